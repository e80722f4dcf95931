"""Grid: which position of the sequence is which patch of the image, and which is a class token.

model.grid.place(42)                 # (3, 0): row and column of the patch at position 42; None for a class token
model.grid.position(3, 0)            # 42
model.grid.cls                       # (98,): where the class token stands
model.grid.fold(relevance)           # [..., pos] -> [..., row, column], without the class tokens
model.grid.box(42)                   # (left, top, right, bottom) of its patch, in pixels
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Shaped
from torch import Tensor

from gatedlens.errors import InputError


@dataclass(frozen=True)
class Grid:
    """`rows` x `columns` patches, row by row, with class tokens at the positions `cls` (ascending) between them.

    patch: height and width of a patch in pixels; stride: pixels from one patch to the next (patches overlap where it is
    smaller).
    """

    rows: int
    columns: int
    cls: tuple[int, ...]
    patch: tuple[int, int]
    stride: tuple[int, int]

    @property
    def length(self) -> int:
        """How many positions there are, class tokens included."""
        return self.rows * self.columns + len(self.cls)

    @property
    def patches(self) -> tuple[int, ...]:
        """The positions of the patches: of (0, 0), (0, 1), ..."""
        return tuple(pos for pos in range(self.length) if pos not in self.cls)

    def place(self, pos: int) -> tuple[int, int] | None:
        """(row, column) of the patch at a position (negative ones count from the end); None for a class token."""
        if not -self.length <= pos < self.length:
            raise InputError(f"Position {pos} does not exist: this grid has positions 0 to {self.length - 1}.")
        pos %= self.length
        if pos in self.cls:
            return None
        row, column = divmod(pos - sum(at < pos for at in self.cls), self.columns)
        return row, column

    def position(self, row: int, column: int) -> int:
        """The position of the patch in that row and column (negative ones count from the end)."""
        if not (-self.rows <= row < self.rows and -self.columns <= column < self.columns):
            raise InputError(f"Patch ({row}, {column}) does not exist: the grid is {self.rows} x {self.columns}.")
        return self.patches[row % self.rows * self.columns + column % self.columns]

    def box(self, pos: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the patch at a position, in pixels of the model's input."""
        place = self.place(pos)
        if place is None:
            raise InputError(f"Position {pos} is a class token: it has no place in the image.")
        top, left = place[0] * self.stride[0], place[1] * self.stride[1]
        return left, top, left + self.patch[1], top + self.patch[0]

    def fold(self, values: Shaped[Tensor, "*any pos"]) -> Shaped[Tensor, "*any row column"]:
        """Values of the positions as a map of the image: class tokens dropped, patches in rows and columns."""
        if values.shape[-1] != self.length:
            raise InputError(f"The last axis has {values.shape[-1]} entries; this grid has {self.length} positions.")
        return values[..., list(self.patches)].unflatten(-1, (self.rows, self.columns))
