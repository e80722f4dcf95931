"""flash-linear-attention's language models: gated linear attention, retention, HGRN2, DeltaNet, gated DeltaNet.

    block   resid + mixer(RMSNorm(resid)), then resid + mlp(RMSNorm(resid))           mlp: down(SiLU(gate(m)) up(m))

What differs from one to the next is the mixer, a file each beside this one:

    gla.py         decay of each number of a key, of the stream (low rank)
    retnet.py      decay of each head, fixed; rotary q and k
    hgrn2.py       decay of each number of a key, with a lower bound; the key is what it forgets
    delta_net.py   the delta rule, without a decay or with one a head
    delta_product.py   the same, several steps a token

Some layers may be softmax attention, rotary, over all positions or a window (`attn` in the config). Each mixer with short
convs or none, with a gate or none, as the module has them. Wraps fla's GLAForCausalLM, RetNetForCausalLM, HGRN2ForCausalLM,
DeltaNetForCausalLM, GatedDeltaNetForCausalLM and GatedDeltaProductForCausalLM (of one step a token a DeltaNet; gated where it
has a forget gate) by the names of their parameters (fla itself is not needed), and `FlaWeights` of formats/fla.py,
which holds their checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from gatedlens.address.point import Point, block_rows
from gatedlens.compat.names.fla import ALIASES
from gatedlens.errors import CheckpointError
from gatedlens.formats.fla import FIELDS, KINDS, TINY, AttentionWords, FlaLayout, Sizes, attention_of, sizes_of, words
from gatedlens.formats.transformers_config import config_of
from gatedlens.hooks.fla.delta_net import DeltaNetMixer, GatedDeltaNetMixer
from gatedlens.hooks.fla.delta_product import DeltaProductMixer, GatedDeltaProductMixer
from gatedlens.hooks.fla.gla import GlaMixer
from gatedlens.hooks.fla.hgrn2 import Hgrn2Mixer
from gatedlens.hooks.fla.mixer import FlaConfig, FlaKind, FlaMixer
from gatedlens.hooks.fla.retnet import RetentionMixer
from gatedlens.model import fields
from gatedlens.model.base import Wrapped
from gatedlens.model.block import Block, Sub, SubRows, residual_rows
from gatedlens.model.hookpoint import rows_of
from gatedlens.model.norm import Norm, norm_rows
from gatedlens.model.state import Carried
from gatedlens.parts.activation import SILU
from gatedlens.parts.attention import CARRIED_WINDOW, RMSNORM, Attention, AttentionKind
from gatedlens.parts.glu import GatedMlp, gated_mlp_rows
from gatedlens.parts.positioned import NEXT_POSITION, PositionedModel

MIXERS: dict[str, type[FlaMixer]] = {
    "GLA": GlaMixer,
    "RetNet": RetentionMixer,
    "HGRN2": Hgrn2Mixer,
    "DeltaNet": DeltaNetMixer,
    "gated DeltaNet": GatedDeltaNetMixer,
    "DeltaProduct": DeltaProductMixer,
    "gated DeltaProduct": GatedDeltaProductMixer,
}
OF_SEVERAL_STEPS = {"DeltaNet": "DeltaProduct", "gated DeltaNet": "gated DeltaProduct"}
MODEL_TYPES = dict(zip(MIXERS, (*KINDS, KINDS[-1]), strict=True))
GROUPED = ("gated DeltaNet", *OF_SEVERAL_STEPS.values())  # whose heads may share their keys
ATTENTION = {
    "attention": AttentionKind(head="q_head"),
    "windowed attention": AttentionKind(windowed=True, head="q_head"),
}
USUAL = (  # as the published checkpoints have them
    FlaKind("GLA", conv=False, gated=True),
    FlaKind("RetNet", conv=False, gated=True),
    FlaKind("HGRN2", conv=False, gated=False),
    FlaKind("DeltaNet", conv=True, gated=False),
    FlaKind("gated DeltaNet", conv=True, gated=True),
    FlaKind("gated DeltaProduct", conv=True, gated=True),
    *(FlaKind(attention, conv=False, gated=False) for attention in ATTENTION),
)


def mixing_of(mixer: Wrapped) -> str:
    """The word in `MIXERS` for a wrapped mixer, by the parts it has."""
    has = {*mixer._modules, *mixer._parameters}
    marks = {"gk_proj": "GLA", "f_proj": "HGRN2", "A_log": "gated DeltaNet", "b_proj": "DeltaNet"}
    otherwise = "RetNet" if has & set(RetentionMixer.norm_name) else "attention"  # which has no norm of its output
    found = next((mixing for mark, mixing in marks.items() if mark in has), otherwise)
    return OF_SEVERAL_STEPS.get(found, found) if steps_of(mixer) > 1 else found


def steps_of(mixer: Wrapped) -> int:
    """How many steps a token takes in a wrapped mixer: how often its keys are as wide as its queries."""
    if "b_proj" not in mixer._modules:
        return 1
    widths: list[int] = [projection.weight.shape[0] for projection in (mixer.k_proj, mixer.q_proj)]
    return widths[0] // widths[1]


def type_of(mixer: Wrapped, config: Mapping[str, Any]) -> str:
    """fla's model_type of a wrapped mixer. A DeltaProduct of one step is a DeltaNet by its parts, with words of its own."""
    product = KINDS[-1]
    return product if config.get("model_type") == product else MODEL_TYPES[mixing_of(mixer)]


def kind_of(mixer: Wrapped, sizes: Sizes, window: int | None = None) -> FlaKind:
    """What a wrapped mixer of these sizes is, by the parts it has; `window`: that of the layers of attention."""
    has = mixer._modules
    if mixing_of(mixer) == "attention":
        return FlaKind("attention" if window is None else "windowed attention", conv=False, gated=False)
    return FlaKind(mixing_of(mixer), "q_conv1d" in has, "g_proj" in has, grouped=sizes.groups < sizes.heads)


def block_points_of(kind: FlaKind) -> tuple[Point, ...]:
    """The rows of a block of this kind, in firing order."""
    ln1, ln2 = (norm_rows(ln, f"{name}_in", RMSNORM) for ln, name in (("ln1", "mixer"), ("ln2", "mlp")))
    if kind.mixing in ATTENTION:
        points, out = block_rows("attn", ATTENTION[kind.mixing].rows("Transformer, arXiv 1706.03762")), "o_proj(z)"
    else:
        points, out = block_rows("mixer", MIXERS[kind.mixing].rows(kind)), "o_proj(gated)"
    return residual_rows(
        SubRows("mixer", points, out, ln1),
        SubRows("mlp", block_rows("mlp", gated_mlp_rows(SILU.word)), "down_proj(post)", ln2),
    )


EVERY = tuple(
    FlaKind(mixing, conv, gated, grouped)
    for mixing in MIXERS
    for conv, gated, grouped in product((False, True), repeat=3)
    if not (mixing == "HGRN2" and gated) and (mixing in GROUPED or not grouped)
)
ROWS = {kind: block_points_of(kind) for kind in dict.fromkeys((*EVERY, *USUAL))}


class HookedFLA(PositionedModel):
    """`gl.from_pretrained("fla-hub/gla-1.3B-100B")`, `gl.wrap(GLAForCausalLM(...))`: one of fla's models, opened up.

    Heads (axis `head`) are those of the recurrences; those of layers of attention are `q_head`. Padding on either side or inside
    a row, and documents packed in a row, are as if each row stood alone. Heads of a recurrence that share keys and values
    (num_kv_heads) and feature maps are refused by name.

    In a DeltaProduct each of a token's steps (axis `step`) has a content x of its own, and so a matrix: implicit attention has a
    branch a step.
    """

    title = "Linear attention of fla"
    paper = "Yang et al., Gated Linear Attention Transformers with Hardware-Efficient Training (arXiv 2312.06635)"
    reference = (
        "fla-hub/gla-1.3B-100B",
        {
            "d_model": 2048,
            "channel": 2048,
            "head": 4,
            "value": 512,
            "group": 4,
            "state": 256,
            "tap": 4,
            "low": 16,
            "step": 2,
            "d_mlp": 5632,
        },
    )
    recurrence: ClassVar = {
        "decay": "exp(log_decay): of each number of a key (GLA, HGRN2), of each head (RetNet, gated DeltaNet); 1 in DeltaNet",
        "write": "u * k (of RetNet rot_k, of delta rules beta * k), [head, value, state]",
        "erase": "of delta rules beta * k, [head, state]",
        "probe": "of delta rules decay * k: it looks at the decayed state",
        "read": "q / sqrt(state.size) (of RetNet rot_q), [head, state]",
        "skip": "none",
        "conv": "causal depthwise convs over q, k and x, no bias, where a model has them",
        "activation before the scan": "SiLU: u = sigmoid(c) * c, behind a conv and in delta rules; else none",
        "gate": "an RMSNorm of the scan, then SiLU(gate_pre) where a model has a gate",
    }
    attention_words: ClassVar = {
        "x": "x",
        "o": "gated",
        "gate": "gate * w / scale",
        "scan": "S[i, j] = q[i] / sqrt(state.size) . T[i] ... T[j + 1] k[j], j <= i, of each head, T = diag(exp(log_decay)); "
        "with rot_q and rot_k in a RetNet; of a delta rule beta[j] * k[j], and T = (1 - beta * k k^T) exp(log_decay), without "
        "the decay in DeltaNet; 0 where a reset lies between, j < reset <= i",
        "skip": "none",
        "act": "sigmoid(conv): u = act * conv; 1 where no activation is",
        "conv": "M[i, j] = v_conv1d.weight[K - 1 - (i - j)], 0 <= i - j < K taps, within a document",
        "r": "0; with a carried state what its conv tail and its scan state bring",
        "attention layers": ATTENTION["attention"].words,
    }
    wraps = (
        "GLAForCausalLM",
        "RetNetForCausalLM",
        "HGRN2ForCausalLM",
        "DeltaNetForCausalLM",
        "GatedDeltaNetForCausalLM",
        "GatedDeltaProductForCausalLM",
        "FlaWeights",
    )
    layout = FlaLayout()
    small = TINY
    block_points = tuple(
        {row.name: row for rows in ROWS.values() for row in rows}.values()
    )  # of all kinds; see rows_for
    aliases = ALIASES
    carried: ClassVar = {
        "scan": Carried("scan", "batch head value state"),
        "conv": Carried("conv", "batch tail conv_channel"),
        **CARRIED_WINDOW,
        **NEXT_POSITION,
    }
    cfg: FlaConfig

    @classmethod
    def describe(cls, wrapped: Wrapped, model_name: str) -> FlaConfig:
        """The cfg of a wrapped model, from its config and the parts that its layers have."""
        given, layers = config_of(wrapped), wrapped.model.layers
        fields.check(given, FIELDS, f"{model_name}'s config")
        if len(layers) == 0:
            raise CheckpointError(f"{model_name} has no layers.")
        attention, recurrent = attention_of(given), [one for one in layers if mixing_of(one.attn) != "attention"]
        if not recurrent:
            raise CheckpointError(f"{model_name} has layers of attention alone: no recurrence to open.")
        if attention is None and len(recurrent) < len(layers):
            raise CheckpointError(f"{model_name} has layers of attention, of which its config says nothing (attn).")
        types = [type_of(layer.attn, given) for layer in recurrent]
        config, found = words(types[0], given), {sizes_of(name, given) for name in types}
        if len(found) > 1:
            raise CheckpointError(
                f"{model_name} has layers with heads of different sizes; gatedlens runs models of one."
            )
        sizes, weight = found.pop(), wrapped.model.embeddings.weight
        heads, groups, key, value = sizes
        window = None if attention is None else attention.window_size
        kinds = tuple(kind_of(layer.attn, sizes, window) for layer in layers)
        for number, layer in enumerate(layers):
            if layer not in recurrent:
                continue
            held = (layer.attn.q_proj.weight.shape[0], layer.attn.o_proj.weight.shape[1])
            if held != (groups * key, heads * value):
                raise CheckpointError(
                    f"Layer {number} of {model_name} has {held[0]} numbers of queries and {held[1]} of values; its config says "
                    f"{groups * key} and {heads * value}."
                )
        steps, said = {steps_of(layer.attn) for layer in recurrent}, config.get("num_householder", 1)
        if steps != {said if KINDS[-1] in types else 1}:
            raise CheckpointError(
                f"{model_name} has layers of {' and '.join(map(str, sorted(steps)))} steps a token (so often are its keys as "
                f"wide as its queries); its config says num_householder {said}."
            )
        convs = {layer.attn.q_conv1d.weight.shape[-1] for layer in layers if "q_conv1d" in layer.attn._modules}
        gla = [layer.attn for layer, kind in zip(layers, kinds, strict=True) if kind.mixing == "GLA"]
        return FlaConfig(
            model_name=model_name,
            architecture="fla",
            n_layers=len(layers),
            d_model=weight.shape[1],
            d_vocab=weight.shape[0],
            n_heads=heads,
            d_head=value,
            n_groups=groups,
            d_state=key,
            n_steps=steps.pop(),
            d_conv=max(convs, default=0),
            d_low=gla[0].gk_proj[0].weight.shape[0] if gla else 0,
            d_mlp=layers[0].mlp.up_proj.weight.shape[0],
            attn_only=False,
            positional_embedding_type="rotary" if {kind.mixing for kind in kinds} & {"RetNet", *ATTENTION} else "none",
            eps=float(config["norm_eps"]),
            dtype=weight.dtype,
            device=str(weight.device),
            original_architecture=type(wrapped).__name__,
            kinds=kinds,
            log_decay_divisor=float(vars(gla[0]).get("gate_logit_normalizer", 16)) if gla else 16.0,
            least_log_decay=config["clamp_min"],
            **_attention_sizes(attention, weight.shape[1]),
            beta_max=2.0 if config["allow_neg_eigval"] else 1.0,
            tie_word_embeddings=wrapped.lm_head.weight is weight,
        )

    @classmethod
    def kinds(cls) -> dict[str, tuple[Point, ...]]:
        """The rows of each kind of block, as the published checkpoints have it."""
        return {str(kind): ROWS[kind] for kind in USUAL}

    def rows_for(self, layer: int) -> tuple[Point, ...]:
        return ROWS[self.cfg.kinds[layer]]

    def make_block(self, layer: int) -> Block:
        w, cfg, rows = self.wrapped.model.layers[layer], self.cfg, self.rows_for(layer)
        ln1, ln2 = (Norm(norm, rows_of(ln, rows), cfg.eps) for ln, norm in (("ln1", w.attn_norm), ("ln2", w.mlp_norm)))
        mixing, points = cfg.kinds[layer].mixing, rows_of("mixer", rows)
        mlp = Sub("mlp", GatedMlp(w.mlp, rows_of("mlp", rows), SILU), ln2, ln="ln2")
        if mixing in ATTENTION:
            told, width = attention_of(config_of(self.wrapped)), cfg.d_attention_head
            theta = 10000.0 if told is None else told.rope_theta
            pairs = torch.arange(0, width, 2, dtype=torch.float64)
            rotary = SimpleNamespace(inv_freq=theta ** (-pairs / width))
            kind, of_attn = ATTENTION[mixing], rows_of("attn", rows)
            attn = Attention(w.attn, of_attn, layer, kind, width, window=cfg.window, rotary=rotary)
            return Block(w, rows, Sub("mixer", attn, ln1, place="attn"), mlp)  # where TransformerLens has attention
        if mixing == "HGRN2":
            mixer: FlaMixer = Hgrn2Mixer(w.attn, points, layer, cfg, self.wrapped.model)
        else:
            mixer = MIXERS[mixing](w.attn, points, layer, cfg)
        return Block(w, rows, Sub("mixer", mixer, ln1), mlp)

    def make_final_norm(self, rows: tuple[Point, ...]) -> Norm:
        return Norm(self.wrapped.model.norm, rows, self.cfg.eps)

    @property
    def embedding(self) -> Any:
        return self.wrapped.model.embeddings

    @property
    def unembedding(self) -> Any:
        return self.wrapped.lm_head


def _attention_sizes(told: AttentionWords | None, width: int) -> dict[str, Any]:
    """What cfg says of the layers of softmax attention."""
    if told is None:
        return {}
    return {
        "n_attention_heads": told.num_heads,
        "n_key_value_heads": told.num_kv_heads,
        "d_attention_head": width // told.num_heads,
        "window": told.window_size,
    }


HOOKED = HookedFLA
