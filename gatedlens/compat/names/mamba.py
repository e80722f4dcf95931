"""What MambaLens and TransformerLens call Mamba's points, and what they compute from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gatedlens.address.point import Alias, View, block_aliases
from gatedlens.compat.names.transformer_lens import BLOCK, DT, MIXER, NORM, STATE
from gatedlens.recurrence.scanning import at_least_float32, linear_scan

if TYPE_CHECKING:
    from gatedlens.model.base import HookedModel
else:  # that file imports this one
    HookedModel = Any

ALIASES = (
    *block_aliases(
        "MambaLens",
        ("hook_layer_input", "hook_mixer_in"),
        ("hook_normalized_input", "ln1.hook_out"),
        ("hook_skip", "mixer.hook_gate_pre"),
        ("hook_in_proj", "mixer.hook_x"),
        ("hook_conv", "mixer.hook_conv"),
        ("hook_ssm_input", "mixer.hook_u"),
        ("hook_delta_1", "mixer.hook_dt_rank"),
        ("hook_delta_2", "mixer.hook_dt_pre"),
        ("hook_B", "mixer.hook_B"),
        ("hook_C", "mixer.hook_C"),
        ("hook_delta", "mixer.hook_dt"),
        ("hook_A_bar", "mixer.hook_decay"),
        ("hook_h_start", "mixer.hook_state_start"),
        ("hook_y", "mixer.hook_scan"),
        ("hook_ssm_output", "mixer.hook_y"),
        ("hook_after_skip", "mixer.hook_gated"),
        ("hook_out_proj", "hook_mixer_out"),
    ),
    Alias("hook_norm", "ln_final.hook_out", "MambaLens"),
    *block_aliases(
        "TransformerLens",
        *BLOCK,
        *NORM,
        *MIXER,
        ("mixer.x_proj.hook_in", "mixer.hook_u"),
        ("mixer.dt_proj.hook_in", "mixer.hook_dt_rank"),
        ("mixer.dt_proj.hook_out", "mixer.hook_dt_pre"),
        ("mixer.hook_dt_proj", "mixer.hook_dt_pre"),
        DT,
        *STATE,
    ),
)


def _edit_steps(
    model: HookedModel, layer: int, values: list[Tensor], calls: list[tuple[dict[str, int], Any]]
) -> Tensor:
    """MambaLens's `hook_h.{t}`: walk the positions, let each hook edit the state after its step, and go on from there.

    The recurrence is linear, so adding (new - old) to the write of position t makes `new` its state and propagates.
    """
    state, decay, write = values
    done = 0
    for params, call in sorted(calls, key=lambda item: item[0]["t"]):
        t = params["t"]
        if t >= write.shape[1]:
            raise model.names.unknown(f"blocks.{layer}.hook_h.{t}", f"hook_h.{t} at {write.shape[1]} positions")
        if t >= done:
            state = linear_scan(decay[:, done : t + 1], write[:, done : t + 1], state)[:, -1]
            done = t + 1
        new = call(state.clone())
        step = torch.nn.functional.one_hot(torch.tensor(t), write.shape[1]).to(write).reshape(1, -1, 1, 1)
        write = write + step * (new - state).unsqueeze(1)
        state = new
    return write


def _edit_B_bar(
    model: HookedModel, layer: int, values: list[Tensor], calls: list[tuple[dict[str, int], Any]]
) -> Tensor:
    """MambaLens's `hook_B_bar` = dt * B; the write is B_bar * u."""
    u, B, dt, write = values
    B_bar = dt.to(write.dtype).unsqueeze(-1) * B.to(write.dtype).unsqueeze(-2)
    edited = B_bar
    for _, call in calls:
        edited = call(edited.clone())
    return write + (edited - B_bar) * u.to(write.dtype).unsqueeze(-1)  # an edit of the write itself stays


def _read_A(model: HookedModel, layer: int) -> Tensor:
    return model.blocks[layer].mixer.A


def _read_B_bar(model: HookedModel, layer: int, dt: Tensor, B: Tensor) -> Tensor:
    return at_least_float32(dt).unsqueeze(-1) * at_least_float32(B).unsqueeze(-2)


def _read_step(model: HookedModel, layer: int, states: Tensor, t: int) -> Tensor:
    return states.select(-3, t)  # from the end: the batch axis may have been dropped


def _read_side_by_side(model: HookedModel, layer: int, *parts: Tensor) -> Tensor:
    return torch.cat(parts, dim=-1)


_M = "blocks.{l}.mixer."
VIEWS = (
    View(
        "blocks.{l}.hook_A",
        "channel state",
        "-exp(A_log)",
        "MambaLens",
        read=_read_A,
        instead="it is a parameter: edit A_log of the wrapped model, or hook mixer.hook_decay",
    ),
    View(
        "blocks.{l}.hook_B_bar",
        "batch pos channel state",
        "dt * B",
        "MambaLens",
        read=_read_B_bar,
        needs=(_M + "hook_dt", _M + "hook_B"),
        at=(_M + "hook_u", _M + "hook_B", _M + "hook_dt", _M + "hook_write"),
        visit=_edit_B_bar,
    ),
    View(
        "blocks.{l}.hook_h.{t}",
        "batch channel state",
        "state[t]; an edit propagates",
        "MambaLens",
        read=_read_step,
        needs=(_M + "hook_state",),
        at=(_M + "hook_state_start", _M + "hook_decay", _M + "hook_write"),
        visit=_edit_steps,
    ),
    View(
        "blocks.{l}.mixer.hook_in_proj",
        "batch pos 2channel",
        "x and gate_pre, concatenated",
        "TransformerLens",
        read=_read_side_by_side,
        needs=(_M + "hook_x", _M + "hook_gate_pre"),
        instead="hook its halves, mixer.hook_x and mixer.hook_gate_pre",
    ),
    View(
        "blocks.{l}.mixer.hook_x_proj",
        "batch pos dt_rank+2state",
        "dt_rank, B and C, concatenated",
        "TransformerLens",
        read=_read_side_by_side,
        needs=(_M + "hook_dt_rank", _M + "hook_B", _M + "hook_C"),
        instead="hook its parts, mixer.hook_dt_rank, mixer.hook_B and mixer.hook_C",
    ),
)
