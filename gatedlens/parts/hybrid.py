"""A hybrid of transformers as data: what stands in its layers, where transformers keeps it; and the model around it.

    BAMBA = Family("Bamba", "BambaForCausalLM", {"Mamba-2, MLP": (MAMBA, MLP), "attention, MLP": (ATTENTION, MLP)}, ...)
    BAMBA.rows["Mamba-2, MLP"]                              # the rows of such a layer, in firing order
    class HookedMamba2Hybrid(HybridModel): families = {"bamba": BAMBA, ...}

A layer is a tuple of `Branch`es, those in a tuple of their own side by side; from them come its rows and, of a wrapped model, its
block. Several families that differ in what stands around one mixer are one `HybridModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from gatedlens.address.point import Point, block_rows
from gatedlens.errors import CheckpointError
from gatedlens.model import fields
from gatedlens.model.base import Wrapped
from gatedlens.model.block import Block, Sub, SubRows, residual_rows
from gatedlens.model.config import HookedConfig
from gatedlens.model.hookpoint import Part, rows_of
from gatedlens.model.mixer import multiplied
from gatedlens.model.norm import Norm, norm_rows
from gatedlens.parts.attention import RMSNORM, check_rope
from gatedlens.parts.positioned import PositionedModel

EMBED = "blocks.0.hook_resid_pre"  # what blocks that several layers share read beside the stream: the embedding


class Site(NamedTuple):
    """Where a part is made: its module of the wrapped model, its rows, the layer; and the whole model with its config."""

    weights: Any
    rows: tuple[Point, ...]
    layer: int
    wrapped: Any

    @property
    def config(self) -> Any:
        """That of transformers."""
        return self.wrapped.config


class Branch(NamedTuple):
    """`Branch("mixer", ROWS, "out_proj(gated)", make, "mamba", "input_layernorm")`: one branch of a layer.

    out: what it puts out, in words; make: its part; weights, norm: the names of their modules in the wrapped layer (norm None: it
    has none). ln and place: where norm and part stand in our block (None: under the name); scale: what a channel mixer's output
    is multiplied by; after: the name of the norm of what the part puts out, {ln}_post in our block.
    """

    name: str
    rows: tuple[Point, ...]
    out: str
    make: Callable[[Site], Part]
    weights: str
    norm: str | None
    ln: str = "ln1"
    place: str | None = None
    scale: Callable[[Any], float] | None = None
    after: str | None = None

    def sub_rows(self) -> SubRows:
        """Its rows, with those of its norm."""
        part = block_rows(self.place or self.name, self.rows)
        norm = () if self.norm is None else norm_rows(self.ln, f"{self.name}_in", RMSNORM)
        if self.after is None:
            return SubRows(self.name, part, self.out, norm)
        after = f"{self.ln}_post"
        return SubRows(self.name, part, f"{after}.out", norm, norm_rows(after, self.out, RMSNORM))

    def sub(
        self, layer: int, wrapped: Any, inside: Any, rows: tuple[Point, ...], norm_of: Callable[[str, str], Norm]
    ) -> Sub:
        """The branch over layer `layer` of a wrapped model, which is `inside`; norm_of: our norm over one of its, by where it
        stands in our block."""
        weights = inside if not self.weights else getattr(inside, self.weights)
        part = self.make(Site(weights, rows_of(self.place or self.name, rows), layer, wrapped))
        norm = None if self.norm is None else norm_of(self.norm, self.ln)
        scale = 1.0 if self.scale is None else self.scale(wrapped.config)
        after_ln = f"{self.ln}_post"
        after = None if self.after is None else norm_of(self.after, after_ln)
        return Sub(self.name, part, norm, self.ln, self.place, after, after_ln, scale)


Layer = tuple[Branch | tuple[Branch, ...], ...]  # branches one after the other; those in a tuple are parallel


@dataclass(frozen=True)
class Family:
    """`Family("Bamba", "BambaForCausalLM", LAYERS, kind_of, told)`.

    wraps: its class in transformers; layers: by what they are called; kind_of(layer, config): what a wrapped layer is called;
    told(config): what its config says of it, as fields of our cfg. embedding, final_norm, eps: their names in the wrapped model
    and in its config; act: the activation of its MLPs; norm: what its norms are.
    """

    title: str
    wraps: str
    layers: Mapping[str, Layer]
    kind_of: Callable[[Any, Any], str]
    told: Callable[[Any], Mapping[str, Any]]
    embedding: str = "embed_tokens"
    final_norm: str = "final_layernorm"
    eps: str = "rms_norm_eps"
    act: str = "silu"
    norm: type[Norm] = Norm

    @cached_property
    def rows(self) -> dict[str, tuple[Point, ...]]:
        """The rows of each kind of layer."""
        return {kind: residual_rows(*map(_sub_rows, layer)) for kind, layer in self.layers.items()}

    def block(self, kind: str, layer: int, wrapped: Any) -> Block:
        """Our block over layer `layer` of a wrapped model."""
        inside, rows = wrapped.model.layers[layer], self.rows[kind]
        eps = float(getattr(wrapped.config, self.eps))

        def norm_of(name: str, ln: str) -> Norm:
            return self.norm(getattr(inside, name), rows_of(ln, rows), eps)

        def sub(one: Branch | tuple[Branch, ...]) -> Sub | tuple[Sub, ...]:
            if isinstance(one, Branch):
                return one.sub(layer, wrapped, inside, rows, norm_of)
            return tuple(branch.sub(layer, wrapped, inside, rows, norm_of) for branch in one)

        return Block(inside, rows, *map(sub, self.layers[kind]))


def _sub_rows(one: Branch | tuple[Branch, ...]) -> SubRows | tuple[SubRows, ...]:
    return one.sub_rows() if isinstance(one, Branch) else tuple(branch.sub_rows() for branch in one)


# -- the model ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class HybridConfig(HookedConfig):
    """What the cfg of every such hybrid says. n_heads and d_head are the attention's; `kinds`: what each layer is.

    0 stands for the sizes of what a model has none of.
    """

    head: ClassVar[str] = "head"  # what the axis of the attention's heads is called
    family: str
    kinds: tuple[str, ...]
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
        attention = {self.head: self.n_heads, "kv_head": self.n_key_value_heads, "d_head": self.d_head}
        experts = {"expert": self.n_experts, "d_expert": self.d_expert, "latent": self.d_latent}
        mlps = {"d_mlp": self.d_mlp or 0, "d_shared": self.d_shared}
        return {**super().sizes, **attention, **experts, **mlps}


class HybridModel(PositionedModel):
    """`class HookedMine(HybridModel)`: with `families` by model_type, the class of its cfg, and the sizes of its mixers."""

    families: ClassVar[Mapping[str, Family]]
    config_class: ClassVar[type[HybridConfig]]
    first_points = (
        Point("hook_embed", "batch pos d_model", "embedding[token] * embedding_multiplier", "the embedding"),
    )
    last_points = (
        Point("hook_logits", "batch pos d_vocab", "unembedding(ln_final.out) * logits_multiplier", "the unembedding"),
    )
    cfg: HybridConfig

    @classmethod
    def sizes_of_mixers(cls, wrapped: Wrapped, model_name: str) -> Mapping[str, Any]:
        """`HookedMamba2Hybrid.sizes_of_mixers(wrapped, "mine")`: the fields of the cfg that say what the mixers are.

        CheckpointError for what cannot be run.
        """
        raise NotImplementedError

    @classmethod
    def describe(cls, wrapped: Wrapped, model_name: str) -> HybridConfig:
        """The cfg of a wrapped model, from the shapes of its parameters and the few numbers that shapes do not tell."""
        config, layers = wrapped.config, wrapped.model.layers
        family, given = cls.families[config.model_type], config.to_dict()
        fields.check(given, cls.hub_fields, f"{model_name}'s config")
        if len(layers) == 0:
            raise CheckpointError(f"{model_name} has no layers.")
        if (act := given.get("hidden_act", family.act)) not in (
            family.act,
            "swish" if family.act == "silu" else family.act,
        ):
            raise CheckpointError(f"{model_name} has hidden_act={act!r}; supported is {family.act!r}.")
        inside = wrapped.model._modules
        check_rope(inside.get("rotary_emb", inside.get("pos_emb")), model_name)
        weight = getattr(wrapped.model, family.embedding).weight
        own = {
            "act_fn": family.act,
            "d_head": given.get("head_dim") or config.hidden_size // config.num_attention_heads,
            "positional_embedding_type": "rotary",
            **cls.sizes_of_mixers(wrapped, model_name),
            **family.told(config),
        }
        return cls.config_class(
            model_name=model_name,
            architecture=cls.__module__.rpartition(".")[2],
            family=family.title,
            n_layers=len(layers),
            d_model=weight.shape[1],
            d_vocab=weight.shape[0],
            n_heads=config.num_attention_heads,
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
        return self.families[self.wrapped.config.model_type]

    @classmethod
    def kinds(cls) -> dict[str, tuple[Point, ...]]:
        """The rows of each kind of block, of every family."""
        return kinds_of(cls.families)

    @property
    def hands_on(self) -> tuple[str, ...]:  # type: ignore[override]
        """The embedding, where a block that layers share reads it."""
        return (EMBED,) if any(block.inner for block in self.blocks) else ()

    def rows_for(self, layer: int) -> tuple[Point, ...]:
        return self.family.rows[self.cfg.kinds[layer]]

    def make_block(self, layer: int) -> Block:
        return self.family.block(self.cfg.kinds[layer], layer, self.wrapped)

    def make_final_norm(self, rows: tuple[Point, ...]) -> Norm:
        return self.family.norm(getattr(self.wrapped.model, self.family.final_norm), rows, self.cfg.eps)

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


def kinds_of(families: Mapping[str, Family]) -> dict[str, tuple[Point, ...]]:
    """`kinds_of({"bamba": BAMBA})["Bamba: attention, MLP"]`: the rows of each kind of layer, of every family."""
    alone = len(families) == 1
    return {
        kind if alone else f"{family.title}: {kind}": rows
        for family in families.values()
        for kind, rows in family.rows.items()
    }


def points_of(families: Mapping[str, Family]) -> tuple[Point, ...]:
    """`block_points` of such a model: the points of all kinds of layers, each once."""
    return tuple({row.name: row for rows in kinds_of(families).values() for row in rows}.values())
