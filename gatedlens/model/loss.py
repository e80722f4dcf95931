"""The loss of the next token: `next_token_loss(logits, tokens, mask)`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.model.padding import Padding
from gatedlens.recurrence.transforms import anywhere


def next_token_loss(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    mask: Shaped[Tensor, "batch pos"] | None = None,
    per_token: bool = False,
) -> Float[Tensor, ...]:
    """`next_token_loss(logits, tokens)`: -log p(token[t + 1] | tokens[..t]), mean over the targets: each real token but
    the first of its row.

    per_token: [batch, pos - 1], the loss of the token behind each position, padding skipped; 0 where there is none.
    """
    padding = Padding.of(mask)
    packed = padding.pack(tokens.unsqueeze(-1)).squeeze(-1)
    losses = F.cross_entropy(padding.pack(logits)[:, :-1].flatten(0, 1), packed[:, 1:].flatten(), reduction="none")
    losses = losses.reshape(len(tokens), -1)
    real = torch.arange(1, tokens.shape[1], device=tokens.device) < padding.counts(tokens).unsqueeze(1)
    if not anywhere(real):
        raise InputError("A loss needs at least two tokens in some row: one to read and one to predict.")
    losses = losses.masked_fill(~real, 0)
    if not per_token:
        return losses.sum() / real.sum()
    return padding.spread(F.pad(losses, (0, 1)).unsqueeze(-1)).squeeze(-1)[:, :-1]
