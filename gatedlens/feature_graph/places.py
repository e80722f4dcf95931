"""Places: where the nodes of a feature graph may stand in a model, and where dictionaries are put in it.

A dictionary reads and writes on the way that a frozen run carries: the residual stream, what a branch reads of it and what it
adds to it, the norm between, and both ends of a mixer's A x + r, its content x and its output o. Between x and o the frozen run
is one operator, and what stands there (conv, u, scan, y) is made of the content and of what is held at once; a dictionary there
would be passed by. So the features of a mixer are best those of an autoencoder at o (`hook_gated` and the like): they are on or
off behind the token mixing, which stays an edge, exact, from position to position. A transcoder from a mixer's input to its
output works position by position: what came from other tokens would all be its error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gatedlens.dictionaries import Dictionary
from gatedlens.dictionaries.reading import Reading
from gatedlens.errors import InputError, did_you_mean
from gatedlens.model.block import Block, Way
from gatedlens.model.language import HookedLanguageModel
from gatedlens.runs.relevance_rules import NORMED, Flow, Rules

ENTRANCE = "blocks.0.hook_resid_pre"


@dataclass(frozen=True)
class Placed:
    """A dictionary and the full names of the points that it reads and writes."""

    dictionary: Dictionary
    point: str
    out_point: str
    layer: int
    reading: Reading
    writing: Reading


@dataclass(frozen=True)
class Places:
    """`Places.of(model, dictionaries, mixers=False)`: the points by what stands there; `mixers` and `whole` with their layers.

    held: what the frozen run holds; flows: the mixers that write to the stream; mixers: whose writes are nodes; whole: what no
    matrix stands for.
    """

    held: tuple[str, ...]
    flows: tuple[Flow, ...]
    dictionaries: tuple[Placed, ...]
    mixers: Mapping[str, int]
    whole: Mapping[str, int]
    order: Mapping[str, int]

    @staticmethod
    def of(model: HookedLanguageModel, dictionaries: Sequence[Dictionary], mixers: bool) -> Places:
        """InputError for a dictionary of several points, or off the way, and for two that write one point."""
        rules, order = Rules.of(model, "none"), {name: i for i, name in enumerate(model.names.points)}
        flows = tuple(flow for flow in rules.flows if flow.place in model.blocks[flow.layer].mixing.values())
        ends = {end for flow in flows for end in (*_contents(flow), flow.output)}
        way = sorted(
            {*ends, *(name for i, block in enumerate(model.blocks) for name in _way(block, i))}, key=order.__getitem__
        )
        placed = tuple(_placed(model, one, way, order) for one in dictionaries)
        written = [one.out_point for one in placed]
        twice = [name for name in written if written.count(name) > 1]
        if twice:
            raise InputError(
                f"Two dictionaries write {twice[0]}: what is there can be told by the features of one alone."
            )
        every = [(f"blocks.{i}.hook_{name}_out", i) for i, block in enumerate(model.blocks) for name in block.mixing]
        nodes = {point: i for point, i in every if mixers and point not in written}
        whole = {point: i for i, block in enumerate(model.blocks) for point in _whole(block, i) if point not in written}
        return Places(rules.detached, flows, placed, nodes, whole, order)

    @property
    def entrance(self) -> str:
        """`places.entrance`: where tokens write."""
        return ENTRANCE

    @property
    def read(self) -> tuple[str, ...]:
        """`places.read`: what targets read, but for those that read the point that they write."""
        return (*dict.fromkeys(one.point for one in self.dictionaries if one.point != one.out_point), NORMED)

    @property
    def noted(self) -> tuple[str, ...]:
        """`places.noted`: the points whose activations a frozen run needs of the run that it holds."""
        of_mixers = (name for flow in self.flows for name in (*flow.points, flow.output))
        sites = (name for one in self.dictionaries for name in (one.point, one.out_point))
        return tuple(dict.fromkeys([*self.held, *of_mixers, *sites, *self.mixers, *self.whole, *self.read, ENTRANCE]))


def _contents(flow: Flow) -> tuple[str, ...]:
    """The points of a mixer's content by the words for it: x, and of attention its values."""
    return tuple(name for name in flow.points if name.rpartition(".")[2] in ("hook_x", "hook_v"))


def _way(block: Block, layer: int) -> list[str]:
    """What of a block the frozen run carries, its mixers' ends aside."""
    stem = f"blocks.{layer}."
    names = [f"{stem}hook_resid_pre", *(f"{stem}{point}" for point in block.stream)]
    for way in (way for group in block.groups for way in group):
        names += [f"{stem}{way.out}", *_through(way, stem, block)]
    for one in block.inner:
        names += [f"{stem}{one.name}.hook_read", f"{stem}{one.name}.hook_out"]
    return names


def _through(way: Way, stem: str, block: Block) -> list[str]:
    """What a branch reads of the stream: the copy of it, and what its norm makes of that."""
    copy, *norms = way.before
    norms += [way.place] if way.place in block.norming.values() else []
    return [f"{stem}{copy}", *(f"{stem}{norm}.hook_{end}" for norm in norms for end in ("normalized", "out"))]


def _whole(block: Block, layer: int) -> list[str]:
    """What branches write that no matrix stands for: all but mixers, and norms of the stream, which are linear with their scale
    held."""
    linear = {*block.mixing.values(), *block.norming.values()}
    ways = [way.out for group in block.groups for way in group if way.place not in linear]
    return [f"blocks.{layer}.{name}" for name in (*ways, *(f"{one.name}.hook_out" for one in block.inner))]


def _placed(model: HookedLanguageModel, one: Dictionary, way: Sequence[str], order: Mapping[str, int]) -> Placed:
    if one.kind == "crosscoder":
        raise InputError(
            f"{one!r}: a feature graph takes dictionaries that read one point and write one; this one is of several."
        )
    ends = [model.names.find(name).name for name in (one.point, one.out_point)]
    for asked, name in zip((one.point, one.out_point), ends, strict=True):
        if name not in way:
            layer = [other for other in way if other.startswith(name.partition(".hook")[0].rpartition(".")[0])]
            near = layer or [other for other in way if other.split(".")[:2] == name.split(".")[:2]] or way
            raise InputError(
                f"The dictionary of {asked!r}: a frozen run does not carry this point, it lies inside of what is one operator, "
                f"or is held; put it at {', '.join(near[:12])}.{did_you_mean(name, way)}"
            )
    point, out_point = ends
    if order[point] > order[out_point]:
        raise InputError(f"{one!r} writes {out_point}, which comes before {point}, which it reads.")
    reading, writing = (Reading.of(model, name, one.axes, one.index) for name in ends)
    return Placed(one, point, out_point, int(out_point.split(".")[1]), reading, writing)
