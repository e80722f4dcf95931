"""Cutting: how a layer's output comes to lose what some positions brought it. `sweeping.py` is its face.

    Cut(token, Edges(((src, dst),)), layers=None, scan=None, index={}).hooks(model)

A is linear in what it reads, so a target i without its sources is o_i - (A (x src))_i: one more pass of the scan, and no matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.entries import Index, Where
from gatedlens.address.layers import Layers, mixers_of, scans_of
from gatedlens.attention.in_progress import underway, verify
from gatedlens.attention.layer import ImplicitAttention
from gatedlens.errors import InputError
from gatedlens.knockout.token_edges import Edges, GivenEdges, alike, visible
from gatedlens.model.base import HookedModel
from gatedlens.model.hookpoint import Capture, HookPoint
from gatedlens.model.mixer import TokenMixing
from gatedlens.recurrence.autocast import exact
from gatedlens.recurrence.operator import Branch, branch_of
from gatedlens.recurrence.scanning import at_least_float32

Way = Callable[[Branch, Tensor, Tensor], Tensor]


# -- what an output loses -------------------------------------------------------------------------------------------
# Each way gets the sources and the targets [batch, pos, one] as numbers 1 and 0, in the order of the branch, and returns
# what every output [batch, pos, channel] would lose with these sources; only the targets' is used.


def token(branch: Branch, src: Tensor, dst: Tensor) -> Float[Tensor, "batch pos channel"]:
    """A (x src)"""
    return branch.forward(branch.factors.x * src)


def write(branch: Branch, src: Tensor, dst: Tensor) -> Float[Tensor, "batch pos channel"]:
    """gate S (u src)"""
    return branch.passed_on(branch.entering() * src)


def share(branch: Branch, src: Tensor, dst: Tensor) -> Float[Tensor, "batch pos channel"]:
    """gate (S u - S (u kept) / S kept), kept = 1 - src, each S with what a state carried."""
    scan, u, start = branch.scan, branch.entering(), branch.factors.start
    if scan is None:  # what passes by the scan has no share of its mass
        return torch.zeros_like(u)
    kept = torch.where(dst.bool(), scan.mass((1 - src).expand_as(u).contiguous()), 1.0)
    if bool((kept <= 0).any()):
        raise InputError(
            "cut_renormalised: a target loses every position that it sees; nothing is left to renormalise."
        )
    return branch.gate * (scan.apply(u, start) - scan.apply(u * (1 - src), start) / kept)


def erase(branch: Branch, src: Tensor, dst: Tensor) -> Float[Tensor, "batch pos channel"]:
    """gate (S u - S~ u), S~ the scan in which src erase nothing, each with what a state carried."""
    return _of_altered(branch, src, branch.entering())


def update(branch: Branch, src: Tensor, dst: Tensor) -> Float[Tensor, "batch pos channel"]:
    """gate (S u - S~ (u kept)), kept = 1 - src: src neither write nor erase."""
    return _of_altered(branch, src, branch.entering() * (1 - src))


def _of_altered(branch: Branch, src: Tensor, u: Tensor) -> Float[Tensor, "batch pos channel"]:
    """gate (S u_run - S~ u), u_run what entered the scan."""
    scan, start = branch.scan, branch.factors.start
    if scan is None:  # what passes by the scan reads no state
        return torch.zeros_like(u)
    return branch.gate * (scan.apply(branch.entering(), start) - scan.unerased(src).apply(u, start))


OF_DELTA_RULES = (erase, update)


# -- the step of an intervention --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """One step of an intervention: `edges` cut in a `way`. `verify` costs one more scan: see `underway.verify`."""

    way: Way
    edges: Edges | GivenEdges
    layers: Layers
    scan: str | None
    index: Mapping[str, Index]
    verify: bool = True

    def hooks(self, model: HookedModel) -> list[tuple[str, Callable[..., Any]]]:
        """`cut.hooks(model)`: at each mixer a hook that keeps what its A is made of, and one that cuts at its output point; of
        several in a layer at those of the kind that is meant, if any is, and that have the axes that are meant.

        InputError for layers that do not exist, or erase nothing where that is to be cut; PointError for an axis that the output
        point lacks.
        """
        found: list[tuple[str, Callable[..., Any]]] = []
        for mixer in self._mixers(model):
            scans_of(mixer, self.scan)
            stem = f"blocks.{mixer.layer}.{mixer.place}."
            where = Where((f"{stem}{mixer.output_point}",), self.index)
            (out,) = where.points(model)
            cutting = Cutting(self, model, mixer, where)
            found += [(stem + name, cutting.factors) for name in mixer.attention_points if stem + name != out]
            found.append((out, cutting))
        return found

    def _mixers(self, model: HookedModel) -> list[TokenMixing]:
        """Those that are meant and have the axes of the index, and a delta rule where that is cut; the first of a layer where
        none has the axes."""
        by_layer: dict[int, list[TokenMixing]] = {}
        for mixer in mixers_of(model, self.layers):
            by_layer.setdefault(mixer.layer, []).append(mixer)
        chosen: list[TokenMixing] = []
        for layer, mixers in by_layer.items():
            if self.way in OF_DELTA_RULES:
                mixers = [mixer for mixer in mixers if erases(model, mixer)]
                if not mixers:
                    raise InputError(_no_delta_rule(model, layer, self.way))
            points, sizes = model.names.points, model.cfg.sizes
            has = [m for m in mixers if all(points[m.output_name].reaches(axis, sizes) for axis in self.index)]
            chosen += has or mixers[-1:]
        return chosen


def erases(model: HookedModel, mixer: TokenMixing) -> bool:
    """Whether the state of a mixer is that of a delta rule."""
    return f"blocks.{mixer.layer}.{mixer.place}.hook_erase" in model.names.points


def _no_delta_rule(model: HookedModel, layer: int, way: Way) -> str:
    """Why what a layer erases cannot be cut, and what can."""
    erasing = [n for n, block in enumerate(model.blocks) if any(erases(model, mixer) for mixer in block.mixers)]
    others = f"The layers that have one: layers={erasing}." if erasing else "No layer of this model has one."
    return (
        f"cut_{way.__name__}: layer {layer} of {model.cfg.model_name} has no delta rule, so no token erases there what others "
        f"wrote; cut_scan cuts what it writes itself. {others}"
    )


class Cutting:
    """The hook at a layer's output point. The first of several there does what all of them ask.

    Cuts act together: two that name one edge must not take it away twice, so what is lost is computed for all of them at once.
    """

    def __init__(self, cut: Cut, model: HookedModel, mixer: TokenMixing, where: Where):
        self.cut = cut
        self.model = model
        self.layer, self.place = mixer.layer, mixer.place
        self.where = where
        self.values: dict[str, Tensor] = {}
        self.factors = Capture(self.values)  # what the layer's A is made of, in this call

    def __call__(self, tensor: Tensor, hook: HookPoint) -> Tensor:
        together = [handle.user_hook for handle in hook.fwd_hooks if isinstance(handle.user_hook, Cutting)]
        values = {**self.values, str(hook.name): tensor}
        self.values.clear()  # what was kept of this call must not outlive it
        if together[0] is not self:
            return tensor
        with exact(tensor):
            attention = underway(self.model, self.layer, values, self.place)
            if any(one.cut.verify for one in together):
                with torch.no_grad():
                    verify(attention, attention.output(), tensor, "a cut")
            o = at_least_float32(tensor.flatten(2)) - _lost(attention, together, tensor, hook)
        return o.to(tensor.dtype).reshape(tensor.shape)

    def channels(self, tensor: Tensor, hook: HookPoint) -> Tensor:
        """Which channels are cut: a mask [channel]."""
        mask = self.where.entries(tensor.shape, hook.point, tensor.device, sizes=self.model.cfg.sizes)
        return mask.expand(1, 1, *tensor.shape[2:]).flatten()


def _lost(attention: ImplicitAttention, together: list[Cutting], tensor: Tensor, hook: HookPoint) -> Tensor:
    """What the layer's output loses through all cuts together: [batch, pos, channel]."""
    mixer, real = attention.mixer, attention.padding.mask
    if real is None:
        real = torch.ones(tensor.shape[:2], dtype=torch.bool, device=tensor.device)
    wanted: dict[int, dict[Way, list[tuple[Tensor, Tensor]]]] = {}
    for cutting in together:
        chosen = scans_of(mixer, cutting.cut.scan)
        # A scan may have several branches, in a row: what passes by it is one of its own.
        each = len(attention.branches) // len(mixer.scans)
        numbers = [n for n in range(len(attention.branches)) if mixer.scans[n // each] in chosen]
        edges = cutting.cut.edges.matrix(real, visible([attention.branches[n] for n in numbers]))
        for number in numbers:
            ways = wanted.setdefault(number, {})
            ways.setdefault(cutting.cut.way, []).append((edges, cutting.channels(tensor, hook)))
    total = torch.zeros_like(attention.branches[0].x)
    for number, ways in wanted.items():
        _refuse_meeting(ways)
        for way, cuts in ways.items():
            total = total + _lost_in_branch(attention, number, way, cuts)
    return total


def _refuse_meeting(ways: Mapping[Way, list[tuple[Tensor, Tensor]]]) -> None:
    """Two ways of cutting cannot share an output: what each leaves depends on the other."""
    outputs = [
        torch.stack([edges.any(2).unsqueeze(2) & chosen for edges, chosen in cuts]).any(0) for cuts in ways.values()
    ]
    if bool((torch.stack(outputs).sum(0) > 1).any()):
        names = " and ".join(way.__name__ for way in ways)
        raise InputError(
            f"Cuts of different kinds ({names}) meet at one target, layer and channel: use one kind there."
        )


def _lost_in_branch(
    attention: ImplicitAttention, number: int, way: Way, cuts: list[tuple[Tensor, Tensor]]
) -> Float[Tensor, "batch pos channel"]:
    """One kind of cut in one branch. Channels of which the same edges are cut go together, and so do alike targets."""
    factors, padding = attention.branches[number], attention.padding

    def turn(x: Tensor) -> Tensor:
        return x.flip(1) if factors.reverse else x

    lost = torch.zeros_like(factors.x)
    # One scan does all channels of which the same cuts are asked: `patterns` are the sets of cuts, `which` each channel's.
    patterns, which = torch.stack([chosen for _, chosen in cuts]).unique(dim=1, return_inverse=True)
    for column, pattern in enumerate(patterns.T.tolist()):
        if not any(pattern):
            continue
        channels = (which == column).nonzero().flatten()
        branch = branch_of(factors if len(channels) == len(which) else factors.select(channels.tolist()))
        edges = torch.stack([edges for (edges, _), member in zip(cuts, pattern, strict=True) if member]).any(0)
        for src, dst in alike(edges):
            inside = [turn(padding.pack(mask.unsqueeze(2))).to(factors.x) for mask in (src, dst)]
            piece = padding.spread(turn(way(branch, *inside))) * dst.unsqueeze(2)
            lost = lost.index_add(2, channels, factors.scale * piece)
    return lost
