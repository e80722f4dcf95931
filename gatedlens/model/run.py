"""DocumentRun: a forward call whose rows may hold several documents, each beginning at position 0.

b batch, l pos. A document is a run of tokens whose first has position 0: nothing passes from one into the next.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gatedlens.model.block import Run


@dataclass
class DocumentRun(Run):
    """A Run whose rows may hold several documents.

    `documents` is known once `apart` was called, as for position_ids. Before that each row is one document, and what lies
    before its beginning is empty anyway.
    """

    def apart(self) -> DocumentRun:
        """`run = DocumentRun(positions).apart()`: the same, with the documents that its positions tell of."""
        return replace(self, padding=replace(self.padding, documents=self.begins.long().cumsum(1)))

    @property
    def documents(self) -> Int[Tensor, "batch pos"] | None:
        """How many documents have begun in this call, up to each position (0: the state's goes on)."""
        return self.padding.documents

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """Where a token is no padding."""
        return torch.ones_like(self.positions, dtype=torch.bool) if self.padding.mask is None else self.padding.mask

    @property
    def ranks(self) -> Int[Tensor, "batch pos"]:
        """Each real token's place among the real tokens of its row; padding ranks behind them."""
        if self.padding.rank is not None:
            return self.padding.rank
        return torch.arange(self.positions.shape[1], device=self.positions.device).expand_as(self.positions)

    @property
    def begins(self) -> Bool[Tensor, "batch pos"]:
        """Where a document begins: the recurrence forgets what was before."""
        return self.real & (self.positions == 0)

    def resets(self, like: Float[Tensor, "batch pos ..."]) -> Float[Tensor, "batch pos one"] | None:
        """As `Run.resets`."""
        return None if self.documents is None else self.begins.unsqueeze(-1).to(like.dtype)

    @property
    def next_position(self) -> Int[Tensor, " batch"]:
        """The position of the token that would come next."""
        if self.padding.mask is None:
            return self.positions[:, -1] + 1
        is_last = self.ranks == self.padding.mask.sum(1, keepdim=True) - 1
        return (self.positions * is_last).sum(1) + 1

    def behind(self, width: int) -> Int[Tensor, "batch long"]:
        """The document of each place of `Padding.behind`: the tail's is the state's."""
        assert self.documents is not None
        order = self.padding.order
        return F.pad(self.documents if order is None else self.documents.gather(1, order), (width - 1, 0))

    def in_document(self, width: int) -> Bool[Tensor, "batch pos one tap"] | None:
        """As `Run.in_document`."""
        if self.documents is None:
            return None
        seen = self.behind(width).unfold(1, width, 1)
        return (seen == seen[..., -1:]).unsqueeze(2)

    def of_last_document(
        self, long: Float[Tensor, "batch long channel"], width: int
    ) -> Float[Tensor, "batch long channel"]:
        """As `Run.of_last_document`."""
        return long if self.documents is None else long * (self.behind(width) == self.last).unsqueeze(2)

    @property
    def last(self) -> Int[Tensor, "batch one"]:
        """The last document of each row."""
        assert self.documents is not None
        return self.documents.amax(1, keepdim=True)
