"""Profiles of a state: what a token makes of it, what its probe meets, how fast it decays, how many directions it holds.

    gl.profiles.rewrite(cache, layer=0).relative             # batch pos head: |S_t - S_{t-1}| / |S_{t-1}|
    gl.profiles.collisions(cache, layer=0).cosine            # batch head dst src: |cos(probe_i, key_j)|, j before i
    gl.profiles.decay_half_life(cache, layer=0)              # batch head key: tokens until half is left
    gl.profiles.state_rank(cache, layer=0, pos=-1).effective     # batch head

    S_t = decay_t S_{t-1} - erase_t (probe_t . S_{t-1}) + write_t          S [value, key] of each head; |S| = sqrt(sum S^2)

One definition for every architecture whose state is a sum of decaying writes. Where each channel has a state of its own (Mamba,
Griffin) a channel is a head, [value 1, key], but for the rank. They are of the run that `cache` holds, with what hooks have made
of its points but for the lazy ones. Positions stand where they stand in the input; a document begins with no state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from gatedlens.address.entries import Index, numbers
from gatedlens.address.layers import scans_of
from gatedlens.address.positions import Positions
from gatedlens.attention.layer import ImplicitAttention
from gatedlens.attention.limits import AT_ONCE, DENSE_LIMIT
from gatedlens.errors import InputError, PointError
from gatedlens.model.cache import ActivationCache
from gatedlens.model.hookpoint import CONV
from gatedlens.options import checked
from gatedlens.recurrence.autocast import exact
from gatedlens.recurrence.head_matrix import HeadScan
from gatedlens.recurrence.matrix import ScanMatrix
from gatedlens.recurrence.micro_steps import at_step
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.recurrence.states import walk
from gatedlens.recurrence.terms import Terms
from gatedlens.result.bundle import Bundle
from gatedlens.result.labelled_tensor import with_label
from gatedlens.result.legend import Legend


class _Rewrite(NamedTuple):
    relative: Float[Tensor, "batch pos head"]
    decayed: Float[Tensor, "batch pos head"]
    erased: Float[Tensor, "batch pos head"]
    written: Float[Tensor, "batch pos head"]


class _Collisions(NamedTuple):
    cosine: Float[Tensor, "batch head dst src"]
    found: Float[Tensor, "batch head dst src"]


class _StateRank(NamedTuple):
    effective: Float[Tensor, "batch *pos head"]
    above: Float[Tensor, "batch *pos head"]


@checked
def rewrite(cache: ActivationCache, layer: int, scan: str | None = None) -> Rewrite:
    """`gl.profiles.rewrite(cache, layer=0).relative`: [batch, pos, head], how much of the state each token rewrites: see Rewrite.

    cache: of `model.run_with_cache(tokens)`. scan: "fwd" or "bwd" where a layer has both: the state before is that of its order.
    InputError for a layer without such a state (attention, RWKV-4); PointError for points that the cache lacks.
    """
    run = StateRun.of(cache, layer, scan, "rewrite")
    parts = []
    with exact(run.u):
        for some, before, states in run.walk():
            terms = run.terms.at(some)
            write = terms.write(run.u[:, some])
            decayed = (1 - terms.decays()).unsqueeze(-2) * before
            probe, erased = terms.probes(), torch.zeros_like(before)
            if terms.erase is not None and probe is not None:
                erased = (before * probe.unsqueeze(-2)).sum(-1, keepdim=True) * terms.erase.unsqueeze(-2)
            size = _size(before[:, :: run.steps])
            known = (size > 0) & ~run.begins[:, some][:, :: run.steps].unsqueeze(-1)
            changes = (run.of_positions(change) for change in (states - before, decayed, erased, write))
            parts.append([torch.where(known, _size(change) / size, torch.nan) for change in changes])
    found = Rewrite(*(run.laid_out(torch.cat(field, dim=1)) for field in zip(*parts, strict=True)))
    return found.named(_title("Rewriting of the state", run.attention), "batch pos head", words=run.attention.words)


@checked
def collisions(
    cache: ActivationCache, layer: int, heads: Index | None = None, max_bytes: int | None = DENSE_LIMIT
) -> Collisions:
    """`gl.profiles.collisions(cache, layer=0).cosine[0, head, i]`: which earlier keys the probe of token i meets: see Collisions.

    heads: of some heads (a number, slice, list or mask; all if None). Refuses what takes more than `max_bytes`. InputError for a
    layer without a delta rule: nothing probes its state.
    """
    run = StateRun.of(cache, layer, None, "collisions")
    terms, probe, attention = run.terms, run.terms.probes(), run.attention
    if probe is None:
        raise InputError(
            f"collisions: layer {attention.layer} of {attention.model.cfg.model_name} has no delta rule, so no token probes its "
            "state: what is written is added to it whatever stands there. gl.profiles.state_rank says how full it is."
        )
    chosen = list(range(terms.heads)) if heads is None else _chosen(attention, heads)
    instead = "Take fewer positions, some heads=[...], or raise max_bytes."
    attention.afford(f"collisions of {len(chosen)} heads", 4 * len(chosen) + AT_ONCE, max_bytes, instead)
    with exact(probe):
        # What the probe of i finds is what a read of the state before it would: a scan of the positions before.
        late = torch.cat([probe[:, 1:], torch.zeros_like(probe[:, :1])], dim=1)
        found = HeadScan.of(terms._replace(read=late), 1).by_head(chosen)
        assert terms.probe is not None  # with no document's beginning in it: the direction alone
        directions = (_unit(x)[:, :, chosen].transpose(1, 2) for x in (terms.probe, terms.of_heads(terms.key)))
        probes, keys = directions
        cosine = (probes @ keys.mT).abs() * run.same_document.unsqueeze(1)
    found = F.pad(found[:, :, :-1], (0, 0, 1, 0))
    whole = Collisions(run.unpacked(cosine.tril(-1)), run.unpacked(found))
    words = attention.words if run.steps == 1 else None
    return whole.named(_title("Collisions", attention), "batch head dst src", {"head": chosen}, words)


@checked
def decay_half_life(cache: ActivationCache, layer: int, scan: str | None = None) -> Float[Tensor, "batch head #key"]:
    """`gl.profiles.decay_half_life(cache, layer=0)[..., 0]`: [batch, head, key], in tokens: log(1/2) / mean log decay.

    The mean is over a row's real positions, resets aside; the axis key is 1 where a head decays as one, and a channel is a head
    where each has a state of its own. Infinite where nothing decays. What a delta rule erases is not in it.

    InputError for a layer without a decaying state; scan as in `rewrite`.
    """
    attention, number, _ = _scanned(cache, layer, scan, "decay_half_life")
    factors = attention.branches[number]
    real = attention.padding.packed_mask(factors.x)
    mean = None if factors.scan is None else factors.scan.mean_log_decay(real.flip(1) if factors.reverse else real)
    if mean is None:
        raise InputError(_stateless("decay_half_life", attention, factors.scan))
    found = (-torch.log(mean.new_tensor(2.0)) / mean.clamp(max=-0.0)).to(factors.x.dtype).abs()
    legend = Legend.of(_title("Half-life of the state", attention), "batch head key", found.shape)
    half_life: Tensor = with_label(found, "tokens until half is left", legend)
    return half_life


@checked
def state_rank(
    cache: ActivationCache,
    layer: int,
    pos: Positions = None,
    heads: Index | None = None,
    threshold: float = 0.01,
    scan: str | None = None,
) -> StateRank:
    """`gl.profiles.state_rank(cache, layer=0, pos=-1).effective`: [batch, head], how many directions it holds: see StateRank.

    pos: one position, or one a row; None: all, [batch, pos, head], which takes a decomposition each. heads: as in `collisions`.
    threshold: in (0, 1), which share of the largest singular value counts. Where each channel has a state vector of its own
    (Mamba) the layer's state [channel, state] counts as one head. InputError for a layer whose channels hold a number each
    (Griffin), or that has no such state; scan as in `rewrite`.
    """
    if not 0 < threshold < 1:
        raise InputError(f"threshold={threshold}: a share of the largest singular value, between 0 and 1.")
    run = StateRun.of(cache, layer, scan, "state_rank")
    attention, by_channel = run.attention, run.u.shape[3] == 1
    if by_channel and run.start.shape[3] == 1:
        raise InputError(
            f"state_rank: each channel of layer {attention.layer} of {attention.model.cfg.model_name} holds one number, no "
            "matrix: it has no rank. gl.profiles.decay_half_life and rewrite say what becomes of it."
        )
    chosen = slice(None) if heads is None else _chosen(attention, heads)
    named = {} if by_channel or heads is None else {"head": _chosen(attention, heads)}
    called = (_title("Rank of the state", attention), "batch pos head" if pos is None else "batch head", named)
    rows = torch.arange(len(run.u), device=run.u.device)
    wanted = None if pos is None else run.packed(attention.place(pos, "pos"))
    found: list[Tensor] = []
    places: list[Tensor] = []
    with exact(run.u):
        for steps, _, every in run.walk():
            some, states = (
                slice(steps.start // run.steps, steps.stop // run.steps),
                every[:, run.steps - 1 :: run.steps],
            )
            matrices = states.transpose(2, 3) if by_channel else states[:, :, chosen]  # [b, some, 1, channel, state]
            if wanted is not None:  # the one of each row, in the part where it stands
                mine = rows[(some.start <= wanted) & (wanted < some.stop)]
                matrices = matrices[mine, wanted[mine] - some.start]
                places.append(mine)
            found.append(torch.linalg.svdvals(matrices))
    if wanted is None:
        ranks = StateRank(*(run.laid_out(each) for each in _ranks(torch.cat(found, dim=1), threshold)))
        return ranks.named(*called, words=attention.words)
    values = torch.cat(found)[torch.cat(places).argsort()]
    return StateRank(*_ranks(values, threshold)).named(*called)


# -- what they are made of ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StateRun:
    """The recurrence of one layer as a run had it: positions packed, in the order of the scan; a position may take several
    steps, and then terms, u and begins are over (pos step)."""

    attention: ImplicitAttention
    terms: Terms
    u: Float[Tensor, "batch long head value"]
    start: Float[Tensor, "batch head value key"]
    begins: Bool[Tensor, "batch long"]  # where a document does, or a hook forgets all
    reverse: bool
    steps: int = 1

    @classmethod
    def of(cls, cache: ActivationCache, layer: int, scan: str | None, what: str) -> StateRun:
        """`StateRun.of(cache, 0, None, "rewrite")`; `what` is who asks, for the errors."""
        attention, number, stem = _scanned(cache, layer, scan, what)
        factors, padding = attention.branches[number], attention.padding
        scan_matrix = factors.scan
        terms = None if scan_matrix is None else scan_matrix.recurrence()
        if scan_matrix is None or terms is None:
            raise InputError(_stateless(what, attention, factors.scan))
        missing = [stem + name for name in ("hook_u", "hook_reset") if stem + name not in cache.cache_dict]
        if missing:
            raise PointError(
                f"{what} of layer {attention.layer} needs points that this cache lacks: {', '.join(missing)}."
            )

        def packed(name: str) -> Tensor:
            x = padding.pack(at_least_float32(padding.zero(cache[stem + name])))
            return x.flip(1) if factors.reverse else x

        mixer: Any = attention.model.blocks[attention.layer].mixer
        u = packed("hook_u").unflatten(-1, (terms.heads, -1))
        u, begins = u.reshape(len(u), -1, *u.shape[-2:]), packed("hook_reset")
        terms, u, steps = scan_matrix.steps_of(terms, u, mixer.steps)
        begins = at_step(begins, 0, steps)[..., 0] >= 1
        shape = (len(u), *u.shape[2:], terms.key.shape[-1])
        start = u.new_zeros(shape)
        if cache.state is not None:
            start = mixer.state_of(cache.state).to(u).reshape(shape).masked_fill(begins[:, :1, None, None], 0)
        return cls(attention, terms, u, start, begins, factors.reverse, steps)

    def walk(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """As `walk` of the recurrence, all steps of a position together."""
        return walk(self.terms, self.u, self.start, multiple=self.steps)

    def of_positions(
        self, change: Float[Tensor, "batch long head value key"]
    ) -> Float[Tensor, "batch pos head value key"]:
        """The sum over the steps of each position."""
        return change if self.steps == 1 else change.unflatten(1, (-1, self.steps)).sum(2)

    def unpacked(self, matrix: Float[Tensor, "batch head dst src"]) -> Float[Tensor, "batch head dst src"]:
        """A matrix of packed positions, or of their steps, at their places in the input."""
        if self.steps == 1:
            return self.attention.unpacked(matrix)
        heads = matrix.shape[1]
        apart = rearrange(matrix, "b h (i s) (j t) -> b (h s t) i j", s=self.steps, t=self.steps)
        return rearrange(
            self.attention.unpacked(apart), "b (h s t) i j -> b h (i s) (j t)", h=heads, s=self.steps, t=self.steps
        )

    @property
    def same_document(self) -> Bool[Tensor, "batch long long"]:
        """Whether two positions are of one document."""
        number = self.begins.cumsum(1)
        return number.unsqueeze(2) == number.unsqueeze(1)

    def packed(self, place: Tensor) -> Tensor:
        """Where a place of each row in the input is here."""
        rank = self.attention.padding.rank
        found = place if rank is None else rank[torch.arange(len(place), device=place.device), place]
        return self.u.shape[1] // self.steps - 1 - found if self.reverse else found

    def laid_out(self, x: Float[Tensor, "batch pos head"]) -> Float[Tensor, "batch pos head"]:
        """Back at the places in the input; NaN at padding."""
        padding = self.attention.padding
        spread = padding.spread(x.flip(1) if self.reverse else x)
        return padding.fill(spread, torch.nan)


def _scanned(cache: ActivationCache, layer: int, scan: str | None, what: str) -> tuple[ImplicitAttention, int, str]:
    """The operator of the layer, the number of the branch that is meant, and what its points' names begin with."""
    attention = ImplicitAttention.of(cache, layer)
    mixer: Any = attention.model.blocks[attention.layer].mixer
    names = scans_of(mixer, scan)
    if len(names) > 1:
        said = " or ".join(f"scan={name!r}" for name in names)
        raise InputError(f"{what}: layer {attention.layer} has {len(names)} scans, each with its state: say {said}.")
    each = len(attention.branches) // len(mixer.scans)  # what passes by a scan has a branch of its own
    stem = f"blocks.{attention.layer}.{mixer.place}." + (f"{names[0]}." if names[0] else "")
    return attention, mixer.scans.index(names[0]) * each, stem


def _stateless(what: str, attention: ImplicitAttention, scan: ScanMatrix | None) -> str:
    """Why a layer has no state that can be profiled, and which layers have one."""
    names, model = attention.model.names.points, attention.model
    layers = [n for n in range(model.cfg.n_layers) if f"blocks.{n}.mixer.hook_write" in names]
    if attention.layer in layers:  # it has one, which is something else
        why = (
            "holds a numerator and a denominator, whose quotient alone means anything: it is a softmax over the past, and "
            "gl.profiles.of_layer says how far it looks"
        )
        return f"{what}: the state of layer {attention.layer} of {model.cfg.model_name} {why}."
    others = f" The layers that have one: layer in {layers}." if layers else ""
    keeps = (
        "a short convolution: it keeps a few tokens"
        if attention.mixer.role == CONV
        else "attention: it keeps every token"
    )
    return f"{what}: layer {attention.layer} of {model.cfg.model_name} is {keeps} and has no state that tokens rewrite.{others}"


def _title(what: str, attention: ImplicitAttention) -> str:
    return f"{what} of {attention.model.cfg.model_name}, layer {attention.layer}"


def _chosen(attention: ImplicitAttention, heads: Index) -> list[int]:
    where = f"Layer {attention.layer} of {attention.model.cfg.model_name}"
    return numbers("heads", heads, attention.n_heads, where)


def _size(x: Float[Tensor, "batch pos head value key"]) -> Float[Tensor, "batch pos head"]:
    return torch.linalg.vector_norm(x, dim=(-2, -1))


def _unit(x: Float[Tensor, "batch pos head key"]) -> Float[Tensor, "batch pos head key"]:
    """x / |x|; 0 stays 0."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(size > 0, size, 1)


def _ranks(
    values: Float[Tensor, "batch *pos head value"], threshold: float
) -> tuple[Float[Tensor, "batch *pos head"], Float[Tensor, "batch *pos head"]]:
    """(effective, above) of singular values, the largest first."""
    total = values.sum(-1, keepdim=True)
    shares = values / torch.where(total > 0, total, 1)
    effective = torch.special.entr(shares).sum(-1).exp() * (total.squeeze(-1) > 0)
    return effective, (values > threshold * values[..., :1]).sum(-1).to(values.dtype)


class Rewrite(Bundle, _Rewrite):
    """What the step of a token makes of the state, in shares of the state before it; each [batch, pos, head].

    relative: |S_t - S_{t-1}| / |S_{t-1}|. Its three parts, whose tensors (not their sizes) sum to the change: decayed, what the
    decay takes, |(1 - decay_t) S_{t-1}|; erased, |erase_t (probe_t . S_{t-1})|, 0 without a delta rule; written, |write_t|.
    NaN at padding and where there is no state before (a document's first position): take `.nanmean(1)`.
    Where a token takes several steps (DeltaProduct), each part is the sum of what its steps do.
    """

    __slots__ = ()


class Collisions(Bundle, _Collisions):
    """What the probe of a token i meets of the key of an earlier one j; each [batch, head, dst, src], 0 but for j before i.

    cosine: |probe_i . key_j| / (|probe_i| |key_j|), 1 where i looks just where j wrote. found: what the probe finds of j's
    content in the state as it is, probe_i . (what the steps between have left of key_j): sum over j of found[i, j] u_j is
    probe_i . S_{i-1}, which erase_i takes away. Both are 0 between documents. Where a token takes n steps (DeltaProduct), dst and
    src are those of (pos step), step innermost.
    """

    __slots__ = ()


class StateRank(Bundle, _StateRank):
    """How many directions a state holds, by its singular values s_1 >= s_2 ...; each [batch, pos, head].

    effective: exp(entropy of s_i / sum s), Roy and Vetterli 2007, as if so many were equal. above: how many are larger than
    `threshold` s_1. Both are 0 of a state that is all zero, and NaN at padding.
    """

    __slots__ = ()
