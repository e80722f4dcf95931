"""Profiles of an implicit attention: how far a layer looks, how sharply, and whether it does induction.

    gl.profiles.of_layer(A).half_life               # batch: of the layer, |A| averaged over channels
    gl.profiles.of_channels(A).mean_distance        # batch channel
    gl.profiles.of_heads(A).half_life               # batch head
    gl.profiles.induction(A).score                  # batch; induction_of_channels(A): batch channel

The definitions stand in `attention/profiles.py`; an AttentionStack has them as methods, with a layer axis in front.
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

# fmt: off
__all__ = [
    "Induction", "Profile", "induction", "induction_of_channels", "induction_of_heads", "of_channels", "of_heads", "of_layer",
    "shares",
]
# fmt: on
