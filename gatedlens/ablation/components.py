"""Whole components: the gate, the convolution, its bias, one tap, the skip, the scan, a layer, a group of channels.

    gl.ablation.open_gate("[01]"), gl.ablation.identity_conv(layers=-1), gl.ablation.remove_layer(3)
    slow = gl.ablation.slowest(model, 1 / 3, batches)           # {"blocks.0.mixer": [3, 17, ...], ...}
    gl.ablation.no_scan(channel=slow)                           # what their scans contribute is zero
    gl.ablation.zero("blocks.*.mixer.hook_write", channel=slow)     # nothing enters their states

layers: a glob ("*", "[01]"), a number (negative: from the end), a slice or a list. A pattern passes over layers that lack
the component (attention layers have none); a number asks for it. An architecture without it says so. Vision Mamba's two
directions are both meant. u, y, c ... are the points of those names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gatedlens.ablation.average import means
from gatedlens.address.entries import Component, Index, Where
from gatedlens.address.layers import Layers, layers_of
from gatedlens.errors import InputError
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.model.hookpoint import HookPoint
from gatedlens.model.intervention import Edit, EditStep, Intervention
from gatedlens.options import checked

GATE = Component("gate", "hook_gate", "gate")
SCAN = Component("scan", "hook_scan", "decay")
SKIP = Component("skip", "hook_y", "skip")
CONV = Component("conv", "hook_conv", "conv")
TAPS = Component("conv", "hook_conv_taps", "conv")
DECAY = Component("decay", "hook_decay", "decay")
ERASE = Component("erase", "hook_erase", "erase")


def _step(part: Component, edit: Edit, layers: Layers, index: Mapping[str, Index], *reads: str) -> Intervention:
    return Intervention((EditStep(Where((part,), index, layers), edit, reads),))


@dataclass(frozen=True)
class BesideContent:
    """The same edit for what passes a mixer's convolution beside the content, Mamba-2's B and C: each stream at its own point
    `hook_B_conv...`, given its own `hook_B_...`. Other mixers have none."""

    leaf: str  # of the point, behind `hook_B_`
    edit: Edit
    layers: Layers
    index: Mapping[str, Index] = field(default_factory=dict)
    reads: str | None = None
    others: bool = False

    def hooks(self, model: HookedModel) -> list[tuple[str, Callable[..., Any]]]:
        """[(name, hook)], in the order in which they must be put on."""
        found: list[tuple[str, Callable[..., Any]]] = []
        for layer in layers_of(model, self.layers):
            for name in model.names.points:
                stream = re.fullmatch(rf"blocks\.{layer}\.mixer\.hook_(\w+)_{self.leaf}", name)
                if stream is None:
                    continue
                reads = () if self.reads is None else (f"hook_{stream[1]}_{self.reads}",)
                where = Where((name,), self.index, others=self.others)
                found += EditStep(where, self.edit, reads).hooks(model)
        return found


@dataclass(frozen=True)
class Unskipped:
    """y without its skip: what the skip was added to, the scan or what a norm in front of y has made of it."""

    layers: Layers
    index: Mapping[str, Index]

    def hooks(self, model: HookedModel) -> list[tuple[str, Callable[..., Any]]]:
        """[(name, hook)], in the order in which they must be put on."""
        found: list[tuple[str, Callable[..., Any]]] = []
        points, order = model.names.points, list(model.names.points)
        for name in SKIP.points(model, self.layers):
            scan = name.replace(SKIP.leaf, SCAN.leaf)
            inner = [
                one for one in order[order.index(scan) : order.index(name)] if points[one].axes == points[name].axes
            ]
            reads = (inner[-1].rpartition(".")[2],)
            found += EditStep(Where((name,), self.index), lambda y, point, inner: inner, reads).hooks(model)
        return found


def open_gate(layers: Layers = "*", **index: Index) -> Intervention:
    """`gl.ablation.open_gate(layers=[0, 2], channel=[3])`: gate = 1, so the mixer's output passes as it is.

    layers: a glob ("*", "[01]"), a number, a slice or a list. A pattern passes over layers that lack the component; a number asks
    for it. index: entries of it, as in `gl.ablation.zero`. Returns an Intervention.

    Where it is put on a model: PointError if its architecture, or a layer that was named by number, lacks the component, and for
    an axis that it lacks; InputError for layers that do not exist and an index that is out of range.
    """
    return _step(GATE, lambda x, point: torch.ones_like(x), layers, index)


def no_scan(layers: Layers = "*", **index: Index) -> Intervention:
    """`gl.ablation.no_scan(channel=slow)`: scan = 0, so only the skip is left.

    Nothing is left where there is no skip; RWKV's bonus is part of its scan. layers, index and errors: as of
    `gl.ablation.open_gate`.
    """
    return _step(SCAN, lambda x, point: torch.zeros_like(x), layers, index)


def no_skip(layers: Layers = "*", **index: Index) -> Intervention:
    """`gl.ablation.no_skip()`: y = scan (RWKV-7: its norm), without what passes by it. layers, index, errors: as of
    `gl.ablation.open_gate`.
    """
    return Intervention((Unskipped(layers, index),))


def no_erase(layers: Layers = "*", **index: Index) -> Intervention:
    """`gl.ablation.no_erase(layers=0, head=1)`: erase = 0, so a delta rule writes without removing what its probe finds.

    What a step writes is added to what the state holds already, as in linear attention with the same decay. layers, index and
    errors: as of `gl.ablation.open_gate`; pos= says at which positions nothing is erased.
    """
    return _step(ERASE, lambda x, point: torch.zeros_like(x), layers, index)


def identity_conv(layers: Layers = "*", **index: Index) -> Intervention:
    """`gl.ablation.identity_conv(layers=-1)`: c = x, no token mixing by the convolution and no bias.

    What follows (an activation, the scan) sees x. What passes the convolution beside the content (Mamba-2's B and C) is left as
    it was before it, too, unless an index asks for entries of the content. layers, index, errors: as of `gl.ablation.open_gate`.
    """

    def itself(c: Tensor, point: HookPoint, x: Tensor) -> Tensor:
        return x

    content = _step(CONV, itself, layers, index, "hook_x")
    return content if index else content + Intervention((BesideContent("conv", itself, layers, reads="pre"),))


def no_conv_bias(layers: Layers = "*", **index: Index) -> Intervention:
    """`gl.ablation.no_conv_bias()`: c = sum over tap of conv_taps. layers, index, errors: as of `gl.ablation.open_gate`."""

    def without(c: Tensor, point: HookPoint, taps: Tensor) -> Tensor:
        return taps.sum(-1)

    content = _step(CONV, without, layers, index, "hook_conv_taps")
    return content if index else content + Intervention((BesideContent("conv", without, layers, reads="conv_taps"),))


@checked
def only_tap(tap: int, layers: Layers = "*") -> Intervention:
    """`gl.ablation.only_tap(-1)`: the convolution keeps one tap and its bias. Tap -1, the last, reads the token itself.

    layers and errors: as of `gl.ablation.open_gate`.
    """

    def nothing(taps: Tensor, point: HookPoint) -> Tensor:
        return torch.zeros_like(taps)

    where = Where((TAPS,), {"tap": tap}, layers, others=True)
    beside = BesideContent("conv_taps", nothing, layers, {"tap": tap}, others=True)
    return Intervention((EditStep(where, nothing), beside))


def remove_layer(layers: Layers) -> Intervention:
    """`gl.ablation.remove_layer(-1)`: a block writes nothing into the residual stream; `remove_layer("[23]")` takes two.

    layers: a glob, a number, a slice or a list. Where it is put on a model: InputError for layers that do not exist.
    """
    where = Where(("blocks.{l}.hook_*_out",), layers=layers)  # mixer_out, mlp_out, ...: whatever branches there are
    return Intervention((EditStep(where, lambda x, point: torch.zeros_like(x)),))


# -- groups of channels by how fast they forget ---------------------------------------------------------------------


@checked
def slowest(
    model: HookedModel,
    share: int | float,
    batches: str | Tensor | Iterable[Input],
    layers: Layers = "*",
    progress: bool = True,
) -> dict[str, list[int]]:
    """`slow = gl.ablation.slowest(model, 1 / 3, batches)`: the channels that forget slowest, an index `channel=slow`.

    {"blocks.0.mixer": [3, 17, ...], ...}: `share` (in (0, 1]) of the channels of each mixer (of each direction), at least one,
    sorted by number. They are ranked by the mean decay over real positions of `batches` (see `means`) and over all axes besides
    `channel` (the state): the larger, the slower.

    Where a head decays as one (Mamba-2), so do all of its channels, and ties go by number.
    PointError where a decay has no axis `channel`, or a model has none; InputError for a share that is none.
    """
    return _ranked(model, share, batches, layers, progress, slow=True)


@checked
def fastest(
    model: HookedModel,
    share: int | float,
    batches: str | Tensor | Iterable[Input],
    layers: Layers = "*",
    progress: bool = True,
) -> dict[str, list[int]]:
    """`fast = gl.ablation.fastest(model, 1 / 3, batches)`: the channels that forget fastest; the rest as in `slowest`."""
    return _ranked(model, share, batches, layers, progress, slow=False)


def _ranked(
    model: HookedModel,
    share: int | float,
    batches: str | Tensor | Iterable[Input],
    layers: Layers,
    progress: bool,
    slow: bool,
) -> dict[str, list[int]]:
    if not 0 < share <= 1:
        raise InputError(f"share={share}: it is a share of the channels, in (0, 1].")
    axes = {name: model.names.points[name].spans("channel") for name in DECAY.points(model, layers)}
    groups = {}
    for name, value in means(model, batches, list(axes), progress=progress).items():
        channels = tuple(range(len(axes[name])))
        decay = value.movedim(axes[name], channels).flatten(0, channels[-1]).flatten(1).mean(1)
        order = decay.argsort(descending=slow, stable=True)
        groups[name.rpartition(".")[0]] = sorted(order[: max(1, round(share * len(decay)))].tolist())
    return groups
