"""Corruption: the input of a causal trace with its subject spoilt, by noise on its embeddings or by another input.

    Corruption.noise(batch, embedded, marked, factor=3.0, samples=10, seed=0)
    Corruption.counterfactual(model, batch, embedded, other)      # two Batches

`embedded` is what stood at hook_embed in the clean run, `marked` [batch, pos] where the subject is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gatedlens.address.positions import Positions, listed, mask_of
from gatedlens.errors import InputError
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Batch
from gatedlens.runs import inputs
from gatedlens.runs.baseline import EMBED


@dataclass(frozen=True, eq=False)
class Corruption:
    """The corrupted input: `batch`, and what is `added` to its embedding in each sample."""

    batch: Batch
    added: Float[Tensor, "sample batch pos d_model"] | None
    marked: Bool[Tensor, "batch pos"]  # the subject
    facts: dict[str, Any]

    @property
    def samples(self) -> int:
        return 1 if self.added is None else len(self.added)

    @staticmethod
    def noise(
        batch: Batch, embedded: Tensor, marked: Tensor, factor: int | float, samples: int, seed: int
    ) -> Corruption:
        """`Corruption.noise(batch, embedded, marked, factor=3.0, samples=10, seed=0)`: noise on the subject's embeddings.

        It is Gaussian; its standard deviation is `factor` times that of all the input's embeddings [batch pos d_model], padding
        left out.
        """
        mask = batch.mask
        real = torch.ones_like(marked) if mask is None else mask.bool()
        std = factor * float((embedded if mask is None else embedded[mask.bool()]).double().std())
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(samples, *embedded.shape, generator=generator, dtype=torch.float64).to(embedded)
        facts = {
            "corrupt": "noise",
            "noise_std": std,
            "samples": samples,
            "seed": seed,
            "subject": listed(marked, real),
        }
        return Corruption(batch, std * drawn * marked.unsqueeze(-1), marked, facts)

    @staticmethod
    def counterfactual(model: HookedModel, batch: Batch, embedded: Tensor, other: Batch) -> Corruption:
        """`Corruption.counterfactual(model, batch, embedded, other)`: another input; its subject is where its embeddings differ.

        InputError for an input of another shape or padding, or one that does not differ.
        """
        masks = inputs.real(model, other), inputs.real(model, batch)
        if other.value.shape != batch.value.shape or not torch.equal(*masks):
            raise InputError(
                f"The counterfactual has shape {list(other.value.shape)} and the clean input {list(batch.value.shape)}: they "
                "must have the same positions, and the same padding."
            )
        _, cache = model.run_with_cache(other, names_filter=EMBED)
        marked = (cache[EMBED] != embedded).any(-1) & masks[1]
        if not bool(marked.any()):
            raise InputError("The counterfactual is the clean input: nothing is corrupted.")
        return Corruption(other, None, marked, {"corrupt": "counterfactual", "subject": listed(marked, masks[1])})


def marked_by(subject: Positions, real: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """Where the subject is; InputError for none, or a row without it."""
    if subject is None:
        raise InputError('corrupt="noise" needs subject=..., the positions to corrupt.')
    marked = mask_of(subject, "subject", real)
    if not bool(marked.any(1).all()):
        raise InputError(f"subject={subject!r}: some row has no subject, no position of it is meant.")
    return marked
