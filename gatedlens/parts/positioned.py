"""PositionedModel: a language model with layers of attention, whose positions go on through its states.

A state holds `next_position`: where the last document of each row has come to, however many documents ended before it.
"""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Shaped
from torch import Tensor

from gatedlens.model.batch import Batch
from gatedlens.model.language import HookedLanguageModel
from gatedlens.model.run import DocumentRun
from gatedlens.model.state import Carried, RecurrentState

NEXT_POSITION = {"next_position": Carried("", "batch")}  # of the document, whatever the layer


class PositionedModel(HookedLanguageModel):
    """`class HookedMine(PositionedModel)`; `carried = {..., **NEXT_POSITION}`: the positions of a call without position_ids
    go on in the state's last document."""

    has_positions: ClassVar[bool] = True

    def begin(
        self,
        batch: Batch,
        state: RecurrentState | None,
        return_state: bool,
        position_ids: Shaped[Tensor, "*document position"] | None = None,
    ) -> DocumentRun:
        """As in every model, and: positions go on in the state's last document."""
        run = super().begin(batch, state, return_state, position_ids)
        assert isinstance(run, DocumentRun)  # of a model that has positions
        if position_ids is None and state is not None:
            skipped = state["next_position", 0] - state.seen  # tokens of documents that ended before the state
            run.positions = run.positions + skipped.to(run.positions.device).unsqueeze(1)
        run.leave("next_position", 0, run.next_position)
        return run
