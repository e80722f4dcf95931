"""Weights under one set of names, whatever a checkpoint calls them: `model.blocks[3].mixer.W_in`, `.A`, `mlp.W_out`, `attn.W_Q`.

    x = n W_in + b_in        gate_pre = n W_gate + b_gate        out = o W_out + b_out        (n what the part reads)

They are views of the wrapped model's parameters, read at call time: an edit in place is an edit of the model, and gradients flow.
Where the forward multiplies a weight by a number (of a config, or of RWKV-4's rescaling) they are the products, and A is the
rate that the forward makes of what is stored. Inputs stand first, as in W_E and W_U.

A part says what it has in `named_weights`; the words are declared here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor

from gatedlens.errors import did_you_mean

if TYPE_CHECKING:
    from typing_extensions import Self
else:
    Self = Any


class Weight:
    """`W_in = Weight("[d_model, channel]: x = n W_in")`: one word; read on a part, it is that part's tensor."""

    def __init__(self, says: str):
        self.__doc__ = says
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, part: None, owner: type) -> Self: ...
    @overload
    def __get__(self, part: NamedWeights, owner: type) -> Tensor: ...
    def __get__(self, part: NamedWeights | None, owner: type) -> Any:
        if part is None:
            return self
        has = part.named_weights()
        if self.name not in has:
            # An AttributeError, as of any attribute that is not there: whoever walks over a module's attributes goes on.
            told = f"it has {', '.join(has)}" if has else "it names none"
            raise AttributeError(f"{type(part).__name__} has no {self.name}: {told}.{did_you_mean(self.name, has)}")
        return has[self.name]


class NamedWeights:
    """What a part inherits: a word for each of its weights."""

    W_in = Weight("[d_model, channel]: x = n W_in + b_in, the content of a mixer; of a channel mixer [d_model, mlp]")
    b_in = Weight("[channel]")
    W_gate = Weight(
        "[d_model, channel]: gate_pre = n W_gate + b_gate; of an MLP [d_model, mlp], of attention [head, d_model, d_head]"
    )
    b_gate = Weight("[channel]")
    W_out = Weight(
        "[channel, d_model]: out = o W_out + b_out, o the last point of the mixer; of a channel mixer [mlp, d_model]"
    )
    b_out = Weight("[d_model]")
    W_conv = Weight("[channel, tap]: the causal convolution of x, the tap of the position itself last")
    b_conv = Weight("[channel]")
    W_Q_conv = Weight("[key, tap]: that of the queries")
    b_Q_conv = Weight("[key]")
    W_K_conv = Weight("[key, tap]: that of the keys")
    b_K_conv = Weight("[key]")
    W_F_conv = Weight("[key, tap]: that of HGRN2's forget gate")
    b_F_conv = Weight("[key]")
    W_B_conv = Weight("[(group state), tap]: that of B")
    b_B_conv = Weight("[(group state)]")
    W_C_conv = Weight("[(group state), tap]: that of C")
    b_C_conv = Weight("[(group state)]")
    A = Weight(
        "the rate of the decay: [channel, state] in Mamba, [head] in Mamba-2 and delta nets, [channel] in Griffin and RWKV-4"
    )
    D = Weight("the skip past the scan: [channel], or [head]")
    W_B = Weight("[channel, state]: B = u W_B in Mamba; [d_model, (group state)] in Mamba-2")
    W_C = Weight("[channel, state]: C = u W_C in Mamba; [d_model, (group state)] in Mamba-2")
    W_dt_rank = Weight("[channel, dt_rank]: dt_rank = u W_dt_rank")
    W_dt = Weight(
        "[dt_rank, channel]: dt_pre = dt_rank W_dt + b_dt in Mamba; [d_model, head] in Mamba-2 and delta nets"
    )
    b_dt = Weight("[channel], or [head]")
    W_dt_low = Weight("[d_model, low]: what W_dt reads where the way to it is narrow")
    W_gate_low = Weight("[d_model, low]: what W_gate reads where the way to it is narrow")
    W_F = Weight("[d_model, key]: HGRN2's forget gate")
    b_beta = Weight("[head]")
    b_B = Weight("[(group state)]")
    b_C = Weight("[(group state)]")
    W_beta = Weight("[d_model, head]: beta_pre = n W_beta, how much a delta rule rewrites")
    W_Q = Weight("[d_model, key] in a mixer; [head, d_model, d_head] in attention")
    W_K = Weight("[d_model, key] in a mixer; [kv_head, d_model, d_head] in attention")
    W_V = Weight("[kv_head, d_model, d_head]")
    W_O = Weight("[head, d_head, d_model]")
    b_Q = Weight("[head, d_head]")
    b_K = Weight("[kv_head, d_head]")
    b_V = Weight("[kv_head, d_head]")
    b_O = Weight("[d_model]")
    W_R = Weight("[d_model, channel]: the receptance r, with which RWKV reads its state")
    W_A = Weight("[d_model, head]: A_pre = n W_A, the rate of the decay, in Mamba-3")
    W_lambda = Weight("[d_model, head]: lambda_pre = n W_lambda, Mamba-3's share of a step's own write")
    W_angle = Weight("[d_model, angle]: angle_pre = n W_angle, how far Mamba-3 turns B and C")
    W_input_gate = Weight("[block, in, out]: RG-LRU's input gate, block by block")
    W_recurrence_gate = Weight("[block, in, out]: RG-LRU's recurrence gate, block by block")
    W_router = Weight("[d_model, expert]: router = m W_router")

    def named_weights(self) -> dict[str, Tensor]:
        """`model.blocks[0].mixer.named_weights()`: every word that the part has, and its tensor."""
        return {}


def given(**found: Tensor | None) -> dict[str, Tensor]:
    """`given(W_in=w, b_in=None)`: those that are there; a bias that a model lacks has no name."""
    return {word: tensor for word, tensor in found.items() if tensor is not None}


def linear(word: str, projection: Any) -> dict[str, Tensor]:
    """`linear("gate", w.gate_proj)`: its W_gate and, where it has a bias, its b_gate."""
    return given(**{f"W_{word}": projection.weight.mT, f"b_{word}": projection.bias})


def several(weight: Tensor, bias: Tensor | None, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """`several(W, b, {"in": 8, "gate": 8})`: what stands side by side in one projection, each under a word of its own."""
    weights = weight.split(list(sizes.values()))
    biases = [None] * len(sizes) if bias is None else bias.split(list(sizes.values()))
    found: dict[str, Tensor] = {}
    for word, weight, bias in zip(sizes, weights, biases, strict=True):
        found |= given(**{f"W_{word}": weight.mT, f"b_{word}": bias})
    return found
