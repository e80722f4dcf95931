"""The implicit attention of a layer in the call that is in progress: what a hook at its output point works with.

attention = underway(model, layer, values)         # values: the layer's attention_points by full name, as they were noted
verify(attention, attention.output(), o, "a cut")  # InputError unless A x + r is what the layer computed
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.attention.layer import ImplicitAttention
from gatedlens.errors import InputError
from gatedlens.model.base import HookedModel


def underway(
    model: HookedModel, layer: int, values: Mapping[str, Tensor], place: str | None = None
) -> ImplicitAttention:
    """The layer's operator, with the padding and the state of the running call; place: as in `implicit_attention`."""
    run, mixer = model.current(), model.blocks[layer].mixer_at(place)
    stem = f"blocks.{layer}.{mixer.place}."
    branches = mixer.branches(lambda name: values[stem + name], run.padding, run.before)
    return ImplicitAttention(branches, run.padding, model, layer, which=place)


@torch.no_grad()
def verify(
    attention: ImplicitAttention,
    output: Float[Tensor, "batch pos channel"],
    o: Float[Tensor, "batch pos ..."],
    what: str,
) -> None:
    """InputError unless `output`, the operator's A x + r, is `o`, the layer's: `what` is exact only then."""
    wanted = attention.padding.zero(o.flatten(2).to(output.dtype))
    error, size = (output - wanted).abs().max().item(), wanted.abs().max().item()
    if not error <= max(size, 1e-30) * torch.finfo(o.dtype).eps ** 0.5:
        points = ", ".join(attention.mixer.attention_points)
        raise InputError(
            f"Layer {attention.layer}: another hook edits inside its recurrence (or its output point), or the mixer's `factors` "
            f"are not those of its forward, so its output is not A x + r (it is off by {error:.3g} of {size:.3g}) and {what} "
            f"would not be exact. Edit what A is derived from ({points}), or make the edit after this one; "
            "`gl.implicit_attention(...).check()` tells the two apart."
        )
