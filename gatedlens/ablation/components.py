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

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gatedlens.ablation.average import means
from gatedlens.address.entries import Component, Where
from gatedlens.address.layers import Layers
from gatedlens.errors import InputError
from gatedlens.model.hookpoint import HookPoint
from gatedlens.model.intervention import Edit, EditStep, Intervention
from gatedlens.options import checked

GATE = Component("gate", "hook_gate", "gate")
SCAN = Component("scan", "hook_scan", "decay")
SKIP = Component("skip", "hook_y", "skip")
CONV = Component("conv", "hook_conv", "conv")
TAPS = Component("conv", "hook_conv_taps", "conv")
DECAY = Component("decay", "hook_decay", "decay")


def _step(part: Component, edit: Edit, layers: Layers, index: dict[str, Any], *reads: str) -> Intervention:
    return Intervention((EditStep(Where((part,), index, layers), edit, reads),))


def open_gate(layers: Layers = "*", **index: Any) -> Intervention:
    """`gl.ablation.open_gate(layers=2, channel=[0, 5])`: gate = 1."""
    return _step(GATE, lambda x, point: torch.ones_like(x), layers, index)


def no_scan(layers: Layers = "*", **index: Any) -> Intervention:
    """`gl.ablation.no_scan(layers=[0, 1])`: scan = 0: what is left is the skip (nothing where there is none; RWKV's bonus
    is part of its scan).
    """
    return _step(SCAN, lambda x, point: torch.zeros_like(x), layers, index)


def no_skip(layers: Layers = "*", **index: Any) -> Intervention:
    """`gl.ablation.no_skip()`: y = scan."""
    return _step(SKIP, lambda y, point, scan: scan, layers, index, "hook_scan")


def identity_conv(layers: Layers = "*", **index: Any) -> Intervention:
    """`gl.ablation.identity_conv(layers=-1)`: c = x: no token mixing by the conv, no bias; what follows (an activation,
    the scan) sees x.
    """
    return _step(CONV, lambda c, point, x: x, layers, index, "hook_x")


def no_conv_bias(layers: Layers = "*", **index: Any) -> Intervention:
    """`gl.ablation.no_conv_bias()`: c = sum over tap of conv_taps."""

    def without(c: Tensor, point: HookPoint, taps: Tensor) -> Tensor:
        return taps.sum(-1)

    return _step(CONV, without, layers, index, "hook_conv_taps")


@checked
def only_tap(tap: int, layers: Layers = "*") -> Intervention:
    """`gl.ablation.only_tap(-1)`: the conv keeps one tap (-1: the token itself) and its bias."""
    where = Where((TAPS,), {"tap": tap}, layers, others=True)
    return Intervention((EditStep(where, lambda x, point: torch.zeros_like(x)),))


def remove_layer(layers: Layers) -> Intervention:
    """A block writes nothing into the residual stream: `remove_layer(-1)`, `remove_layer("[23]")`."""
    where = Where(("blocks.{l}.hook_m*_out",), layers=layers)  # mixer_out, and mlp_out where there is one
    return Intervention((EditStep(where, lambda x, point: torch.zeros_like(x)),))


# -- groups of channels by how fast they forget ---------------------------------------------------------------------


@checked
def slowest(
    model: Any, share: int | float, batches: Iterable[Any], layers: Layers = "*", progress: bool = True
) -> dict[str, list[int]]:
    """`gl.ablation.slowest(model, 1 / 3, batches)`: the channels that forget slowest: `share` of each mixer's (of each
    direction's), as an index `channel=...`.

    By the mean decay over real positions of `batches` (see `means`) and over all axes besides `channel` (the state): the
    larger, the slower. At least one channel; sorted by number. PointError where a decay has no axis `channel`.
    """
    return _ranked(model, share, batches, layers, progress, slow=True)


@checked
def fastest(
    model: Any, share: int | float, batches: Iterable[Any], layers: Layers = "*", progress: bool = True
) -> dict[str, list[int]]:
    """`gl.ablation.fastest(model, 1 / 3, batches)`: the channels that forget fastest; see `slowest`."""
    return _ranked(model, share, batches, layers, progress, slow=False)


def _ranked(
    model: Any, share: int | float, batches: Iterable[Any], layers: Layers, progress: bool, slow: bool
) -> dict[str, list[int]]:
    if not 0 < share <= 1:
        raise InputError(f"share={share}: it is a share of the channels, in (0, 1].")
    axes = {name: model.names.points[name].axis("channel") for name in DECAY.points(model, layers)}
    groups = {}
    for name, value in means(model, batches, list(axes), progress=progress).items():
        decay = value.movedim(axes[name], 0).flatten(1).mean(1)
        order = decay.argsort(descending=slow, stable=True)
        groups[name.rpartition(".")[0]] = sorted(order[: max(1, round(share * len(decay)))].tolist())
    return groups
