"""Subspaces: which directions of an activation hold a thing, found by what an interchange of them does.

    learned = gl.subspaces.das(model, base, source, answers, ("resid_post", 1), rank=2)
    learned = gl.subspaces.das(model, base, source, answers, ("state", 1), rank=1, axes="value", head=2)
    with learned.interchange(model, other_prompt, pos=-1).on(model): logits = model(prompt)

    gl.subspaces.pca, mean_difference, lda, random, spanned            # fixed directions: a Subspace each
    gl.subspaces.score(model, {"learned": learned, "random": learned.random()}, base, source, answers)     # a Result
    gl.subspaces.sweep(model, base, source, answers, "blocks.*.hook_resid_post", pos=[5, -1])    # layer x pos, with controls

axes: what of the point makes a vector (None: all but batch and pos), "value" of a state, say; index (head=2, channel=[3, 5]):
which entries of it. What is neither is turned by the same basis. A state that is interchanged stays so for later positions."""

from gatedlens.runs.untrained import untrained
from gatedlens.subspaces.alignment import das
from gatedlens.subspaces.fixed import lda, mean_difference, pca, random, spanned
from gatedlens.subspaces.interchange import Interchange
from gatedlens.subspaces.scoring import score
from gatedlens.subspaces.subspace import Subspace
from gatedlens.subspaces.sweeping import sweep

# fmt: off
__all__ = [
    "Interchange", "Subspace", "das", "lda", "mean_difference", "pca", "random", "score", "spanned", "sweep", "untrained",
]
# fmt: on
