"""ResidualCache: the residual stream of a cached run, decomposed into our components by TransformerLens's methods.

    parts, labels = cache.decompose_resid(return_labels=True)      # embed, 0_mixer_out, 0_mlp_out, ...
    cache.logit_attrs(parts, tokens=" whale")                      # each component's share of a logit; they sum to it
    cache.accumulated_resid(apply_ln=True)                         # the stream before each layer, through the final norm

What TransformerLens computes for attention heads and neurons says what there is instead. ActivationCache inherits all this.
"""

from __future__ import annotations

from typing import Any

import transformer_lens
from jaxtyping import Float
from torch import Tensor
from transformer_lens.utilities import Slice

from gatedlens.errors import InputError, PointError


class ResidualCache(transformer_lens.ActivationCache):
    """TransformerLens's ActivationCache, where it takes a model for a transformer; `find(key)` is ActivationCache's."""

    model: Any

    def find(self, key: Any) -> Any:
        """The point or view that `key` stands for; PointError for none."""
        raise NotImplementedError

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: str = "all",
        apply_ln: bool = False,
        pos_slice: Any = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Float[Tensor, "component ..."] | tuple[Float[Tensor, "component ..."], list[str]]:
        """The residual stream before `layer` (None, -1: the last one) as a sum of what was written into it.

        Components: `embed`, then each block's `{l}_mixer_out` (and `{l}_mlp_out` where it has one). `mode` "attn"
        keeps the mixers, "mlp" the channel mixers. They sum to `resid_pre` of the layer.
        """
        layer = self._boundary(layer)
        if mlp_input:
            self.find(("resid_mid", layer))
        slice_ = pos_slice if isinstance(pos_slice, Slice) else Slice(pos_slice)
        wanted = [("embed", "blocks.0.hook_resid_pre")] if incl_embeds else []  # the embedding as the stream holds it
        modes = {"all": ("mixer", "mlp"), "attn": ("mixer",), "mlp": ("mlp",)}
        if mode not in modes:
            raise InputError(f"mode={mode!r}: it is 'all', 'attn' (the mixers) or 'mlp'.")
        kinds = modes[mode]
        for block in range(layer + 1 if mlp_input else layer):
            for kind in kinds if block < layer else ("mixer",):
                name = f"blocks.{block}.hook_{kind}_out"
                if name in self.model.names:
                    wanted.append((f"{block}_{kind}_out", name))
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
        pos_slice: Any = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Float[Tensor, "component ..."] | tuple[Float[Tensor, "component ..."], list[str]]:
        """The residual stream before each layer up to `layer` (None, -1: all, and the last one), as TransformerLens's."""
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
        tokens: Any,
        incorrect_tokens: Any = None,
        pos_slice: Any = None,
        batch_slice: Any = None,
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

    # -- what TransformerLens computes for attention heads, neurons and its own SSM bridges alone --------------------------

    def _no_heads(self, *_: Any, **__: Any) -> Any:
        raise PointError(
            f"{self.model.cfg.model_name} is not made of attention heads: decompose_resid() splits the residual stream into "
            "mixers and channel mixers, and gl.implicit_attention(cache, layer=...).contributions() a mixer into tokens."
        )

    def _no_neurons(self, *_: Any, **__: Any) -> Any:
        raise PointError(
            f"{self.model.cfg.model_name} has gated channel mixers, whose neurons are no terms of a sum of W_out's rows "
            "alone: decompose_resid(mode='mlp') gives the channel mixers, their points what is inside."
        )

    def _no_ssm_bridge(self, *_: Any, **__: Any) -> Any:
        raise PointError(
            "This is for TransformerLens's own bridge. Here gl.implicit_attention(cache, layer=...).only('scan').dense() is "
            "the scan's matrix, and cache['state', layer] its states, with names_filter='blocks.*.hook_state'."
        )

    compute_head_results = stack_head_results = get_full_resid_decomposition = _no_heads
    get_neuron_results = stack_neuron_results = _no_neurons
    ssm_layers = compute_ssm_state = compute_ssm_effective_attention = _no_ssm_bridge
