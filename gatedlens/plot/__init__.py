"""Plots: matplotlib figures by default, HTML where a person would want to hover.

    gl.plot.heatmap(attention.abs_mean()[0], tokens=model.to_str_tokens(text)) # a matplotlib Figure
    gl.plot.heatmap(attention)                                                  # its mean, its own tokens
    gl.plot.layers(stack); gl.plot.layers({0: A0, 1: A1}, tokens)               # one panel a layer
    gl.plot.heads(attention)                                                    # one panel a head
    gl.plot.text(scores, tokens)                                                # coloured tokens, shows in a notebook
    gl.plot.over_image(attention.mean()[0, cls], images[0], model.grid)         # a map over the image it was read from
    gl.plot.activation(cache, ("dt", 3), tokens)                                # one activation, titled by its row

A figure is matplotlib's, but pyplot does not know it: in a notebook it shows itself, once, where it is the value of a cell's
last line, and `figure.show()` opens a window elsewhere. `ax=` draws into one of yours (whose figure pyplot shows, if it made it).
backend="plotly" gives figures to hover over. Both are extras (`pip install gatedlens[plot]`, `[plotly]`), imported when a figure
is asked for. matplotlib's math text is off: a `$` in a token, a title or a name is a `$`.
"""

from gatedlens.plot.coloured_text import Html, text
from gatedlens.plot.drawing import label, labels_of
from gatedlens.plot.matrices import activation, heads, heatmap, layers
from gatedlens.plot.page import attention_page
from gatedlens.plot.pixels import image, over_image
from gatedlens.plot.results import result
from gatedlens.plot.sheet import panels

# fmt: off
__all__ = [
    "Html", "activation", "attention_page", "heads", "heatmap", "image", "label", "labels_of", "layers", "over_image", "panels",
    "result", "text",
]
# fmt: on
