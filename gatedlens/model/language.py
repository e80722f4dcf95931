"""HookedLanguageModel: a HookedModel that reads tokens and predicts the next one.

logits = model("The cat sat on the mat")
loss = model(tokens, return_type="loss")
logits, state = model(prefix, return_state=True); model(suffix, state=state)
model.generate("Call me", max_new_tokens=20, temperature=0.8, seed=0)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from gatedlens.address.point import Point
from gatedlens.errors import InputError
from gatedlens.model import text as text_
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Array, Batch, Earlier, ForwardOutput, Input, Option, Output, check_return_type
from gatedlens.model.cache import ActivationCache
from gatedlens.model.generation import generate
from gatedlens.model.loss import next_token_loss
from gatedlens.model.state import RecurrentState
from gatedlens.model.tokenizer import TokenizerLike
from gatedlens.model.tokens import ReadsText

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ForwardOptions(TypedDict, total=False):
    """What `forward` takes by name beside what decides the kind of its output."""

    loss_per_token: bool
    prepend_bos: bool | None
    padding_side: str | None
    start_at_layer: int | None
    stop_at_layer: int | None
    earlier: Earlier
    attention_mask: Array | None
    state: RecurrentState | None
    tokens: Tensor | None
    position_ids: Tensor | None
    input_ids: Array | None
    token_type_ids: Array | None


# The options of `forward` that tell how an input is read, for functions that hand them on.
OF_INPUT = ("prepend_bos", "padding_side", "attention_mask", "position_ids")


class HookedLanguageModel(ReadsText, HookedModel):
    """What every language model shares; an architecture adds its rows, its blocks and where its embeddings are."""

    first_points = (Point("hook_embed", "batch pos d_model", "embedding[token]", "the embedding"),)
    last_points = (Point("hook_logits", "batch pos d_vocab", "unembedding(ln_final.out)", "the unembedding"),)

    def __init__(self, wrapped: nn.Module, *, model_name: str = "", tokenizer: TokenizerLike = None):
        super().__init__(wrapped, model_name=model_name, tokenizer=tokenizer)
        self.set_tokenizer(tokenizer)

    generate = generate

    # -- what an architecture gives ------------------------------------------------------------------------------

    @property
    def embedding(self) -> Any:
        raise NotImplementedError

    @property
    def unembedding(self) -> Any:
        raise NotImplementedError

    def embed(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """`model.embed(tokens)`: [batch, pos, d_model], what the tokens write into the residual stream (scaled, where the
        architecture scales it).
        """
        own = self.embedding
        how = (own.padding_idx, own.max_norm, own.norm_type, own.scale_grad_by_freq, own.sparse)
        return F.embedding(tokens, own.weight, *how)

    def ends(self) -> dict[str, tuple[Any, type[nn.Module]]]:
        return {"embedding": (self.embedding, nn.Embedding), "unembedding": (self.unembedding, nn.Linear)}

    def _described(self, model_name: str) -> Any:
        cfg = super()._described(model_name)
        cfg.d_vocab_out = self.unembedding.weight.shape[0]  # a head may have other outputs than there are tokens
        return cfg

    def stream(self, embedded: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """`model.stream(embedded)`: the residual stream that an embedding starts (in another dtype, where the architecture
        has one).
        """
        return embedded

    def reads_from(self, batch: Batch) -> Float[Tensor, "batch pos"]:
        """`model.reads_from(batch)`: [batch, pos], 1 at the last real position of each row: the next token is read from
        there.
        """
        rows, length = batch.value.shape[:2]
        place = torch.arange(1, length + 1, device=batch.value.device).expand(rows, length)
        last = (place if batch.mask is None else place * batch.mask).argmax(1)
        return F.one_hot(last, length).double()

    @classmethod
    def snippet(cls) -> str:
        """`HookedMamba.snippet()`: code that reads one point of a language model, for the catalogue."""
        return (
            'logits, cache = model.run_with_cache([[1, 2, 3, 4]], names_filter="blocks.*.mixer.hook_decay")\n'
            'decay = cache["decay", 0]  # how much of its state each channel keeps at each position\n'
            'print(decay.shape, model.hook_table()["blocks.0.mixer.hook_decay"]["equation"])'
        )

    # -- forward -------------------------------------------------------------------------------------------------

    def prepare(  # type: ignore[override]  # names the options that the base takes as **options
        self,
        input: Input | None = None,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        *,
        attention_mask: Array | None = None,
        start_at_layer: int | None = None,
        input_ids: Array | None = None,
        token_type_ids: Array | None = None,
        **options: Option,
    ) -> tuple[Batch, dict[str, Any]]:
        """`batch, options = model.prepare(text)`: the input as a Batch (tokens, or with start_at_layer a residual stream,
        and the mask), and the options of `forward` that are still to be used.

        InputError for an input that the model cannot run on, and for options that the others would make vain.
        """
        self._check_options(return_type, loss_per_token, prepend_bos, padding_side, start_at_layer, options)
        rest = {
            "return_type": return_type,
            "loss_per_token": loss_per_token,
            "start_at_layer": start_at_layer,
            **options,
        }
        input, attention_mask = text_.encoded(input, input_ids, attention_mask, token_type_ids)
        if isinstance(input, Batch):
            return input, rest
        if start_at_layer is not None:
            value = self._check_resid(input)
            is_resid = True
            mask = None
        else:
            if prepend_bos is None and options.get("state") is not None:
                prepend_bos = False  # the text goes on from the state's
            value, mask = self._tokenize(input, prepend_bos, padding_side)
            is_resid = False
        if attention_mask is not None:
            given = text_.check_mask(attention_mask, (value.shape[0], value.shape[1])).to(value.device)
            mask = given if mask is None else given & mask
        return Batch(value, mask, is_resid), rest

    def _check_options(
        self,
        return_type: str | None,
        per_token: bool,
        prepend_bos: bool | None,
        side: str | None,
        start: int | None,
        options: dict[str, Any],
    ) -> None:
        """Refuse options that the others would make vain: nothing is silently ignored."""
        check_return_type(return_type)
        if side is not None and side not in text_.SIDES:
            raise InputError(f"padding_side={side!r}: it is 'left' or 'right'.")
        if options.get("stop_at_layer") is not None and return_type in ("loss", "both"):
            raise InputError(f"return_type={return_type!r} with stop_at_layer: a run that stops has no logits.")
        if per_token and return_type not in ("loss", "both"):
            raise InputError(f"loss_per_token=True with return_type={return_type!r}: ask for 'loss' or 'both'.")
        if start is None and options.get("tokens") is not None:
            raise InputError("tokens=... goes with start_at_layer; otherwise the input holds the tokens.")
        if start is None and options.get("earlier") is not None:
            raise InputError(
                "earlier=... goes with start_at_layer; otherwise every block that hands something on runs."
            )
        if start is not None and prepend_bos:
            raise InputError("prepend_bos=True with start_at_layer: a residual stream takes no BOS.")

    def _check_resid(self, resid: Any) -> Float[Tensor, "batch pos d_model"]:
        d = self.cfg.d_model
        if not isinstance(resid, Tensor) or not resid.is_floating_point() or resid.ndim != 3 or resid.shape[-1] != d:
            got = f"{resid.dtype} {list(resid.shape)}" if isinstance(resid, Tensor) else type(resid).__name__
            raise InputError(f"start_at_layer runs from a residual stream, floats of [batch, pos, {d}]; this is {got}.")
        if resid.numel() == 0:
            raise InputError(f"The residual stream is empty: {list(resid.shape)}.")
        return resid

    if TYPE_CHECKING:
        # one signature for each kind of output; `ForwardOptions` are the others of `forward`, which decide none.
        @overload
        def forward(
            self,
            input: Input | None = None,
            return_type: Literal["logits", "loss"] = "logits",
            *,
            return_state: Literal[False] = False,
            **options: Unpack[ForwardOptions],
        ) -> Tensor: ...
        @overload
        def forward(
            self,
            input: Input | None = None,
            return_type: Literal["logits", "loss"] = "logits",
            *,
            return_state: Literal[True],
            **options: Unpack[ForwardOptions],
        ) -> tuple[Tensor, RecurrentState]: ...
        @overload
        def forward(
            self,
            input: Input | None = None,
            *,
            return_type: Literal["both"],
            return_state: Literal[False] = False,
            **options: Unpack[ForwardOptions],
        ) -> Output: ...
        @overload
        def forward(self, *args: Any, **options: Any) -> Any: ...

    def forward(
        self,
        input: Input | None = None,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        attention_mask: Array | None = None,
        state: RecurrentState | None = None,
        return_state: bool = False,
        tokens: Shaped[Tensor, "*text token"] | None = None,
        position_ids: Shaped[Tensor, "*document position"] | None = None,
        input_ids: Array | None = None,
        token_type_ids: Array | None = None,
        earlier: Earlier = None,
    ) -> ForwardOutput:
        """`model.forward(input)`, called as `logits = model(input)`: logits [batch, pos, d_vocab], the loss, both (an Output)
        or None, by `return_type`.

        input: text, a list of texts (padded, on the side that `set_tokenizer` tells), token ids [batch, pos], or what a
        tokenizer returned, which may also come as keywords (`model(**tokenizer(text, return_tensors="pt"))`); with
        `start_at_layer` the residual stream [batch, pos, d_model] that enters that block (give `tokens` as well for a
        loss). attention_mask [batch, pos]: 0
        where a position is padding. stop_at_layer: stop before that block and return the residual stream. state:
        continue from a RecurrentState. return_state: return (output, state). position_ids [batch, pos]: each token's
        place in its document, for architectures that have positions (a 0 starts a new one). earlier: with start_at_layer, the
        cache of a run (or activations by point) with what blocks before it hand on beside the stream, `model.hands_on`.
        """
        batch, _ = self.prepare(
            input, return_type, loss_per_token, prepend_bos, padding_side, attention_mask=attention_mask,
            start_at_layer=start_at_layer, stop_at_layer=stop_at_layer, state=state, tokens=tokens,
            input_ids=input_ids, token_type_ids=token_type_ids, earlier=earlier,
        )  # fmt: skip
        run = self.begin(batch, state, return_state, position_ids)
        run.handed |= self._handed(earlier)
        with self._carrying(run):
            if batch.is_resid:
                known = self.embedding.weight.shape[0]
                tokens = None if tokens is None else text_.check(torch.as_tensor(tokens), known)
                if tokens is not None and tokens.shape != batch.value.shape[:2]:
                    raise InputError(
                        f"tokens have shape {list(tokens.shape)}; the stream is {list(batch.value.shape[:2])}."
                    )
                run.tokens = tokens
                resid = self.through_blocks(batch.value, run, start_at_layer, stop_at_layer)
            else:
                tokens = run.tokens = batch.value
                resid = self.stream(self.hook_embed(self.there(self.embedding, self.embed, tokens)))
                resid = self.through_blocks(resid, run, None, stop_at_layer)
            out = (
                resid
                if stop_at_layer is not None
                else self._outputs(resid, tokens, batch.mask, return_type, loss_per_token)
            )
        if not return_state:
            return out
        seen = run.padding.counts(batch.value) + (0 if state is None else state.seen.to(resid.device))
        return out, RecurrentState(run.left or {}, seen, self.cfg.model_name)

    def _handed(self, earlier: Earlier) -> dict[str, Tensor]:
        """What blocks handed on beside the stream in the run that `earlier` is of."""
        if earlier is None:
            return {}
        if not isinstance(earlier, ActivationCache | Mapping):
            raise InputError(
                f"earlier is {type(earlier).__name__}; it must be the cache of a run, or a mapping of points to activations."
            )
        return {name: earlier[name] for name in self.hands_on if name in earlier}

    if TYPE_CHECKING:
        __call__ = forward  # type: ignore[assignment]  # by the same signatures, which name their options

    def _outputs(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        tokens: Int[Tensor, "batch pos"] | None,
        mask: Bool[Tensor, "batch pos"] | None,
        return_type: str | None,
        per_token: bool,
    ) -> Any:
        normed = self.there(self.ln_final.weights, self.ln_final, resid)
        if return_type is None and self.hook_logits.at_rest():
            return None
        logits = self.hook_logits(self.there(self.unembedding, self.unembed, normed))
        if return_type in ("logits", None):
            return None if return_type is None else logits
        if tokens is None:
            raise InputError(f"return_type={return_type!r} with start_at_layer needs tokens=..., the ids to predict.")
        self._check_targets(tokens)
        loss = next_token_loss(
            logits, tokens.to(logits.device), None if mask is None else mask.to(logits.device), per_token
        )
        return loss if return_type == "loss" else Output(logits, loss)

    def _check_targets(self, tokens: Int[Tensor, "batch pos"]) -> None:
        outputs = self.unembedding.weight.shape[0]
        if outputs < self.embedding.weight.shape[0] and int(tokens.max()) >= outputs:
            raise InputError(
                f"A loss predicts the next token, and the input holds token {int(tokens.max())}, while the head has {outputs} "
                "outputs: take the logits (return_type='logits') and a loss of your own."
            )

    def loss_fn(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Array | None = None,
        per_token: bool = False,
    ) -> Float[Tensor, ...]:
        """`model.loss_fn(logits, tokens)`: the loss of the next token, as `model(tokens, return_type="loss")` has it and
        TransformerLens's `loss_fn`: the mean over targets, or, with per_token, [batch, pos - 1]."""
        self._check_targets(tokens)
        mask = None if attention_mask is None else text_.check_mask(attention_mask, (tokens.shape[0], tokens.shape[1]))
        return next_token_loss(
            logits, tokens.to(logits.device), None if mask is None else mask.to(logits.device), per_token
        )

    def unembed(self, normed: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
        """`model.unembed(normed)`: [..., d_vocab], the logits of a normalised residual stream, at least float32."""
        head = self.unembedding
        logits = F.linear(normed.to(head.weight.dtype), head.weight, head.bias)
        return self.apply_output_logits_transform(logits if logits.dtype == torch.float64 else logits.float())

    def apply_output_logits_transform(self, logits: Float[Tensor, "... d_vocab"]) -> Float[Tensor, "... d_vocab"]:
        """`model.apply_output_logits_transform(logits)`: what follows the unembedding's matrix: nothing, unless an
        architecture says so (TransformerLens's name for it).
        """
        return logits

    @property
    def adapter(self) -> HookedLanguageModel:
        """Where TransformerLens's logit lens looks for `apply_output_logits_transform`."""
        return self

    # -- weights by TransformerLens's names ----------------------------------------------------------------------

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.embedding.weight

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.unembedding.weight.T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        head = self.unembedding
        return self.W_U.new_zeros(self.cfg.d_vocab_out) if head.bias is None else head.bias

    def tokens_to_residual_directions(self, tokens: str | int | Int[Tensor, ...]) -> Float[Tensor, "... d_model"]:
        """`model.tokens_to_residual_directions(" whale")`: [..., d_model], the columns of W_U of some tokens.

        The residual stream behind ln_final is read along them. tokens: a text of one token, an id, or ids of any shape.
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        return self.W_U.T[torch.as_tensor(tokens, device=self.W_U.device)]

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """`model.accumulated_bias(layer)`: [d_model], the constant that the output biases of all mixers before `layer` add
        to the residual stream.

        Of MLPs without biases; an architecture with others says so. InputError for one in front of a norm (OLMo-hybrid's with
        attention_bias), whose part is another at each position: `cache.get_full_resid_decomposition()` has it as "bias".
        """
        total = torch.zeros(self.cfg.d_model, device=self.W_U.device)
        for mixer in (mixer for block in self.blocks[: layer + int(mlp_input)] for mixer in block.writers):
            _, bias = mixer.output_weights()
            held = self.blocks[mixer.layer].held(mixer.place)
            if bias is not None and held:
                raise InputError(
                    f"accumulated_bias({layer}): behind the bias of layer {mixer.layer} stands {held[0]}, so what it adds is no "
                    "constant. It is in what the mixer writes, `contributions().remainder()`."
                )
            total = total if bias is None else total + bias
        return total
