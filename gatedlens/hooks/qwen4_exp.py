"""Qwen4 (transformers' Qwen4Exp): gated delta nets and attention that chooses, with experts, on a stream of several copies.

b batch, l pos, k copy, d hidden (the width of a copy, and of what branches read and put out), d_model = (copy hidden):

    stream       embed(tokens), in every copy               resid_k += share_k branch(read(resid))
    read         mean over k of gate_k (1 + w_k) resid_k / scale_k               parts/copies.py; in front of the unembedding, too
    delta net    as Qwen3.5's: parts/delta_net.py           out_proj(RMSNorm(scan) act(z)), act SiLU or a sigmoid
    attention    q and k normed and partly rotary, a sigmoid gate before o_proj, over the tokens that an indexer chooses:
                 parts/indexed_attention.py
    channel mix  experts and a shared expert

What a branch writes goes into every copy, and the copies are never mixed: so the stream, all copies side by side, is the plain
sum of what was written to it, and d_model is its whole width. Wraps transformers' Qwen4ExpForCausalLM, and the language model
inside Qwen4ExpForConditionalGeneration, whose images are not read. Some layers begin by adding embeddings of n-grams,
parts/ngrams.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from gatedlens.address.point import Point, block_rows
from gatedlens.compat.names.qwen3_next import ALIASES
from gatedlens.formats.qwen4_exp import FIELDS, TINY
from gatedlens.hooks.qwen3_next import DELTA, MIXER_ROWS, WEIGHTS, MixerSideBySide, checked_language, text_model
from gatedlens.model.base import Wrapped
from gatedlens.model.block import Block, Sub, SubRows, residual_rows
from gatedlens.model.config import HookedConfig
from gatedlens.model.hookpoint import rows_of
from gatedlens.model.norm import GemmaNorm, Norm
from gatedlens.parts.activation import SILU
from gatedlens.parts.attention import AttentionKind
from gatedlens.parts.copies import CopyRead, Inject, inject_rows, read_rows
from gatedlens.parts.delta_net import CARRIED_DELTA
from gatedlens.parts.experts import EXPERTS_ALONE, Experts, SharedExpert, experts_rows, shared_expert_rows, softmax_top
from gatedlens.parts.grid_positions import GridModel
from gatedlens.parts.indexed_attention import CARRIED_INDEX, IndexedAttention, with_index
from gatedlens.parts.ngrams import CARRIED_NGRAMS, NGrams, ngram_rows
from gatedlens.parts.positioned import NEXT_POSITION

QWEN = "Qwen4"
NORMED = "(1 + w) * normalized"
DELTAS = {"silu": DELTA, "sigmoid": replace(DELTA, gate="sigmoid")}  # by the activation of the gate behind the scan
ATTENTION = AttentionKind(gated=True, normed=NORMED, head="q_head")
PROJECTED = MIXER_ROWS[: next(i for i, row in enumerate(MIXER_ROWS) if row.name == "hook_q_conv_taps")]
EXPERTS_ROWS = experts_rows(SILU.word, WEIGHTS, shared=shared_expert_rows(SILU.word), out="hidden")
EXPERTS_OUT = (
    f"{EXPERTS_ALONE.replace('expert_weights * experts', 'mlp.expert_weights * mlp.experts')}, + the shared expert"
)


def _rows(place: str, points: tuple[Point, ...], out: str, ngrams: bool = False) -> tuple[Point, ...]:
    """The rows of a block whose mixer stands at `place`; ngrams: whether it begins with n-gram embeddings."""
    first = (SubRows("ple", block_rows("ple", ngram_rows("ple_in")), "ple.gated + SiLU(ple.conv)"),) if ngrams else ()
    return residual_rows(
        *first,
        SubRows(
            "mixer", block_rows(place, points), "inject1.gate * inject1.in, copy by copy", read_rows("ln1", "mixer_in"),
            inject_rows("inject1", out, "ln1"),
        ),
        SubRows(
            "mlp", block_rows("mlp", EXPERTS_ROWS), "inject2.gate * inject2.in, copy by copy", read_rows("ln2", "mlp_in"),
            inject_rows("inject2", EXPERTS_OUT, "ln2"),
        ),
    )  # fmt: skip


GATES = {"silu": "", "sigmoid": ", sigmoid gate"}
ROWS = {
    **{
        f"{first}delta net{gate}": _rows("mixer", DELTAS[act].rows(*PROJECTED), "out_proj(mixer.gated)", bool(first))
        for first in ("", "n-grams, ")
        for act, gate in GATES.items()
    },
    "attention": _rows("attn", with_index(ATTENTION.rows(f"{QWEN}, gated attention"), NORMED), "o_proj(attn.gated)"),
}


@dataclass(kw_only=True)
class Qwen4ExpConfig(HookedConfig):
    """cfg of Qwen4. d_model is the width of the stream, n_copies of d_hidden; n_heads and d_head are the attention's, those of
    its indexer n_index_heads and d_index; `kinds`: what each layer is."""

    kinds: tuple[str, ...]
    n_copies: int
    d_hidden: int
    d_low: int  # the rank of the gates by which the copies are read
    d_ngram: int  # of the n-gram embeddings of a layer that has them
    n_value_heads: int
    n_key_heads: int
    d_state: int  # numbers of a key head
    d_inner: int  # channels: numbers of all value heads
    d_conv: int
    n_key_value_heads: int
    n_index_heads: int
    d_index: int
    n_experts: int
    n_experts_per_token: int
    normalised_weights: bool  # of the experts that a token has chosen
    d_expert: int
    d_shared: int
    tie_word_embeddings: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        copies = {"copy": self.n_copies, "hidden": self.d_hidden, "low": self.d_low, "d_ngram": self.d_ngram, "axis": 3}
        heads = {"channel": self.d_inner, "head": self.n_value_heads, "value": self.d_inner // self.n_value_heads}
        keys = {"group": self.n_key_heads, "state": self.d_state, "tap": self.d_conv}
        attention = {"q_head": self.n_heads, "kv_head": self.n_key_value_heads, "d_head": self.d_head}
        index = {"index_head": self.n_index_heads, "d_index": self.d_index}
        experts = {"expert": self.n_experts, "d_expert": self.d_expert, "d_shared": self.d_shared}
        return {**super().sizes, **copies, **heads, **keys, **attention, **index, **experts}


class HookedQwen4Exp(GridModel):
    """`HookedQwen4Exp(Qwen4ExpForCausalLM(...))`, or better `gl.wrap(...)`: Qwen4's language model opened up.

    The residual stream holds n_copies copies side by side, d_model = n_copies * d_hidden numbers; what a branch reads
    (`ln1.hook_out`) and puts out (`inject1.hook_in`), and what the unembedding reads are d_hidden wide. Heads (axis `head`)
    are those of the delta nets' values; the attention's are `q_head`. Padding on either side or inside a row, and documents
    packed in a row, are as if each row stood alone.

    Positions of images: `model(embeds.repeat(1, 1, model.cfg.n_copies), start_at_layer=0, position_ids=[3, batch, pos])`, as
    transformers' model of images and text makes both; its vision tower stays as it is, and is not opened.
    """

    title = "Qwen4"
    paper = (
        "Qwen4Exp of transformers, with gated delta nets (arXiv 2412.06464) and hyper-connections (arXiv 2409.19606)"
    )
    reference = (
        "transformers' Qwen4ExpTextConfig as it stands, with 4 heads of 128 in its indexers",
        {
            "d_model": 8192, "copy": 4, "hidden": 2048, "low": 320, "d_ngram": 2048, "channel": 4096, "head": 32, "value": 128,
            "group": 16, "state": 128, "tap": 4, "q_head": 16, "kv_head": 2, "d_head": 256, "index_head": 4, "d_index": 128,
            "expert": 512, "d_expert": 512, "d_shared": 512,
        },
    )  # fmt: skip
    first_points = (Point("hook_embed", "batch pos d_model", "embedding[token], in every copy", "the embedding"),)
    recurrence: ClassVar = DELTA.recurrence
    attention_words: ClassVar = {**DELTA.words, "attention layers": ATTENTION.words}
    wraps = ("Qwen4ExpForCausalLM", "Qwen4ExpForConditionalGeneration")
    hub_types = ("qwen4_exp", "qwen4_exp_text")
    hub_fields = FIELDS
    small = TINY
    block_points = tuple(
        {row.name: row for rows in ROWS.values() for row in rows}.values()
    )  # of all kinds; see rows_for
    final_points = read_rows("ln_final", "blocks.-1.hook_resid_post")
    aliases = ALIASES
    carried: ClassVar = {**CARRIED_DELTA, **CARRIED_INDEX, **CARRIED_NGRAMS, **NEXT_POSITION}
    cfg: Qwen4ExpConfig

    @classmethod
    def describe(cls, wrapped: Wrapped, model_name: str) -> Qwen4ExpConfig:
        """The cfg of a wrapped model, from the shapes of its parameters and the few numbers that shapes do not tell."""
        config, model = checked_language(wrapped, cls.hub_fields, model_name)
        layers = model.layers
        weight, experts = model.embed_tokens.weight, layers[0].mlp
        return Qwen4ExpConfig(
            model_name=model_name,
            architecture="qwen4_exp",
            n_layers=len(layers),
            d_model=config.hc_count * weight.shape[1],
            d_vocab=weight.shape[0],
            n_heads=config.num_attention_heads,
            d_head=config.head_dim,
            act_fn=config.hidden_act,
            attn_only=False,
            positional_embedding_type="rotary",
            eps=float(config.rms_norm_eps),
            dtype=weight.dtype,
            device=str(weight.device),
            original_architecture=type(wrapped).__name__,
            kinds=tuple(kind_of(layer) for layer in layers),
            n_copies=config.hc_count,
            d_hidden=weight.shape[1],
            d_low=config.hc_lowrank,
            d_ngram=config.ple_embed_dim if config.ple_layer_ids else 0,
            n_value_heads=config.linear_num_value_heads,
            n_key_heads=config.linear_num_key_heads,
            d_state=config.linear_key_head_dim,
            d_inner=config.linear_num_value_heads * config.linear_value_head_dim,
            d_conv=config.linear_conv_kernel_dim,
            n_key_value_heads=config.num_key_value_heads,
            n_index_heads=config.indexer_n_heads or 0,
            d_index=config.indexer_head_dim or 0,
            n_experts=experts.experts.down_proj.shape[0],
            n_experts_per_token=config.num_experts_per_tok,
            normalised_weights=config.norm_topk_prob,
            d_expert=experts.experts.down_proj.shape[2],
            d_shared=experts.shared_expert.down_proj.weight.shape[1],
            tie_word_embeddings=wrapped.lm_head.weight is weight,
        )

    @classmethod
    def kinds(cls) -> dict[str, tuple[Point, ...]]:
        """The rows of each kind of block."""
        return dict(ROWS)

    def rows_for(self, layer: int) -> tuple[Point, ...]:
        return ROWS[self.cfg.kinds[layer]]

    def make_block(self, layer: int) -> Block:
        model, cfg, rows = text_model(self.wrapped), self.cfg, self.rows_for(layer)
        w = model.layers[layer]
        around = {"1": w.attn_hyper_connection, "2": w.mlp_hyper_connection}
        reads = {n: CopyRead(one, rows_of(f"ln{n}", rows), cfg.eps, cfg.n_copies) for n, one in around.items()}
        writes = {n: Inject(one, rows_of(f"inject{n}", rows)) for n, one in around.items()}
        of_mlp = rows_of("mlp", rows)
        shared = SharedExpert(w.mlp.shared_expert, rows_of("shared", of_mlp), SILU, w.mlp.shared_expert_gate)
        routing = softmax_top(cfg.n_experts_per_token, cfg.normalised_weights)
        experts = Experts(w.mlp, of_mlp, SILU, routing, shared=shared)
        mlp = Sub("mlp", experts, reads["2"], ln="ln2", after=writes["2"], after_ln="inject2")
        ngrams = w._modules.get("ple")
        first = () if ngrams is None else (Sub("ple", NGrams(ngrams, rows_of("ple", rows), layer, cfg.eps)),)
        if "linear_attn" in w._modules:
            kind = DELTAS[w.linear_attn.norm.activation]
            mixer = MixerSideBySide(w.linear_attn, rows_of("mixer", rows), layer, kind, cfg.sizes, cfg.eps)
            return Block(w, rows, *first, Sub("mixer", mixer, reads["1"], after=writes["1"], after_ln="inject1"), mlp)
        points, heads = rows_of("attn", rows), w.self_attn
        norms = (
            GemmaNorm(heads.q_norm, rows_of("q_norm", points), cfg.eps),
            GemmaNorm(heads.k_norm, rows_of("k_norm", points), cfg.eps),
        )
        attn = IndexedAttention(heads, points, layer, ATTENTION, heads.head_dim, None, model.rotary_emb, norms)
        return Block(w, rows, Sub("mixer", attn, reads["1"], place="attn", after=writes["1"], after_ln="inject1"), mlp)

    @property
    def hands_on(self) -> tuple[str, ...]:  # type: ignore[override]
        """The embeddings of n-grams, which are made of the tokens."""
        return tuple(
            f"blocks.{i}.ple.hook_embed" for i, kind in enumerate(self.cfg.kinds) if kind.startswith("n-grams")
        )

    @property
    def sections(self) -> Any:
        return text_model(self.wrapped).rotary_emb.mrope_section

    def make_final_norm(self, rows: tuple[Point, ...]) -> Norm:
        return CopyRead(text_model(self.wrapped).hyper_connection_mixer, rows, self.cfg.eps, self.cfg.n_copies)

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The embedding as it enters the residual stream, in every copy."""
        return self.embedding.weight.repeat(1, self.cfg.n_copies)

    def embed(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        return super().embed(tokens).repeat(1, 1, self.cfg.n_copies)

    @property
    def embedding(self) -> Any:
        return text_model(self.wrapped).embed_tokens

    @property
    def unembedding(self) -> Any:
        return self.wrapped.lm_head


def kind_of(layer: Wrapped) -> str:
    """What a wrapped layer is."""
    if "self_attn" in layer._modules:
        return "attention"
    first = "" if layer._modules.get("ple") is None else "n-grams, "
    return f"{first}delta net{GATES[layer.linear_attn.norm.activation]}"


HOOKED = HookedQwen4Exp
