"""The J-lens and the R-lens: what a layer's residual stream does to the last one's, on average, as a matrix.

    lens = gl.lens.jacobian_lens(model, texts)          # FittedLens; lens.read(model, text).plot()
    lens = gl.lens.relevance_lens(model, texts)         # the same with a gradient that follows the rules of relevance

    J_l = mean over prompts of 1/|V| sum over t in V, t' in V of  d resid_last[t'] / d resid_l[t]

V are a prompt's positions but for the first (sinks) and the last (which predicts nothing that is there). What is summed over t'
is what a position does to all that read it; in a causal model those are t' >= t. Gurnee et al. 2026 (the Jacobian lens); the
numbers are TransformerLens's `JacobianLens.fit`.

Under the rules (`relevance_rules.py`) the gradient of a mixer goes through its operator with A held, that of a gated product half
to either side, and norms' scales are held. So R_l h is what h is worth at the last layer: of one position, the score that
`gl.attribution.lrp` gives it is u . R x, x its embedding and u the direction of the logit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from gatedlens.address.layers import Layers
from gatedlens.address.positions import order
from gatedlens.errors import InputError
from gatedlens.lens.fitted_lens import Depth, FittedLens, depths_of, stream_at
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Batch, Input
from gatedlens.model.hookpoint import Capture
from gatedlens.options import checked, is_whole
from gatedlens.recurrence.autocast import exact
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.runs import inputs
from gatedlens.runs.fitting import Checkpoint, model_said
from gatedlens.runs.gradients import check_allowed
from gatedlens.runs.relevance_rules import Rules

Around = Callable[[], AbstractContextManager[Any]]


@checked
def jacobian_lens(
    model: HookedModel,
    batches: str | Tensor | Iterable[Input],
    layers: Layers = None,
    skip_first: int = 16,
    skip_last: int = 1,
    dim_batch: int = 8,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> FittedLens:
    """`lens = gl.lens.jacobian_lens(model, texts)`: a FittedLens: the mean Jacobian of the last layer's stream by each one's.

    batches: inputs of the model, one after another: texts, lists of texts, ids [batch, pos], pairs (ids, mask), images; one
    tensor, or one text, is one batch. Some hundred prompts of 128 tokens are enough. Each row counts alike. layers: which depths
    (numbers, "embed"), None for all below the last. skip_first, skip_last: how many positions at a row's ends take no part.
    dim_batch: how many dimensions one backward pass takes: each batch is run that many times side by side. checkpoint: a file
    that is written as it goes, and from which an interrupted fit goes on.

    InputError for a row that has no position left, for the last layer, and for a checkpoint of another fit.
    """
    said = {"kind": "J-lens", "skip_first": skip_first, "skip_last": skip_last}
    return _fitted(model, batches, layers, said, nullcontext, dim_batch, checkpoint, progress)


@checked
def relevance_lens(
    model: HookedModel,
    batches: str | Tensor | Iterable[Input],
    layers: Layers = None,
    gates: str = "content",
    skip_first: int = 16,
    skip_last: int = 1,
    dim_batch: int = 8,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> FittedLens:
    """`lens = gl.lens.relevance_lens(model, texts)`: the J-lens whose gradient follows the rules of relevance.

    See `mean_jacobian.py`. gates: what gets the relevance of a gated product, as in `gl.attribution.lrp`. All else as in
    `jacobian_lens`.
    """
    rules = Rules.of(model, gates)
    said = {"kind": "R-lens", "gates": gates, "skip_first": skip_first, "skip_last": skip_last}
    return _fitted(model, batches, layers, said, lambda: rules.on(model), dim_batch, checkpoint, progress)


def _fitted(
    model: HookedModel,
    batches: str | Tensor | Iterable[Input],
    layers: Layers,
    said: Mapping[str, Any],
    around: Around,
    dim_batch: int,
    checkpoint: str | Path | None,
    progress: bool,
) -> FittedLens:
    """The mean over all rows of all batches."""
    check_allowed()
    for name, least in (("skip_first", 0), ("skip_last", 0)):
        if said[name] < least:
            raise InputError(f"{name}={said[name]}: a number of positions, 0 or more.")
    if dim_batch < 1:
        raise InputError(f"dim_batch={dim_batch}: give at least 1.")
    depths = depths_of(model, layers)
    kept = Checkpoint(checkpoint, {**model_said(model), **said, "depths": depths})
    sums, seen, rows = _begun(model, depths, kept)
    done = len(seen)

    def now() -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {str(depth): total for depth, total in sums.items()}, {"seen": seen, "rows": rows}

    given = [batches] if isinstance(batches, str | Tensor) else batches
    with kept.kept(now):
        for number, one in enumerate(tqdm(given, disable=not progress, desc=f"fitting a {said['kind']}", unit="batch")):
            batch = inputs.ready(model, one)
            own = inputs.checksum(batch)
            if number < done:
                if seen[number] != own:
                    raise InputError(
                        f"checkpoint={str(checkpoint)!r} is of another fit: its batch {number} is another input."
                    )
                continue
            valid = _valid(model, batch, int(said["skip_first"]), int(said["skip_last"]))
            found = _of_batch(model, batch, valid, depths, dim_batch, around)
            for depth in depths:
                sums[depth] += found[depth]
            rows += len(valid)
            seen.append(own)
            if kept.due():
                kept.save(*now())
    if not rows:
        raise InputError("The lens was given no batch.")
    wide = at_least_float32(torch.empty(0, dtype=model.cfg.dtype)).dtype
    weights = {depth: (total / rows).to(wide) for depth, total in sums.items()}
    facts = {**model_said(model), **{name: one for name, one in said.items() if name != "kind"}, "prompts": rows}
    return FittedLens(str(said["kind"]), weights, facts=facts)


def _begun(model: HookedModel, depths: list[Depth], kept: Checkpoint) -> tuple[dict[Depth, Tensor], list[int], int]:
    """The sums so far, the checksums of the batches that are in them, and of how many rows they are."""
    d = model.cfg.d_model
    sums = {depth: torch.zeros(d, d, dtype=torch.float64) for depth in depths}
    earlier = kept.take_up({str(depth): one for depth, one in sums.items()})
    if earlier is None:
        return sums, [], 0
    tensors, far = earlier
    seen = far.get("seen", "checksums", lambda v: isinstance(v, list) and bool(v) and all(map(is_whole, v)))
    rows = far.get("rows", "how many rows they are", lambda v: is_whole(v) and v > 0)
    return {depth: tensors[str(depth)] for depth in depths}, list(seen), int(rows)


def _valid(model: HookedModel, batch: Batch, first: int, last: int) -> Bool[Tensor, "batch pos"]:
    """Which positions of each row take part, counted among its real ones."""
    real = inputs.real(model, batch)
    valid = torch.zeros_like(real)
    for row, count in enumerate(real.sum(1).tolist()):
        if count <= first + last:
            raise InputError(
                f"Row {row} of a batch has {count} positions; skip_first={first} and skip_last={last} leave none: leave such "
                "rows out, or skip fewer."
            )
        valid[row, order(real)[row, first : count - last]] = True
    return valid


def _of_batch(
    model: HookedModel,
    batch: Batch,
    valid: Bool[Tensor, "batch pos"],
    depths: list[Depth],
    dim_batch: int,
    around: Around,
) -> dict[Depth, Float[Tensor, "d_model d_model"]]:
    """The Jacobians of the rows, each the mean over its own positions, added up; exact, some of its rows at a time."""
    d = model.cfg.d_model
    n = min(dim_batch, d)
    many = Batch(_times(batch.value, n), None if batch.mask is None else _times(batch.mask, n), batch.is_resid)
    target, sources = _streams(model, many, depths, around)
    weight = valid.to(target.device, target.dtype)
    share = weight.double() / weight.double().sum(1, keepdim=True)
    found = {depth: torch.zeros(d, d, dtype=torch.float64) for depth in depths}
    for start in range(0, d, n):
        some = range(start, min(start + n, d))
        cotangent = torch.zeros_like(target).unflatten(0, (n, len(valid)))
        for place, dim in enumerate(some):
            cotangent[place, :, :, dim] = weight
        with exact(target):
            gradients = torch.autograd.grad(target, sources, cotangent.flatten(0, 1), retain_graph=some.stop < d)
        for depth, gradient in zip(depths, gradients, strict=True):
            each = gradient.unflatten(0, (n, len(valid)))[: len(some)].double()
            found[depth][some.start : some.stop] = torch.einsum("nrpd,rp->nd", each, share.to(each.device)).cpu()
    return found


def _streams(
    model: HookedModel, batch: Batch, depths: list[Depth], around: Around
) -> tuple[Float[Tensor, "batch pos d_model"], list[Float[Tensor, "batch pos d_model"]]]:
    """The last layer's residual stream, and those at the depths, in one graph that begins at the first of them."""
    names, last = [stream_at(depth) for depth in depths], stream_at(model.cfg.n_layers - 1)
    values: dict[str, Tensor] = {}

    def begin(x: Tensor, hook: Any) -> Tensor:
        return x.detach().requires_grad_()

    hooks: list[Any] = [(names[0], begin), *((name, Capture(values)) for name in (*names, last))]
    with torch.enable_grad(), around(), model.hooks(hooks):
        model(batch, return_type=None)
    return values[last], [values[name] for name in names]


def _times(x: Tensor, n: int) -> Tensor:
    """The rows `n` times over, one batch behind the other."""
    return x.repeat(n, *[1] * (x.ndim - 1))
