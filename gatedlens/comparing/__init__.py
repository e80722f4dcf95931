"""Comparing models: one analysis of several side by side, and the weights of one put into another, layer by layer.

    found = gl.comparing.side_by_side(analysis, {"base": base, "tuned": tuned})      # a Result with an axis `model`
    gl.comparing.difference(found, "tuned", "base").plot()
    with gl.comparing.graft(base, layers=3).on(tuned):                               # the base's layer 3 in the fine-tune
        tuned(tokens)
    gl.comparing.graft_sweep(tuned, base, tokens, metric).plot()                     # layer x part

`alignment.py` says how layers of models of unequal depth stand beside each other, `grafting.py` what is exchanged.
"""

from gatedlens.comparing.alignment import difference, side_by_side
from gatedlens.comparing.grafting import Graft, graft, graft_sweep

# fmt: off
__all__ = [
    "Graft", "difference", "graft", "graft_sweep", "side_by_side",
]
# fmt: on
