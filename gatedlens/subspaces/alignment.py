"""DAS, distributed alignment search: the subspace whose interchange makes a model say what a causal model says it should.

    learned = gl.subspaces.das(model, base, source, answers, ("resid_post", 1), rank=2, pos=5)

    loss = cross-entropy of the logits of base + P (source - base) and the answers,  P = basis^T basis,  minimised by Adam

The basis stays orthonormal by torch's parametrisation. Initial rotation, order of batches and steps are those of
TransformerLens's `fit_das`, so that both find the same subspace. Source: Geiger et al. 2024 (arXiv 2303.02536)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from gatedlens.address.entries import Index
from gatedlens.address.names import Name
from gatedlens.address.positions import Positions
from gatedlens.errors import InputError
from gatedlens.metrics import Logits, Tokens, at_position
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Batch, Input
from gatedlens.options import checked, tensor_of
from gatedlens.runs import inputs
from gatedlens.runs.cells import layer_of
from gatedlens.runs.fitting import Checkpoint, Descent, descend, model_said
from gatedlens.runs.gradients import check_allowed
from gatedlens.runs.identity import Digest
from gatedlens.runs.vectors import ROWS, Frame, one_place, rows_of, vectors
from gatedlens.subspaces.interchange import Interchange
from gatedlens.subspaces.subspace import Subspace

KEPT = 1 << 30  # bytes of the base's residual stream that a fit keeps


@checked
def das(
    model: HookedModel,
    base: Input,
    source: Input,
    answers: Tokens,
    name: Name,
    pos: Positions = -1,
    source_pos: Positions = None,
    rank: int = 1,
    axes: str | Sequence[str] | None = None,
    *,
    read: Positions = -1,
    epochs: int = 20,
    batch_size: int = 128,
    lr: float = 1e-2,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    **index: Index,
) -> Subspace:
    """`gl.subspaces.das(model, base, source, answers, ("resid_post", 1), pos=5, rank=2)`: the learned Subspace.

    base, source: inputs, a row a pair. answers: the token (class) of each pair that the causal model gives for the base with the
    variable of the source. pos, source_pos: where the interchange is, in base and source (None: as pos); they count real
    tokens. rank: of the subspace. axes, index: what of the point is a vector, see `gl.subspaces`. read: the position whose
    logits answer.

    epochs: passes over the pairs (0: the rotation that training starts from, a control); batch_size: pairs a step; lr:
    Adam's. seed: of the start and of the order; the same seed gives the same numbers. checkpoint: a file that is written as it
    goes, from which an interrupted fit (or a longer one) goes on. `facts["losses"]` is the mean loss of each epoch, in nats.

    PointError for a point or axis that there is not. InputError for pairs that do not match, a rank that is none, a model in
    training mode, and a checkpoint of another fit.

    Source: Geiger et al. 2024 (Finding alignments between interpretable causal variables and distributed neural representations,
    arXiv 2303.02536).
    """
    fit = Fit.of(model, base, source, answers, Frame.of(model, name, axes, index), pos, source_pos, read)
    return fit.run(Training(rank, epochs, batch_size, float(lr), seed), checkpoint, progress)


@dataclass(frozen=True)
class Training:
    """How a rotation is learned."""

    rank: int
    epochs: int = 20
    batch_size: int = 128
    lr: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        for option, least in (("rank", 1), ("epochs", 0), ("batch_size", 1), ("seed", 0)):
            if getattr(self, option) < least:
                raise InputError(f"{option}={getattr(self, option)}: give {least} or more.")
        if not self.lr > 0:
            raise InputError(f"lr={self.lr}: a learning rate is more than 0.")

    def rotation(self, d: int, like: Tensor) -> nn.Linear:
        """A map from `rank` to `d` dimensions whose weight [d, rank] stays orthonormal, as it starts; at least float32."""
        if self.rank > d:
            raise InputError(f"rank={self.rank}: a vector has {d} numbers, so give 1 to {d}.")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            linear = nn.Linear(self.rank, d, bias=False)
            orthogonal(linear)
        return linear.to(like.device, torch.promote_types(like.dtype, torch.float32))

    def batches(self, pairs: int) -> list[Int[Tensor, " some"]]:
        """Which pairs each step reads: in each epoch all of them, in another order."""
        generator = numpy.random.default_rng(self.seed)
        orders = (torch.as_tensor(generator.permutation(pairs)) for _ in range(self.epochs))
        return [rows for order in orders for rows in order.split(self.batch_size)]


@dataclass(frozen=True)
class Fit:
    """The pairs of a fit, made ready: `source` [pair, some, other, d] is what the source runs held; `start` the block that runs
    of the base begin at, `resid` its residual stream there (None: they begin with the input)."""

    model: HookedModel
    base: Batch
    source: Float[Tensor, "pair some other d"]
    answers: Int[Tensor, " pair"]
    frame: Frame
    pos: Positions
    read: Positions
    start: int = 0
    resid: Float[Tensor, "pair pos d_model"] | None = None

    @staticmethod
    def of(
        model: HookedModel,
        base: Input,
        source: Input,
        answers: Tokens,
        frame: Frame,
        pos: Positions,
        source_pos: Positions,
        read: Positions,
    ) -> Fit:
        """`Fit.of(model, base, source, answers, frame, pos, source_pos, read)`; errors as of `das`."""
        check_allowed()
        if model.training:
            raise InputError("The model is in training mode, where dropout may differ from run to run: model.eval().")
        ready, other = inputs.ready(model, base), inputs.ready(model, source)
        tokens = answers_of(answers, len(ready.value), model)
        if len(ready.value) != len(other.value):
            raise InputError(
                f"There are {len(ready.value)} bases and {len(other.value)} sources: give a source for each base."
            )
        where, what = (pos, "pos") if source_pos is None else (source_pos, "source_pos")
        found = vectors(model, other, frame, where, what)
        start, resid = _beginning(model, ready, frame)
        return Fit(model, ready, found, tokens.to(found.device), frame, pos, read, start, resid)

    def run(self, training: Training, checkpoint: str | Path | None, progress: bool) -> Subspace:
        """`fit.run(training, None, True)`: the rotation learned."""
        model, pairs = self.model, len(self.answers)
        linear = training.rotation(self.source.shape[-1], self.source)
        batches, kept = training.batches(pairs), Checkpoint(checkpoint, self._said(training))

        def loss_at(step: int) -> Tensor:
            return self._loss(linear, batches[step]).reshape(1)

        steps: list[list[float]] = []
        if batches:
            descent = Descent(len(batches), training.lr, progress)
            with frozen(model):
                steps = descend(dict(linear.named_parameters()), loss_at, descent, kept, "DAS")
        losses = _by_epoch([one for (one,) in steps], batches, pairs)
        basis = torch.linalg.qr(linear.weight.detach().double()).Q.mT.to(linear.weight)
        facts = {
            "model": model.cfg.model_name, "fit": "das", "losses": losses, "pairs": pairs, "epochs": training.epochs,
            "batch_size": training.batch_size, "lr": training.lr, "seed": training.seed,
        }  # fmt: skip
        return Subspace(self.frame, basis.contiguous(), one_place(self.pos), facts)

    def _loss(self, linear: nn.Linear, rows: Int[Tensor, " some"]) -> Float[Tensor, ""]:
        """The mean cross-entropy of some pairs under the interchange, in nats."""
        pos = some_of(self.pos, rows)
        change = Interchange(self.frame, linear.weight.mT, self.source[rows.to(self.source.device)], pos)
        part, options = rows_of(self.base, rows.to(self.base.value.device)), dict[str, Any]()
        if self.resid is not None:
            part = Batch(self.resid[rows.to(self.resid.device)], part.mask, is_resid=True)
            options = {"start_at_layer": self.start}
        with self.model.hooks(change.hooks(self.model)):
            logits = self.model(part, **options)
        here = at_position(Logits.of(logits, part.mask), some_of(self.read, rows))
        return F.cross_entropy(here, self.answers[rows.to(self.answers.device)].to(here.device))

    def _said(self, training: Training) -> dict[str, Any]:
        """Everything that decides the numbers, but how many epochs."""
        given = Digest().add([self.base.value, self.base.mask, self.source, self.answers, self.pos, self.read])
        said = {"frame": self.frame.to_dict(), "rank": training.rank, "batch_size": training.batch_size}
        said |= {"lr": training.lr, "seed": training.seed, "input (checksum)": f"{given.data}{given.tensors}"}
        return {**model_said(self.model), **said}


def _by_epoch(losses: list[float], batches: Sequence[Tensor], pairs: int) -> list[float]:
    """The mean loss of each epoch, of each batch by how many pairs it has."""
    weighed = [loss * len(rows) for loss, rows in zip(losses, batches, strict=True)]
    each = -(-pairs // len(batches[0])) if batches else 1
    return [sum(weighed[first : first + each]) / pairs for first in range(0, len(weighed), each)]


@torch.no_grad()
def _beginning(model: HookedModel, base: Batch, frame: Frame) -> tuple[int, Tensor | None]:
    """The block that a fit's runs may begin at, and the base's residual stream there: what an interchange does not change is run
    once. Not block 0, some of whose points fire before its stream begins; nor under hooks, which may read anything."""
    layer = layer_of(frame.name) or 0
    whole = layer == 0 or model.is_hooked() or bool(model.hands_on)
    numbers = len(base.value) * model.positions(base) * model.cfg.d_model
    if whole or numbers * model.cfg.dtype.itemsize > KEPT:
        return 0, None
    name = f"blocks.{layer}.hook_resid_pre"
    parts = base.value.split(ROWS)
    masks = [None] * len(parts) if base.mask is None else base.mask.split(ROWS)
    kept = [
        model.run_with_cache(Batch(part, mask, base.is_resid), names_filter=name, return_type=None)[1][name]
        for part, mask in zip(parts, masks, strict=True)
    ]
    return layer, torch.cat(kept)


def answers_of(answers: Tokens, rows: int, model: HookedModel) -> Int[Tensor, " pair"]:
    """`answers_of(answers, 4, model)`: one token (class) a pair, checked: InputError for another number, or what is no token."""
    tokens = tensor_of(answers, "answers").reshape(-1)
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise InputError(f"answers are token ids (classes of a classifier), whole numbers; these are {tokens.dtype}.")
    if len(tokens) not in (1, rows):
        raise InputError(f"There are {len(tokens)} answers and {rows} pairs: give one for each.")
    most = model.cfg.sizes.get("d_vocab")
    if most is not None and bool(((tokens < 0) | (tokens >= most)).any()):
        raise InputError(
            f"answers are token ids, 0 to {most - 1}; these are {int(tokens.min())} to {int(tokens.max())}."
        )
    return tokens.long().expand(rows)


def some_of(pos: Positions, rows: Int[Tensor, " some"]) -> Positions:
    """`some_of(pos, rows)`: of positions that go by row those of some rows; others as they are."""
    by_row = isinstance(pos, Tensor | numpy.ndarray) and pos.ndim > 0
    if by_row:
        given = torch.as_tensor(pos)
        whole = given.dtype == torch.bool and given.ndim == 1
        return given if whole or len(given) == 1 else given[rows.to(given.device)]
    if isinstance(pos, list) and pos and all(isinstance(one, list | tuple) for one in pos):
        return [pos[int(row)] for row in rows]
    return pos


@contextmanager
def frozen(model: HookedModel) -> Iterator[None]:
    """`with frozen(model): ...`: no parameter of the model takes a gradient; afterwards each as before."""
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, before in asked.items():
            parameter.requires_grad_(before)
