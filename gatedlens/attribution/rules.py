"""Rules: how relevance goes back through what is not linear, as hooks that change gradients and no value.

    rules = Rules.of(model)
    with rules.on(model):                     # under it, gradient x activation is the activation's relevance
        logits = model(tokens)

    detached     weighs content and carries none: gets no relevance. Every norm's scale, whatever the scan is made of
                 (dt, B, C; decays and input gates; keys; attention patterns), and gates that are sigmoids
    shared       the relevance of a point goes in equal parts to the points that it reads, as if it were linear in each

Norms, SiLU and the scan follow Jafari et al. 2024 (MambaLRP, arXiv 2406.07592). Of gates there are two kinds, so `gates` is a
choice. SiLU(z) and GELU(z) are content times a weight, 0 where z is: MambaLRP gives z half of the product. sigmoid(r) is a
weight alone, 1/2 where r is 0, so no share of the product is r's ("signal takes all", Arras et al. 2017, arXiv 1706.07206):

    gates="content"    half to a gate that has content, none to a sigmoid
    gates="half"       half to every gate; a sigmoid passes it on to r as if it were linear: lost where r is 0, and where r
                       is small its inputs get large shares of either sign, the biases among them
    gates="none"       none to any gate: all of it is the signal's

Everything is read off the model: its norms, what its mixers name as `attention_points`, and the shared words
for shared roles (u, y, gate, gated, pre, post), so an architecture that uses them needs no rule of its own.

x = x.detach() + (f - f.detach()) has the value of x and the gradient of f: it is how a hook puts a rule in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gatedlens.errors import InputError, did_you_mean
from gatedlens.hookpoint import Capture

CONTENT = (
    "hook_x",
    "hook_v",
    "hook_conv",
    "hook_u",
    "hook_gate",
    "hook_gated",
    "hook_z",
)  # of a mixer's attention_points
SIGMOID = "sigmoid("  # how the equation of a gate that only weighs begins
GATES = ("content", "half", "none")
NORMED, LOGITS = "ln_final.hook_out", "hook_logits"


@dataclass(frozen=True)
class Share:
    """`Share("hook_u", ("hook_conv",))`: the relevance of a point goes in equal parts to those that it reads."""

    point: str
    reads: tuple[str, ...]


# In each part of a model, for each point the first row whose points are all there.
SHARES = (
    Share("hook_u", ("hook_conv",)),  # u = SiLU(c), or u = c
    Share("hook_u", ("hook_x",)),  # without a conv
    Share("hook_gated", ("hook_y", "hook_gate_pre")),  # y * act(gate_pre): half to each side
    Share("hook_mlp_out", ("mlp.hook_kv", "mlp.hook_gate_pre")),  # kv * act(gate_pre)
    Share("hook_post", ("hook_pre", "hook_pre_linear")),  # act(pre) * pre_linear
    Share("hook_post", ("hook_pre",)),  # act(pre)
)


@dataclass(frozen=True)
class Rules:
    """The points of a model that are detached, and the shares, by full names."""

    detached: tuple[str, ...]
    shares: tuple[Share, ...]

    @staticmethod
    def of(model: Any, gates: str = "content") -> Rules:
        if gates not in GATES:
            raise InputError(f"gates={gates!r}: it is {', '.join(map(repr, GATES))}.{did_you_mean(str(gates), GATES)}")
        scales = [name for name, point in model.names.points.items() if point.leaf == "hook_scale"]
        weights = _weights(model, gates)
        detached = dict.fromkeys([*scales, *_inside_scans(model), *weights])
        return Rules(tuple(detached), tuple(_shares(model, set(weights))))

    def hooks(self, model: Any) -> list[tuple[str, Callable[..., Any]]]:
        """[(name, hook)] for one forward at a time."""
        values: dict[str, Tensor] = {}
        pairs: list[tuple[str, Callable[..., Any]]] = [(name, _detach) for name in self.detached]
        for share in self.shares:
            pairs += [(name, Capture(values)) for name in share.reads]
            pairs.append((share.point, _sharing(values, share.reads)))
        if "pos" in model.names.points[LOGITS].dims:  # a language model may cap its logits
            pairs += [(NORMED, Capture(values)), (LOGITS, _uncapped(values, model))]
        return pairs

    @contextmanager
    def on(self, model: Any) -> Iterator[Any]:
        """`with rules.on(model): ...`: values stay as they are, gradients follow the rules."""
        with model.hooks(self.hooks(model)):
            yield model


def _weights(model: Any, gates: str) -> list[str]:
    """The gates that get no relevance."""
    every = {name: point for name, point in model.names.points.items() if point.leaf == "hook_gate"}
    if gates == "content":
        return [name for name, point in every.items() if point.equation.startswith(SIGMOID)]
    return [] if gates == "half" else list(every)


def _inside_scans(model: Any) -> Iterator[str]:
    """What the scans are made of: the attention_points of each mixer that are no content."""
    for layer, block in enumerate(model.blocks):
        for name in block.mixer.attention_points:
            if name.rpartition(".")[2] not in CONTENT:
                yield f"blocks.{layer}.{block.mixer.place}.{name}"


def _shares(model: Any, weights: set[str]) -> Iterator[Share]:
    """The rows of SHARES that a model has, in each of its parts, by full names; other tools' names count."""
    names: Mapping[str, str] = {**model.names.aliases, **{name: name for name in model.names.points}}
    done = set()
    for part in dict.fromkeys(name.rpartition(".")[0] for name in names):
        for row in SHARES:
            point, reads = (names.get(f"{part}.{row.point}"), [names.get(f"{part}.{name}") for name in row.reads])
            if point is None or None in reads or point in done:
                continue
            if weights & {str(name).removesuffix("_pre") for name in reads}:
                continue  # its gate only weighs: the product is linear in its other side
            done.add(point)
            yield Share(point, tuple(name for name in reads if name is not None))


# -- the hooks ------------------------------------------------------------------------------------------------------


def _detach(value: Tensor, hook: Any) -> Tensor:
    return value.detach()


def with_gradient_of(value: Tensor, flow: Tensor) -> Tensor:
    """`value`, bit by bit, with the gradient of `flow`."""
    return value.detach() + (flow - flow.detach()).to(value.dtype)


def ratio(value: Tensor, part: Tensor) -> Tensor:
    """value / part, held fixed; 0 where the part is 0 (it has no relevance to get)."""
    return torch.where(part == 0, 0, value.detach() / part.detach())


def _sharing(values: Mapping[str, Tensor], reads: tuple[str, ...]) -> Callable[..., Tensor]:
    def share(value: Tensor, hook: Any) -> Tensor:
        parts = [values[name] for name in reads]
        flow = torch.stack([part * ratio(value, part) for part in parts]).mean(0)
        return with_gradient_of(value, flow)

    return share


def _uncapped(values: Mapping[str, Tensor], model: Any) -> Callable[..., Tensor]:
    """The relevance of a logit goes to what it is before the model caps it."""

    def through(value: Tensor, hook: Any) -> Tensor:
        weight = model.W_U.T
        raw = F.linear(values[NORMED].to(weight.dtype), weight, model.b_U).to(value.dtype)
        return with_gradient_of(value, raw * ratio(value, raw))

    return through
