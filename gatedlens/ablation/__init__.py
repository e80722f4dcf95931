"""Ablation: interventions as values. Each says where (points by name, entries by axis) and what stands there instead.

    without_gate = gl.ablation.constant("blocks.*.mixer.hook_gate", 1.0)
    cut = gl.ablation.zero("blocks.2.mixer.hook_write", pos=3, channel=slice(0, 64))
    with (without_gate + cut).on(model):
        logits = model(tokens)
    model.run_with_hooks(tokens, fwd_hooks=cut.hooks(model))
    gl.ablation.by_kind(model, tokens, metric)           # a hybrid's metric without the scans, the attention, both

Where: a point's name, alias or glob, or a list of them, and `axis=index` for any of its axes (int, slice, list or mask). An
edit is a function (tensor, point) -> tensor, so a new kind of ablation is one more function. Everything is undone at the
end, also after an exception.
"""

from gatedlens.ablation.average import Means, means
from gatedlens.ablation.components import (
    fastest,
    identity_conv,
    no_conv_bias,
    no_erase,
    no_scan,
    no_skip,
    only_tap,
    open_gate,
    remove_layer,
    slowest,
)
from gatedlens.ablation.kinds import by_head, by_kind, by_layer
from gatedlens.ablation.values import constant, freeze, mean, noise, resample, scale, zero
from gatedlens.address.entries import Component, Index, Where
from gatedlens.address.layers import Layers
from gatedlens.model.intervention import Edit, EditStep, Intervention, Step, edit

# fmt: off
__all__ = [
    "Component", "Edit", "EditStep", "Index", "Intervention", "Layers", "Means", "Step", "Where", "by_head", "by_kind",
    "by_layer", "constant", "edit", "fastest", "freeze", "identity_conv", "mean", "means", "no_conv_bias", "no_erase",
    "no_scan", "no_skip", "noise", "only_tap", "open_gate", "remove_layer", "resample", "scale", "slowest", "zero",
]
# fmt: on
