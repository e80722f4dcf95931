"""The recurrence as it is written, and its matrix: slow, and plain to see. What the fast forms are tested against.

    S_t = decay_t * S_{t-1} - erase_t (probe_t . S_{t-1}) + value_t key_t^T      scan_t = S_t read_t     S [head, value, key]

Every position is a few operations of torch: right under any derivative and any transform.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.recurrence.terms import Terms


def literal_states(
    terms: Terms, u: Float[Tensor, "batch pos head value"], initial: Float[Tensor, "batch head value key"]
) -> Float[Tensor, "batch pos head value key"]:
    """Every state, a position at a time."""
    value, key = terms.value(u), terms.of_heads(terms.key)
    erase = None if terms.erase is None else terms.erase.unsqueeze(-2)
    return march(terms.decays().unsqueeze(-2), value.unsqueeze(-1) * key.unsqueeze(-2), erase, terms.probes(), initial)


def march(
    decay: Float[Tensor, "batch pos head #value #key"],
    write: Float[Tensor, "batch pos head value key"],
    erase: Float[Tensor, "batch pos head #value key"] | None,
    probe: Float[Tensor, "batch pos head key"] | None,
    state: Float[Tensor, "batch head value key"],
) -> Float[Tensor, "batch pos head value key"]:
    """The same for a decay, a write and an erase of any form: what hooks may have made of them."""
    states = []
    for t in range(write.shape[1]):
        left = decay[:, t] * state
        if erase is not None and probe is not None:
            found = (state * probe[:, t].unsqueeze(-2)).sum(-1, keepdim=True)  # what the probe finds: [b, h, v, 1]
            left = left - found * erase[:, t]
        state = left + write[:, t]
        states.append(state)
    return torch.stack(states, dim=1)


def literal_scan(
    terms: Terms, u: Float[Tensor, "batch pos head value"], initial: Float[Tensor, "batch head value key"]
) -> tuple[Float[Tensor, "batch pos head value"], Float[Tensor, "batch head value key"]]:
    """scan_t = S_t read_t at every position, and the last state."""
    states = literal_states(terms, u, initial)
    return (states * terms.of_heads(terms.read).unsqueeze(-2)).sum(-1), states[:, -1]


def literal_matrix(terms: Terms) -> Float[Tensor, "batch head dst src"]:
    """S[i, j] of each head: what the read of i finds of a one that j wrote, by running the recurrence from each j."""
    batch, length, heads = terms.log_decay.shape[:3]
    width = terms.key.shape[3]
    ones = terms.key.new_ones(batch, length, heads, 1)
    columns = []
    for j in range(length):
        only = torch.zeros_like(ones)
        only[:, j] = 1
        columns.append(literal_scan(terms, only, ones.new_zeros(batch, heads, 1, width))[0].squeeze(-1))
    return torch.stack(columns, dim=-1).transpose(1, 2)
