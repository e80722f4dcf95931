"""Knockout: cut what some positions read from others, in chosen layers and channels, and nothing else.

    cut = gl.knockout.cut(src=batch.answer_pos, dst=-1, layers=1)           # per row: a tensor; for all: a number, a list
    with cut.on(model):
        logits = model(batch.tokens)
    (gl.knockout.cut(3, -1) + gl.ablation.open_gate()).on(model)            # composes with any intervention
    gl.knockout.sweep(model, tokens, metric, dst=-1, window=3)              # Result [layer, src], a heat map
    gl.knockout.gather_and_aggregate(model, tokens, metric, segments)       # Result [role, layer]

o = A x + r is what a layer's token mixing hands to its output projection (`layer.py`), i a target, j a source. A is that
of the same run, with whatever was edited upstream. In a layer of two mixers, side by side or one before the other, each has its A
and is cut, unless layers=gl.layers.where(kind=...) names one of them. Three things can be cut:

    cut                 A[i, j] = 0: o_i loses all that comes from x_j, through conv, scan and skip
    cut_scan            o_i loses gate_i S[i, j] u_j: what the state carries of j's write into i's readout. The conv stays, and
                        u_j holds what the conv mixed into it (neighbours, bias)
    cut_renormalised    S[i, j] = 0 and the rest of row i scaled to sum to 1 again: scores := -inf in attention, numerator
                        and denominator of RWKV. For softmax scans only

A is held as it is: gates, dt, B, C, keys stay those of the run, also where a conv or shift has mixed x_j into them.

`cut` and `cut_scan` do not renormalise: a zeroed entry of a softmax leaves a row that sums to less than 1. Attention knockout in
transformers (Geva et al. 2023, arXiv 2304.14767) is `cut_renormalised`; in Mamba (Endy et al. 2025, Mamba Knockout, arXiv
2505.24244) it is `cut_scan`.

A delta rule's token does two things to the state, S_t = decay_t S_{t-1} - erase_t (probe_t . S_{t-1}) + write_t, and so an edge
j -> i is of what j writes and of what it erases. Each of these is the run itself, in which i alone reads another state:

    cut_scan            the state without j's write         scan_i loses S[i, j] u_j, S with all that was erased behind j
    cut_erase           the state with j's erase at 0       scan_i = S~ u, S~ the matrix of the recurrence with erase_j = 0
    cut_update          the state without either            scan_i = S~ (u but for u_j): as if j had not touched the state

`cut` zeroes an entry of A and leaves all others as they are, so an entry [i, k] with k < j still holds what j erased of k's
write. `cut` and `cut_scan` take from i what j says; `cut_erase` gives back what j made it forget. All of them hold the decays.
"""

from gatedlens.knockout.cutting import Cut
from gatedlens.knockout.roles import gather_and_aggregate
from gatedlens.knockout.sweeping import How, cut, cut_erase, cut_renormalised, cut_scan, cut_update, pairs, sweep
from gatedlens.knockout.token_edges import Edges

# fmt: off
__all__ = [
    "Cut", "Edges", "How", "cut", "cut_erase", "cut_renormalised", "cut_scan", "cut_update", "gather_and_aggregate", "pairs",
    "sweep",
]
# fmt: on
