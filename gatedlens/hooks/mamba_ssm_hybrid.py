"""mamba-ssm's own hybrids around Mamba-2: layers of attention (attn_layer_idx), MLPs (d_intermediate), narrow states (d_ssm).

    h += mamba2 or attention (norm(h))            h += fc2(y SiLU(g)), y, g = fc1(norm2(h))
    with d_ssm < d_inner:  mamba2(n) = out_proj([SiLU(z0) x0, gated]), z0, x0 the first channels of in_proj(n)

The channels beside the heads pass no state: they are a gated MLP that reads what the mixer reads. Here it is a branch of its own
beside the mixer, `beside`, with a copy of the norm, so that an edit of what one reads leaves the other alone.

Wraps mamba-ssm's MambaLMHeadModel (by its parameter names) and `Mamba2HybridWeights` of formats/mamba_ssm_hybrid.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatedlens.address.point import Point, block_rows
from gatedlens.compat.names.hybrid import ALIASES
from gatedlens.errors import CheckpointError
from gatedlens.formats.mamba_ssm_hybrid import TINY, MambaSsmHybrid, Rotary, attention_of
from gatedlens.formats.mamba_stack import MambaStack, StackConfig, embedding_of, is_hybrid
from gatedlens.formats.transformers_config import config_of, norm_eps
from gatedlens.hooks.mamba2 import NORMS, HookedMamba2, Mamba2Mixer, Mamba2Shape, mixer_rows
from gatedlens.model import fields
from gatedlens.model.base import Wrapped
from gatedlens.model.block import Block, Sub, SubRows, residual_rows
from gatedlens.model.hookpoint import Part, rows_of
from gatedlens.model.norm import NormOfNarrow, eps_of, norm_rows
from gatedlens.model.run import Run
from gatedlens.parts.activation import SILU
from gatedlens.parts.attention import CARRIED_WINDOW, RMSNORM, AttentionKind, Multipliers
from gatedlens.parts.fused_attention import FusedAttention, fused_rows
from gatedlens.parts.glu import FusedMlp, fused_mlp_rows
from gatedlens.parts.positioned import NEXT_POSITION, PositionedModel

CODE = "mamba-ssm 2.3.2"
ATTENDS = {rotary: AttentionKind(head="q_head", rotary=rotary) for rotary in (False, True)}
BESIDE_ROWS = (
    Point("hook_pre", "batch pos d_beside", "in_proj(ln1_beside.out)[:d_beside]", CODE),
    Point("hook_pre_linear", "batch pos d_beside", "in_proj(ln1_beside.out)[d_beside:2 * d_beside]", CODE),
    Point("hook_post", "batch pos d_beside", "SiLU(pre) * pre_linear", CODE),
)


class Beside(Part):
    """out = out_proj's first columns of SiLU(z0) x0: the channels of a mixer that no state passes."""

    def __init__(self, weights: Any, rows: tuple[Point, ...], channels: int):
        super().__init__(weights, rows)
        self.channels = channels

    def forward(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Float[Tensor, "batch pos d_model"]:
        w, both = self.weights, slice(2 * self.channels)
        given = F.linear(n, w.in_proj.weight[both], None if w.in_proj.bias is None else w.in_proj.bias[both])
        pre, linear = (half.contiguous() for half in given.chunk(2, dim=-1))
        post = self.hook_post(F.silu(self.hook_pre(pre)) * self.hook_pre_linear(linear))
        return F.linear(post, w.out_proj.weight[:, : self.channels])


# -- what stands in a layer -----------------------------------------------------------------------------------------


def _mamba2(norm: str, beside: bool) -> SubRows | tuple[SubRows, ...]:
    own = SubRows(
        "mixer", block_rows("mixer", mixer_rows(norm)), "out_proj(gated)", norm_rows("ln1", "mixer_in", RMSNORM)
    )
    if not beside:
        return own
    other = block_rows("beside", BESIDE_ROWS), "out_proj(beside.post)", norm_rows("ln1_beside", "beside_in", RMSNORM)
    return SubRows("beside", *other), own


def _attention(rotary: bool, conv: bool) -> SubRows:
    rows = block_rows("attn", fused_rows(ATTENDS[rotary], conv, CODE))
    return SubRows("mixer", rows, "out_proj(z)", norm_rows("ln1", "mixer_in", RMSNORM))


MLP = SubRows(
    "mlp",
    block_rows("mlp", fused_mlp_rows(SILU.word, CODE, up="fc1")),
    "fc2(post)",
    norm_rows("ln2", "mlp_in", RMSNORM),
)
_WHERE = {"after the gate": "", "before the gate": " (its norm before the gate)", "none": " (without a norm)"}
MIXING = {
    **{f"Mamba-2{_WHERE[norm]}": _mamba2(norm, False) for norm in NORMS},
    **{f"Mamba-2{_WHERE[norm]} beside channels without a state": _mamba2(norm, True) for norm in NORMS},
    **{
        f"{'rotary ' if rotary else ''}attention{' behind a conv' if conv else ''}": _attention(rotary, conv)
        for rotary in (False, True)
        for conv in (False, True)
    },
}
ROWS = {
    **{mixing: residual_rows(subs) for mixing, subs in MIXING.items()},
    **{f"{mixing}, MLP": residual_rows(subs, MLP) for mixing, subs in MIXING.items()},
}


@dataclass(kw_only=True)
class MambaSsmHybridConfig(StackConfig):
    """cfg of such a hybrid. n_heads and d_head are the attention's, 0 where there is none; `kinds`: what each layer is;
    d_inner: the channels of the heads; d_beside: those beside them."""

    kinds: tuple[str, ...]
    n_mixer_heads: int
    n_groups: int
    d_beside: int = 0
    n_key_value_heads: int = 0
    qkv_conv: int = 0

    @property
    def sizes(self) -> dict[str, int]:
        heads = {"channel": self.d_inner, "head": self.n_mixer_heads, "value": self.d_inner // self.n_mixer_heads}
        keys = {"group": self.n_groups, "state": self.d_state, "tap": self.d_conv, "d_beside": self.d_beside}
        attention = {"q_head": self.n_heads, "kv_head": self.n_key_value_heads, "d_head": self.d_head}
        return {**super().sizes, **heads, **keys, **attention, "qkv_tap": self.qkv_conv, "d_mlp": self.d_mlp or 0}


class HookedMambaSsmHybrid(PositionedModel, MambaStack):
    """`gl.from_pretrained(folder)` of mamba-ssm's config.json with attn_layer_idx, d_intermediate or d_ssm: such a hybrid
    opened up.

    Heads (axis `head`) are those of Mamba-2; the attention's are `q_head`. Padding on either side or inside a row, documents
    packed in a row, and a text that goes on from a state are as if each row stood alone; a time step keeps its limits while
    decoding. (mamba-ssm's own decoding limits none, and goes on wrongly behind an attention with a conv.)
    """

    title = "mamba-ssm's hybrids"
    paper = "Dao and Gu, Transformers are SSMs (arXiv 2405.21060), sec. 9.2.3: Mamba-2 with attention and MLPs"
    reference = (
        "state-spaces/mamba2attn-2.7b",
        {
            "d_model": 2560, "channel": 5120, "head": 80, "value": 64, "state": 128, "group": 1, "tap": 4, "q_head": 30,
            "kv_head": 30, "d_head": 128, "qkv_tap": 4, "d_beside": 0, "d_mlp": 0,
        },
    )  # fmt: skip
    recurrence: ClassVar = HookedMamba2.recurrence
    attention_words: ClassVar = {**HookedMamba2.attention_words, "attention layers": ATTENDS[False].words}
    wraps = ("MambaLMHeadModel", "Mamba2HybridWeights")
    layout = MambaSsmHybrid()
    small = TINY
    block_points = tuple({row.name: row for rows in ROWS.values() for row in rows}.values())
    aliases = ALIASES
    carried: ClassVar = {**HookedMamba2.carried, **CARRIED_WINDOW, **NEXT_POSITION}
    cfg: MambaSsmHybridConfig

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return is_hybrid(module)

    @classmethod
    def describe(cls, wrapped: Wrapped, model_name: str) -> MambaSsmHybridConfig:
        """The cfg of a wrapped model, from the shapes of its parameters and the few numbers that shapes do not tell."""
        given, layers = config_of(wrapped), wrapped.backbone.layers
        fields.check(given, cls.layout.fields, f"{model_name}'s config")
        scans = [layer.mixer for layer in layers if "A_log" in layer.mixer._parameters]
        shapes = [Mamba2Shape.of(mixer, given) for mixer in scans]
        shapes[0].check(scans[0], model_name)
        if any(shape != shapes[0] for shape in shapes):
            raise CheckpointError(f"{model_name} has mixers of different sizes.")
        first, shape, attends = scans[0], shapes[0], [layer.mixer for layer in layers if layer.mixer not in scans]
        weight, mlp = embedding_of(wrapped).weight, layers[0]._modules.get("mlp")
        heads = shared = d_head = taps = 0
        if attends:
            taps = attends[0].conv1d.weight.shape[-1] if "conv1d" in attends[0]._modules else 0
            said = attention_of(given, vars(attends[0]), model_name)
            heads = said["num_heads"]
            d_head, shared = said["head_dim"] or weight.shape[1] // heads, said["num_heads_kv"] or heads
        return MambaSsmHybridConfig(
            model_name=model_name,
            architecture="mamba_ssm_hybrid",
            n_layers=len(layers),
            d_model=weight.shape[1],
            d_vocab=weight.shape[0],
            n_heads=heads,
            d_head=d_head,
            d_mlp=None if mlp is None else mlp.fc2.weight.shape[1],
            attn_only=False,
            normalization_type="RMS" if getattr(layers[0].norm, "bias", None) is None else "LN",
            eps=eps_of(layers[0].norm, norm_eps(given)),
            dtype=first.in_proj.weight.dtype,
            device=str(weight.device),
            original_architecture=type(wrapped).__name__,
            d_inner=shape.d_inner,
            d_state=shape.d_state,
            d_conv=first.conv1d.weight.shape[-1],
            expand=(shape.beside + shape.d_inner) / weight.shape[1],
            residual_in_fp32=bool(vars(layers[0]).get("residual_in_fp32", given.get("residual_in_fp32", True))),
            use_bias=first.in_proj.bias is not None,
            use_conv_bias=first.conv1d.bias is not None,
            tie_word_embeddings=wrapped.lm_head.weight is weight,
            kinds=tuple(_kind(layer, given, model_name) for layer in layers),
            n_mixer_heads=shape.n_heads,
            n_groups=shape.n_groups,
            d_beside=shape.beside,
            n_key_value_heads=shared,
            qkv_conv=taps,
        )

    @classmethod
    def kinds(cls) -> dict[str, tuple[Point, ...]]:
        """The rows of each kind of block; one with an MLP has those of the MLP behind."""
        return {kind: rows for kind, rows in ROWS.items() if kind.endswith(", MLP")}

    def rows_for(self, layer: int) -> tuple[Point, ...]:
        return ROWS[self.cfg.kinds[layer]]

    def make_block(self, layer: int) -> Block:
        w, cfg, rows = self.wrapped.backbone.layers[layer], self.cfg, self.rows_for(layer)
        given = config_of(self.wrapped)

        def norm(weights: Any, ln: str) -> NormOfNarrow:
            return NormOfNarrow(weights, rows_of(ln, rows), cfg.eps, centred=cfg.normalization_type == "LN")

        mixing: Sub | tuple[Sub, ...]
        if "A_log" in w.mixer._parameters:
            shape = Mamba2Shape.of(w.mixer, given)
            mixing = Sub("mixer", Mamba2Mixer(w.mixer, rows_of("mixer", rows), layer, shape), norm(w.norm, "ln1"))
            if shape.beside:
                beside = Beside(w.mixer, rows_of("beside", rows), shape.beside)
                mixing = (Sub("beside", beside, norm(w.norm, "ln1_beside"), "ln1_beside"), mixing)
        else:
            said = attention_of(given, vars(w.mixer), cfg.model_name)
            turned = said["rotary_emb_dim"]
            rotary = Rotary(w.mixer, turned, said["rotary_emb_base"]) if turned > 0 else None
            kind, scale = ATTENDS[rotary is not None], Multipliers(scores=said["softmax_scale"])
            attn = FusedAttention(
                w.mixer, rows_of("attn", rows), layer, kind, cfg.d_head, None, rotary, multipliers=scale
            )
            mixing = Sub("mixer", attn, norm(w.norm, "ln1"), place="attn")
        if "mlp" not in w._modules:
            return Block(w, rows, mixing)
        mlp = FusedMlp(w.mlp, rows_of("mlp", rows), SILU, up="fc1", down="fc2", gate_first=False)
        return Block(w, rows, mixing, Sub("mlp", mlp, norm(w.norm2, "ln2"), "ln2"))


def _kind(layer: Any, given: Any, model_name: str) -> str:
    """What a layer is."""
    mixer = layer.mixer
    if "A_log" in mixer._parameters:
        shape = Mamba2Shape.of(mixer, given)
        mixing = f"Mamba-2{_WHERE[shape.norm]}{' beside channels without a state' if shape.beside else ''}"
    else:
        rotary = attention_of(given, vars(mixer), model_name)["rotary_emb_dim"] > 0
        mixing = f"{'rotary ' if rotary else ''}attention{' behind a conv' if 'conv1d' in mixer._modules else ''}"
    return f"{mixing}, MLP" if "mlp" in layer._modules else mixing


HOOKED = HookedMambaSsmHybrid
