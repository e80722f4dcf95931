"""Secant: two runs of a model side by side, and what of the difference at the end is due to what at the beginning.

    x = Contrast.of(features, (reference,), RULES)      # at a hook point: all behind it is a contrast
    logits = model(x, start_at_layer=0)                 # logits.earlier[0]: those of the reference
    M = torch.autograd.grad(logits[0, -1, 7], x)        # sum (x - x') M = f(x) - f(x')

`gl.attribution.secant` is what a user asks; it, `circuits` and whoever else wants secants in the place of derivatives stand on
this. contrast.py: what carries the runs. rules.py: which operation has which rule.
"""

from gatedlens.secant.contrast import Call, Contrast, Rule, difference
from gatedlens.secant.rules import RULES

__all__ = ["RULES", "Call", "Contrast", "Rule", "difference"]
