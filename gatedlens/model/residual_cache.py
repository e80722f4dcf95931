"""ResidualCache: the residual stream of a cached run, decomposed into our components by TransformerLens's methods.

    parts, labels = cache.decompose_resid(return_labels=True)      # embed, 0_mixer_out, 0_mlp_out, ...
    cache.logit_attrs(parts, tokens=" whale")                      # each component's share of a logit; they sum to it
    cache.accumulated_resid(apply_ln=True)                         # the stream before each layer, through the final norm
    cache.stack_head_results(return_labels=True)                   # what each head writes: L0H0, L0H1, ...

What TransformerLens computes for neurons says what there is instead. ActivationCache (cache.py) inherits all this.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch
import transformer_lens
from jaxtyping import Float
from torch import Tensor
from transformer_lens.utilities import Slice

from gatedlens.address.key import Key
from gatedlens.address.layers import layer_of
from gatedlens.address.point import Found
from gatedlens.errors import InputError, PointError
from gatedlens.model.batch import Option
from gatedlens.model.by_head import head_outputs, writing_of
from gatedlens.model.keeping import SliceLike
from gatedlens.model.norm import Norm

# Whose logits are meant: a text of one token, an id, ids [batch] or [batch, pos]. For editors and type checkers; whoever passes
# something else gets the error of the function that reads it.
if TYPE_CHECKING:
    from gatedlens.model.base import HookedModel

    TokensOfLogits: TypeAlias = str | int | Sequence[Any] | Tensor
else:
    HookedModel = TokensOfLogits = Any


class ResidualCache(transformer_lens.ActivationCache):
    """TransformerLens's ActivationCache, where it takes a model for a transformer; `find(key)` is ActivationCache's."""

    model: HookedModel

    def find(self, key: Key) -> Found:
        """The point or view that `key` stands for; PointError for none."""
        raise NotImplementedError

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: str = "all",
        apply_ln: bool = False,
        pos_slice: SliceLike = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Float[Tensor, "component ..."] | tuple[Float[Tensor, "component ..."], list[str]]:
        """`parts, labels = cache.decompose_resid(return_labels=True)`: [component, batch, pos, d_model], as
        TransformerLens's.

        The residual stream before `layer` (None, -1: the last one) as a sum of what was written into it.

        Components: `embed`, then each block's `{l}_mixer_out` (and `{l}_mlp_out` where it has one, and `{l}_norm1_out` where
        the stream itself is normed). `mode` "attn" keeps the mixers, "mlp" the channel mixers. They sum to `resid_pre` of the
        layer.
        """
        layer = self._boundary(layer)
        if mlp_input:
            self.find(("resid_mid", layer))
        slice_ = pos_slice if isinstance(pos_slice, Slice) else Slice(pos_slice)
        wanted = [("embed", "blocks.0.hook_resid_pre")] if incl_embeds else []  # the embedding as the stream holds it
        if mode not in ("all", "attn", "mlp"):
            raise InputError(f"mode={mode!r}: it is 'all', 'attn' (the mixers) or 'mlp'.")
        for block in range(layer + 1 if mlp_input else layer):
            groups = self.model.names.branches(block)
            groups = groups if block < layer else tuple(takewhile(lambda group: "mlp" not in group, groups))
            some = {"attn": self.model.blocks[block].mixing, "mlp": ("mlp",)}.get(mode)
            kinds = [kind for group in groups for kind in group if some is None or kind in some]
            wanted += [(f"{block}_{kind}_out", f"blocks.{block}.hook_{kind}_out") for kind in kinds]
        stream = slice_.apply(self["resid_pre", 0], dim=-2)
        parts = stream.new_zeros(len(wanted), *stream.shape)
        for part, (_, name) in zip(parts, wanted, strict=True):
            part += slice_.apply(self[name], dim=-2)
        if apply_ln:
            parts = self.apply_ln_to_stack(parts, layer, pos_slice=slice_, mlp_input=mlp_input)
        return (parts, [label for label, _ in wanted]) if return_labels else parts

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: SliceLike = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Float[Tensor, "component ..."] | tuple[Float[Tensor, "component ..."], list[str]]:
        """`cache.accumulated_resid(apply_ln=True)`: [layer, batch, pos, d_model], as TransformerLens's.

        The residual stream before each layer up to `layer` (None, -1: all, and the last one), as TransformerLens's. incl_mid:
        also in the middle of each layer before it, where a layer has one (between its mixer and its channel mixer).
        """
        boundary = self._boundary(layer)
        has_mid = [f"blocks.{i}.hook_resid_mid" in self.model.names for i in range(boundary)]
        if not incl_mid or all(has_mid):
            return super().accumulated_resid(boundary, incl_mid, apply_ln, pos_slice, mlp_input, return_labels)
        wanted = [(f"{i}_pre", ("resid_pre", i)) for i in range(boundary + 1) if i < len(self.model.blocks)]
        wanted += [("final_post", ("resid_post", boundary - 1))] if boundary == len(self.model.blocks) else []
        for i in (i for i in reversed(range(boundary)) if has_mid[i]):
            wanted.insert(i + 1, (f"{i}_mid", ("resid_mid", i)))
        slice_ = Slice.unwrap(pos_slice)
        parts = torch.stack([slice_.apply(self[key], dim=-2) for _, key in wanted])
        if apply_ln:
            again = boundary == len(self.model.blocks)
            parts = self.apply_ln_to_stack(
                parts,
                boundary,
                pos_slice=slice_,
                mlp_input=mlp_input,
                has_batch_dim=self.has_batch_dim,
                recompute_ln=again,
            )
        return (parts, [label for label, _ in wanted]) if return_labels else parts

    def _boundary(self, layer: int | None) -> int:
        """The layer before which a residual stream is read; n_layers is the end."""
        n_layers = self.model.cfg.n_layers
        if layer is None or layer == -1:
            return n_layers
        if not 0 <= layer <= n_layers:
            raise InputError(
                f"layer={layer}: a residual stream is read before layer 0 to {n_layers - 1}, or at the end ({n_layers}, -1)."
            )
        return layer

    def logit_attrs(
        self,
        residual_stack: Float[Tensor, "component ..."],
        tokens: TokensOfLogits,
        incorrect_tokens: TokensOfLogits | None = None,
        pos_slice: SliceLike = None,
        batch_slice: SliceLike = None,
        has_batch_dim: bool = True,
    ) -> Float[Tensor, "component ..."]:
        """`cache.logit_attrs(cache.decompose_resid(), tokens=" whale")`: each component's share of the tokens' logits.

            share = gain * (component - its mean, under a LayerNorm) / ln_final.scale . W_U[:, token]

        As TransformerLens's, with the final norm's own weight (`gain`), which TransformerLens leaves out unless it was
        folded into W_U: the shares of `decompose_resid()` sum to the logit (before a soft cap), less the constant that
        b_U and the norm's bias add. tokens: one, [batch] or [batch, pos]; less `incorrect_tokens`' if given.
        """
        rows = batch_slice if isinstance(batch_slice, Slice) else Slice(batch_slice)
        scaled = self.apply_ln_to_stack(residual_stack, -1, False, pos_slice, rows, has_batch_dim)
        along = self.model.tokens_to_residual_directions(tokens)
        if incorrect_tokens is not None:
            other = self.model.tokens_to_residual_directions(incorrect_tokens)
            if along.shape != other.shape:
                shapes = f"{list(along.shape[:-1])} and {list(other.shape[:-1])}"
                raise InputError(
                    f"tokens and incorrect_tokens have the shapes {shapes}: each token needs its opposite."
                )
            along = along - other
        a_token_a_row = along.ndim == 2 and scaled.ndim == 4 and has_batch_dim and rows.mode != "int"
        if a_token_a_row and along.shape[0] == scaled.shape[1]:
            along = along.unsqueeze(1)
        gain = self.model.ln_final.gain_behind
        return ((scaled if gain is None else scaled * gain) * along).sum(-1)

    def apply_ln_to_stack(
        self,
        residual_stack: Float[Tensor, "component ..."],
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: SliceLike = None,
        batch_slice: SliceLike = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Float[Tensor, "component ..."]:
        """`cache.apply_ln_to_stack(parts)`: as TransformerLens's, what components become behind the norm of a layer, its
        scale held (recompute_ln: computed anew, behind the final one).

        Where a norm does more (Qwen4's reads several copies of the stream), all of that is held, its gain with it.
        """
        name = (
            "ln_final"
            if layer in (None, -1, self.model.cfg.n_layers)
            else f"blocks.{layer}.{'ln2' if mlp_input else 'ln1'}"
        )
        norm = self.model.get_submodule(name) if f"{name}.hook_scale" in self.model.names.points else None
        if not isinstance(norm, Norm) or norm.gain_behind is not None:
            return super().apply_ln_to_stack(
                residual_stack, layer, mlp_input, pos_slice, batch_slice, has_batch_dim, recompute_ln
            )
        positions, rows = (one if isinstance(one, Slice) else Slice(one) for one in (pos_slice, batch_slice))

        def cached(point: str) -> Tensor:
            held = positions.apply(self[f"{name}.{point}"], dim=-2)
            return rows.apply(held, dim=0) if has_batch_dim else held

        stack = rows.apply(residual_stack, dim=1) if has_batch_dim else residual_stack
        if recompute_ln and name == "ln_final":
            return torch.stack([norm(one) for one in stack])
        return norm.scaled(stack, cached)

    def logit_lens(self, **options: Option) -> object:
        """`cache.logit_lens(positions=None)`: TransformerLens's. It reads vectors of d_model, so a final norm that makes
        narrower ones of it is refused."""
        if self.model.ln_final.gain_behind is None:
            raise InputError(
                f"cache.logit_lens() reads vectors of d_model numbers, and the unembedding of {self.model.cfg.model_name} reads "
                f"{len(self.model.W_U)} of {self.model.cfg.d_model}: gl.lens.logit_lens(model, text) reads the stream at every "
                "layer."
            )
        return super().logit_lens(**options)

    def _get_cached_ln_scale(self, layer: int | None, mlp_input: bool, *given: Any, **options: Any) -> Tensor:
        """As TransformerLens's; a layer that reads the stream as it is (OLMo-hybrid's attention is normed behind) says so."""
        norm = "ln2" if mlp_input else "ln1"
        if layer is not None and layer < self.model.cfg.n_layers:
            name = f"blocks.{layer}.{norm}.hook_scale"
            if name not in self.model.names.points:
                part = "channel mixer" if mlp_input else "mixer"
                raise PointError(
                    f"apply_ln: the {part} of layer {layer} of {self.model.cfg.model_name} reads the residual stream as it is, "
                    f"there is no {name}. apply_ln=False gives what it reads."
                )
        scale: Tensor = super()._get_cached_ln_scale(layer, mlp_input, *given, **options)
        return scale

    # -- heads ---------------------------------------------------------------------------------------------------

    def head_results(self, layer: int) -> Float[Tensor, "*batch pos head d_model"]:
        """`cache.head_results(0)`: [batch, pos, head, d_model], what each head of a layer writes into the residual stream.

        That is W_out of what the head gives to the output projection; the heads sum to `hook_mixer_out`, but for the projection's
        bias. TransformerLens's `cache["result", 0]` is the same. PointError for a layer without heads, and where the cache lacks
        its output point.
        """
        layer = layer_of(self.model, layer)
        block, name = self.model.blocks[layer], self._head_outputs().get(layer)
        if name is None:
            raise self.model.names.lacking(block.mixer.output_name, "head", self.model.cfg.sizes)
        return writing_of(self.model, layer, self.__getitem__).by_heads(self[name], self.model.cfg.sizes["head"])

    def _head_outputs(self) -> dict[int, str]:
        """The output point of each layer that has heads; a PointError that says so where none has."""
        return head_outputs(self.model) or self._no_heads()

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: SliceLike = None,
        apply_ln: bool = False,
    ) -> Float[Tensor, "component ..."] | tuple[Float[Tensor, "component ..."], list[str]]:
        """`parts, labels = cache.stack_head_results(return_labels=True)`: [component, batch, pos, d_model], as TransformerLens's.

        What every head of the layers before `layer` (None, -1: of all) writes: `L0H0`, `L0H1`, ...; layers without heads have
        none. incl_remainder: what else the residual stream holds there, `remainder`. PointError for a model without heads.
        """
        outputs, end = self._head_outputs(), self._boundary(layer)
        slice_ = pos_slice if isinstance(pos_slice, Slice) else Slice(pos_slice)
        stream = slice_.apply(
            self["resid_pre", end] if end < self.model.cfg.n_layers else self["resid_post", -1], dim=-2
        )
        found, labels = [stream.new_zeros(0, *stream.shape)], list[str]()
        for number in [one for one in outputs if one < end]:
            results = slice_.apply(self.head_results(number), dim=-3).to(stream)
            found.append(results.movedim(-2, 0))
            labels += [f"L{number}H{head}" for head in range(len(found[-1]))]
        parts = torch.cat(found)
        if incl_remainder:
            parts, labels = torch.cat([parts, (stream - parts.sum(0)).unsqueeze(0)]), [*labels, "remainder"]
        if apply_ln:
            parts = self.apply_ln_to_stack(parts, end, pos_slice=slice_)
        return (parts, labels) if return_labels else parts

    def compute_head_results(self) -> None:
        """`cache.compute_head_results()`: keep `head_results` of every layer that has heads, as TransformerLens's does.

        They stand under `blocks.{l}.mixer.hook_result`, in TransformerLens's layout; `cache["result", 0]` needs no such call.
        """
        for layer in self._head_outputs():
            self.cache_dict[f"blocks.{layer}.{self.model.blocks[layer].mixer.place}.hook_result"] = self.head_results(
                layer
            )

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: SliceLike = None,
        return_labels: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Float[Tensor, "component ..."] | tuple[Float[Tensor, "component ..."], list[str]]:
        """`parts, labels = cache.get_full_resid_decomposition(return_labels=True)`: the residual stream before `layer` (None, -1:
        at the end) by heads, as TransformerLens's.

        Components: every head (`L0H0`), then the mixers without heads and the channel mixers (`0_mlp_out`; expand_neurons=False
        where there are any), `embed`, and `bias`, that of the output projections. They sum to the stream. project_output_onto:
        [d_model] or [d_model, some]. PointError for a model without heads, and for neurons.
        """
        outputs, end = self._head_outputs(), self._boundary(layer)
        slice_ = pos_slice if isinstance(pos_slice, Slice) else Slice(pos_slice)
        parts, names = self.decompose_resid(end, mlp_input, pos_slice=slice_, return_labels=True)
        if expand_neurons and any(name.endswith("_mlp_out") for name in names):
            self._no_neurons()
        upto = end + 1 if mlp_input else end
        heads, labels = self.stack_head_results(upto, True, pos_slice=slice_)
        split = {f"{number}_mixer_out" for number in outputs if number < upto}
        whole = [i for i, name in enumerate(names) if name not in split]
        bias = parts[[i for i, name in enumerate(names) if name in split]].sum(0) - heads.sum(0)
        order = [*(i for i in whole if names[i] != "embed"), *(i for i in whole if names[i] == "embed")]
        stack = torch.cat([heads, parts[order], bias.unsqueeze(0)])
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, end, mlp_input, pos_slice=slice_)
        if project_output_onto is not None:
            stack = stack @ project_output_onto.to(stack)
        return (stack, [*labels, *(names[i] for i in order), "bias"]) if return_labels else stack

    # -- what TransformerLens computes for attention heads, neurons and its own SSM bridges alone --------------------------

    def _no_heads(self, *_: object, **__: object) -> NoReturn:
        raise PointError(
            f"{self.model.cfg.model_name} is not made of attention heads: decompose_resid() splits the residual stream into "
            "mixers and channel mixers, and gl.implicit_attention(cache, layer=...).contributions() a mixer into tokens."
        )

    def _no_neurons(self, *_: object, **__: object) -> NoReturn:
        raise PointError(
            f"{self.model.cfg.model_name} has gated channel mixers, whose neurons are no terms of a sum of W_out's rows "
            "alone: decompose_resid(mode='mlp') gives the channel mixers, their points what is inside."
        )

    def _no_ssm_bridge(self, *_: object, **__: object) -> NoReturn:
        raise PointError(
            "This is for TransformerLens's own bridge. Here gl.implicit_attention(cache, layer=...).only('scan').dense() is "
            "the scan's matrix, and cache['state', layer] its states, with names_filter='blocks.*.hook_state'."
        )

    get_neuron_results = stack_neuron_results = _no_neurons
    ssm_layers = compute_ssm_state = compute_ssm_effective_attention = _no_ssm_bridge
