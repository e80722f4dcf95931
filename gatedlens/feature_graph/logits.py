"""Logits: which of them a feature graph explains, as what reads the last norm.

    logits=None                  the most likely tokens, up to 0.95 of the probability, 10 at most
    logits="1", 17               of this token; ["1", "2"]: of several
    logits=[("1", "2")]          the logit of the first minus that of the second

    logit = (W_U[:, token] . ln_final.out[pos] + b_U[token]) * cap

cap is what the model makes of that number (a soft cap, a scale) as a share of it, held; 1 where it makes nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.feature_graph.frozen import FrozenRun
from gatedlens.feature_graph.sites import Reads
from gatedlens.options import is_many, is_whole
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.runs.relevance_rules import NORMED, ratio

MOST, LIKELY = 10, 0.95

# For editors and type checkers: whoever passes something else gets the error of `_pair`.
if TYPE_CHECKING:
    Token: TypeAlias = str | int
    Asked: TypeAlias = Token | Sequence[Token | tuple[Token, Token]] | None
else:
    Token = Asked = Any


@dataclass(frozen=True)
class Logits:
    """The logits that are explained: their tokens' ids (of a difference with that of the other), names and probabilities."""

    ids: tuple[tuple[int, int | None], ...]
    said: tuple[str, ...]
    probability: Float[Tensor, " n"]
    reads: Reads

    @staticmethod
    def of(frozen: FrozenRun, asked: Asked, pos: int) -> Logits:
        """`Logits.of(frozen, "1", pos=18)`. InputError for what is no token."""
        model, all_of_them = frozen.model, at_least_float32(frozen.logits[0, pos])
        p = all_of_them.softmax(-1)
        ids = _likely(p) if asked is None else [_pair(frozen, one, len(p)) for one in _listed(asked)]
        if not ids:
            raise InputError("logits=[]: name a token, several, or a pair of two whose difference is meant.")
        wide = frozen.value(NORMED)
        W_U, b_U = (given.detach().to(wide) for given in (model.W_U, model.b_U))
        raw = wide[pos] @ W_U + b_U
        cap = torch.where(raw == 0, 1, ratio(all_of_them.to(raw), raw))

        def read(token: int | None) -> tuple[Tensor, Tensor, Tensor]:
            if token is None:
                return torch.zeros_like(wide[0]), torch.zeros_like(b_U[0]), torch.zeros_like(b_U[0])
            return W_U[:, token] * cap[token], b_U[token] * cap[token], raw[token] * cap[token]

        parts = [[a - b for a, b in zip(read(right), read(wrong), strict=True)] for right, wrong in ids]
        directions, offset, values = (torch.stack(part) for part in zip(*parts, strict=True))
        reads = Reads(NORMED, torch.full((len(ids),), pos, device=wide.device), directions, offset, values)
        words = [[_word(frozen, one) for one in pair if one is not None] for pair in ids]
        chosen = p[torch.tensor([right for right, _ in ids], device=p.device)].to(wide)
        return Logits(tuple(ids), tuple(" - ".join(pair) for pair in words), chosen, reads)


def _likely(p: Float[Tensor, " d_vocab"]) -> list[tuple[int, int | None]]:
    ordered, order = p.sort(descending=True, stable=True)
    count = 1 + int((ordered.cumsum(0) < LIKELY).sum())
    return [(int(token), None) for token in order[: min(count, MOST)]]


def _listed(asked: Any) -> list[Any]:
    if isinstance(asked, str | tuple) or is_whole(asked):
        return [asked]
    if not is_many(asked):
        raise InputError(f"logits={asked!r:.80}: a target is a logit: a token's text or id, a list, or a pair of two.")
    return list(asked)


def _pair(frozen: FrozenRun, one: Any, size: int) -> tuple[int, int | None]:
    if not isinstance(one, tuple):
        return _token(frozen, one, size), None
    if len(one) != 2:
        raise InputError(f"logits={one!r} has {len(one)} parts; a pair (right, wrong) is a difference of logits.")
    return _token(frozen, one[0], size), _token(frozen, one[1], size)


def _token(frozen: FrozenRun, one: Any, size: int) -> int:
    token = frozen.model.to_single_token(one) if isinstance(one, str) else one
    if not is_whole(token):
        raise InputError(f"logits={one!r:.80}: a target is a logit: a token's text or id, or a pair of two.")
    if not 0 <= int(token) < size:
        raise InputError(
            f"logits={one!r}: {frozen.model.cfg.model_name} has the logits 0 to {size - 1}; a feature is no target of its own, "
            "its edges come with the graph."
        )
    return int(token)


def _word(frozen: FrozenRun, token: int) -> str:
    return frozen.words(torch.tensor([token]))[0]
