"""Fixed directions: subspaces that a formula gives, from activations or from nothing.

    gl.subspaces.pca(model, texts, ("resid_post", 3), rank=4)            # most of the variance
    gl.subspaces.mean_difference(model, texts, labels, ("resid_post", 3))     # between classes' means
    gl.subspaces.lda(model, texts, labels, ("resid_post", 3))            # the same, where classes vary little within themselves
    gl.subspaces.random(model, ("resid_post", 3), rank=4, seed=0)
    gl.subspaces.spanned(model, ("resid_post", 3), directions)           # by vectors of yours: a probe's, a steering vector

Each takes axes="value" (what of the point is a vector), an index (head=2) and pos.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gatedlens.address.entries import Index
from gatedlens.address.names import Name
from gatedlens.address.positions import Positions
from gatedlens.errors import InputError
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.options import checked
from gatedlens.runs import inputs
from gatedlens.runs.vectors import Frame, each_label, one_place, orthonormal, vectors
from gatedlens.subspaces.subspace import Subspace

# A label a row. For editors and type checkers: whoever passes something else gets the error of `numbered`.
if TYPE_CHECKING:
    Labels: TypeAlias = Tensor | Sequence[Hashable]
else:
    Labels = Any
Axes = str | Sequence[str] | None


@checked
def pca(
    model: HookedModel,
    input: Input,
    name: Name,
    rank: int = 1,
    pos: Positions = -1,
    axes: str | Sequence[str] | None = None,
    **index: Index,
) -> Subspace:
    """`gl.subspaces.pca(model, texts, ("resid_post", 3), rank=4)`: the directions along which activations vary most, a Subspace.

    rank: how many. pos: at which position of each row, None for all; rows, positions and what stands beside the vector's axes are
    the samples. axes, index: see `gl.subspaces`. `facts["share"]` is how much of the variance each direction holds.
    PointError for a point or axis that there is not; InputError for a rank that the samples do not span. Source: Pearson
    1901."""
    frame = Frame.of(model, name, axes, index)
    x = _samples(model, input, frame, pos).flatten(0, 1)
    centred = x - x.mean(0)
    _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
    there = int((sizes > 1e-9 * sizes[:1].clamp(min=1e-300)).sum())
    _check_rank(rank, there, f"{len(x)} samples vary along")
    share = (sizes.square() / sizes.square().sum()).tolist()[:rank]
    return _made(model, frame, directions[:rank], pos, {"fit": "pca", "share": share, "samples": len(x)})


@checked
def mean_difference(
    model: HookedModel,
    input: Input,
    labels: Labels,
    name: Name,
    pos: Positions = -1,
    axes: str | Sequence[str] | None = None,
    **index: Index,
) -> Subspace:
    """`gl.subspaces.mean_difference(model, texts, labels, ("resid_post", 3))`: the span of the classes' means, centred.

    Of two classes the direction from one mean to the other; of n classes rank n - 1. labels: one for each row, of at least two
    classes. Other parameters and errors: as of `pca`; InputError for labels that do not match the rows, and for a single class.
    """
    frame = Frame.of(model, name, axes, index)
    means, _, facts = _by_class(model, input, labels, frame, pos)
    return _made(model, frame, orthonormal(means - means.mean(0)), pos, {"fit": "mean_difference", **facts})


@checked
def lda(
    model: HookedModel,
    input: Input,
    labels: Labels,
    name: Name,
    pos: Positions = -1,
    axes: str | Sequence[str] | None = None,
    shrinkage: float = 0.1,
    **index: Index,
) -> Subspace:
    """`gl.subspaces.lda(model, texts, labels, ("resid_post", 3))`: W^-1 times the centred means of classes, as a Subspace.

    W is the covariance within classes, shrunk: (1 - shrinkage) W + shrinkage trace(W) / d, which a sample of fewer rows than
    d needs (0 to 1). Other parameters and errors: as of `mean_difference`. Source: Fisher 1936; Ledoit and Wolf 2004
    (shrinkage)."""
    if not 0 <= shrinkage <= 1:
        raise InputError(f"shrinkage={shrinkage}: it is a share, from 0 to 1.")
    frame = Frame.of(model, name, axes, index)
    means, within, facts = _by_class(model, input, labels, frame, pos)
    d = means.shape[1]
    level = within.diagonal().mean().clamp(min=torch.finfo(within.dtype).tiny)
    W = (1 - shrinkage) * within + shrinkage * level * torch.eye(d, dtype=within.dtype, device=within.device)
    directions = torch.linalg.lstsq(W, (means - means.mean(0)).mT).solution.mT
    return _made(model, frame, orthonormal(directions), pos, {"fit": "lda", "shrinkage": shrinkage, **facts})


@checked
def random(
    model: HookedModel,
    name: Name,
    rank: int = 1,
    seed: int = 0,
    axes: str | Sequence[str] | None = None,
    **index: Index,
) -> Subspace:
    """`gl.subspaces.random(model, ("resid_post", 3), rank=4, seed=0)`: a random subspace: what any other has to beat.

    rank: 0 (none of the space) up to all of it. axes, index and errors: as of `pca`.
    """
    frame = Frame.of(model, name, axes, index)
    d = frame.width(model)
    _check_rank(rank, d, "the point has", least=0)
    drawn = torch.randn(rank, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return _made(model, frame, orthonormal(drawn), None, {"fit": "random", "seed": seed})


@checked
def spanned(
    model: HookedModel,
    name: Name,
    directions: Float[Tensor, "*some d"],
    pos: int | None = None,
    axes: str | Sequence[str] | None = None,
    **index: Index,
) -> Subspace:
    """`gl.subspaces.spanned(model, ("resid_post", 3), probe.weights)`: the span of vectors of yours, [d] or [some, d].

    Vectors that depend on one another give fewer dimensions. axes, index and errors: as of `pca`; InputError for vectors of
    another width than the point's."""
    frame = Frame.of(model, name, axes, index)
    d = frame.width(model)
    if directions.ndim == 0 or directions.shape[-1] != d:
        raise InputError(
            f"The directions have the shape {list(directions.shape)}; a vector of {frame.said} has {d} numbers."
        )
    rows = directions.reshape(-1, d)
    return _made(model, frame, orthonormal(rows.double()), pos, {"fit": "given"})


def numbered(labels: Labels, rows: int) -> tuple[Int[Tensor, " row"], list[Any]]:
    """`numbered(["a", "b", "a"], 3)`: ([0, 1, 0], ["a", "b"]); InputError for another number of labels, and for one class."""
    given = each_label(labels)
    if len(given) != rows:
        raise InputError(f"There are {len(given)} labels and {rows} rows: give one for each.")
    classes = sorted(set(given), key=lambda one: (str(type(one)), one))
    if len(classes) < 2:
        raise InputError(
            f"All labels are {classes[0]!r}: two classes at least are told apart." if classes else "No labels."
        )
    return torch.tensor([classes.index(one) for one in given]), classes


def _check_rank(rank: int, most: int, what: str, least: int = 1) -> None:
    if not least <= rank <= most:
        raise InputError(f"rank={rank}: {what} {most} dimensions: give {least} to {most}.")


def _samples(model: HookedModel, input: Input, frame: Frame, pos: Positions) -> Float[Tensor, "row sample d"]:
    """The vectors of each row, in float64."""
    found = vectors(model, inputs.ready(model, input), frame, pos)
    return found.flatten(1, 2).double()


def _by_class(
    model: HookedModel, input: Input, labels: Labels, frame: Frame, pos: Positions
) -> tuple[Float[Tensor, "group d"], Float[Tensor, "d d"], dict[str, Any]]:
    """The means of classes, the covariance within them, and what is known of the sample."""
    x = _samples(model, input, frame, pos)
    which, classes = numbered(labels, len(x))
    groups = [x[(which == one).to(x.device)].flatten(0, 1) for one in range(len(classes))]
    means = torch.stack([group.mean(0) for group in groups])
    rest = torch.cat([group - mean for group, mean in zip(groups, means, strict=True)])
    facts = {"classes": [str(one) for one in classes], "samples": len(rest)}
    return means, rest.mT @ rest / max(1, len(rest) - len(classes)), facts


def _made(model: HookedModel, frame: Frame, basis: Tensor, pos: Positions, facts: dict[str, Any]) -> Subspace:
    return Subspace(
        frame,
        basis.to(torch.promote_types(model.cfg.dtype, torch.float32)),
        one_place(pos),
        {"model": model.cfg.model_name, **facts},
    )
