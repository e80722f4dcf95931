"""Every state of a delta rule, whatever hooks have made of its decays and writes: what stands behind hook_state.

    S_t = decay_t * S_{t-1} - erase_t (probe_t . S_{t-1}) + write_t

A loop over positions (`march`, literal.py) on a processor. On accelerators chunks side by side: without the rule a chunk is an
elementwise recurrence F (doubling.py); what its probes find, w_i = probe_i . S_{i-1}, is a triangular system as in chunk.py,

    (I + T) w = p S_0 + probe_i . F_{i-1}        T[i, j] = probe_i . E(i-1, j) erase_j        p_i = probe_i E(i-1, 0)

and with w known all of it is an elementwise recurrence with the writes write_t - erase_t w_t. Where a hook gave each value a
decay or an erase of its own, each is a head. b batch, l pos, h head, v value, k key, C positions of a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import handle_torch_function

from gatedlens.recurrence import doubling
from gatedlens.recurrence.chunk import solve
from gatedlens.recurrence.halving import climb
from gatedlens.recurrence.literal import march
from gatedlens.recurrence.matrix_vector import times
from gatedlens.recurrence.scanning import linear_scan
from gatedlens.recurrence.transforms import overridden

CHUNK = 64  # positions, a power of 2


def states_of_delta_rule(
    decay: Float[Tensor, "batch pos head #value #key"],
    write: Float[Tensor, "batch pos head value key"],
    erase: Float[Tensor, "batch pos head #value key"],
    probe: Float[Tensor, "batch pos head key"],
    state: Float[Tensor, "batch head value key"],
) -> Float[Tensor, "batch pos head value key"]:
    """`march`, by the way that the device likes."""
    if overridden(decay, write, erase, probe, state):
        given = decay, write, erase, probe, state
        return handle_torch_function(states_of_delta_rule, given, *given)
    if not doubling.pays(write):
        return march(decay, write, erase, probe, state)
    length, width, keys = write.shape[1], *write.shape[3:]
    decay = decay.expand(*decay.shape[:-1], keys)
    if decay.shape[3] > 1 or erase.shape[3] > 1:
        decay, erase = (x.expand(-1, -1, -1, width, -1).flatten(2, 3) for x in (decay, erase))
        whole, probe = write.flatten(2, 3).unsqueeze(3), probe.repeat_interleave(width, dim=2)
        states = _in_chunks(decay, whole, erase, probe, state.flatten(1, 2).unsqueeze(2))
    else:
        states = _in_chunks(decay.squeeze(3), write, erase.squeeze(3), probe, state)
    return states[:, :length].reshape(write.shape)


def _in_chunks(
    decay: Float[Tensor, "batch pos head key"],
    write: Float[Tensor, "batch pos head value key"],
    erase: Float[Tensor, "batch pos head key"],
    probe: Float[Tensor, "batch pos head key"],
    state: Float[Tensor, "batch head value key"],
) -> Float[Tensor, "batch long head value key"]:
    size = min(CHUNK, 1 << max(0, write.shape[1] - 1).bit_length())
    number = -(-write.shape[1] // size)

    def apart(x: Tensor, filled: float = 0.0) -> Tensor:
        """[b, l, ...] -> [(b chunk), C, ...]: positions past the end keep all and write nothing."""
        over = number * size - x.shape[1]
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, over), value=filled) if over else x
        return x.unflatten(1, (number, size)).flatten(0, 1)

    decay, write, erase, probe = apart(decay, 1.0), apart(write), apart(erase), apart(probe)
    each = decay.unsqueeze(3).expand_as(write)
    free = linear_scan(each, write)  # [(b n), C, h, v, k]
    # Each probe looks at the state before it, so its row is that of the position before: E(i-1, j), and probe_0 sees S_0.
    ahead = F.pad(probe[:, 1:], (0, 0, 0, 0, 0, 1))
    square = climb(decay.transpose(1, 2), [ahead.transpose(1, 2)], [erase.transpose(1, 2)])
    T = F.pad(square.matrices[0][0][..., :-1, :], (0, 0, 1, 0))
    rows = torch.cat([probe[:, :1].transpose(1, 2), square.rows[0][..., :-1, :]], dim=2)  # p: [(b n), h, C, k]
    seen = times(F.pad(free[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0)), probe).transpose(1, 2)
    width = seen.shape[-1]
    X, Y = solve(T, torch.cat([seen, rows], dim=-1)).split([width, rows.shape[-1]], dim=-1)
    late = square.sources[0]
    transition = torch.diag_embed(square.decay) - late.mT @ Y
    left = free[:, -1].mT - late.mT @ X
    starts = [state.mT]
    steps = (x.unflatten(0, (-1, number)).unbind(1) for x in (transition, left))
    for onward, new in zip(*steps, strict=True):
        starts.append(onward @ starts[-1] + new)
    before = torch.stack(starts[:-1], 1).flatten(0, 1)  # [(b n), h, k, v]
    found = (X + Y @ before).transpose(1, 2)  # [(b n), C, h, v]
    states = linear_scan(each, write - found.unsqueeze(-1) * erase.unsqueeze(-2), before.mT.contiguous())
    return states.unflatten(0, (-1, number)).flatten(1, 2)
