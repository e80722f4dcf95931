"""Interchange: a source run's component in a subspace, put into a base run; an intervention that saves and loads.

    change = subspace.interchange(model, source_tokens, pos=-1)
    with change.on(model): logits = model(base_tokens)
    (change.intervention() + gl.ablation.zero(...)).on(model)
    change.save("change.safetensors"); Interchange.load("change.safetensors")

x' = x + scale P (x_source - x), P = basis^T basis. With all of the space it is activation patching, with none of it nothing.
Source: Geiger et al. 2021 (Causal abstractions of neural networks, arXiv 2106.02997).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.positions import Positions
from gatedlens.errors import InputError
from gatedlens.files import is_number
from gatedlens.markup import card
from gatedlens.model.base import HookedModel
from gatedlens.model.intervention import Intervention
from gatedlens.options import checked, is_whole
from gatedlens.runs.movement import Movement, as_far
from gatedlens.runs.saved import check_tensors, frame_of, read_saved, write_saved
from gatedlens.runs.vectors import Frame


@dataclass(frozen=True, eq=False)
class Interchange:
    """`source` [batch, some, other, d]: what each row's source run held, `some` counting its positions; `pos`: where in the
    base. other: [rank, d], the directions of a placebo; None for an interchange.
    """

    frame: Frame
    basis: Float[Tensor, "rank d"]
    source: Float[Tensor, "batch some other d"]
    pos: Positions = -1
    scale: float = 1.0
    facts: Mapping[str, Any] = field(default_factory=dict)
    other: Float[Tensor, "rank d"] | None = None

    def __repr__(self) -> str:
        rank, d = self.basis.shape
        placebo = "placebo of " if self.other is not None else ""
        return f"Interchange({placebo}{self.frame.said}, rank {rank} of {d}, {len(self.source)} rows at pos {self._said()})"

    def _repr_html_(self) -> str:
        rank, d = self.basis.shape
        facts = {"rank": f"{rank} of {d}", "rows": len(self.source), "pos": self._said(), "scale": self.scale}
        return card(
            f"Interchange: {self.frame.said}", {**facts, **{k: v for k, v in self.facts.items() if k != "rows"}}
        )

    def _said(self) -> str:
        return str(self.pos.tolist()) if isinstance(self.pos, Tensor) else "all" if self.pos is None else str(self.pos)

    def intervention(self) -> Intervention:
        """`change.intervention() + other`: as an Intervention. While the model runs: InputError for a run with other rows or
        positions than the source.
        """
        fitted = str(self.facts.get("model", "unnamed"))
        return Intervention((Movement(self.frame, self.move, self.basis.shape[1], self.pos, fitted=fitted),))

    @contextmanager
    def on(self, model: HookedModel) -> Iterator[HookedModel]:
        """`with change.on(model): ...`; PointError for a model without the point."""
        with self.intervention().on(model):
            yield model

    def hooks(self, model: HookedModel) -> list[tuple[str, Callable[..., Any]]]:
        """`model.run_with_hooks(tokens, fwd_hooks=change.hooks(model))`: [(name, hook)]; PointError for a model without the
        point.
        """
        return self.intervention().hooks(model)

    def move(self, v: Float[Tensor, "entry other d"], row: Tensor, nth: Tensor) -> Float[Tensor, "entry other d"]:
        """`change.move(v, row, nth)`: scale P (source - v), of vectors v of some rows at their nth positions."""
        rows, some, other, d = self.source.shape
        if v.shape[1:] != (other, d):
            raise InputError(
                f"The source's vectors of {self.frame.said} are {[other, d]}, those of this run {list(v.shape[1:])}."
            )
        most, last = int(row.max()) + 1, int(nth.max()) + 1
        if most != rows > 1 or last != some > 1:
            raise InputError(
                f"The source has {rows} rows of {some} positions each, this run {most} of {last}: give a source row for each, or "
                "one for all, and as many positions."
            )
        row, nth = (at if size > 1 else at * 0 for at, size in ((row, rows), (nth, some)))
        apart = self.source.to(v.device)[row.to(v.device), nth.to(v.device)].to(v) - v
        own = apart @ self.basis.to(v).mT @ self.basis.to(v)
        if self.other is None:
            return self.scale * own
        return self.scale * as_far(apart @ self.other.to(v).mT @ self.other.to(v), own)

    @checked
    def placebo(self, seed: int = 0) -> Interchange:
        """`change.placebo(seed=1).on(model)`: a control: it moves each vector exactly as far as the interchange does, towards the
        source in a random subspace of the same rank. What it does too, the distance does, not the subspace.
        """
        generator = torch.Generator().manual_seed(seed)
        rank, d = self.basis.shape
        drawn = torch.linalg.qr(torch.randn(d, rank, generator=generator, dtype=torch.float64)).Q.mT
        return replace(self, other=drawn.to(self.basis).contiguous())

    # -- on disk -------------------------------------------------------------------------------------------------

    @checked
    def save(self, path: str | Path) -> Path:
        """`change.save("change.safetensors")`: write it; returns the path. InputError for positions that JSON cannot hold."""
        pos: object = self.pos.tolist() if isinstance(self.pos, Tensor) else self.pos
        if isinstance(pos, slice):
            pos = {"slice": [pos.start, pos.stop, pos.step]}
        elif isinstance(pos, range):
            pos = list(pos)
        said = {"frame": self.frame.to_dict(), "pos": pos, "scale": self.scale, "facts": dict(self.facts)}
        said["by_row"] = isinstance(self.pos, Tensor)
        tensors = {"basis": self.basis, "source": self.source} | ({} if self.other is None else {"other": self.other})
        return write_saved(path, "interchange", tensors, said)

    @staticmethod
    def load(path: str | Path) -> Interchange:
        """`Interchange.load("change.safetensors")`: what `save` wrote. CheckpointError for a file that holds none."""
        tensors, fields = read_saved(path, "interchange", {"basis": "rank d", "source": "batch some other d"})
        other = tensors.get("other")
        if other is not None:
            check_tensors(path, "interchange", tensors, {"other": tensors["basis"]})
        scale = fields.get("scale", "a number", is_number)
        by_row = fields.get("by_row", "true or false", lambda v: isinstance(v, bool))
        pos = fields.get("pos", "positions", _are_rows if by_row else _are_positions)
        pos = torch.tensor(pos) if by_row else slice(*pos["slice"]) if isinstance(pos, dict) else pos
        facts = dict(fields.fields("facts"))
        return Interchange(frame_of(fields), tensors["basis"], tensors["source"], pos, float(scale), facts, other)


def _are_positions(value: Any) -> bool:
    """Whether JSON says positions that `save` writes, but a tensor's."""
    if isinstance(value, dict):
        ends = value.get("slice")
        return isinstance(ends, list) and len(ends) == 3 and all(one is None or is_whole(one) for one in ends)
    return value is None or is_whole(value) or isinstance(value, str | list)


def _are_rows(value: Any) -> bool:
    """Whether JSON says a tensor of positions, or of truths, of one or two axes (or one number)."""
    numbers = value if isinstance(value, list) else [value]
    if numbers and all(isinstance(one, list) for one in numbers):
        return len({len(one) for one in numbers}) == 1 and all(map(_are_rows, numbers))
    return bool(numbers) and all(is_whole(one) or isinstance(one, bool) for one in numbers)
