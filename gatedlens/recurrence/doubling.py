"""A recurrence of steps by doubling: as many operators as the number of positions has bits, not as it has positions.

    state_t = decay_t * state_{t-1} + write_t

Neighbours meet: the step of two positions is decay_{t+1} decay_t and decay_{t+1} write_t + write_{t+1}. The pairs are a
recurrence half as long; its states are those of every second position, and each of the others is one step from the one before.
No decay is divided by or taken the logarithm of, so any number will do. That is three times the arithmetic of a loop over
positions: for accelerators, where starting an operator costs more than its numbers. Out of place, in torch's own operations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

ELEMENTS = 1 << 26  # numbers of a segment's decay where positions run side by side: 256 MiB of float32

Join = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def pays(x: Tensor) -> bool:
    """Whether positions run side by side on the device of `x`. A loop is faster where its numbers are in a cache."""
    return x.device.type != "cpu"


def doubled(
    decay: Float[Tensor, "batch pos *rest"],
    write: Float[Tensor, "batch pos *rest"],
    initial: Float[Tensor, "batch ..."],
    step: Step = torch.addcmul,
    join: Join = torch.mul,
) -> Float[Tensor, "batch pos *rest"]:
    """Every state. `step(write, decay, state)` is the next state and `join(decay, decay)` the decay of two steps."""
    first = step(write[:, :1], decay[:, :1], initial.unsqueeze(1))
    # The first state is known; behind it stand pairs, each seen from the state before it, and perhaps a single position.
    pairs = (write.shape[1] - 1) // 2
    states = first
    if pairs:
        early, late = slice(1, 1 + 2 * pairs, 2), slice(2, 2 + 2 * pairs, 2)
        second = doubled(
            join(decay[:, late], decay[:, early]),
            step(write[:, late], decay[:, late], write[:, early]),
            first.squeeze(1),
            step,
            join,
        )
        before = torch.cat([first, second[:, :-1]], dim=1)
        between = step(write[:, early], decay[:, early], before)
        states = torch.cat([first, torch.stack([between, second], 2).flatten(1, 2)], dim=1)
    if write.shape[1] % 2:
        return states
    return torch.cat([states, step(write[:, -1:], decay[:, -1:], states[:, -1:])], dim=1)


def running_max(
    log_decay: Float[Tensor, "batch pos *rest"],
    key: Float[Tensor, "batch pos *rest"],
    start: Float[Tensor, "batch ..."],
) -> Float[Tensor, "batch pos *rest"]:
    """max_t = max(max_{t-1} + log_decay_t, key_t): the same with + for *, and the maximum for +."""
    return doubled(log_decay, key, start, lambda k, w, top: torch.maximum(top + w, k), torch.add)
