"""Implicit attention: what a gated-linear layer attends to, as one exact, lazy linear operator.

    logits, cache = model.run_with_cache("The cat sat on the mat")
    A = gl.implicit_attention(cache, layer=3)
    A @ x                       # batch pos channel: the layer's output without r; A.T @ g goes back
    A.row(-1), A.column(0)      # batch channel src / dst
    A.mean()                    # batch dst src, channels averaged; A.abs_mean(), A.weighted(w)
    A.grouped([slow, fast])     # batch group dst src: the mean of each group of channels
    A.dense(channels=[0, 5])    # batch channel dst src
    A.mean(heads=slice(None))   # batch head dst src: the channels of each head averaged; A.select(heads=2), A.row(-1, heads=2)
    A.without("skip"), A.only("scan"), A.paper("unified"), A.paper("hidden")
    A.contributions()           # token to token, in d_model: norms, projections on a direction, vectors
    A.check()                   # how exactly A x + r is the layer's output, and every view the same A

o = A x + r with A = diag(gate) (S + diag(skip)) diag(act) M: see `factors.py`. Nothing of size [state, pos, pos] is built.
"""

from gatedlens.attention.checking import Check
from gatedlens.attention.contributions import Contributions
from gatedlens.attention.layer import ImplicitAttention
from gatedlens.attention.stack import AttentionStack, implicit_attention

# fmt: off
__all__ = [
    "AttentionStack", "Check", "Contributions", "ImplicitAttention", "implicit_attention",
]
# fmt: on
