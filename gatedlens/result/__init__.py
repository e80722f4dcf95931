"""Numbers on named axes: Result, tensors that carry labels, and what of a number is more than rounding.

found = gl.patching.sweep(...)        # a Result
found.top(3); found["layer", 2]; found.save("sweep.json"); Result.load("sweep.json")
"""

from gatedlens.result.bundle import Bundle
from gatedlens.result.labelled_tensor import KEEP, Function, LabelledTensor, label_of, labelled, with_label
from gatedlens.result.legend import Legend
from gatedlens.result.result import Result
from gatedlens.result.results import Results
from gatedlens.result.rounding import BITS, NOISE, STEP, figures, levels, moved, noise, order, total

# fmt: off
__all__ = [
    "BITS",
    "KEEP",
    "NOISE",
    "STEP",
    "Bundle",
    "Function",
    "LabelledTensor",
    "Legend",
    "Result",
    "Results",
    "figures",
    "label_of",
    "labelled",
    "levels",
    "moved",
    "noise",
    "order",
    "total",
    "with_label",
]
# fmt: on
