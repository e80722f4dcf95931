"""Profiles of an implicit attention: how far it looks, how sharply, and whether it does induction.

    gl.profiles.of_layer(A).half_life               # batch: of the layer, |A| averaged over channels
    gl.profiles.of_channels(A).mean_distance        # batch channel
    gl.profiles.of_heads(A).half_life               # batch head: |A| averaged over the channels of each
    gl.profiles.induction(A).score                  # batch; induction_of_channels(A): batch channel

One definition for every architecture, one-directional or not, padded or not. i destination, j source, d distance:

    p_i[j] = |A[i, j]| / sum over j of |A[i, j]|            a row as shares
    d(i, j) = |i - j|, counted in real tokens               padding takes up no distance
    P[d] = mean over i of sum over d(i, j) = d of p_i[j]     the distance profile, which sums to 1

Rows of padding, and rows in which everything is zero, are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gatedlens.address.entries import Index, numbers
from gatedlens.attention.layer import ImplicitAttention
from gatedlens.attention.limits import AT_ONCE, DENSE_LIMIT
from gatedlens.errors import InputError
from gatedlens.options import checked
from gatedlens.result.bundle import Bundle

CHUNK_ELEMENTS = 1 << 22  # numbers in one chunk of dense matrices


class _Profile(NamedTuple):
    distance: Float[Tensor, "*some pos"]
    half_life: Float[Tensor, "*some"]
    mean_distance: Float[Tensor, "*some"]
    effective_context: Float[Tensor, "*some"]
    sharpness: Float[Tensor, "*some"]


class Profile(Bundle, _Profile):
    """distance [..., pos]: the profile P, the share of the attention at each distance.

    half_life: the distance within which half of P lies: the number of nearest distances (0, 1, ...) that hold half of
    it, interpolated; of exponentially decaying attention it is the decay's half-life in tokens. mean_distance: sum of
    d P[d]. effective_context: mean over rows of exp(entropy of p_i), the number of positions that a row reads as if
    evenly. sharpness: mean over rows of 1 - entropy of p_i / log(number of positions where it looks): 1 for a single
    position, 0 for an even spread; rows that have but one position to look at are left out. See `Bundle`.
    """

    __slots__ = ()
    last: ClassVar[Mapping[str, str]] = {"distance": "distance"}


class _Induction(NamedTuple):
    score: Float[Tensor, "*some"]
    chance: Float[Tensor, "*some"]


class Induction(Bundle, _Induction):
    """score: how much of the attention goes where induction would look; chance: how much an even spread would send; `Bundle`."""

    __slots__ = ()


@checked
def of_layer(attention: ImplicitAttention, max_bytes: int | None = DENSE_LIMIT) -> Profile:
    """`gl.profiles.of_layer(A).half_life`: [batch], the profile of |A| averaged over channels; every field [batch].
    Refuses what takes more than `max_bytes` on the way.
    """
    _afford("profile", attention, max_bytes)
    weights = attention.abs_mean(max_bytes=None).unsqueeze(1)
    found = Profile(*(field.squeeze(1) for field in _profile(weights, attention)))
    return found.named(_title("Profile", attention), "batch")


@checked
def of_channels(
    attention: ImplicitAttention,
    channels: int | slice | list[int] | None = None,
    max_bytes: int | None = DENSE_LIMIT,
) -> Profile:
    """`gl.profiles.of_channels(A).half_life`: [batch, channel], the profile of each channel (of `channels`, all if None);
    every field [batch, channel]. Chunked over channels.
    """
    _afford("profiles of channels", attention, max_bytes)
    found = Profile(*_by_channel(attention, channels, lambda weights: _profile(weights, attention)))
    return found.named(_title("Profile", attention), "batch channel", _numbered(attention, channels))


@checked
def of_heads(attention: ImplicitAttention, heads: Index | None = None, max_bytes: int | None = DENSE_LIMIT) -> Profile:
    """`gl.profiles.of_heads(A).half_life`: [batch, head], the profile of each head (of `heads`, all if None): of |A| averaged
    over its channels; every field [batch, head]. PointError for a layer without heads.
    """
    _afford("profiles of heads", attention, max_bytes)
    found = _profile(_of_heads(attention, heads, max_bytes), attention)
    return found.named(_title("Profile", attention), "batch head", {"head": _heads(attention, heads)})


@checked
def induction(
    attention: ImplicitAttention,
    tokens: Int[Tensor, "batch pos"] | None = None,
    max_bytes: int | None = DENSE_LIMIT,
) -> Induction:
    """`gl.profiles.induction(A).score`: [batch], how much of |A| (averaged over channels) goes to the tokens that followed
    earlier occurrences of the row's token.

    Row i's targets are j + 1 for every j < i with tokens[j] == tokens[i], i itself not among them; the score is the
    mean over rows that have targets of sum over targets of p_i. Olsson et al. 2022 (In-context Learning and Induction
    Heads). `tokens`: those that the attention was derived from; any labels [batch, pos] (of patches, say) will do.
    """
    _afford("induction", attention, max_bytes)
    weights = attention.abs_mean(max_bytes=None).unsqueeze(1)
    found = Induction(*(f.squeeze(1) for f in _induction(weights, attention, tokens)))
    return found.named(_title("Induction", attention), "batch")


@checked
def induction_of_channels(
    attention: ImplicitAttention,
    channels: int | slice | list[int] | None = None,
    tokens: Int[Tensor, "batch pos"] | None = None,
    max_bytes: int | None = DENSE_LIMIT,
) -> Induction:
    """`gl.profiles.induction_of_channels(A).score`: [batch, channel], `induction` of each channel."""
    _afford("induction of channels", attention, max_bytes)
    found = Induction(*_by_channel(attention, channels, lambda weights: _induction(weights, attention, tokens)))
    return found.named(_title("Induction", attention), "batch channel", _numbered(attention, channels))


@checked
def induction_of_heads(
    attention: ImplicitAttention,
    heads: Index | None = None,
    tokens: Int[Tensor, "batch pos"] | None = None,
    max_bytes: int | None = DENSE_LIMIT,
) -> Induction:
    """`gl.profiles.induction_of_heads(A).score`: [batch, head], `induction` of each head (of `heads`, all if None).
    PointError for a layer without heads.
    """
    _afford("induction of heads", attention, max_bytes)
    found = _induction(_of_heads(attention, heads, max_bytes), attention, tokens)
    return found.named(_title("Induction", attention), "batch head", {"head": _heads(attention, heads)})


# -- what they are called -------------------------------------------------------------------------------------------


def _title(what: str, attention: ImplicitAttention) -> str:
    where = "" if attention.model is None else f" of {attention.model.cfg.model_name}, layer {attention.layer}"
    return f"{what}{where}"


def _heads(attention: ImplicitAttention, heads: Index | None) -> list[int]:
    return numbers("heads", slice(None) if heads is None else heads, attention.n_heads, "the layer")


def _numbered(attention: ImplicitAttention, channels: int | slice | list[int] | None) -> dict[str, Sequence[int]]:
    """The numbers of the channels in the layer."""
    some = attention if channels is None else attention.select(channels)
    return {} if some.channels is None else {"channel": some.channels}


# -- the definitions ------------------------------------------------------------------------------------------------


@checked
def shares(weights: Float[Tensor, "batch some dst src"]) -> Float[Tensor, "batch some dst src"]:
    """`gl.profiles.shares(weights)`: p: each row of |weights| divided by its sum; a row of zeros stays one."""
    size = weights.abs()
    total = size.sum(-1, keepdim=True)
    return size / torch.where(total > 0, total, 1)


def _over_rows(
    values: Float[Tensor, "batch some dst"], counted: Bool[Tensor, "batch some dst"]
) -> Float[Tensor, "batch some"]:
    """The mean over the rows that count; 0 where none does."""
    return (values * counted).sum(-1) / counted.sum(-1).clamp(min=1)


def _entropy(p: Float[Tensor, "batch some dst src"]) -> Float[Tensor, "batch some dst"]:
    return torch.special.entr(p).sum(-1)


def _profile(weights: Float[Tensor, "batch some dst src"], attention: ImplicitAttention) -> Profile:
    p, places = shares(weights), _places(attention)
    read = p.sum(-1) > 0
    distance = (places.unsqueeze(2) - places.unsqueeze(1)).abs().clamp(max=p.shape[-1] - 1)
    total = p.new_zeros(*p.shape[:2], p.shape[-1])
    total = total.scatter_add(-1, distance.flatten(1).unsqueeze(1).expand(-1, p.shape[1], -1), p.flatten(2))
    total = total / read.sum(-1, keepdim=True).clamp(min=1)
    entropy, seen = _entropy(p), _visible(attention).unsqueeze(1)
    even = entropy / seen.clamp(min=2).to(p).log()
    return Profile(
        total,
        _half(total),
        (total * torch.arange(p.shape[-1]).to(total)).sum(-1),
        _over_rows(entropy.exp(), read),
        _over_rows(1 - even, read & (seen > 1)),
    )


def _half(profile: Float[Tensor, "batch some pos"]) -> Float[Tensor, "batch some"]:
    """The number of first entries that hold half of the total; linear within the entry that crosses it."""
    reached, half = profile.cumsum(-1), profile.sum(-1, keepdim=True) / 2
    at = (reached < half).sum(-1, keepdim=True).clamp(max=profile.shape[-1] - 1)
    inside = profile.gather(-1, at)
    missing = half - (reached.gather(-1, at) - inside)
    share = missing / inside.clamp(min=torch.finfo(profile.dtype).tiny)
    return (at + share).squeeze(-1)


def _induction(
    weights: Float[Tensor, "batch some dst src"], attention: ImplicitAttention, tokens: Tensor | None
) -> Induction:
    targets = _targets(attention, tokens).unsqueeze(1)
    p = shares(weights)
    counted = targets.any(-1) & (p.sum(-1) > 0)
    chance = targets.sum(-1) / _visible(attention).unsqueeze(1).clamp(min=1).to(p)
    return Induction(_over_rows((p * targets).sum(-1), counted), _over_rows(chance.expand_as(counted), counted))


def _targets(attention: ImplicitAttention, tokens: Tensor | None) -> Bool[Tensor, "batch dst src"]:
    """Where induction would look: the real token behind an earlier occurrence of the destination's token."""
    tokens, padding = _labels(attention, tokens), attention.padding
    if padding.order is not None:
        tokens = tokens.gather(1, padding.order)
    length = tokens.shape[1]
    same = (tokens.unsqueeze(2) == tokens.unsqueeze(1)).tril(-1)
    follows = torch.nn.functional.pad(same[:, :, :-1], (1, 0)) & ~torch.eye(
        length, dtype=torch.bool, device=same.device
    )
    if padding.rank is None or padding.mask is None:
        return follows
    follows = follows.gather(1, padding.rank.unsqueeze(2).expand_as(follows))
    follows = follows.gather(2, padding.rank.unsqueeze(1).expand_as(follows))
    return follows & padding.mask.unsqueeze(2) & padding.mask.unsqueeze(1)


def _labels(attention: ImplicitAttention, tokens: Tensor | None) -> Tensor:
    wanted, tokens = attention.shape[:2], attention.tokens if tokens is None else tokens
    if tokens is None or tokens.is_floating_point():
        raise InputError(
            "induction needs tokens, and this attention was not derived from any: pass tokens=[batch, pos]."
        )
    if tuple(tokens.shape) != wanted:
        raise InputError(f"induction compares tokens of shape {list(wanted)}; these have shape {list(tokens.shape)}.")
    return tokens


def _of_heads(
    attention: ImplicitAttention, heads: Index | None, max_bytes: int | None
) -> Float[Tensor, "batch head dst src"]:
    return attention.abs_mean(max_bytes, heads=slice(None) if heads is None else heads)


def _afford(what: str, attention: ImplicitAttention, max_bytes: int | None) -> None:
    instead = "Take fewer positions, ask for row(i) of the attention, or raise max_bytes."
    attention.afford(what, AT_ONCE + 6, max_bytes, instead)


# -- positions ------------------------------------------------------------------------------------------------------


def _places(attention: ImplicitAttention) -> Int[Tensor, "batch pos"]:
    """Each position counted in real tokens; masked ones rank behind."""
    batch, length, _ = attention.shape
    if attention.padding.rank is not None:
        return attention.padding.rank
    return torch.arange(length, device=attention.branches[0].x.device).expand(batch, length)


def _visible(attention: ImplicitAttention) -> Int[Tensor, "batch pos"]:
    """How many real positions lie where each row looks: those up to it, or all where a scan comes from the other end.

    (A local attention's window, or a document's beginning, does not make them fewer: all layers are measured alike.)
    """
    places = _places(attention)
    ahead = any(branch.reverse for branch in attention.branches)
    behind = any(not branch.reverse for branch in attention.branches)
    if attention.transposed:
        ahead, behind = behind, ahead
    real = attention.padding.counts(places).unsqueeze(1)
    return (places + 1) * behind + (real - 1 - places) * ahead + (0 if behind else 1)


def _by_channel(
    attention: ImplicitAttention,
    channels: int | slice | list[int] | None,
    function: Callable[[Tensor], tuple[Tensor, ...]],
) -> list[Tensor]:
    """`function` of the dense matrices, channel chunk by channel chunk, put together along the channels."""
    some = attention if channels is None else attention.select(channels)
    batch, length, total = some.shape
    size = max(1, CHUNK_ELEMENTS // (batch * length * length))
    chunks = [range(total)[start : start + size] for start in range(0, total, size)]
    found = [function(some.dense(list(chunk), max_bytes=None)) for chunk in chunks]
    return [torch.cat(pieces, dim=1) for pieces in zip(*found, strict=True)]
