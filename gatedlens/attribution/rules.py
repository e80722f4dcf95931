"""Rules: how relevance goes back through what is not linear, as hooks that change gradients and no value.

    rules = Rules.of(model)
    with rules.on(model):                     # under it, gradient x activation is the activation's relevance
        logits = model(tokens)

    detached     weighs content and carries none: gets no relevance. Every norm's scale, whatever the scan is made of
                 (dt, B, C; decays and input gates; keys; attention patterns), and gates that are sigmoids
    shared       the relevance of a point goes in equal parts to the points that it reads, as if it were linear in each

Norms, SiLU and the scan follow Jafari et al. 2024 (MambaLRP, arXiv 2406.07592), sigmoid gates Arras et al. 2017 ("signal
takes all"). Everything is read off the model: its norms, what its mixers name as `attention_points`, and the shared words
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
    Share("hook_post", ("hook_pre", "hook_pre_linear")),  # act(pre) * pre_linear
    Share("hook_post", ("hook_pre",)),  # act(pre)
)


@dataclass(frozen=True)
class Rules:
    """The points of a model that are detached, and the shares, by full names."""

    detached: tuple[str, ...]
    shares: tuple[Share, ...]

    @staticmethod
    def of(model: Any) -> Rules:
        points = model.names.points
        gates = [n for n, p in points.items() if p.leaf == "hook_gate" and p.equation.startswith(SIGMOID)]
        scales = [name for name, point in points.items() if point.leaf == "hook_scale"]
        detached = dict.fromkeys([*scales, *_inside_scans(model), *gates])
        return Rules(tuple(detached), tuple(_shares(model, set(gates))))

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
        if f"{part}.hook_gate" in weights:  # it only weighs: the product is linear in its other side
            done.add(names.get(f"{part}.hook_gated"))
        for row in SHARES:
            point, reads = (names.get(f"{part}.{row.point}"), [names.get(f"{part}.{name}") for name in row.reads])
            if point is None or None in reads or point in done:
                continue
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
