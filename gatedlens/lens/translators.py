"""The tuned lens: an affine map a layer, trained so that what it makes of the stream predicts what the model predicts.

    lens = gl.lens.tuned_lens(model, batches, steps=250)      # FittedLens; lens.read(model, text).divergence()

    lens_l(h) = h + A_l h + b_l ,   loss_l = mean over positions of KL(softmax(logits) || softmax(unembed(ln_final(lens_l(h)))))

A and b begin at 0, so the lens begins as the logit lens. Belrose et al. 2023 (arXiv 2303.08112). The model stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gatedlens.address.layers import Layers
from gatedlens.errors import InputError
from gatedlens.lens.fitted_lens import Depth, FittedLens, depths_of, stream_at
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.options import checked
from gatedlens.recurrence.autocast import exact
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.result.result import Result
from gatedlens.runs import inputs
from gatedlens.runs.fitting import Checkpoint, Descent, course, descend, model_said, which_batch


@checked
def tuned_lens(
    model: HookedModel,
    batches: str | Tensor | Sequence[Input],
    layers: Layers = None,
    steps: int = 250,
    lr: int | float = 1e-3,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> FittedLens:
    """`lens = gl.lens.tuned_lens(model, batches, steps=250)`: a FittedLens of affine translators, trained by KL to the logits.

    batches: a list of inputs (texts, lists of texts, ids [batch, pos], pairs (ids, mask), images); each step reads one, in an
    order drawn by `seed`; one tensor, or one text, is one batch. layers: which depths (numbers, "embed"), None for all below the
    last. lr: of Adam. checkpoint: a file that is written as it goes, from which an interrupted fit goes on (or a longer one).
    `lens.facts["losses"]` is the first and the last loss of each depth, in nats; `gl.lens.losses(lens)` all of them.

    InputError for the last layer, no batch, a loss that is no number, and a checkpoint of another fit.
    """
    given = [batches] if isinstance(batches, str | Tensor) else list(batches)
    if not given:
        raise InputError("tuned_lens() was given no batch.")
    depths, d = depths_of(model, layers), model.cfg.d_model
    wide = at_least_float32(torch.empty(0, dtype=model.cfg.dtype)).dtype
    like = model.W_U
    parameters: dict[str, Tensor] = {}
    for depth in depths:
        parameters[f"{depth}.weight"] = torch.zeros(d, d, dtype=wide, device=like.device)
        parameters[f"{depth}.bias"] = torch.zeros(d, dtype=wide, device=like.device)
    total = 0
    for one in given:
        total = inputs.checksum(inputs.ready(model, one), total)
    how = {"lr": lr, "seed": seed, "batches": len(given)}
    kept = Checkpoint(checkpoint, {**model_said(model), **how, "depths": depths, "input (checksum)": total})

    def loss_at(step: int) -> Tensor:
        own, streams, real = _predicted(model, given[which_batch(step, len(given), seed)], depths)
        return torch.stack([_divergence(model, parameters, depth, streams[depth], own, real) for depth in depths])

    losses = descend(parameters, loss_at, Descent(steps, float(lr), progress), kept, "tuned lens")
    eye = torch.eye(d, dtype=wide)
    weights: dict[Depth, Tensor] = {depth: eye + parameters[f"{depth}.weight"].cpu() for depth in depths}
    biases: dict[Depth, Tensor] = {depth: parameters[f"{depth}.bias"].cpu() for depth in depths}
    facts = {**model_said(model), **how, "steps": steps, "losses": losses}
    return FittedLens("tuned lens", weights, biases, facts)


@checked
def losses(lens: FittedLens) -> Result:
    """`gl.lens.losses(lens).plot()`: of a tuned lens the losses of its training, a Result [step, layer], in nats."""
    if "losses" not in lens.facts:
        raise InputError(f"A {lens.kind} is not trained: only a tuned lens has losses.")
    return course(lens.facts["losses"], lens.layers, "layer", "Tuned lens: losses in training", "KL (nats)")


@torch.no_grad()
def _predicted(
    model: HookedModel, given: Input, depths: list[Depth]
) -> tuple[Float[Tensor, "batch pos d_vocab"], dict[Depth, Tensor], Bool[Tensor, "batch pos"]]:
    """The model's own log probabilities, the streams at the depths, and which positions are real."""
    names = {depth: stream_at(depth) for depth in (*depths, model.cfg.n_layers - 1)}
    cache, batch = inputs.cached(model, given, list(names.values()))
    last = cache[names[model.cfg.n_layers - 1]]
    own = _logits(model, last).log_softmax(-1)
    return own, {depth: cache[names[depth]] for depth in depths}, inputs.real(model, batch)


def _divergence(
    model: HookedModel, parameters: dict[str, Tensor], depth: Depth, stream: Tensor, own: Tensor, real: Tensor
) -> Tensor:
    """The mean over real positions of KL(own || what the lens makes of the stream)."""
    weight, bias = parameters[f"{depth}.weight"], parameters[f"{depth}.bias"]
    with exact(stream):
        wide = stream.to(weight.dtype)
        carried = wide + wide @ weight.T + bias
    said: Any = _logits(model, carried.to(stream.dtype)).log_softmax(-1)
    each = (own.exp() * (own - said)).sum(-1)
    return (each * real.to(each)).sum() / real.sum().to(each.device)


def _logits(model: HookedModel, stream: Tensor) -> Tensor:
    with exact(stream):
        return at_least_float32(model.unembed(model.ln_final(stream)))
