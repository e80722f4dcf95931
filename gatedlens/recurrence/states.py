"""Every state of a recurrence, some positions at a time: all of them at once may be too many.

    for some, before, states in walk(terms, u, initial): ...       # before: the state that each of these steps began from

b batch, l pos, h head, v value, k key.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.recurrence.chunks import parts_of
from gatedlens.recurrence.delta_states import states_of_delta_rule
from gatedlens.recurrence.scanning import linear_scan
from gatedlens.recurrence.terms import Terms

AT_ONCE = 1 << 22  # numbers of the states that are there at a time


def every_state(
    terms: Terms, u: Float[Tensor, "batch pos head value"], initial: Float[Tensor, "batch head value key"]
) -> Float[Tensor, "batch pos head value key"]:
    """`literal_states`, by the way that the device likes."""
    decay, write, probe = terms.decays().unsqueeze(-2), terms.write(u), terms.probes()
    if terms.erase is None or probe is None:
        return linear_scan(decay, write, initial)
    return states_of_delta_rule(decay, write, terms.erase.unsqueeze(-2), probe, initial)


def walk(
    terms: Terms,
    u: Float[Tensor, "batch pos head value"],
    state: Float[Tensor, "batch head value key"],
    at_once: int = AT_ONCE,
    multiple: int = 1,
) -> Iterator[tuple[slice, Float[Tensor, "batch some head value key"], Float[Tensor, "batch some head value key"]]]:
    """(some, before, states) from the first position to the last: which positions, the states before them and behind them; a
    multiple of so many at a time."""
    size = multiple * max(1, at_once // max(1, multiple * state.numel()))
    for some in parts_of(u.shape[1], size):
        states = every_state(terms.at(some), u[:, some], state)
        yield some, torch.cat([state.unsqueeze(1), states[:, :-1]], dim=1), states
        state = states[:, -1]
