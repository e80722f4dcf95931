"""The gated delta rule as terms, for every architecture that has one.

    S_t = (1 - beta_t k_t k_t^T) decay_t S_{t-1} + beta_t k_t u_t^T          scan_t = S_t q_t / sqrt(n)

n numbers of a key. What a step removes is erase (probe . S): erase = beta k, and probe = decay k, because it looks at the
decayed state.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.recurrence.terms import Terms

UNIT_EPS = 1e-6


def unit(x: Float[Tensor, "*any state"]) -> Float[Tensor, "*any state"]:
    """`unit(k)`: x / sqrt(sum x^2 + 1e-6), in at least float32."""
    wide = at_least_float32(x)
    return wide * torch.rsqrt(wide.pow(2).sum(-1, keepdim=True) + UNIT_EPS)


def delta_terms(
    q: Float[Tensor, "batch pos group state"],
    k: Float[Tensor, "batch pos group state"],
    beta: Float[Tensor, "batch pos head"],
    log_decay: Float[Tensor, "batch pos head #state"],
) -> Terms:
    """`delta_terms(q, k, beta, log_decay)`: key = erase = beta k, probe = decay k, read = q / sqrt(n).

    Heads in a row share the q and k of their group. The decay is a number a head (Gated DeltaNet, arXiv 2412.06464, eq. 10), or
    one for each number of a key (Kimi Linear, arXiv 2510.26692, eq. 1).
    """
    share = beta.shape[2] // k.shape[2]
    k = k if share == 1 else k.repeat_interleave(share, dim=2)
    written = beta.unsqueeze(-1) * k
    read = q * q.shape[-1] ** -0.5
    return Terms(log_decay, key=written, read=read, erase=written, probe=torch.exp(log_decay) * k)
