"""Foreign: types of packages that are imported where they are used, for editors and type checkers.

At run time they are Any, and nothing is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from PIL.Image import Image
    from rich.table import Table
else:
    Axes = Figure = DataFrame = Image = Table = Any

__all__ = ["Axes", "DataFrame", "Figure", "Image", "Table"]
