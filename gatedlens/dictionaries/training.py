"""Training a dictionary on activations that lie in a store, or in memory: a plain loop, seeded, that can be gone on with.

    store = gl.store.harvest(model, texts, "blocks.1.mixer.hook_gated", "out", context=128)
    sae = gl.dictionaries.train(store, "blocks.1.mixer.hook_gated", 512, TopK(16), checkpoint="sae.safetensors")
    transcoder = gl.dictionaries.train(store, "blocks.1.ln2.hook_out", 512, TopK(16), out_point="blocks.1.hook_mlp_out")
    sae = gl.dictionaries.train(cache["gated", 1], "blocks.1.mixer.hook_gated", 512, TopK(16))           # a tensor

Entries are scaled so that their mean square length is d_in (d_out of what is written); both numbers are folded into the weights
at the end. With x, y an entry, f = encode(x), r = y - reconstruct(f, x):

    loss = mean |r|^2 / mean |y - mean y|^2  +  l1 * mean sum f / d_out  +  aux * mean |r - r_dead|^2 / mean |r|^2

decoder rows have length 1 throughout. l1 is for a ReLU. r_dead is what the d_in / 2 strongest of the dead features would decode
to (Gao et al. 2024, arXiv 2406.04093, A.2): it brings them back.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from gatedlens.dictionaries.activation import Activation, BatchTopK, ReLU, TopK
from gatedlens.dictionaries.dictionary import Dictionary, Function, Names, names_of
from gatedlens.dictionaries.entries import Entries
from gatedlens.errors import InputError
from gatedlens.files import Fields, is_number
from gatedlens.options import checked, is_whole
from gatedlens.runs.fitting import MOMENTS, Checkpoint
from gatedlens.runs.gradients import check_allowed, needed

if TYPE_CHECKING:  # a word: whatever has `find`, `dataset` and a manifest will do
    from gatedlens.store import Store

    Data: TypeAlias = Store | Tensor | Mapping[str, Tensor]
else:
    Data = Any

__all__ = ["train"]

TRAINED = (ReLU, TopK, BatchTopK)


@dataclass(frozen=True)
class Options:
    """What decides a training beside its data; `facts` of the dictionary hold it."""

    n_features: int
    steps: int
    batch_size: int
    lr: float
    l1: float
    aux: float
    dead_after: int
    skip: bool
    seed: int


@checked
def train(
    data: Data,
    point: Names,
    n_features: int,
    activation: Function = None,
    out_point: Names | None = None,
    *,
    steps: int = 2000,
    batch_size: int = 1024,
    lr: int | float = 1e-3,
    l1: int | float = 0.0,
    aux: int | float = 1 / 32,
    dead_after: int = 200,
    skip: bool = False,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    facts: Mapping[str, Any] | None = None,
) -> Dictionary:
    """`gl.dictionaries.train(store, "blocks.1.mixer.hook_gated", 512, TopK(16), steps=2000)`: the Dictionary.

    data: a store that holds `point` (and `out_point`), a tensor [..., d_in] of entries, or {point: tensor}. point: what it reads,
    several of them for a crosscoder; out_point: what it writes, None for the same. activation: TopK, BatchTopK, or a ReLU with an
    `l1`. Adam, `lr` falling to 0 over the last fifth. aux: the weight of what brings features back that have not fired for
    `dead_after` steps; skip: with a W_skip from what is read to what is written. checkpoint: a file from which an interrupted
    call goes on. Of one seed, on one machine, the numbers are the same, gone on with or not. facts: what the header says besides.

    `facts["training"]` holds the options, and of the last tenth of the steps the variance explained, the features that fire at an
    entry (l0) and the share of dead ones. `gl.dictionaries.measure` says what the model makes of it.

    PointError for a point that the data lack; InputError for entries that do not fit, an activation that is not trained, a
    checkpoint of another training.
    """
    check_allowed()
    for name, value in (("n_features", n_features), ("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name}={value}: it is at least 1.")
    for name, number in (("lr", lr), ("l1", l1), ("aux", aux)):
        if not 0 <= number < float("inf"):
            raise InputError(f"{name}={number}: it is 0 or more.")
    chosen = TopK(min(32, n_features)) if activation is None else activation
    if not isinstance(chosen, TRAINED):
        names = ", ".join(one.__name__ for one in TRAINED)
        raise InputError(
            f"activation={chosen!r} is not trained here: {names} are. A BatchTopK is a JumpReLU afterwards."
        )
    if isinstance(chosen, ReLU) and l1 <= 0:
        raise InputError("A ReLU of l1=0 has nothing that makes it sparse: give l1=1e-1, say, or TopK(32).")
    points = names_of("point", point)
    out_points = points if out_point is None else names_of("out_point", out_point)
    entries = Entries.of(data, points, out_points)
    options = Options(n_features, steps, batch_size, float(lr), float(l1), float(aux), dead_after, skip, seed)
    run = Run(entries, options, chosen)
    return run.finished(None if checkpoint is None else Path(checkpoint), progress, dict(facts or {}))


# -- a training -----------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A training under way: its dictionary (of scaled entries), optimiser, and what a checkpoint holds of both."""

    entries: Entries
    options: Options
    activation: Activation
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)  # over the last tenth of the steps

    def __post_init__(self) -> None:
        o, generator = self.options, torch.Generator().manual_seed(self.options.seed)
        some = torch.randperm(self.entries.n, generator=generator)[:8192].tolist()
        x, y = self.entries.pair(some)
        self.mean, centred = y.mean(0), y - y.mean(0)
        self.scales = [float((d.shape[1] / t.square().sum(1).mean()).sqrt()) for t, d in ((x, x), (y, y))]
        if not all(0 < scale < float("inf") for scale in self.scales):
            raise InputError(f"The entries of {', '.join(self.entries.points)} are all zero, or not finite.")
        self.variance = float(centred.square().sum(1).mean()) * self.scales[1] ** 2
        if self.variance == 0:
            raise InputError(
                f"The entries of {', '.join(self.entries.out_points)} are all the same: there is nothing to learn."
            )
        same = self.entries.points == self.entries.out_points
        decoder = torch.randn(o.n_features, y.shape[1], generator=generator, dtype=y.dtype)
        decoder /= decoder.norm(dim=1, keepdim=True)
        random = torch.randn(x.shape[1], o.n_features, generator=generator, dtype=x.dtype)
        self.activation = copy.deepcopy(self.activation).to(
            y.dtype
        )  # a BatchTopK's threshold moves, and is as exact as y
        self.dictionary = Dictionary(
            decoder.T.contiguous() if same else random / random.norm(dim=0),
            decoder,
            b_dec=self.mean * self.scales[1],
            W_skip=x.new_zeros(x.shape[1], y.shape[1]) if o.skip else None,
            point=self.entries.points,
            out_point=None if same else self.entries.out_points,
            activation=self.activation,
            centred=same,
            d_ins=self.entries.widths(self.entries.points),
            d_outs=self.entries.widths(self.entries.out_points),
        )
        self.dictionary.requires_grad_(True)
        self.dictionary.train()
        self.optimiser = torch.optim.Adam(self.dictionary.parameters(), lr=o.lr, betas=(0.9, 0.999))
        self.quiet = torch.zeros(o.n_features, dtype=torch.long)  # for how many steps a feature has not fired

    def batch(self) -> list[int]:
        """The entries of this step: each epoch is in an order of its own."""
        o, n = self.options, self.entries.n
        size = min(o.batch_size, n)
        each = n // size
        epoch, place = divmod(self.step, each)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(1_000_003 * (o.seed + 1) + epoch))
        return order[place * size : (place + 1) * size].tolist()

    def once(self) -> None:
        """One step."""
        o, d = self.options, self.dictionary
        left = (o.steps - self.step) / max(1, o.steps // 5)
        for group in self.optimiser.param_groups:
            group["lr"] = o.lr * min(1.0, left, (self.step + 1) / max(1, min(100, o.steps // 20)))
        x, y = self.entries.pair(self.batch())
        x, y = x * self.scales[0], y * self.scales[1]
        p = d.sums(x)
        f = d.activation(p)
        residual = y - d.reconstruct(f, x)
        lost = residual.square().sum(1).mean()
        loss = lost / self.variance
        if o.l1:
            loss = loss + o.l1 * f.sum(1).mean() / d.d_out
        dead = self.quiet >= o.dead_after
        if o.aux and bool(dead.any()):
            loss = loss + o.aux * self._of_the_dead(p, residual.detach(), dead)
        if not bool(loss.isfinite()):
            raise InputError(
                f"The loss of {', '.join(self.entries.points)} is {float(loss.detach())} at step {self.step}: some entries are "
                f"not finite, or lr={o.lr} is too large."
            )
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        with torch.no_grad():
            d.W_dec.div_(d.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12))
            fired = f > 0
            self._threshold(f.detach())
            self.quiet = torch.where(fired.any(0), 0, self.quiet + 1)
        if self.step >= o.steps - max(1, o.steps // 10):
            self._sum({"lost": float(lost.detach()), "l0": float(fired.sum(1).float().mean()), "steps": 1.0})
        self.step += 1

    def _of_the_dead(self, p: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
        """How much of the residual the strongest dead features do not explain."""
        k = min(int(dead.sum()), max(1, self.dictionary.d_in // 2))
        top = p.masked_fill(~dead, -torch.inf).topk(k, dim=-1)
        f = torch.zeros_like(p).scatter(-1, top.indices, torch.relu(top.values))
        gap = residual - f @ self.dictionary.W_dec
        return (gap.square().sum(1).mean() / residual.square().sum(1).mean().clamp(min=1e-12)).nan_to_num()

    def _threshold(self, f: Tensor) -> None:
        """A BatchTopK's threshold: the running mean of the least value that a batch lets through."""
        if isinstance(self.activation, BatchTopK) and bool((f > 0).any()):
            least = f[f > 0].min()
            first = self.step == 0
            self.activation.threshold = (least if first else 0.99 * self.activation.threshold + 0.01 * least).to(
                f.dtype
            )

    def _sum(self, more: Mapping[str, float]) -> None:
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in more.items()}

    # -- to the end ----------------------------------------------------------------------------------------------

    def finished(self, checkpoint: Path | None, progress: bool, facts: dict[str, Any]) -> Dictionary:
        """All steps that are left, and the dictionary of entries as they are."""
        kept = Checkpoint(checkpoint, self._said())
        some = list(self.dictionary.parameters())
        like = {f"dictionary.{name}": tensor for name, tensor in self.dictionary.state_dict().items()}
        like |= {f"optimiser.{i}.{word}": one for i, one in enumerate(some) for word in MOMENTS}
        like |= {f"optimiser.{i}.step": torch.tensor(0.0) for i in range(len(some))}
        earlier = kept.take_up({**like, "quiet": self.quiet})
        if earlier is not None:
            self._go_on(*earlier)
        named = f"Dictionary of {', '.join(self.entries.points)}"
        bar = tqdm(total=self.options.steps, initial=self.step, desc=named, disable=not progress)
        with bar, kept.kept(self._now), needed():
            while self.step < self.options.steps:
                self.once()
                bar.update()
                if kept.due():
                    kept.save(*self._now())
        return self._unscaled(facts)

    def _said(self) -> dict[str, Any]:
        """All that decides the numbers."""
        of = {"points": self.entries.points, "out": self.entries.out_points, "entries": self.entries.n}
        said = {**asdict(self.options), "activation": self.activation.said()}
        return {**said, **of, "data (checksum)": self.entries.digest()}

    def _now(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint holds: weights, Adam's moments, which features are quiet; how far it is."""
        tensors = {f"dictionary.{name}": t.detach() for name, t in self.dictionary.state_dict().items()}
        for number, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
        return {**tensors, "quiet": self.quiet}, {"step": self.step, "sums": self.sums}

    def _go_on(self, tensors: Mapping[str, Tensor], far: Fields) -> None:
        step = far.get("step", "how many steps are done", lambda v: is_whole(v) and v > 0)
        sums = far.get("sums", "numbers", lambda v: isinstance(v, dict) and all(map(is_number, v.values())))
        own = {name.partition(".")[2]: t for name, t in tensors.items() if name.startswith("dictionary.")}
        with torch.no_grad():
            for name, tensor in self.dictionary.state_dict().items():
                tensor.copy_(own[name])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimiser."):
                _, number, word = name.split(".")
                state.setdefault(int(number), {})[word] = tensor
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": state, "param_groups": groups})
        self.quiet, self.step, self.sums = tensors["quiet"], int(step), dict(sums)

    @torch.no_grad()
    def _unscaled(self, facts: dict[str, Any]) -> Dictionary:
        """The dictionary of entries as they are: the scales folded into its weights. Features stay as they are."""
        d, (s_in, s_out) = self.dictionary, self.scales
        steps = max(1.0, self.sums.get("steps", 1.0))
        training = {
            **asdict(self.options),
            "explained": 1 - self.sums.get("lost", float("nan")) / steps / self.variance,
            "l0": self.sums.get("l0", float("nan")) / steps,
            "dead": float((self.quiet >= self.options.dead_after).float().mean()),
        }
        own = {} if self.entries.model is None else {"model": self.entries.model}
        return Dictionary(
            d.W_enc * s_in,
            d.W_dec / s_out,
            d.b_enc,
            d.b_dec / s_out,
            None if d.W_skip is None else d.W_skip * (s_in / s_out),
            point=d.points,
            out_point=None if d.points == d.out_points else d.out_points,
            activation=self.activation,
            centred=d.centred,
            d_ins=d.d_ins,
            d_outs=d.d_outs,
            facts={**own, **facts, "training": training},
        )
