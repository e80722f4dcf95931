"""ActivationCache: TransformerLens's, with our names, and everything that an analysis needs beside the tensors.

logits, cache = model.run_with_cache("The cat sat on the mat", names_filter=["blocks.*.mixer.hook_dt", "hook_embed"])
cache["dt", 3]                      # also: cache["blocks.3.mixer.hook_dt"], cache["blocks.3.hook_delta"] (MambaLens)
cache.select(("scan", 3), head=2)   # some entries: batch pos value
cache.tokens, cache.mask, cache.state, cache.documents
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from jaxtyping import Shaped
from torch import Tensor
from transformer_lens.utilities import Slice

from gatedlens.address.composite import picked
from gatedlens.address.entries import Index, Where
from gatedlens.address.key import Key
from gatedlens.address.names import SHORTHAND
from gatedlens.address.point import Found
from gatedlens.errors import InputError, PointError, did_you_mean, in_bytes
from gatedlens.markup import card, table
from gatedlens.model.keeping import SliceLike
from gatedlens.model.residual_cache import ResidualCache

if TYPE_CHECKING:
    from gatedlens.model.base import HookedModel
    from gatedlens.model.state import RecurrentState
else:
    HookedModel = RecurrentState = Any


class ActivationCache(ResidualCache):
    """What one run fired. `tokens`, `mask` and `state` are what the run was given (None where it was not); `sliced` says
    whether only some positions were kept; `documents` [batch, pos] counts the documents that position_ids told of.

    Keys: a full name, another tool's name for it, or TransformerLens's shorthand (word, layer[, part]). Gradients of an
    `incl_bwd` run stand under the name with `_grad` behind it.
    """

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        model: HookedModel,
        has_batch_dim: bool = True,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        state: RecurrentState | None = None,
        sliced: bool = False,
        documents: Tensor | None = None,
    ):
        super().__init__(cache_dict, model, has_batch_dim=has_batch_dim)
        self.tokens = tokens
        self.mask = mask
        self.state = state
        self.sliced = sliced
        self.documents = documents

    def find(self, key: Key) -> Found:
        """`cache.find(("dt", 3))`: the point or view that a key stands for in this model.

        key: a full name, an alias, or TransformerLens's (word, layer[, part]). PointError for one that the model lacks.
        """
        names = self.model.names
        if isinstance(key, str):
            plain = re.fullmatch(r"(?!hook_)[A-Za-z_0-9]+", key)
            return names.short(key) if plain and not SHORTHAND.fullmatch(key) else names.find(key)
        if not isinstance(key, tuple) or not 1 <= len(key) <= 3:
            raise PointError(f"{key!r} is no key of a cache: use a name, or (word, layer), or (word, layer, part).")
        return names.short(*key)

    def __getitem__(self, key: Key) -> Tensor:
        if isinstance(key, str) and key in self.cache_dict:
            return self.cache_dict[key]
        if isinstance(key, tuple) and key[0:1] == ("result",) and 1 < len(key) < 4:  # TransformerLens's word
            return self.head_results(key[1])
        suffix = ""
        if isinstance(key, str) and key.endswith("_grad"):
            key, suffix = key[: -len("_grad")], "_grad"
        found = self.find(key)
        if found.view is None:
            return self._stored(found.name + suffix, key)
        if suffix:
            raise PointError(f"{key!r} is computed from {', '.join(found.needs())}: ask for their gradients.")
        values = [self._stored(name, key) for name in found.needs()]
        params = {k: v for k, v in found.params.items() if k != "l"}
        if "t" in params:
            self._check_position(key, params["t"], values[0])
        return found.view.read(self.model, found.layer, *values, **params)

    def select(self, key: Key, **index: Index) -> Shaped[Tensor, ...]:
        """`cache.select(("scan", 0), head=2)`: the entries of a cached activation by its axes, or by what these make up.

        index: any axis but batch and pos: a number, which takes the axis away, or a slice, list or mask, which keeps it. So
        head=2 of [batch pos channel] is [batch pos value], head=[0, 2] [batch pos head value], and channel=[3, 5] of a state
        [batch pos head value state] is [batch pos channel state]. PointError for an axis that the point lacks, for two that
        overlap, and for a view; InputError for an index out of range.
        """
        name, grad = (key[: -len("_grad")], "_grad") if isinstance(key, str) and key.endswith("_grad") else (key, "")
        found = self.find(name)
        if found.view is not None:
            raise PointError(f"{key!r} is computed from {', '.join(found.needs())}: select entries of these.")
        for axis in ("batch", "pos"):
            if axis in index:
                raise InputError(
                    f"{axis}={index[axis]!r}: rows are chosen by apply_slice_to_batch_dim, positions by pos_slice, or either of "
                    "the tensor that you get."
                )
        where, point, sizes = Where((), index), self.model.names.points[found.name], self.model.cfg.sizes
        where.check(found.name, self.model.names, sizes)
        value = self._stored(found.name + grad, key)
        value = value if self.has_batch_dim else value.unsqueeze(0)
        chosen = picked(value, point, where.at(found.name), sizes, found.name)
        return chosen if self.has_batch_dim else chosen.squeeze(0)

    def _check_position(self, key: Any, t: int, states: Tensor) -> None:
        if self.sliced:
            raise PointError(
                f"{key!r}: this cache keeps only some positions (pos_slice); read them from its hook_state."
            )
        if t >= states.shape[-3]:
            raise PointError(f"{key!r}: there are {states.shape[-3]} positions, 0 to {states.shape[-3] - 1}.")

    def apply_slice_to_batch_dim(self, batch_slice: SliceLike) -> ActivationCache:
        """`cache.apply_slice_to_batch_dim(slice(0, 4))`: a cache of some rows of the batch, with their tokens, mask and
        state.

        batch_slice: a number, a slice or a list of row numbers, or TransformerLens's Slice.
        """
        rows = batch_slice if isinstance(batch_slice, Slice) else Slice(batch_slice)
        part = super().apply_slice_to_batch_dim(rows)
        given = (self.tokens, self.mask, self.documents)
        tokens, mask, documents = (None if t is None else rows.apply(t, dim=0) for t in given)
        state = None if self.state is None else self.state.map(lambda t: rows.apply(t, dim=0))
        return ActivationCache(
            part.cache_dict, self.model, part.has_batch_dim, tokens, mask, state, self.sliced, documents
        )

    def _stored(self, name: str, asked: Any) -> Tensor:
        if name in self.cache_dict:
            return self.cache_dict[name]
        known = list(self.cache_dict)
        point = self.model.names.points.get(name)
        if point is not None and point.lazy:
            why = (
                f"{name} is lazy, so the default leaves it out: ask for it, run_with_cache(..., names_filter={name!r})."
            )
        else:
            why = f"It holds {len(known)} activations: {', '.join(known[:3])}, ..." if known else "It is empty."
            why += did_you_mean(name, known)
        raise PointError(f"{asked!r} ({name}) is not in this cache. {why}")

    def __contains__(self, key: Any) -> bool:
        if isinstance(key, str) and key in self.cache_dict:
            return True
        try:
            return all(name in self.cache_dict for name in self.find(key).needs())
        except PointError:
            return False

    def __repr__(self) -> str:
        size = sum(t.numel() * t.element_size() for t in self.cache_dict.values())
        names = ", ".join(list(self.cache_dict)[:3])
        return f"ActivationCache({len(self)} activations, {size / 2**20:.1f} MiB: {names}, ...)"

    def _repr_html_(self) -> str:
        sizes = {name: t.numel() * t.element_size() for name, t in self.cache_dict.items()}
        facts = {"activations": len(self), "": in_bytes(sum(sizes.values()))}
        if self.tokens is not None:
            facts["tokens"] = " x ".join(map(str, self.tokens.shape))
        rows = [
            (name, list(t.shape), str(t.dtype).removeprefix("torch."), in_bytes(sizes[name]))
            for name, t in self.cache_dict.items()
        ]
        title = f"ActivationCache: {self.model.cfg.model_name}"
        return card(title, facts, table(["name", "shape", "dtype", "bytes"], rows, 16))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__
