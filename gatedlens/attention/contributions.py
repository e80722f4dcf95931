"""Token-to-token contributions: what position j writes into the residual stream at position i, through one layer.

    F = gl.implicit_attention(model, text, layer=3).contributions()
    F.row(-1)                   # batch src d_model: what each position writes at the last; F.column(0): batch dst d_model
    F.norms()                   # batch dst src: the length of every vector
    F.along(direction)          # batch dst src: every vector's part along a direction [d_model]
    F.along(W_U[:, a] - W_U[:, b])                       # what each token gives to the logit difference of a and b
    F.remainder(), F.output()   # batch pos d_model: what no token brings; the whole output
    A.contributions(heads=2)    # through one head: the heads sum to F, the bias b aside, which is none's
    F.tap(2)                    # of these, what the conv's tap two tokens back brings; the taps sum to F

    F[i, j] = W (A[:, i, j] * x[j, :])          sum over j of F[i, j] + W r_i + b = the layer's output at i

A, x and r are the implicit attention's, W and b those of the layer's output projection; what stands behind that projection is
held, numbers of each position i (`model/writing.py`), and multiplies F[i], W r_i and b. A factor that was left out of
A (`without`, `only`) is left out of F. Nothing of size [channel, pos, pos] is built; `norms` goes block by block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from gatedlens.address.positions import Positions
from gatedlens.attention.limits import AT_ONCE, DENSE_LIMIT
from gatedlens.errors import InputError
from gatedlens.model.writing import Writing
from gatedlens.options import checked
from gatedlens.recurrence.autocast import exact
from gatedlens.recurrence.factors import NAMES, Factors
from gatedlens.recurrence.operator import Branch
from gatedlens.result.labelled_tensor import labelled
from gatedlens.result.legend import Legend

# `layer.py` builds contributions and is imported after this file, so its class stands here for type checkers alone.
if TYPE_CHECKING:
    from gatedlens.attention.layer import ImplicitAttention
else:
    ImplicitAttention = Any

BLOCK_ELEMENTS = 1 << 24  # numbers in one block of vectors [batch, rows, src, d_model]
INSTEAD = "Ask for row(i) or column(j), which grow with the positions alone, for fewer positions, or raise max_bytes."


@dataclass(frozen=True)
class Contributions:
    """`Contributions(attention)`, or `attention.contributions()`; see the head of this file."""

    attention: ImplicitAttention
    back: int | None = None  # the one tap that these pass; None: all

    def __post_init__(self) -> None:
        if self.attention.transposed:
            raise InputError("Contributions go from sources to destinations: take those of A, not of A.T.")

    def __repr__(self) -> str:
        batch, length, _ = self.attention.shape
        return f"Contributions({self.attention!r} -> batch {batch}, dst {length}, src {length}, d_model {self.writing.width})"

    @checked
    def legend(self, axes: str, shape: Sequence[int]) -> Legend | None:
        """`c.legend("batch dst src", shape)`: what stands along the axes of a view, as in `ImplicitAttention.legend`."""
        said = self.attention.legend(axes, shape)
        of = "Contributions" + ("" if self.back is None else f" by the tap {self.back} back")
        return None if said is None else replace(said, title=said.title.replace("Implicit attention", of, 1))

    @property
    def weight(self) -> Float[Tensor, "d_model channel"]:
        """W of the output projection."""
        return self.writing.weight.to(self.attention.dtype)

    @property
    def writing(self) -> Writing:
        """How what the channels hold gets into the residual stream."""
        found: Writing = self.attention.writing
        return found

    def _branches(self) -> Iterator[tuple[ImplicitAttention, Float[Tensor, "batch pos channel"]]]:
        """Each summand of A with its own x in the tokens' order (an edit may give Vision Mamba's directions two)."""
        for factors in self.attention.branches:
            x = factors.x.flip(1) if factors.reverse else factors.x
            yield replace(self.attention, branches=(factors,)), self.attention.padding.spread(x)

    def _project(self, values: Iterable[Float[Tensor, "batch pos channel"]]) -> Float[Tensor, "batch pos d_out"]:
        """W times the sum of what each branch gives."""
        with exact(self.weight):
            return torch.stack(list(values)).sum(0) @ self.weight.T

    # -- vectors -------------------------------------------------------------------------------------------------

    def row(self, i: Positions) -> Float[Tensor, "batch src d_model"]:
        """`c.row(-1)`: [batch, src, d_model], F[i, :]: what every place writes at position i; i counts real positions, as
        in `ImplicitAttention.row`.
        """
        return self.at(self.attention.place(i, "row"))

    @checked
    def at(self, place: Int[Tensor, " batch"]) -> Float[Tensor, "batch src d_model"]:
        """`c.at(place)`: [batch, src, d_model], F[i, :] of a place of each row in the input."""
        given = self._project(rearrange(A.at(place), "b c j -> b j c") * x for A, x in self._branches())
        return self.writing.at(place, given)

    @checked
    def through(
        self, place: Int[Tensor, " batch"], direction: Float[Tensor, "batch d_model"]
    ) -> Float[Tensor, "batch channel src"]:
        """`c.through(place, direction)`: [batch, channel, src], what every place gives to a direction of each row at a
        place of it, channel by channel: (W^T direction)[c] A[c][i, j] x[j, c]. Summed over channels it is
        `c.at(place) @ direction`.
        """
        weights = self._seen(place, direction)
        given = torch.stack([A.at(place) * rearrange(x, "b j c -> b c j") for A, x in self._branches()]).sum(0)
        return weights.unsqueeze(-1) * given

    def _seen(
        self, place: Int[Tensor, " batch"], direction: Float[Tensor, "batch d_model"]
    ) -> Float[Tensor, "batch channel"]:
        """W^T of a direction of each row, as what is written at a place of it sees it."""
        writing, rows = self.writing, torch.arange(len(place), device=place.device)
        seen = writing.seen(direction.to(self.attention.dtype))
        return seen.squeeze(1) if writing.by is None else (seen * writing.by[rows, place].to(seen).unsqueeze(-1)).sum(1)

    def column(self, j: Positions) -> Float[Tensor, "batch dst d_model"]:
        """`c.column(0)`: [batch, dst, d_model], F[:, j]: what position j writes at every place; j as in `row`."""
        place = self.attention.place(j, "column")
        rows = torch.arange(len(place), device=place.device)
        return self.writing.spread(
            self._project(
                rearrange(A.T.at(place), "b c i -> b i c") * x[rows, place].unsqueeze(1) for A, x in self._branches()
            )
        )

    def remainder(self) -> Float[Tensor, "batch pos d_model"]:
        """`c.remainder()`: [batch, pos, d_model], W r + b: what no token of this call brings: biases, and the state that
        the call went on from.
        """
        rest, writing = self._project([self.attention.bias]), self.writing
        bias = writing.bias if self.back is None else None
        return writing.spread(rest if bias is None else rest + bias.to(rest.dtype))

    def output(self) -> Float[Tensor, "batch pos d_model"]:
        """`c.output()`: [batch, pos, d_model], the sum of it all, linear in pos: with all factors, the layer's
        `hook_mixer_out`.
        """
        return self.writing.spread(self._project(A @ x for A, x in self._branches())) + self.remainder()

    # -- all pairs -----------------------------------------------------------------------------------------------

    @checked
    @labelled("norm of the contribution", "batch dst src")
    def norms(self, progress: bool = False, max_bytes: int | None = DENSE_LIMIT) -> Float[Tensor, "batch dst src"]:
        """`c.norms()`: [batch, dst, src], |F[i, j]| for all pairs, a block of destinations at a time. Refuses what takes
        more than `max_bytes` on the way.
        """
        self.attention.afford("contributions().norms()", AT_ONCE + 2, max_bytes, INSTEAD)
        return torch.cat([block.norm(dim=-1) for block in self.blocks(progress, max_bytes=None)], dim=1)

    @checked
    def blocks(
        self, progress: bool = False, max_bytes: int | None = DENSE_LIMIT
    ) -> Iterator[Float[Tensor, "batch rows src d_model"]]:
        """`for block in c.blocks(): ...`: [batch, rows, src, d_model], F itself, some destinations at a time, from the
        first on; each block is cut from matrices of all.
        """
        self.attention.afford("contributions().blocks()", AT_ONCE, max_bytes, INSTEAD)
        return self._blocks(progress)

    def _blocks(self, progress: bool) -> Iterator[Float[Tensor, "batch rows src d_model"]]:
        batch, length, channels = self.attention.shape
        writing = self.writing
        rows = max(1, BLOCK_ELEMENTS // (batch * length * writing.width))
        width = max(1, BLOCK_ELEMENTS // (batch * length * length))
        for start in tqdm(range(0, length, rows), disable=not progress, desc="contributions", unit="block"):
            total = self.weight.new_zeros(batch, min(rows, length - start), length, len(self.weight))
            for A, x in self._branches():
                for first in range(0, channels, width):
                    some = slice(first, first + width)
                    part = A.dense(some, max_bytes=None)[:, :, start : start + rows]
                    part = rearrange(part, "b c i j -> b i j c") * x[:, None, :, some]
                    with exact(part):
                        total = total + part @ self.weight[:, some].T
            held = None if writing.by is None else writing.by[:, start : start + rows].unsqueeze(2)
            yield writing.spread(total, held)

    @checked
    @labelled("contribution along the direction", "batch dst src")
    def along(
        self, direction: Float[Tensor, " d_model"], max_bytes: int | None = DENSE_LIMIT
    ) -> Float[Tensor, "batch dst src"]:
        """`c.along(direction)`: [batch, dst, src], F[i, j] . direction for all pairs; no channel apart.

        With p = W^T direction it is sum over c of p[c] A[c][i, j] x[j, c]: a weighted mean of channels with x folded
        into the activation behind each tap, so it costs as much as one `mean()` a tap.
        """
        writing, d_model = self.writing, self.writing.width
        if tuple(direction.shape) != (d_model,):
            raise InputError(f"along() takes a direction of [d_model] = [{d_model}]; this is {list(direction.shape)}.")
        self.attention.afford("contributions().along()", AT_ONCE + 2, max_bytes, INSTEAD)
        seen = writing.seen(direction.to(self.weight).unsqueeze(0))[0]
        parts = tuple(name for name in NAMES if name in (*self.attention.parts, "act", "conv"))

        def through(back: int) -> Tensor:
            own = self.tap(back).attention
            folded = tuple(_folded(factors, own.parts) for factors in own.branches)
            whole = replace(own, branches=folded, parts=parts)
            each = [whole.weighted(weights, max_bytes=None) for weights in seen]
            if writing.by is None:
                return each[0]
            held = writing.by.to(each[0]).unsqueeze(2)  # of a destination, in each copy
            return torch.stack([one * held[..., copy] for copy, one in enumerate(each)]).sum(0)

        return sum(through(back) for back in (range(self.n_taps) if self.back is None else [self.back]))  # type: ignore[return-value]

    # -- tap by tap ----------------------------------------------------------------------------------------------

    @property
    def n_taps(self) -> int:
        """How many tokens the conv of this operator reads: 1 where there is none, or it was left out."""
        return max(Branch(factors, self.attention.parts).taps.shape[1] for factors in self.attention.branches)

    @checked
    def tap(self, back: int) -> Contributions:
        """The contributions that pass the conv's tap `back` tokens before (0: the token itself).

        F.tap(k)[i, j] goes by way of position j + k (j - k in a scan from the end): the tap brings token j there, and
        the scan sends it on to i. Summed over k it is F; the remainder is no tap's, so here it is zero.
        """
        if back == self.back:
            return self
        if self.back is not None:
            raise InputError(f"tap({back}): these are the contributions of tap {self.back} alone.")
        if not 0 <= back < self.n_taps:
            raise InputError(f"tap({back}): this layer's taps reach 0 to {self.n_taps - 1} tokens back.")
        branches = tuple(_only_tap(factors, self.attention.parts, back) for factors in self.attention.branches)
        return Contributions(replace(self.attention, branches=branches), back)


def _only_tap(factors: Factors, parts: tuple[str, ...], back: int) -> Factors:
    """These factors with one tap: zeros in place of those that are nearer, and nothing besides A x."""
    taps = Branch(factors, parts).taps
    width = taps.shape[1]
    own = taps[:, width - 1 - back].unsqueeze(1) if back < width else torch.zeros_like(taps[:, :1])
    taps = torch.cat([own, own.new_zeros(len(own), back)], dim=1)
    return replace(factors, taps=taps, drift=None, start=None, rest=None)


def _folded(factors: Factors, parts: tuple[str, ...]) -> Factors:
    """x folded into factors of one tap k: act[m] * tap * x[m - k] for act[m], and a conv that only moves m to m - k.

    A[i, j] x[j] = sum over m of S[i, m] act[m] tap [j = m - k] x[j].
    """
    branch = Branch(factors, parts)
    back = branch.taps.shape[1] - 1
    # A conv that looks ahead brings position m the token at m + k instead.
    sides = (0, 0, 0, back) if factors.ahead else (0, 0, back, 0)
    padded = torch.nn.functional.pad(factors.x, sides)
    x = padded[:, back:] if factors.ahead else padded[:, : factors.x.shape[1]]
    shift = torch.zeros_like(branch.taps)
    shift[:, 0] = 1
    return replace(factors, act=branch.act * branch.taps[:, 0] * x, taps=shift)
