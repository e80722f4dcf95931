"""Qwen3-Next and Qwen3.5: gated delta nets (Yang et al. 2024, arXiv 2412.06464), gated attention, MLPs or experts.

b batch, l pos, d d_model, h head (of values), v value (of a head), c channel = (head value), g group (a key head, shared by
heads in a row), n state (a key head's numbers), K taps of the conv; unit(x) = x / sqrt(sum x^2 + 1e-6).

    delta net    q, k, x, z, b, a = in_proj(n)           the rest is parts/delta_net.py: beta = sigmoid(b), dt_pre = a + dt_bias
                 state_t = decay_t (state_{t-1} - beta_t (state_{t-1} k_t) k_t^T) + beta_t u_t k_t^T
                 scan_t  = state_t q_t / sqrt(n)         out = out_proj(RMSNorm(scan) SiLU(z)), the norm head by head
    attention    softmax attention over all positions, q and k normed and partly rotary, a sigmoid gate before o_proj
    channel mix  down(SiLU(gate(m)) up(m)), or experts and a shared expert

Wraps transformers' Qwen3NextForCausalLM, and of Qwen3.5 and Qwen3.5-MoE the language model, alone (Qwen3_5ForCausalLM) or inside
a model of images and text (Qwen3_5ForConditionalGeneration), whose images are not read. The two generations differ in how the
input projections are laid out. What a checkpoint holds for predicting several tokens (mtp.*) is not read, as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatedlens.address.point import Point
from gatedlens.compat.names.qwen3_next import ALIASES
from gatedlens.errors import CheckpointError
from gatedlens.formats.qwen3_next import TINY
from gatedlens.formats.transformers_config import QWEN3_NEXT
from gatedlens.model import fields
from gatedlens.model.base import Wrapped
from gatedlens.model.block import Block, Sub
from gatedlens.model.config import HookedConfig
from gatedlens.model.hookpoint import rows_of
from gatedlens.model.norm import GemmaNorm, Norm, norm_rows
from gatedlens.model.weights import linear, several
from gatedlens.parts.activation import SILU
from gatedlens.parts.attention import CARRIED_WINDOW, Attention, AttentionKind, check_rope
from gatedlens.parts.delta_net import CARRIED_DELTA, DeltaKind, DeltaMixer, Projected
from gatedlens.parts.experts import EXPERTS_OUT, Experts, SharedExpert, experts_rows, shared_expert_rows, softmax_top
from gatedlens.parts.glu import GatedMlp, gated_mlp_rows
from gatedlens.parts.grid_positions import GridAttention, GridModel
from gatedlens.parts.layer_kind import LayerKind, rows_by_kind
from gatedlens.parts.positioned import NEXT_POSITION

GDN = "Gated DeltaNet, arXiv 2412.06464"
BLOCK = f"{GDN}, fig. 1"
DELTA = DeltaKind(rule=f"{GDN}, eq. 10", block=BLOCK, forgets=f"{GDN}, sec. 3.4")
MIXER_ROWS = DELTA.rows(
    Point("hook_q_pre", "batch pos group state", "in_proj(ln1.out), the query of each key head", BLOCK),
    Point("hook_k_pre", "batch pos group state", "in_proj(ln1.out), the key of each key head", BLOCK),
    Point("hook_x", "batch pos channel", "in_proj(ln1.out), the values of the heads", BLOCK),
    Point("hook_gate_pre", "batch pos channel", "in_proj(ln1.out), z of the heads", BLOCK),
    Point("hook_beta_pre", "batch pos head", "in_proj(ln1.out), b of the heads", BLOCK),
    Point("hook_dt_pre", "batch pos head", "in_proj(ln1.out), a of the heads, + dt_bias", BLOCK),
)

QWEN = "Qwen3-Next"
NORMED = "(1 + w) * normalized"
ATTENTION = AttentionKind(gated=True, normed=NORMED, head="q_head")
WEIGHTS = "softmax over expert of router, the k largest, divided by their sum (if the config says so)"
MIXING = {
    "delta net": ("mixer", MIXER_ROWS, "out_proj(gated)"),
    "attention": ("attn", ATTENTION.rows(f"{QWEN}, gated attention"), "o_proj(gated)"),
}
CHANNEL_MIXING = {
    "MLP": (gated_mlp_rows(SILU.word), "down_proj(post)"),
    "experts": (experts_rows(SILU.word, WEIGHTS, shared=shared_expert_rows(SILU.word)), EXPERTS_OUT),
}


def kind_of(layer: Wrapped) -> LayerKind:
    """What a wrapped layer is, by the parts it has: configs name it differently from one transformers to the next."""
    attends, chooses = "self_attn" in layer._modules, "experts" in layer.mlp._modules
    return LayerKind("attention" if attends else "delta net", "experts" if chooses else "MLP")


ROWS = rows_by_kind(MIXING, CHANNEL_MIXING, NORMED)


# -- the gated delta net --------------------------------------------------------------------------------------------


class MixerByKeyHead(DeltaMixer):
    """Qwen3-Next's: in_proj_qkvz and in_proj_ba are laid out key head by key head, each with what its heads have."""

    def projected(self, n: Float[Tensor, "batch pos d_model"]) -> Projected:
        w, (groups, state) = self.weights, self.key_shape
        values = self.sizes["x"] // groups
        qkvz = F.linear(n, w.in_proj_qkvz.weight, w.in_proj_qkvz.bias).unflatten(-1, (groups, -1))
        q, k, x, z = qkvz.split([state, state, values, values], dim=-1)
        b, a = F.linear(n, w.in_proj_ba.weight, w.in_proj_ba.bias).unflatten(-1, (groups, -1)).chunk(2, dim=-1)
        return Projected(q, k, x.flatten(2), z.flatten(2), b.flatten(2), a.flatten(2))

    def read_with(self) -> dict[str, Tensor]:
        w, (groups, state) = self.weights, self.key_shape
        values = self.sizes["x"] // groups
        each = w.in_proj_qkvz.weight.unflatten(0, (groups, -1)).split([state, state, values, values], dim=1)
        both = w.in_proj_ba.weight.unflatten(0, (groups, -1)).chunk(2, dim=1)
        words = ("W_Q", "W_K", "W_in", "W_gate", "W_beta", "W_dt")
        return {word: one.flatten(0, 1).mT for word, one in zip(words, (*each, *both), strict=True)}


class MixerSideBySide(DeltaMixer):
    """Qwen3.5's: in_proj_qkv holds all queries, all keys, all values; z, b and a have projections of their own."""

    def projected(self, n: Float[Tensor, "batch pos d_model"]) -> Projected:
        w, keys = self.weights, self.key_shape
        q, k, x = F.linear(n, w.in_proj_qkv.weight, w.in_proj_qkv.bias).split(list(self.sizes.values()), dim=-1)
        z, b, a = (F.linear(n, p.weight, p.bias) for p in (w.in_proj_z, w.in_proj_b, w.in_proj_a))
        return Projected(q.unflatten(-1, keys), k.unflatten(-1, keys), x, z, b, a)

    def read_with(self) -> dict[str, Tensor]:
        w, words = self.weights, {"Q": self.sizes["q"], "K": self.sizes["k"], "in": self.sizes["x"]}
        alone = {**linear("gate", w.in_proj_z), **linear("beta", w.in_proj_b), **linear("dt", w.in_proj_a)}
        return {**several(w.in_proj_qkv.weight, w.in_proj_qkv.bias, words), **alone}


# -- the model ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Qwen3NextConfig(HookedConfig):
    """cfg of Qwen3-Next and Qwen3.5. n_heads and d_head are the attention's; `kinds`: what each layer is.

    0 stands for the sizes of what a model has none of.
    """

    kinds: tuple[LayerKind, ...]
    n_value_heads: int
    n_key_heads: int
    d_state: int  # numbers of a key head
    d_inner: int  # channels: numbers of all value heads
    d_conv: int
    n_key_value_heads: int
    n_experts: int = 0
    n_experts_per_token: int = 0
    normalised_weights: bool = True  # of the experts that a token has chosen
    d_expert: int = 0
    d_shared: int = 0
    tie_word_embeddings: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        heads = {"channel": self.d_inner, "head": self.n_value_heads, "value": self.d_inner // self.n_value_heads}
        keys = {"group": self.n_key_heads, "state": self.d_state, "tap": self.d_conv}
        attention = {"q_head": self.n_heads, "kv_head": self.n_key_value_heads, "d_head": self.d_head}
        experts = {"expert": self.n_experts, "d_expert": self.d_expert, "d_shared": self.d_shared}
        return {**super().sizes, **heads, **keys, **attention, "d_mlp": self.d_mlp or 0, **experts}


class HookedQwen3Next(GridModel):
    """`HookedQwen3Next(Qwen3NextForCausalLM(...))`, or better `gl.wrap(...)`: Qwen3-Next, or Qwen3.5's language model, opened up.

    Heads (axis `head`) are those of the delta nets' values; the attention's are `q_head`. Padding on either side or inside a row,
    and documents packed in a row, are as if each row stood alone. (In transformers padding on the right is in the state that a
    call leaves, and so is padding inside a row.)

    Qwen3.5 takes positions of images, too: `model(embeds, start_at_layer=0, position_ids=[3, batch, pos])`, as transformers'
    model of images and text makes both; its vision tower stays as it is, and is not opened.
    """

    title = "Qwen3-Next"
    paper = "Yang, Kautz and Hatamizadeh, Gated Delta Networks: Improving Mamba2 with Delta Rule (arXiv 2412.06464)"
    reference = (
        "Qwen/Qwen3-Next-80B-A3B-Instruct",
        {
            "d_model": 2048, "channel": 4096, "head": 32, "value": 128, "group": 16, "state": 128, "tap": 4, "q_head": 16,
            "kv_head": 2, "d_head": 256, "d_mlp": 5120, "expert": 512, "d_expert": 512, "d_shared": 512,
        },
    )  # fmt: skip
    recurrence: ClassVar = DELTA.recurrence
    attention_words: ClassVar = {**DELTA.words, "attention layers": ATTENTION.words}
    wraps = (
        "Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM", "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForConditionalGeneration",
    )  # fmt: skip
    hub_types = ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")
    hub_fields = QWEN3_NEXT
    small = TINY
    block_points = tuple(
        {row.name: row for rows in ROWS.values() for row in rows}.values()
    )  # of all kinds; see rows_for
    final_points = norm_rows("ln_final", "blocks.-1.hook_resid_post", "the final norm", NORMED)
    aliases = ALIASES
    carried: ClassVar = {
        **CARRIED_DELTA,
        **CARRIED_WINDOW,
        **NEXT_POSITION,
    }
    cfg: Qwen3NextConfig

    @classmethod
    def describe(cls, wrapped: Wrapped, model_name: str) -> Qwen3NextConfig:
        """The cfg of a wrapped model, from the shapes of its parameters and the few numbers that shapes do not tell."""
        config, model = checked_language(wrapped, cls.hub_fields, model_name)
        layers = model.layers
        weight, kinds = model.embed_tokens.weight, tuple(map(kind_of, layers))
        mlps = {kind.channels: layer.mlp for kind, layer in zip(kinds, layers, strict=True)}
        experts: dict[str, Any] = {}
        if "experts" in mlps:
            chosen = mlps["experts"]
            experts = {
                "n_experts": chosen.experts.down_proj.shape[0],
                "n_experts_per_token": config.num_experts_per_tok,
                "normalised_weights": config.to_dict().get("norm_topk_prob", True),  # always in Qwen3.5
                "d_expert": chosen.experts.down_proj.shape[2],
                "d_shared": chosen.shared_expert.down_proj.weight.shape[1],
            }
        return Qwen3NextConfig(
            model_name=model_name,
            architecture="qwen3_next",
            n_layers=len(layers),
            d_model=weight.shape[1],
            d_vocab=weight.shape[0],
            n_heads=config.num_attention_heads,
            d_head=config.head_dim,
            d_mlp=mlps["MLP"].up_proj.weight.shape[0] if "MLP" in mlps else None,
            act_fn=config.hidden_act,
            attn_only=False,
            positional_embedding_type="rotary",
            eps=float(config.rms_norm_eps),
            dtype=weight.dtype,
            device=str(weight.device),
            original_architecture=type(wrapped).__name__,
            kinds=kinds,
            n_value_heads=config.linear_num_value_heads,
            n_key_heads=config.linear_num_key_heads,
            d_state=config.linear_key_head_dim,
            d_inner=config.linear_num_value_heads * config.linear_value_head_dim,
            d_conv=config.linear_conv_kernel_dim,
            n_key_value_heads=config.num_key_value_heads,
            tie_word_embeddings=wrapped.lm_head.weight is weight,
            **experts,
        )

    @classmethod
    def kinds(cls) -> dict[str, tuple[Point, ...]]:
        """The rows of each kind of block."""
        return {str(kind): rows for kind, rows in ROWS.items()}

    def rows_for(self, layer: int) -> tuple[Point, ...]:
        return ROWS[self.cfg.kinds[layer]]

    def make_block(self, layer: int) -> Block:
        model, cfg, kind, rows = text_model(self.wrapped), self.cfg, self.cfg.kinds[layer], self.rows_for(layer)
        w = model.layers[layer]
        ln1 = GemmaNorm(w.input_layernorm, rows_of("ln1", rows), cfg.eps)
        ln2 = GemmaNorm(w.post_attention_layernorm, rows_of("ln2", rows), cfg.eps)
        if kind.channels == "experts":
            routing = softmax_top(cfg.n_experts_per_token, cfg.normalised_weights)
            of_mlp = rows_of("mlp", rows)
            shared = SharedExpert(w.mlp.shared_expert, rows_of("shared", of_mlp), SILU, w.mlp.shared_expert_gate)
            mlp = Sub("mlp", Experts(w.mlp, of_mlp, SILU, routing, shared=shared), ln2, ln="ln2")
        else:
            mlp = Sub("mlp", GatedMlp(w.mlp, rows_of("mlp", rows), SILU), ln2, ln="ln2")
        if kind.mixing == "delta net":
            laid_out = MixerByKeyHead if "in_proj_qkvz" in w.linear_attn._modules else MixerSideBySide
            mixer = laid_out(w.linear_attn, rows_of("mixer", rows), layer, DELTA, cfg.sizes, cfg.eps)
            return Block(w, rows, Sub("mixer", mixer, ln1), mlp)
        points, heads = rows_of("attn", rows), w.self_attn
        norms = (
            GemmaNorm(heads.q_norm, rows_of("q_norm", points), cfg.eps),
            GemmaNorm(heads.k_norm, rows_of("k_norm", points), cfg.eps),
        )
        attends = Attention if self.sections is None else GridAttention
        attn = attends(heads, points, layer, ATTENTION, heads.head_dim, None, model.rotary_emb, norms)
        return Block(w, rows, Sub("mixer", attn, ln1, place="attn"), mlp)  # where TransformerLens has attention

    @property
    def sections(self) -> Any:
        return vars(text_model(self.wrapped).rotary_emb).get("mrope_section")

    def make_final_norm(self, rows: tuple[Point, ...]) -> Norm:
        return GemmaNorm(text_model(self.wrapped).norm, rows, self.cfg.eps)

    @property
    def embedding(self) -> Any:
        return text_model(self.wrapped).embed_tokens

    @property
    def unembedding(self) -> Any:
        return self.wrapped.lm_head


def checked_language(wrapped: Wrapped, known: Mapping[str, fields.Field], model_name: str) -> tuple[Any, Any]:
    """(config, model) of the language model of a Qwen; CheckpointError for what is not known."""
    fields.check(wrapped.config.to_dict(), known, f"{model_name}'s config")
    config, model = wrapped.config.get_text_config(), text_model(wrapped)
    if len(model.layers) == 0:
        raise CheckpointError(f"{model_name} has no layers.")
    if config.hidden_act not in ("silu", "swish"):
        raise CheckpointError(f"{model_name} has hidden_act={config.hidden_act!r}; supported is 'silu'.")
    check_rope(model.rotary_emb, model_name)
    return config, model


def text_model(wrapped: Wrapped) -> Any:
    """The layers with their embedding and final norm: all but the head, also of a model of images and text."""
    inner: nn.Module = wrapped.model
    return inner._modules.get("language_model", inner)


HOOKED = HookedQwen3Next
