"""Picture: a matplotlib Figure that pyplot does not know of, shown once, by its own repr.

    picture = gl.plot.heatmap(A.mean()[0]); picture                # in a notebook: the picture
    picture.savefig("mean.png"); picture.axes[0].set_title("...")  # all else is matplotlib's
    picture.show()                                                 # in a script: a window

Nothing is left open: a picture is gone when nobody holds it. This file imports matplotlib, so it is imported when one is made.
"""

from __future__ import annotations

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


class Picture(Figure):
    """A Figure of its own."""

    def _repr_png_(self) -> bytes:
        data = io.BytesIO()
        FigureCanvasAgg(self).print_figure(data, format="png", dpi=self.dpi, bbox_inches="tight")
        return data.getvalue()

    def show(self, warn: bool = True) -> None:
        """`picture.show()`: a window, until it is closed; in a notebook the picture below the cell."""
        import matplotlib.pyplot as plt

        plt.figure(FigureClass=lambda **_: self)  # pyplot knows it for as long as the window stands
        try:
            plt.show()
        finally:
            plt.close(self)

    def __repr__(self) -> str:
        width, height = self.get_size_inches()
        said = self.get_suptitle() or next((ax.get_title() for ax in self.axes if ax.get_title()), "")
        return f"Picture({said!r}, {width:.3g} x {height:.3g} in)"
