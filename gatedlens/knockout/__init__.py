"""Knockout: cut what some positions read from others, in chosen layers and channels, and nothing else.

    cut = gl.knockout.cut(src=batch.answer_pos, dst=-1, layers=1)           # per row: a tensor; for all: a number, a list
    with cut.on(model):
        logits = model(batch.tokens)
    (gl.knockout.cut(3, -1) + gl.ablation.open_gate()).on(model)            # composes with any intervention
    gl.knockout.sweep(model, tokens, metric, dst=-1, window=3)              # Result [layer, src], a heat map

o = A x + r is what a layer's token mixing hands to its output projection (`layer.py`), i a target, j a source. A is that
of the same run, with whatever was edited upstream. Three things can be cut:

    cut                 A[i, j] = 0: o_i loses all that comes from x_j, through conv, scan and skip
    cut_scan            o_i loses gate_i S[i, j] u_j: what the state carries of j's write into i's readout. The conv stays, and
                        u_j holds what the conv mixed into it (neighbours, bias)
    cut_renormalised    S[i, j] = 0 and the rest of row i scaled to sum to 1 again: scores := -inf in attention, numerator
                        and denominator of RWKV. For softmax scans only

A is held as it is: gates, dt, B, C, keys stay those of the run, also where a conv or shift has mixed x_j into them.

`cut` and `cut_scan` do not renormalise: a zeroed entry of a softmax leaves a row that sums to less than 1. Attention knockout in
transformers (Geva et al. 2023, arXiv 2304.14767) is `cut_renormalised`; in Mamba (Endy et al. 2025, Mamba Knockout, arXiv
2505.24244) it is `cut_scan`.
"""

from gatedlens.knockout.cutting import Cut
from gatedlens.knockout.sweeping import How, cut, cut_renormalised, cut_scan, pairs, sweep
from gatedlens.knockout.token_edges import Edges

# fmt: off
__all__ = [
    "Cut", "Edges", "How", "cut", "cut_renormalised", "cut_scan", "pairs", "sweep",
]
# fmt: on
