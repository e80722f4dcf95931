"""Positions of text and images (mrope, Qwen2-VL, arXiv 2409.12191): time, height and width, each of which turns some pairs.

    model(embeds, start_at_layer=0, position_ids=positions)      # [3, batch, pos], time height width; or 4, the text's in front

A token of text has its position three times, and is turned as by one. Pair j of a head goes by height where j is 1, 4, 7, ...
below 3 section[1], by width where it is 2, 5, 8, ... below 3 section[2], else by time. What a call without position_ids goes on
from is behind the largest of the three. b batch, l pos, axis (time height width).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.model.batch import Batch
from gatedlens.model.run import DocumentRun
from gatedlens.model.state import RecurrentState
from gatedlens.options import tensor_of
from gatedlens.parts.attention import Attention
from gatedlens.parts.positioned import PositionedModel

AXES = 3


class GridAttention(Attention):
    """An attention whose q and k may be turned by time, height and width. `rotary` holds `mrope_section`, the pairs of each."""

    def turning(
        self, run: DocumentRun, like: Tensor
    ) -> tuple[Float[Tensor, "batch pos rotary"], Float[Tensor, "batch pos rotary"]]:
        return super().turning(run, like) if run.axes is None else self.turning_by(run.axes, like)

    def turning_by(
        self, axes: Int[Tensor, "axis batch pos"], like: Tensor
    ) -> tuple[Float[Tensor, "batch pos rotary"], Float[Tensor, "batch pos rotary"]]:
        """cos and sin of positions of three axes."""
        turns = [self.angles(positions, like) for positions in axes]
        cos, sin = (torch.stack(sides) for sides in zip(*turns, strict=True))  # axis b l (2 pair)
        axis = self.axis_of_pair(cos.shape[-1] // 2).repeat(2).to(cos.device)
        index = axis.expand(1, *cos.shape[1:])
        return cos.gather(0, index)[0], sin.gather(0, index)[0]

    def axis_of_pair(self, pairs: int) -> Int[Tensor, " pair"]:
        """Which axis turns each pair: 0 time, 1 height, 2 width."""
        section, number = self.rotary.mrope_section, torch.arange(pairs)
        axis = torch.zeros(pairs, dtype=torch.long)
        for side in (1, 2):
            axis[(number % AXES == side) & (number < AXES * section[side])] = side
        return axis


class GridModel(PositionedModel):
    """`class HookedMine(GridModel)`: position_ids may be of three axes where `sections` is not None; then layers of attention are
    `GridAttention`s."""

    has_positions: ClassVar[bool] = True

    @property
    def sections(self) -> Any:
        """How many pairs each axis turns; None: there is one position a token."""
        raise NotImplementedError

    def begin(
        self,
        batch: Batch,
        state: RecurrentState | None,
        return_state: bool,
        position_ids: Shaped[Tensor, "*document position"] | None = None,
    ) -> DocumentRun:
        """As in every model with positions; those of the axes turn, that of the text tells documents apart."""
        text, axes = self._split(position_ids, batch)
        run = super().begin(batch, state, return_state, text)
        if axes is None:
            return run
        run.axes = axes.to(run.positions.device)
        if run.left is not None:
            counted = run.real if run.documents is None else run.real & (run.documents == run.last)
            furthest = run.axes.masked_fill(~counted, -1).amax((0, 2))
            run.left[RecurrentState.key("next_position", 0)] = furthest + 1
        return run

    def documents(
        self, batch: Batch, position_ids: Shaped[Tensor, "*document position"] | None
    ) -> Int[Tensor, "batch pos"] | None:
        """As of any model, by the positions of the text."""
        return super().documents(batch, self._split(position_ids, batch)[0])

    def _split(
        self, position_ids: Shaped[Tensor, "*document position"] | None, batch: Batch
    ) -> tuple[Shaped[Tensor, "*text position"] | None, Int[Tensor, "axis batch pos"] | None]:
        """Positions of the text, and of the axes; InputError for positions of another shape."""
        if position_ids is None or self.sections is None:
            return position_ids, None
        positions = tensor_of(position_ids, "position_ids")
        if positions.ndim < AXES:
            return positions, None
        rows, length = batch.value.shape[0], self.positions(batch)
        if len(positions) not in (AXES, AXES + 1) or tuple(positions.shape[1:]) not in ((rows, length), (1, length)):
            raise InputError(
                f"position_ids have shape {list(positions.shape)}; the input is [{rows}, {length}], so they are that, or [3, "
                f"{rows}, {length}]: time, height and width; or [4, {rows}, {length}], the text's in front."
            )
        axes = torch.stack([self._check_positions(one, rows, length) for one in positions[-AXES:]])
        return positions[0] if len(positions) > AXES else None, axes
