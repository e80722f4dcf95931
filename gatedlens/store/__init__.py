"""The activation store: activations of a whole corpus on disk.

    store = gl.store.harvest(model, "corpus.jsonl", "blocks.*.mixer.hook_gated", "out", batch_size=16, context=128)
    store = gl.store.open("out")
    store["gated", 1][7]                                        # pos channel, of sample 7
    for x in store.loader(("gated", 1), batch_size=1024, shuffle=True): ...

    gl.store.estimate(...)            # tokens and bytes, before
    gl.store.harvest(..., reduce=["mean", "covariance"])        # statistics instead of tensors

`datasets` (the extra `store`) writes and reads the Arrow folder; `ray` (the extra `ray`) is for `engine="ray"`.
"""

from gatedlens.errors import StoreError
from gatedlens.store.harvesting import estimate, harvest
from gatedlens.store.reading import Column, Store, open
from gatedlens.store.sizes import Estimate
from gatedlens.store.statistics import REDUCTIONS, Reduction, Statistics, sample

# fmt: off
__all__ = [
    "REDUCTIONS", "Column", "Estimate", "Reduction", "Statistics", "Store", "StoreError",
    "estimate", "harvest", "open", "sample",
]
# fmt: on
