"""ActivationCache: TransformerLens's, with our names, and everything that an analysis needs beside the tensors.

logits, cache = model.run_with_cache("The cat sat on the mat", names_filter=["blocks.*.mixer.hook_dt", "hook_embed"])
cache["dt", 3]                      # also: cache["blocks.3.mixer.hook_dt"], cache["blocks.3.hook_delta"] (MambaLens)
cache.select(("scan", 3), head=2)   # some entries: batch pos value
cache.tokens, cache.mask, cache.state, cache.documents
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import numpy
import torch
import transformer_lens
from jaxtyping import Float, Shaped
from torch import Tensor
from transformer_lens.utilities import Slice

from gatedlens.address.composite import picked
from gatedlens.address.entries import Index, Where
from gatedlens.address.layers import layer_of
from gatedlens.address.names import SHORTHAND
from gatedlens.address.point import Found
from gatedlens.errors import InputError, PointError, did_you_mean
from gatedlens.model.hookpoint import HookPoint, Saver
from gatedlens.recurrence.autocast import exact

# For editors and type checkers; whoever passes something else gets the error of the function that reads it.
#
# Key            what a cache is asked for: a name, or TransformerLens's shorthand (word, layer[, part])
# SliceLike      what `pos_slice=` and `batch_slice=` take: some positions of the input as it is laid out, or some rows
# TokensOfLogits whose logits are meant: a text of one token, an id, ids [batch] or [batch, pos]
if TYPE_CHECKING:
    from gatedlens.model.base import HookedModel
    from gatedlens.model.state import RecurrentState

    Key: TypeAlias = str | tuple[str] | tuple[str, int] | tuple[str, int, str]
    SliceLike: TypeAlias = (
        int | slice | tuple[int, ...] | Sequence[int] | numpy.ndarray[Any, Any] | Tensor | Slice | None
    )
    TokensOfLogits: TypeAlias = str | int | Sequence[Any] | Tensor
else:
    HookedModel = RecurrentState = Key = SliceLike = TokensOfLogits = Any

# ResidualCache: the residual stream of a cached run, decomposed into our components by TransformerLens's methods.
#
#     parts, labels = cache.decompose_resid(return_labels=True)      # embed, 0_mixer_out, 0_mlp_out, ...
#     cache.logit_attrs(parts, tokens=" whale")                      # each component's share of a logit; they sum to it
#     cache.accumulated_resid(apply_ln=True)                         # the stream before each layer, through the final norm
#
#     cache.stack_head_results(return_labels=True)                   # what each head writes: L0H0, L0H1, ...
#
# What TransformerLens computes for neurons says what there is instead. ActivationCache inherits all this.


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

        Components: `embed`, then each block's `{l}_mixer_out` (and `{l}_mlp_out` where it has one). `mode` "attn"
        keeps the mixers, "mlp" the channel mixers. They sum to `resid_pre` of the layer.
        """
        layer = self._boundary(layer)
        if mlp_input:
            self.find(("resid_mid", layer))
        slice_ = pos_slice if isinstance(pos_slice, Slice) else Slice(pos_slice)
        wanted = [("embed", "blocks.0.hook_resid_pre")] if incl_embeds else []  # the embedding as the stream holds it
        if mode not in ("all", "attn", "mlp"):
            raise InputError(f"mode={mode!r}: it is 'all', 'attn' (the mixers) or 'mlp'.")
        for block in range(layer + 1 if mlp_input else layer):
            kinds = [kind for group in self.model.names.branches(block) for kind in group]
            kinds = kinds if block < layer else kinds[: kinds.index("mlp")]
            kinds = [kind for kind in kinds if mode == "all" or (mode == "mlp") == (kind == "mlp")]
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

        The residual stream before each layer up to `layer` (None, -1: all, and the last one), as TransformerLens's.
        """
        boundary = self._boundary(layer)
        return super().accumulated_resid(boundary, incl_mid, apply_ln, pos_slice, mlp_input, return_labels)

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
        return (scaled * self.model.ln_final.gain * along).sum(-1)

    # -- heads ---------------------------------------------------------------------------------------------------

    def head_results(self, layer: int) -> Float[Tensor, "*batch pos head d_model"]:
        """`cache.head_results(0)`: [batch, pos, head, d_model], what each head of a layer writes into the residual stream.

        That is W_out of what the head gives to the output projection; the heads sum to `hook_mixer_out`, but for the projection's
        bias. TransformerLens's `cache["result", 0]` is the same. PointError for a layer without heads, and where the cache lacks
        its output point.
        """
        layer = layer_of(self.model, layer)
        mixer, name = self.model.blocks[layer].mixer, self._head_outputs().get(layer)
        if name is None:
            asked = f"blocks.{layer}.{mixer.place}.{mixer.output_point}"
            raise self.model.names.lacking(asked, "head", self.model.cfg.sizes)
        point, sizes = self.model.names.points[name], self.model.cfg.sizes
        o, weight = self[name], mixer.output_weights()[0]
        o = o.flatten(-2) if "head" in point.dims else o
        with exact(o):
            return torch.einsum(
                "...hv,dhv->...hd",
                o.unflatten(-1, (sizes["head"], -1)).to(weight.dtype),
                weight.to(o.device).unflatten(1, (sizes["head"], -1)),
            )

    def _head_outputs(self) -> dict[int, str]:
        """The output point of each layer that has heads; a PointError that says so where none has."""
        mixers = [(layer, block.mixer) for layer, block in enumerate(self.model.blocks)]
        names = {layer: f"blocks.{layer}.{mixer.place}.{mixer.output_point}" for layer, mixer in mixers}
        points, sizes = self.model.names.points, self.model.cfg.sizes
        return {layer: name for layer, name in names.items() if points[name].reaches("head", sizes)} or self._no_heads()

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


class ActivationCache(ResidualCache):
    """What one run fired. `tokens`, `mask` and `state` are what the run was given (None where it was not); `sliced` says
    whether only some positions were kept; `documents` [batch, pos] counts the documents that position_ids told of.

    Keys: a full name, another tool's name for it, or TransformerLens's shorthand (word, layer[, part]). Gradients of an
    `incl_bwd` run stand under the name with `_grad` behind it.
    """

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        model: HookedModel,
        has_batch_dim: bool = True,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        state: RecurrentState | None = None,
        sliced: bool = False,
        documents: Tensor | None = None,
    ):
        super().__init__(cache_dict, model, has_batch_dim=has_batch_dim)
        self.tokens = tokens
        self.mask = mask
        self.state = state
        self.sliced = sliced
        self.documents = documents

    def find(self, key: Key) -> Found:
        """`cache.find(("dt", 3))`: the point or view that a key stands for in this model.

        key: a full name, an alias, or TransformerLens's (word, layer[, part]). PointError for one that the model lacks.
        """
        names = self.model.names
        if isinstance(key, str):
            plain = re.fullmatch(r"(?!hook_)[A-Za-z_0-9]+", key)
            return names.short(key) if plain and not SHORTHAND.fullmatch(key) else names.find(key)
        if not isinstance(key, tuple) or not 1 <= len(key) <= 3:
            raise PointError(f"{key!r} is no key of a cache: use a name, or (word, layer), or (word, layer, part).")
        return names.short(*key)

    def __getitem__(self, key: Key) -> Tensor:
        if isinstance(key, str) and key in self.cache_dict:
            return self.cache_dict[key]
        if isinstance(key, tuple) and key[0:1] == ("result",) and 1 < len(key) < 4:  # TransformerLens's word
            return self.head_results(key[1])
        suffix = ""
        if isinstance(key, str) and key.endswith("_grad"):
            key, suffix = key[: -len("_grad")], "_grad"
        found = self.find(key)
        if found.view is None:
            return self._stored(found.name + suffix, key)
        if suffix:
            raise PointError(f"{key!r} is computed from {', '.join(found.needs())}: ask for their gradients.")
        values = [self._stored(name, key) for name in found.needs()]
        params = {k: v for k, v in found.params.items() if k != "l"}
        if "t" in params:
            self._check_position(key, params["t"], values[0])
        return found.view.read(self.model, found.layer, *values, **params)

    def select(self, key: Key, **index: Index) -> Shaped[Tensor, ...]:
        """`cache.select(("scan", 0), head=2)`: the entries of a cached activation by its axes, or by what these make up.

        index: any axis but batch and pos: a number, which takes the axis away, or a slice, list or mask, which keeps it. So
        head=2 of [batch pos channel] is [batch pos value], head=[0, 2] [batch pos head value], and channel=[3, 5] of a state
        [batch pos head value state] is [batch pos channel state]. PointError for an axis that the point lacks, for two that
        overlap, and for a view; InputError for an index out of range.
        """
        name, grad = (key[: -len("_grad")], "_grad") if isinstance(key, str) and key.endswith("_grad") else (key, "")
        found = self.find(name)
        if found.view is not None:
            raise PointError(f"{key!r} is computed from {', '.join(found.needs())}: select entries of these.")
        for axis in ("batch", "pos"):
            if axis in index:
                raise InputError(
                    f"{axis}={index[axis]!r}: rows are chosen by apply_slice_to_batch_dim, positions by pos_slice, or either of "
                    "the tensor that you get."
                )
        where, point, sizes = Where((), index), self.model.names.points[found.name], self.model.cfg.sizes
        where.check(found.name, self.model.names, sizes)
        value = self._stored(found.name + grad, key)
        value = value if self.has_batch_dim else value.unsqueeze(0)
        chosen = picked(value, point, where.at(found.name), sizes, found.name)
        return chosen if self.has_batch_dim else chosen.squeeze(0)

    def _check_position(self, key: Any, t: int, states: Tensor) -> None:
        if self.sliced:
            raise PointError(
                f"{key!r}: this cache keeps only some positions (pos_slice); read them from its hook_state."
            )
        if t >= states.shape[-3]:
            raise PointError(f"{key!r}: there are {states.shape[-3]} positions, 0 to {states.shape[-3] - 1}.")

    def apply_slice_to_batch_dim(self, batch_slice: SliceLike) -> ActivationCache:
        """`cache.apply_slice_to_batch_dim(slice(0, 4))`: a cache of some rows of the batch, with their tokens, mask and
        state.

        batch_slice: a number, a slice or a list of row numbers, or TransformerLens's Slice.
        """
        rows = batch_slice if isinstance(batch_slice, Slice) else Slice(batch_slice)
        part = super().apply_slice_to_batch_dim(rows)
        given = (self.tokens, self.mask, self.documents)
        tokens, mask, documents = (None if t is None else rows.apply(t, dim=0) for t in given)
        state = None if self.state is None else self.state.map(lambda t: rows.apply(t, dim=0))
        return ActivationCache(
            part.cache_dict, self.model, part.has_batch_dim, tokens, mask, state, self.sliced, documents
        )

    def _stored(self, name: str, asked: Any) -> Tensor:
        if name in self.cache_dict:
            return self.cache_dict[name]
        known = list(self.cache_dict)
        point = self.model.names.points.get(name)
        if point is not None and point.lazy:
            why = (
                f"{name} is lazy, so the default leaves it out: ask for it, run_with_cache(..., names_filter={name!r})."
            )
        else:
            why = f"It holds {len(known)} activations: {', '.join(known[:3])}, ..." if known else "It is empty."
            why += did_you_mean(name, known)
        raise PointError(f"{asked!r} ({name}) is not in this cache. {why}")

    def __contains__(self, key: Any) -> bool:
        if isinstance(key, str) and key in self.cache_dict:
            return True
        try:
            return all(name in self.cache_dict for name in self.find(key).needs())
        except PointError:
            return False

    def __repr__(self) -> str:
        size = sum(t.numel() * t.element_size() for t in self.cache_dict.values())
        names = ", ".join(list(self.cache_dict)[:3])
        return f"ActivationCache({len(self)} activations, {size / 2**20:.1f} MiB: {names}, ...)"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__


class Keep(Saver):
    """The hook behind run_with_cache: a detached copy, on `device`, of the positions `pos_slice` picks."""

    def __init__(self, store: dict[str, Tensor], device: Any, remove_batch_dim: bool, pos_slice: Slice):
        self.store = store
        self.device = device
        self.remove_batch_dim = remove_batch_dim
        self.pos_slice = pos_slice

    def trim(self, tensor: Tensor, point: HookPoint) -> Tensor:
        """The part of an activation (or of its gradient) that is kept."""
        if point.pos_dim is not None:
            tensor = self.pos_slice.apply(tensor, dim=point.pos_dim)
        if self.remove_batch_dim and tensor.shape[0] == 1:
            tensor = tensor[0]
        return tensor

    def __call__(self, tensor: Tensor, hook: Any) -> None:
        kept = self.trim(tensor.detach(), hook)
        moves = self.device is not None and self.device != kept.device
        self.store[hook.name] = kept.to(self.device) if moves else kept.clone()


class KeepLive:
    """The hook behind run_with_cache(incl_bwd=True): what `Keep` keeps, and the tensor itself, for its gradient."""

    def __init__(self, keep: Keep, live: dict[str, tuple[Tensor, HookPoint]]):
        self.keep = keep
        self.live = live

    def __call__(self, tensor: Tensor, hook: Any) -> Tensor:
        self.keep(tensor, hook)
        leaf = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        self.live[hook.name] = (leaf, hook)
        return leaf.clone()


def gradients(
    out: Tensor, live: dict[str, tuple[Tensor, HookPoint]], keep: Callable[[Tensor, HookPoint], Tensor]
) -> dict[str, Tensor]:
    """`{name_grad: d out / d activation}`; zeros where `out` does not depend on it. Parameters' .grad stay untouched."""
    with exact(out):
        found = torch.autograd.grad(out, [leaf for leaf, _ in live.values()], allow_unused=True)
    grads = {}
    for (name, (leaf, point)), grad in zip(live.items(), found, strict=True):
        grads[f"{name}_grad"] = keep(torch.zeros_like(leaf) if grad is None else grad, point)
    return grads
