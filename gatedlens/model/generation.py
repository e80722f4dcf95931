"""Generation: token by token from a RecurrentState, in constant memory per step, hooks firing at every step."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from gatedlens.address.names import NamesFilter
from gatedlens.errors import InputError
from gatedlens.model.batch import Array, Batch, Input
from gatedlens.model.state import RecurrentState
from gatedlens.options import checked

if TYPE_CHECKING:  # language.py imports this file
    from typing_extensions import Unpack

    from gatedlens.model.language import HookedLanguageModel

    Generated: TypeAlias = str | list[str] | Tensor
else:
    HookedLanguageModel = Generated = Any


@checked
def sample(
    logits: Float[Tensor, "batch d_vocab"],
    temperature: int | float = 1.0,
    top_k: int | None = None,
    top_p: int | float | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " batch"]:
    """One token a row. temperature 0: the most likely one. top_k: among the k likeliest. top_p: among the smallest set
    of likeliest tokens whose probabilities reach p (Holtzman et al. 2020)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        ordered, index = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        drop = probs.cumsum(-1) - probs >= top_p  # the first token that reaches p stays
        logits = logits.masked_fill(drop.scatter(-1, index, drop), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


def _check(max_new_tokens: int, temperature: int | float, top_k: int | None, top_p: int | float | None) -> None:
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens={max_new_tokens}: it cannot be negative.")
    if temperature < 0:
        raise InputError(f"temperature={temperature}: it is 0 (greedy) or more.")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k={top_k}: it is at least 1.")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p={top_p}: it lies in (0, 1].")


class Sampling(TypedDict, total=False):
    """What `generate` takes by name beside what decides the kind of its output."""

    stop_at_eos: bool
    eos_token_id: int | None
    do_sample: bool
    top_k: int | None
    top_p: int | float | None
    temperature: int | float
    seed: int | None
    prepend_bos: bool | None
    padding_side: str | None
    attention_mask: Array | None
    state: RecurrentState | None
    verbose: bool
    input_ids: Array | None
    token_type_ids: Array | None
    use_past_kv_cache: bool
    names_filter: NamesFilter


if TYPE_CHECKING:  # text in, text out; ids in, ids out; with return_state the state beside it

    @overload
    def generate(
        self: HookedLanguageModel,
        input: str,
        max_new_tokens: int = 10,
        *,
        return_type: Literal["input", "str"] = "input",
        return_state: Literal[False] = False,
        **options: Unpack[Sampling],
    ) -> str: ...
    @overload
    def generate(
        self: HookedLanguageModel,
        input: Input | None = None,
        max_new_tokens: int = 10,
        *,
        return_type: Literal["tokens"],
        return_state: Literal[False] = False,
        **options: Unpack[Sampling],
    ) -> Tensor: ...
    @overload
    def generate(
        self: HookedLanguageModel,
        input: Tensor,
        max_new_tokens: int = 10,
        *,
        return_type: Literal["input"] = "input",
        return_state: Literal[False] = False,
        **options: Unpack[Sampling],
    ) -> Tensor: ...
    @overload
    def generate(self: HookedLanguageModel, input: Any = None, *args: Any, **options: Any) -> Any: ...


@checked
@torch.no_grad()
def generate(
    self: HookedLanguageModel,
    input: Input | None = None,
    max_new_tokens: int = 10,
    stop_at_eos: bool = True,
    eos_token_id: int | None = None,
    do_sample: bool = True,
    top_k: int | None = None,
    top_p: int | float | None = None,
    temperature: int | float = 1.0,
    seed: int | None = None,
    prepend_bos: bool | None = None,
    padding_side: str | None = None,
    attention_mask: Array | None = None,
    state: RecurrentState | None = None,
    return_type: str = "input",
    return_state: bool = False,
    verbose: bool = True,
    input_ids: Array | None = None,
    token_type_ids: Array | None = None,
    use_past_kv_cache: bool = True,
    return_cache: bool = False,
    names_filter: NamesFilter = None,
) -> Generated | tuple[Generated, ...]:
    """`model.generate("Call me", max_new_tokens=20, temperature=0.8, seed=0)`: the input and what follows it.

    Text in, text out; ids in, ids [batch, pos + new] out (`return_type` "str", "tokens" or "input", the kind that came
    in). do_sample=False, or temperature=0, takes the likeliest token. stop_at_eos: a row that produced EOS goes on
    with EOS, and all stop when every row has. A batch of texts is padded on the left, so that new tokens follow their
    text. state: go on from a RecurrentState; return_state: return (output, state). verbose: a progress bar.

    use_past_kv_cache: as in TransformerLens, whether each step goes on from the state of the last; without, each runs the whole
    text again, slowly and to the same end. return_cache: return (output, cache), or (output, state, cache), the ActivationCache
    of input and output as `run_with_cache` has it, in one more forward; names_filter: of which points.
    """
    _check(max_new_tokens, temperature, top_k, top_p)
    if return_type not in ("input", "str", "tokens"):
        raise InputError(f"return_type={return_type!r}: it is 'input', 'str' or 'tokens'.")
    is_text = isinstance(input, str) or (isinstance(input, list) and bool(input) and isinstance(input[0], str))
    batch, _ = self.prepare(
        input, prepend_bos=prepend_bos, padding_side=padding_side or "left", attention_mask=attention_mask, state=state,
        input_ids=input_ids, token_type_ids=token_type_ids,
    )  # fmt: skip
    if eos_token_id is None and stop_at_eos and self.tokenizer is not None:
        eos_token_id = self.tokenizer.eos_token_id
    generator = None if seed is None else torch.Generator(batch.value.device).manual_seed(seed)
    heat = temperature if do_sample else 0.0

    start = state
    logits, state = self(batch, state=start, return_state=True)
    last = logits[:, -1] if batch.mask is None else logits[torch.arange(len(logits)), _last_real(batch.mask)]
    new: list[Tensor] = []
    done = torch.zeros(batch.value.shape[0], dtype=torch.bool, device=batch.value.device)
    for step in tqdm(range(max_new_tokens), disable=not verbose, desc="generating", unit="token"):
        token = sample(last.float(), heat, top_k, top_p, generator)
        if stop_at_eos and eos_token_id is not None:
            token = torch.where(done, eos_token_id, token)
            done |= token == eos_token_id
        new.append(token)
        finished = bool(done.all()) or step == max_new_tokens - 1
        if finished and not return_state:
            break
        if use_past_kv_cache:
            logits, state = self(token.unsqueeze(1), state=state, return_state=True)
        else:
            logits, state = self(_whole(batch, new), state=start, return_state=True)
        last = logits[:, -1]
        if finished:
            break
    whole = _whole(batch, new)
    ids = whole.value
    out = ids if return_type == "tokens" or (return_type == "input" and not is_text) else _text(self, batch, new, input)
    more: tuple[Any, ...] = (state,) if return_state else ()
    if return_cache:
        more += (self.run_with_cache(whole, None, names_filter=names_filter, state=start)[1],)
    return (out, *more) if more else out


def _whole(batch: Batch, new: list[Int[Tensor, " batch"]]) -> Batch:
    """The input and what has followed it so far."""
    if not new:
        return batch
    ids, mask = torch.stack(new, dim=1), batch.mask
    if mask is not None:
        mask = torch.cat([mask, torch.ones_like(ids, dtype=torch.bool)], dim=1)
    return replace(batch, value=torch.cat([batch.value, ids], dim=1), mask=mask)


def _last_real(mask: Bool[Tensor, "batch pos"]) -> Int[Tensor, " batch"]:
    return mask.shape[1] - 1 - mask.flip(1).to(torch.int8).argmax(1)


def _text(model: HookedLanguageModel, batch: Any, new: list[Int[Tensor, " batch"]], input: Input | None) -> Any:
    """The texts, without padding and BOS."""
    tokenizer = model._need_tokenizer("return_type='str'")
    texts = []
    for row in range(batch.value.shape[0]):
        mask = slice(None) if batch.mask is None else batch.mask[row]
        ids = [*batch.value[row][mask].tolist(), *(int(token[row]) for token in new)]
        texts.append(tokenizer.decode(ids, skip_special_tokens=True))
    return texts[0] if isinstance(input, str) or (len(texts) == 1 and not isinstance(input, list)) else texts
