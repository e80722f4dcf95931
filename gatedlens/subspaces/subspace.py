"""Subspace: some directions of an activation, orthonormal; and what may be done to a model within it.

    s.basis                                      # [rank, d]; s.name, s.axes, s.index say of what, s.pos where it was fitted
    s.coordinates(x), s.project(x)               # of vectors [..., d]: [..., rank], [..., d]
    s.complement(), s.random(seed=1), s + other, s.overlap(other)
    with s.ablate(pos=-1).on(model): ...         # its component removed, or set to that of `to`
    change = s.interchange(model, source_tokens, pos=-1)         # an Interchange: the source run's component
    s.save("s.safetensors"); Subspace.load("s.safetensors")

P = basis^T basis projects onto it. A state (hook_state) is moved for good: see `runs/movement.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gatedlens.address.positions import Positions
from gatedlens.errors import CheckpointError, InputError
from gatedlens.markup import card
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.model.intervention import Intervention
from gatedlens.options import checked, is_whole
from gatedlens.runs import inputs
from gatedlens.runs.movement import Movement, check_width
from gatedlens.runs.saved import frame_of, read_saved, write_saved
from gatedlens.runs.vectors import Frame, orthonormal, vectors
from gatedlens.subspaces.interchange import Interchange

ALIKE = 1e-4  # how far from orthonormal the rows of a basis may be


@dataclass(frozen=True, eq=False)
class Subspace:
    """`basis` [rank, d], rows orthonormal; `frame` which numbers of which point; `pos` where it was fitted (None: everywhere)."""

    frame: Frame
    basis: Float[Tensor, "rank d"]
    pos: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.basis.ndim != 2 or len(self.basis) > self.basis.shape[1]:
            raise InputError(f"A basis is [rank, d], no more rows than columns; this is {list(self.basis.shape)}.")
        gram = self.basis.detach().double() @ self.basis.detach().double().mT
        far = float((gram - torch.eye(len(gram), device=gram.device)).abs().max()) if len(gram) else 0.0
        if not far < ALIKE:
            raise InputError(
                f"The rows of a basis are orthonormal; these are off by {far:.2g}: gl.subspaces.spanned makes one of any vectors."
            )

    @property
    def name(self) -> str:
        return self.frame.name

    @property
    def rank(self) -> int:
        return self.basis.shape[0]

    @property
    def d(self) -> int:
        return self.basis.shape[1]

    @property
    def layer(self) -> int | None:
        """The block that it is in; None outside the blocks."""
        return int(self.name.split(".")[1]) if self.name.startswith("blocks.") else None

    def __repr__(self) -> str:
        where = "" if self.pos is None else f", pos {self.pos}"
        return f"Subspace({self.frame.said}, rank {self.rank} of {self.d}{where}{_fitted(self.facts)})"

    def _repr_html_(self) -> str:
        facts = {"rank": f"{self.rank} of {self.d}", "pos": "all" if self.pos is None else self.pos}
        shown = {name: said for name, said in self.facts.items() if not isinstance(said, list | dict)}
        return card(f"Subspace: {self.frame.said}", {**facts, **shown})

    # -- as a subspace -------------------------------------------------------------------------------------------

    def coordinates(self, x: Float[Tensor, "*any d"]) -> Float[Tensor, "*any rank"]:
        """`s.coordinates(x)`: x basis^T, [..., rank]. InputError for vectors of another width."""
        if x.shape[-1] != self.d:
            raise InputError(
                f"These vectors have {x.shape[-1]} numbers; the subspace of {self.frame.said} is of {self.d}."
            )
        return x @ self.basis.to(x).mT

    def project(self, x: Float[Tensor, "*any d"]) -> Float[Tensor, "*any d"]:
        """`s.project(x)`: P x, the component of vectors [..., d] in the subspace. InputError for vectors of another width."""
        return self.coordinates(x) @ self.basis.to(x)

    def complement(self) -> Subspace:
        """`s.complement()`: what stands at right angles to it: the rest of the space."""
        wide = torch.linalg.qr(self.basis.double().mT, mode="complete").Q
        return replace(self, basis=wide[:, self.rank :].mT.to(self.basis).contiguous(), facts=_kept(self.facts))

    @checked
    def random(self, seed: int = 0) -> Subspace:
        """`s.random(seed=0)`: a random subspace of the same rank at the same place, as a control."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(self.rank, self.d, generator=generator, dtype=torch.float64)
        return replace(self, basis=orthonormal(drawn).to(self.basis), facts={**_kept(self.facts), "random": seed})

    def overlap(self, other: Subspace) -> float:
        """`s.overlap(other)`: the mean squared cosine of the principal angles, |B C^T|^2 / the smaller rank: 1 where one holds
        the other, 0 at right angles. InputError for subspaces of two widths.
        """
        if other.d != self.d:
            raise InputError(f"overlap: one subspace is of {self.d} dimensions, the other of {other.d}.")
        both = self.basis.double() @ other.basis.double().to(self.basis.device).mT
        return float(both.square().sum() / max(1, min(self.rank, other.rank)))

    def __add__(self, other: Subspace) -> Subspace:
        """`s + other`: the span of both, at the same place. InputError for two places."""
        if not isinstance(other, Subspace):
            return NotImplemented
        if other.frame != self.frame:
            raise InputError(f"{self!r} and {other!r} are of two places; they span no subspace together.")
        return replace(
            self, basis=orthonormal(torch.cat([self.basis, other.basis.to(self.basis)])), facts=_kept(self.facts)
        )

    # -- on a model ----------------------------------------------------------------------------------------------

    def check(self, model: HookedModel) -> None:
        """`s.check(model)`: PointError for a model without the point; InputError for one whose vectors have another width."""
        check_width(model, self.frame, self.d, str(self.facts.get("model", "unnamed")))

    @checked
    def interchange(
        self,
        model: HookedModel,
        source: Input,
        pos: Positions = None,
        source_pos: Positions = None,
        scale: int | float = 1.0,
    ) -> Interchange:
        """`s.interchange(model, source, pos=-1)`: an Interchange: base + scale P (source - base) at `pos` of a base run.

        source: the source run's input, a row for each of the base's, or one for all. pos: where in the base run, counted among
        real tokens; None: where it was fitted, if that is one position, else everywhere ("*"). source_pos: where in the source
        (None: as pos), as many in each row. PointError, InputError: as of `check`, and for a position that a row lacks.

        Source: Geiger et al. 2021 (Causal abstractions of neural networks, arXiv 2106.02997).
        """
        self.check(model)
        pos = self.pos if pos is None else pos
        batch, where = inputs.ready(model, source), pos if source_pos is None else source_pos
        found = vectors(model, batch, self.frame, where, what="pos" if source_pos is None else "source_pos")
        facts = {"model": model.cfg.model_name, "rows": len(found)}
        return Interchange(self.frame, self.basis.to(found.device), found, pos, float(scale), facts)

    @checked
    def ablate(
        self,
        pos: Positions = None,
        to: Float[Tensor, " d"] | None = None,
        rows: Bool[Tensor, " batch"] | None = None,
        scale: int | float = 1.0,
    ) -> Intervention:
        """`s.ablate(pos=-1)`: x - scale P (x - to) at `pos`: its component removed, or made that of the vector `to` (a mean,
        say).

        pos: as of `interchange`; of a state one in each row. rows: True for the rows that are meant (None: all). InputError while
        the model runs, for rows that do not match it, and for positions that do not exist.
        """
        toward = torch.zeros(self.d) if to is None else to
        if tuple(toward.shape) != (self.d,):
            raise InputError(
                f"to has the shape {list(toward.shape)}; the subspace of {self.frame.said} is of {self.d}."
            )

        def move(v: Tensor, row: Tensor, nth: Tensor) -> Tensor:
            return scale * self.project(toward.to(v) - v)

        fitted, where = str(self.facts.get("model", "unnamed")), self.pos if pos is None else pos
        return Intervention((Movement(self.frame, move, self.d, where, rows, fitted),))

    # -- on disk -------------------------------------------------------------------------------------------------

    @checked
    def save(self, path: str | Path) -> Path:
        """`s.save("s.safetensors")`: write it, with its place and facts in the header; returns the path."""
        said = {"frame": self.frame.to_dict(), "pos": self.pos, "facts": dict(self.facts)}
        return write_saved(path, "subspace", {"basis": self.basis}, said)

    @staticmethod
    def load(path: str | Path) -> Subspace:
        """`Subspace.load("s.safetensors")`: what `save` wrote. CheckpointError for a file that holds none."""
        tensors, fields = read_saved(path, "subspace", {"basis": "rank d"})
        pos = fields.get("pos", "a position, or null", lambda v: v is None or is_whole(v))
        try:
            return Subspace(frame_of(fields), tensors["basis"], pos, dict(fields.fields("facts")))
        except InputError as error:
            raise CheckpointError(f"{path} is no saved subspace: {error}") from error


def _kept(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of what is known of a subspace that which holds of one made of it."""
    return {name: facts[name] for name in ("model",) if name in facts}


def _fitted(facts: Mapping[str, Any]) -> str:
    return f", {facts['fit']}" if "fit" in facts else ""
