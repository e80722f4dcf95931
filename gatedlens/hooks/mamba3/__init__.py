"""Mamba-3 (Lahoti et al. 2026, arXiv 2603.15569): a state that decays, turns, and is written by a trapezoidal rule.

b batch, l pos, d d_model, h head, v value (of a head), c channel = (head value), g group, n state, a angle; MIMO: r rank.

    z, x, B, C, dt, A, lambda, angle = in_proj(n)                no convolution: u = x
    dt      = softplus(dt + dt_bias)                             A = min(-f(A), -A_floor), of each token
    turn    = tanh(angle) pi dt                                  summed over the document: the angles that B and C are turned by
    rot_B   = turned(RMSNorm(B) + B_bias)                        rot_C likewise: real arithmetic for a complex state
    gamma   = sigmoid(lambda) dt                                 beta = (1 - sigmoid(lambda)) dt (the paper's, but for the decay)
    state_t = exp(dt_t A_t) (state_{t-1} + beta_t u_{t-1} rot_B_{t-1}^T) + gamma_t u_t rot_B_t^T
    y       = state rot_C + D u                                  out = out_proj(y SiLU(z)), or RMSNorm(y) SiLU(z) by heads

MIMO: B and C are of R ranks. A step writes R outer products, of u_r = mimo_x_r x, and reads R times, y_r = state rot_C_r + D u_r;
what goes to out_proj is sum over r of mimo_o_r y_r SiLU(mimo_z_r z). Pairs of states that are turned are neighbours (SISO), or
half the states apart (MIMO).

Wraps mamba-ssm's MambaLMHeadModel and flash-linear-attention's Mamba3ForCausalLM (by their parameter names), and `Mamba3Weights`
of formats/mamba3_ssm.py, which says also which release means what by A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from gatedlens.address.point import Point, block_rows
from gatedlens.compat.names.mamba3 import ALIASES
from gatedlens.errors import CheckpointError
from gatedlens.formats.mamba3_ssm import TINY, Mamba3Ssm, in_mamba_ssms_words
from gatedlens.formats.mamba_stack import MambaStack, StackConfig, embedding_of, writes_two_terms
from gatedlens.formats.transformers_config import config_of, norm_eps
from gatedlens.hooks.mamba3.mixer import AFTER, CODE, RMSNORM, Mamba3Mixer, Mamba3Shape, mixer_rows
from gatedlens.model import fields
from gatedlens.model.base import Wrapped
from gatedlens.model.block import Block, Sub, SubRows, residual_rows
from gatedlens.model.hookpoint import rows_of
from gatedlens.model.norm import NormOfNarrow, eps_of, norm_rows
from gatedlens.model.state import Carried
from gatedlens.parts.activation import SILU
from gatedlens.parts.glu import FusedMlp, fused_mlp_rows

MLP = SubRows(
    "mlp",
    block_rows("mlp", fused_mlp_rows(SILU.word, CODE, up="fc1")),
    "fc2(post)",
    norm_rows("ln2", "mlp_in", RMSNORM),
)


def _rows(kind: str, mlp: bool) -> tuple[Point, ...]:
    ln1 = norm_rows("ln1", "mixer_in", RMSNORM)
    own = SubRows("mixer", block_rows("mixer", mixer_rows(kind)), "out_proj(gated)", ln1)
    return residual_rows(own, MLP) if mlp else residual_rows(own)


ROWS = {(kind, mlp): _rows(kind, mlp) for kind in AFTER for mlp in (False, True)}


@dataclass(kw_only=True)
class Mamba3Config(StackConfig):
    """cfg of Mamba-3. n_heads heads of d_head channels; `kind`: "", "norm before the gate" or "MIMO" (of n_ranks); A_activation:
    "heavy_tail" or "softplus"."""

    n_groups: int
    n_angles: int
    n_ranks: int = 1
    kind: str = ""
    A_floor: float = 1e-4
    A_activation: str = "heavy_tail"

    @property
    def sizes(self) -> dict[str, int]:
        heads = {"channel": self.d_inner, "head": self.n_heads, "value": self.d_head, "group": self.n_groups}
        turned = {"state": self.d_state, "angle": self.n_angles, "rank": self.n_ranks}
        return {**super().sizes, **heads, **turned, "d_mlp": self.d_mlp or 0}


class HookedMamba3(MambaStack):
    """`gl.from_pretrained("state-spaces/mamba3-siso-187m")`, `gl.wrap(MambaLMHeadModel(...))`: Mamba-3 opened up.

    hook_state stands in the frame in which nothing turns: B and C are turned by the sum of the angles, as in mamba-ssm. Documents
    packed in a row, told apart by `position_ids`, and padding are as if each row stood alone: state, angles, and the write that a
    step takes over from the one before begin anew.
    """

    title = "Mamba-3"
    paper = "Lahoti et al., Mamba-3: Improved Sequence Modeling using State Space Principles (arXiv 2603.15569)"
    reference = (
        "state-spaces/mamba3-siso-187m",
        {
            "d_model": 768, "channel": 1536, "head": 24, "value": 64, "state": 128, "group": 1, "angle": 32, "rank": 1,
            "d_mlp": 1536,
        },
    )  # fmt: skip
    recurrence: ClassVar = {
        "decay": "exp(dt * A), [head], A of each token",
        "write": "gamma * u * rot_B, and decayed with the state beta * (u * rot_B)[pos - 1]; [head, value, state]",
        "read": "rot_C, [head, state]",
        "skip": "D * u",
        "conv": "none",
        "activation before the scan": "none: u = x (MIMO: mimo_x * x, of each rank)",
        "gate": "SiLU(gate_pre), behind an RMSNorm by heads where there is one (MIMO: SiLU(mimo_z * gate_pre) of each rank)",
    }
    attention_words: ClassVar = {
        "x": "x",
        "o": "gated",
        "gate": "gate, times norm.weight / scale where there is a norm; of a rank mimo_o * gate",
        "scan": "S[i, j] = sum over state of rot_C[i] * rot_B[j] * exp(log_decay[j + 1] + ... + log_decay[i]) * (gamma[j] + "
        "beta[j + 1]), j < i, of each head; S[i, i] the same without beta; 0 where a reset lies between, j < reset <= i",
        "skip": "D",
        "act": "1; of a rank mimo_x. MIMO: the sum over ranks that write and ranks that read, D where they are the same",
        "conv": "none: M is the identity",
        "r": "0; with a carried state what its scan state brings, and beta times the write of the step before",
    }
    wraps = ("MambaLMHeadModel", "Mamba3ForCausalLM", "Mamba3Weights")
    layout = Mamba3Ssm()
    small = TINY
    block_points = tuple({row.name: row for row in (*ROWS["", False], *ROWS["", True])}.values())
    aliases = ALIASES
    has_positions = True
    carried: ClassVar = {
        "scan": Carried("scan", "batch head value state"),
        "u": Carried("shift", "batch tail written"),
        "rot_B": Carried("shift", "batch tail turned"),
        "angle": Carried("angle", "batch head angle"),
    }
    cfg: Mamba3Config

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return writes_two_terms(module)

    @classmethod
    def describe(cls, wrapped: Wrapped, model_name: str) -> Mamba3Config:
        """The cfg of a wrapped model, from the shapes of its parameters and the few numbers that shapes do not tell."""
        given, layers = in_mamba_ssms_words(config_of(wrapped)), wrapped.backbone.layers
        fields.check(given, cls.layout.fields, f"{model_name}'s config")
        odd = [number for number, layer in enumerate(layers) if "B_bias" not in layer.mixer._parameters]
        if odd:
            raise CheckpointError(
                f"Layer {odd[0]} of {model_name} is no Mamba-3 mixer; gatedlens opens stacks of Mamba-3 alone."
            )
        shapes = [Mamba3Shape.of(layer.mixer, given, model_name) for layer in layers]
        first, shape, weight = layers[0], shapes[0], embedding_of(wrapped).weight
        if any(other != shape for other in shapes):
            raise CheckpointError(f"{model_name} has mixers of different sizes.")
        mlp = first._modules.get("mlp")
        return Mamba3Config(
            model_name=model_name,
            architecture="mamba3",
            n_layers=len(layers),
            d_model=weight.shape[1],
            d_vocab=weight.shape[0],
            n_heads=shape.n_heads,
            d_head=shape.d_inner // shape.n_heads,
            d_mlp=None if mlp is None else mlp.fc2.weight.shape[1],
            normalization_type="RMS" if getattr(first.norm, "bias", None) is None else "LN",
            eps=eps_of(first.norm, norm_eps(given)),
            dtype=first.mixer.in_proj.weight.dtype,
            device=str(weight.device),
            original_architecture=type(wrapped).__name__,
            d_inner=shape.d_inner,
            d_state=shape.d_state,
            d_conv=0,
            expand=shape.d_inner / weight.shape[1],
            residual_in_fp32=_in_float32(first, given, "model_type" in config_of(wrapped)),
            use_conv_bias=False,
            tie_word_embeddings=wrapped.lm_head.weight is weight,
            n_groups=shape.n_groups,
            n_angles=shape.n_angles,
            n_ranks=shape.n_ranks,
            kind=shape.kind,
            A_floor=shape.A_floor,
            A_activation=shape.A_activation,
        )

    @classmethod
    def kinds(cls) -> dict[str, tuple[Point, ...]]:
        """The rows of each kind of block; one without an MLP lacks those of the MLP."""
        return {f"{kind or 'SISO'}, MLP": ROWS[kind, True] for kind in AFTER}

    def rows_for(self, layer: int) -> tuple[Point, ...]:
        return ROWS[self.cfg.kind, bool(self.cfg.d_mlp)]

    def make_block(self, layer: int) -> Block:
        w, cfg, rows = self.wrapped.backbone.layers[layer], self.cfg, self.rows_for(layer)

        def norm(weights: Any, ln: str) -> NormOfNarrow:
            return NormOfNarrow(weights, rows_of(ln, rows), cfg.eps, centred=cfg.normalization_type == "LN")

        shape = Mamba3Shape.of(w.mixer, in_mamba_ssms_words(config_of(self.wrapped)), cfg.model_name)
        mixer = Sub("mixer", Mamba3Mixer(w.mixer, rows_of("mixer", rows), layer, shape), norm(w.norm, "ln1"))
        if not cfg.d_mlp:
            return Block(w, rows, mixer)
        mlp = FusedMlp(w.mlp, rows_of("mlp", rows), SILU, up="fc1", down="fc2", gate_first=False)
        return Block(w, rows, mixer, Sub("mlp", mlp, norm(w.norm2, "ln2"), "ln2"))


def _in_float32(layer: Any, given: Mapping[str, Any], of_fla: bool) -> bool:
    """Whether the residual stream stays at least float32; in fla it is rounded to the dtype of the norms behind each mixer."""
    asked = bool(vars(layer).get("residual_in_fp32", given.get("residual_in_fp32", True)))
    return asked and (not of_fla or layer.norm.weight.dtype.itemsize >= 4)


HOOKED = HookedMamba3
