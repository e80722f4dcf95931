"""Hybrids around Mamba-2: Bamba, Granite-4-H, Falcon-H1 and Nemotron-H; attention, MLPs and experts beside the scan.

    Bamba         h += mamba or attention (norm(h))               h += mlp(norm(h))                           bamba.py
    Granite-4-H   the same with multipliers                       h += r (experts(m) + shared_mlp(m))         granite.py
    Falcon-H1     h += a mamba(norm(h)) + b attention(norm(h))    h += mlp(norm(h))                           falcon_h1.py
    Nemotron-H    h += mamba, attention, mlp or experts (norm(h)), one a layer                                nemotron_h.py

The mixer is Mamba-2's (hooks/mamba2.py), word for word; what stands around it is data, a `Family` each (family.py). Wraps
transformers' classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.compat.names.mamba2_hybrid import ALIASES
from gatedlens.errors import CheckpointError
from gatedlens.formats.mamba2_hybrid import FIELDS, TINY
from gatedlens.hooks.mamba2 import HookedMamba2, Mamba2Shape
from gatedlens.hooks.mamba2_hybrid.bamba import BAMBA
from gatedlens.hooks.mamba2_hybrid.falcon_h1 import FALCON_H1
from gatedlens.hooks.mamba2_hybrid.family import Family
from gatedlens.hooks.mamba2_hybrid.granite import GRANITE, NO_POSITIONS
from gatedlens.hooks.mamba2_hybrid.nemotron_h import NEMOTRON_H
from gatedlens.model import fields
from gatedlens.model.base import Wrapped
from gatedlens.model.block import Block
from gatedlens.model.config import HookedConfig
from gatedlens.model.mixer import multiplied
from gatedlens.model.norm import Norm
from gatedlens.parts.attention import CARRIED_WINDOW, check_rope
from gatedlens.parts.positioned import NEXT_POSITION, PositionedModel

FAMILIES = {  # by the model_type of transformers
    "bamba": BAMBA,
    "granitemoehybrid": GRANITE,
    "falcon_h1": FALCON_H1,
    "nemotron_h": NEMOTRON_H,
}
ROWS = {f"{family.title}: {kind}": rows for family in FAMILIES.values() for kind, rows in family.rows.items()}


@dataclass(kw_only=True)
class Mamba2HybridConfig(HookedConfig):
    """cfg of a hybrid. n_heads and d_head are the attention's; `kinds`: what each layer is.

    0 stands for the sizes of what a model has none of.
    """

    family: str
    kinds: tuple[str, ...]
    n_mixer_heads: int
    d_inner: int
    d_state: int
    n_groups: int
    d_conv: int
    n_key_value_heads: int
    n_experts: int = 0
    n_experts_per_token: int = 0
    d_expert: int = 0
    d_shared: int = 0
    d_latent: int = 0
    embedding_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    tie_word_embeddings: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        value = self.d_inner // self.n_mixer_heads if self.n_mixer_heads else 0
        heads = {"channel": self.d_inner, "head": self.n_mixer_heads, "value": value}
        keys = {"group": self.n_groups, "state": self.d_state, "tap": self.d_conv}
        attention = {"q_head": self.n_heads, "kv_head": self.n_key_value_heads, "d_head": self.d_head}
        experts = {"expert": self.n_experts, "d_expert": self.d_expert, "latent": self.d_latent}
        mlps = {"d_mlp": self.d_mlp or 0, "d_shared": self.d_shared}
        return {**super().sizes, **heads, **keys, **attention, **experts, **mlps}


class HookedMamba2Hybrid(PositionedModel):
    """`HookedMamba2Hybrid(BambaForCausalLM(...))`, or better `gl.wrap(...)`: Bamba, Granite-4-H, Falcon-H1 and Nemotron-H opened up.

    Heads (axis `head`) are those of Mamba-2; the attention's are `q_head`. Padding on either side or inside a row, and documents
    packed in a row, are as if each row stood alone; a time step keeps its limits while decoding. (transformers lets a bias of
    in_proj into the state through padding on the left, and padding on the right into the state that a call leaves; packed
    documents run into one another; Bamba's positions begin anew where a cache goes on without position_ids.)
    """

    title = "Mamba-2 hybrids"
    paper = (
        "Bamba (huggingface.co/blog/bamba), Granite 4.0 (ibm.com/granite), Falcon-H1 (arXiv 2507.22448) and Nemotron-H "
        "(arXiv 2504.03624), around Mamba-2 (arXiv 2405.21060)"
    )
    reference = (
        "ibm-granite/granite-4.0-h-small",
        {
            "d_model": 4096, "channel": 8192, "head": 128, "value": 64, "state": 128, "group": 1, "tap": 4, "q_head": 32,
            "kv_head": 8, "d_head": 128, "d_mlp": 1536, "expert": 72, "d_expert": 768, "d_shared": 1536, "latent": 1024,
        },
    )  # fmt: skip
    recurrence: ClassVar = HookedMamba2.recurrence
    attention_words: ClassVar = {**HookedMamba2.attention_words, "attention layers": NO_POSITIONS.words}
    wraps = tuple(family.wraps for family in FAMILIES.values())
    hub_types = tuple(FAMILIES)
    hub_fields = FIELDS
    small = TINY
    block_points = tuple(
        {row.name: row for rows in ROWS.values() for row in rows}.values()
    )  # of all kinds; see rows_for
    first_points = (
        Point("hook_embed", "batch pos d_model", "embedding[token] * embedding_multiplier", "the embedding"),
    )
    last_points = (
        Point("hook_logits", "batch pos d_vocab", "unembedding(ln_final.out) * logits_multiplier", "the unembedding"),
    )
    aliases = ALIASES
    carried: ClassVar = {**HookedMamba2.carried, **CARRIED_WINDOW, **NEXT_POSITION}
    cfg: Mamba2HybridConfig

    @classmethod
    def describe(cls, wrapped: Wrapped, model_name: str) -> Mamba2HybridConfig:
        """The cfg of a wrapped model, from the shapes of its parameters and the few numbers that shapes do not tell."""
        config, layers = wrapped.config, wrapped.model.layers
        family, given = FAMILIES[config.model_type], config.to_dict()
        fields.check(given, cls.hub_fields, f"{model_name}'s config")
        if len(layers) == 0:
            raise CheckpointError(f"{model_name} has no layers.")
        check_rope(wrapped.model._modules.get("rotary_emb"), model_name)
        weight = getattr(wrapped.model, family.embedding).weight
        own = {
            "d_mlp": None,
            "act_fn": "silu",
            "positional_embedding_type": "rotary",
            **_sizes_of_mixers(wrapped, given, model_name),
            **family.told(config),
        }
        return Mamba2HybridConfig(
            model_name=model_name,
            architecture="mamba2_hybrid",
            family=family.title,
            n_layers=len(layers),
            d_model=weight.shape[1],
            d_vocab=weight.shape[0],
            n_heads=config.num_attention_heads,
            d_head=given.get("head_dim") or config.hidden_size // config.num_attention_heads,
            attn_only=False,
            eps=float(getattr(config, family.eps)),
            dtype=weight.dtype,
            device=str(weight.device),
            original_architecture=type(wrapped).__name__,
            kinds=tuple(family.kind_of(layer, config) for layer in layers),
            n_key_value_heads=config.num_key_value_heads,
            tie_word_embeddings=wrapped.lm_head.weight is weight,
            **own,
        )

    @property
    def family(self) -> Family:
        """Where things are in the wrapped model."""
        return FAMILIES[self.wrapped.config.model_type]

    @classmethod
    def kinds(cls) -> dict[str, tuple[Point, ...]]:
        """The rows of each kind of block, of every family."""
        return ROWS

    def rows_for(self, layer: int) -> tuple[Point, ...]:
        return self.family.rows[self.cfg.kinds[layer]]

    def make_block(self, layer: int) -> Block:
        return self.family.block(self.cfg.kinds[layer], layer, self.wrapped)

    def make_final_norm(self, rows: tuple[Point, ...]) -> Norm:
        return Norm(getattr(self.wrapped.model, self.family.final_norm), rows, self.cfg.eps)

    @property
    def embedding(self) -> Any:
        return getattr(self.wrapped.model, self.family.embedding)

    @property
    def unembedding(self) -> Any:
        return self.wrapped.lm_head

    # -- multipliers at both ends, where the model has them ------------------------------------------------------

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The embedding as it enters the residual stream."""
        return multiplied(self.embedding.weight, self.cfg.embedding_multiplier)

    def embed(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        return multiplied(super().embed(tokens), self.cfg.embedding_multiplier)

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding, times what the logits are multiplied by."""
        return multiplied(self.unembedding.weight.T, self.cfg.logits_multiplier)

    def unembed(self, normed: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
        return multiplied(super().unembed(normed), self.cfg.logits_multiplier)

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        total = super().accumulated_bias(layer, mlp_input)
        for block in self.blocks[:layer] if include_mlp_biases else ():
            down = block.mlp.weights._modules.get("down_proj") if "mlp" in block._modules else None
            bias = None if down is None else down.bias
            total = total if bias is None else total + bias
        return total


def _sizes_of_mixers(wrapped: Wrapped, given: Any, model_name: str) -> dict[str, int]:
    """The sizes of the Mamba-2 mixers, all 0 in a model without; CheckpointError for one that differs or is laid out otherwise."""
    found = {}
    for number, layer in enumerate(wrapped.model.layers):
        mixer = layer._modules.get("mamba") or layer._modules.get("mixer")
        if mixer is None or "A_log" not in mixer._parameters:
            continue
        if vars(mixer)["activation"] not in ("silu", "swish"):
            raise CheckpointError(
                f"{model_name} has the activation {mixer.activation!r} in a mixer; supported is 'silu'."
            )
        shape = Mamba2Shape.of(mixer, given)
        shape.check(mixer, f"Layer {number} of {model_name}")
        found[shape.n_heads, shape.d_inner, shape.d_state, shape.n_groups, mixer.conv1d.weight.shape[-1]] = number
    if len(found) > 1:
        raise CheckpointError(f"{model_name} has mixers of different sizes, in layers {sorted(found.values())}.")
    names = ("n_mixer_heads", "d_inner", "d_state", "n_groups", "d_conv")
    return dict(zip(names, next(iter(found), (0,) * len(names)), strict=True))


HOOKED = HookedMamba2Hybrid
