"""Foreign: types of optional packages, for editors and type checkers. At run time they are Any, and nothing is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from PIL.Image import Image
else:
    Axes = Figure = DataFrame = Image = Any

__all__ = ["Axes", "DataFrame", "Figure", "Image"]
