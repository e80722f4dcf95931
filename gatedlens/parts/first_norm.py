"""NormedStream: a language model whose first block norms the embedding before the stream begins, as RWKV's do (ln0)."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from gatedlens.model.language import HookedLanguageModel


class NormedStream(HookedLanguageModel):
    """`class HookedMine(NormedStream)`: block 0 has a norm `ln0`; `make_block` puts it there."""

    def stream(self, embedded: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Block 0's first norm starts the stream: what enters block 0 (start_at_layer=0) has passed it."""
        first: Any = self.blocks[0]
        out: Tensor = first.ln0(embedded)
        return out
