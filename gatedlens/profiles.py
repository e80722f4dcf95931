"""Profiles of an implicit attention, how far a layer looks and whether it does induction; and of a state, what becomes of it.

    gl.profiles.of_layer(A).half_life               # batch: of the layer, |A| averaged over channels
    gl.profiles.of_channels(A).mean_distance        # batch channel
    gl.profiles.of_heads(A).half_life               # batch head
    gl.profiles.induction(A).score                  # batch; induction_of_channels(A): batch channel

    gl.profiles.rewrite(cache, layer=0).relative    # batch pos head: how much of the state each token rewrites
    gl.profiles.collisions(cache, layer=0).cosine   # batch head dst src: which earlier keys the probe of a token meets
    gl.profiles.decay_half_life(cache, layer=0)     # batch head key: tokens until half of what was written is left
    gl.profiles.state_rank(cache, layer=0, pos=-1)  # batch head: how many directions the state holds

A an implicit attention, cache of `model.run_with_cache`. The definitions stand in `attention/profiles.py` and
`attention/state_profiles.py`; an AttentionStack has the first ones as methods, with a layer axis in front.
"""

from gatedlens.attention.profiles import (
    Induction,
    Profile,
    induction,
    induction_of_channels,
    induction_of_heads,
    of_channels,
    of_heads,
    of_layer,
    shares,
)
from gatedlens.attention.state_profiles import (
    Collisions,
    Rewrite,
    StateRank,
    collisions,
    decay_half_life,
    rewrite,
    state_rank,
)

# fmt: off
__all__ = [
    "Collisions", "Induction", "Profile", "Rewrite", "StateRank", "collisions", "decay_half_life", "induction",
    "induction_of_channels", "induction_of_heads", "of_channels", "of_heads", "of_layer", "rewrite", "shares", "state_rank",
]
# fmt: on
