"""Direct logit attribution: a logit as a sum over what wrote it, by component or by source token. Both add up exactly.

    by = gl.lens.logit_attribution(model, prompt, " Mary", " John")     # batch x component
    by.at(batch=0).plot()
    by = gl.lens.token_attribution(model, prompt, " Mary", " John")     # batch x component x src, and a remainder
    by.values.sum((1, 2))                                               # the logit difference

    logit = u . ln_final(resid) + b_U ,   resid = embed + sum over l of mixer_out_l + mlp_out_l
    mixer_out_l[i] = sum over j of F_l[i, j] + remainder_l[i]

u the column of W_U of `right` (minus that of `wrong`). The final norm's scale is held at what it was, which makes the norm
linear: centring where it centres, weight, bias. F are the contributions of the implicit attention (`contributions.py`).
Where a model norms the stream itself (MiniMax), those norms are held in the same way: each component is carried through the ones
behind it, and they have no share of their own. (`cache.logit_attrs(cache.decompose_resid(), token)` shares it out without that:
most of what a layer writes is then taken away by the norm behind it.)
A soft cap is not linear: with one, what is decomposed is the logit before it. Elhage et al. 2021; nostalgebraist 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.positions import Positions, listed, one_a_row
from gatedlens.attention.contributions import Contributions
from gatedlens.attention.layer import points_of
from gatedlens.attention.stack import implicit_attention
from gatedlens.errors import InputError
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Batch, Input
from gatedlens.model.cache import ActivationCache
from gatedlens.model.padding import Padding
from gatedlens.options import checked, tensor_of
from gatedlens.recurrence.autocast import exact
from gatedlens.result.result import Result
from gatedlens.runs import inputs

Tokens = int | str | Sequence[int] | Sequence[str] | Tensor
REMAINDER = "remainder"


@checked
@torch.no_grad()
def logit_attribution(
    model: HookedModel, input: Input, right: Tokens, wrong: Tokens | None = None, pos: Positions = None
) -> Result:
    """`gl.lens.logit_attribution(model, text, " whale")`: what each component gives to logit[right] (minus logit[wrong]):
    `embed`, `0_mixer_out`, ..., batch x component.

    input: text, ids, a pair (ids, mask), images, or a cache with the residual stream's points. right, wrong: ids, tokens or
    classes, one for all rows or one a row. pos: where it is predicted, among the row's real positions (the last). Biases
    of the final norm and the unembedding stand as components of their own where there are any.
    """
    reading = Reading.of(model, input, right, wrong, pos, ())
    parts = {label: reading.at(label).of_stream(value) for label, value in reading.streams()} | reading.biases
    values = torch.stack(list(parts.values()), dim=1)
    return reading.result(values, ("batch", "component"), {"component": list(parts)})


@checked
@torch.no_grad()
def token_attribution(
    model: HookedModel, input: Input, right: Tokens, wrong: Tokens | None = None, pos: Positions = None
) -> Result:
    """`gl.lens.token_attribution(model, text, " whale")`: `logit_attribution` by source, batch x component x src.

    The same by source: batch x component x src, where src are a row's positions and `remainder`, what no token brings.

    A mixer's output is split by its implicit attention; the embedding and the channel mixers write where they stand; the
    biases, and what a mixer adds by biases and a carried state, are the remainder. Options as in `logit_attribution`.
    """
    inside = tuple(name for block in model.blocks for mixer in block.writers for name in points_of(block, mixer))
    reading = Reading.of(model, input, right, wrong, pos, inside)
    rows = {}
    for label, value in reading.streams():
        layer, _, kind = label.partition("_")
        place = model.blocks[int(layer)].mixing.get(kind.removesuffix("_out")) if kind else None
        here = reading.at(label)
        rows[label] = here.in_place(value) if place is None else here.of_mixer(int(layer), place)
    for label, bias in reading.biases.items():
        rows[label] = torch.cat([bias.new_zeros(len(bias), reading.length), bias.unsqueeze(1)], dim=1)
    values, names = reading.by_number(torch.stack(list(rows.values()), dim=1))
    return reading.result(values, ("batch", "component", "src"), {"component": list(rows), "src": names})


@dataclass(frozen=True, eq=False)
class Reading:
    """One logit (or difference) a row, read linearly off the last residual stream of `cache`: direction . resid + biases.

    directions: the same off the stream where a component is written, by its name; none where no norm of the stream lies between.
    """

    model: Any
    cache: ActivationCache
    batch: Batch
    direction: Float[Tensor, "batch pos d_model"]  # zero where the logit does not look
    biases: dict[str, Tensor]
    logit: Float[Tensor, " batch"]
    facts: dict[str, Any]
    directions: dict[str, Tensor]

    @staticmethod
    def of(
        model: HookedModel, input: Input, right: Tokens, wrong: Tokens | None, pos: Positions, inside: tuple[str, ...]
    ) -> Reading:
        """The reading of an input (run once) or of a cache; `inside` are more points that are needed."""
        last_block = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
        streams = ("blocks.0.hook_resid_pre", "blocks.*.hook_*_out", last_block, *held_at_last(model))
        cache, batch = inputs.cached(model, input, (*streams, *_scales(model), *inside))
        last = cache["resid_post", -1].double()
        u = _columns(model, right, len(last), "right")
        b_u = _biases(model, right, len(last))
        if wrong is not None:
            u = u - _columns(model, wrong, len(last), "wrong")
            b_u = b_u - _biases(model, wrong, len(last))
        looks, where = _looks(model, batch, pos)
        u = looks.unsqueeze(-1) * u.unsqueeze(1)
        direction, norm_bias = _through_norm(model, last, {name: cache[name] for name in held_at_last(model)}, u)
        biases = {"ln_final_bias": norm_bias, "unembedding_bias": b_u}
        logit = (direction * last).sum((1, 2)) + norm_bias + b_u
        facts = {"model": model.cfg.model_name, "right": _said(right), "pos": where, "logit": logit.tolist()}
        facts |= {} if wrong is None else {"wrong": _said(wrong)}
        facts |= {} if model.cfg.logits_soft_cap is None else {"before_soft_cap": model.cfg.logits_soft_cap}
        biases = {label: value for label, value in biases.items() if bool((value != 0).any())}
        return Reading(model, cache, batch, direction, biases, logit, facts, _where_written(model, cache, direction))

    def at(self, label: str) -> Reading:
        """The same, read where a component is written."""
        return replace(self, direction=self.directions.get(label, self.direction))

    @property
    def length(self) -> int:
        return self.direction.shape[1]

    def streams(self) -> Iterator[tuple[str, Float[Tensor, "batch pos d_model"]]]:
        """What was written into the residual stream, by the names of `cache.decompose_resid`; norms of the stream aside."""
        yield "embed", self.cache["resid_pre", 0]
        for layer in range(self.model.cfg.n_layers):
            norming = self.model.blocks[layer].norming
            for kind in (kind for group in self.model.names.branches(layer) for kind in group if kind not in norming):
                yield f"{layer}_{kind}_out", self.cache[f"blocks.{layer}.hook_{kind}_out"]

    @checked
    def of_stream(self, value: Tensor) -> Float[Tensor, " batch"]:
        return (value.double() * self.direction).sum((1, 2))

    @checked
    def in_place(self, value: Tensor) -> Float[Tensor, "batch src"]:
        """By the position at which it stands; no remainder."""
        own = (value.double() * self.direction).sum(2)
        return torch.cat([own, own.new_zeros(len(own), 1)], dim=1)

    @checked
    def of_mixer(self, layer: int, place: str) -> Float[Tensor, "batch src"]:
        """By the position from which the mixer brought it, and the remainder."""
        given = implicit_attention(self.cache, layer=layer, place=place).contributions()
        rest = self.of_stream(given.remainder())
        return torch.cat([self.through(given).sum(1), rest.unsqueeze(1)], dim=1)

    @checked
    def through(self, given: Contributions) -> Float[Tensor, "batch channel src"]:
        """What every place gives to the logit through each channel of a mixer."""
        batch, _, channels = given.attention.shape
        total = self.direction.new_zeros(batch, channels, self.length)
        for i in self.direction.abs().sum((0, 2)).nonzero().flatten().tolist():  # where the logit looks
            place = torch.full((batch,), i, device=total.device)
            total = total + given.through(place, self.direction[:, i])
        return total

    def by_number(self, values: Float[Tensor, "batch *rest src"]) -> tuple[Float[Tensor, "batch *rest src"], list[Any]]:
        """Sources and the remainder, by the rows' real positions, and what they are called."""
        names = inputs.labels(self.model, self.batch)
        by_source = Padding.of(self.batch.mask).pack(values[..., :-1].movedim(-1, 1)).movedim(1, -1)[..., : len(names)]
        return torch.cat([by_source, values[..., -1:]], dim=-1), [*names, REMAINDER]

    @checked
    def result(self, values: Tensor, axes: tuple[str, ...], labels: dict[str, Any]) -> Result:
        """The Result, with how far its sum is from the logit (rounding, unless hooks edited the streams)."""
        error = (values.flatten(1).sum(1) - self.logit).abs().max().item()
        title = "Direct logit attribution" + (", by source token" if "src" in axes else "")
        return self.titled(values, axes, labels, title, error)

    @checked
    def titled(
        self, values: Tensor, axes: tuple[str, ...], labels: dict[str, Any], title: str, error: int | float
    ) -> Result:
        """The Result, with how far what should add up does not."""
        what = "logit" if "wrong" not in self.facts else "logit difference"
        what += ", before the soft cap" if "before_soft_cap" in self.facts else ""
        return Result(values, axes, labels, title, what, {**self.facts, "error": error})


def _scales(model: HookedModel) -> list[str]:
    """The scales of the norms of the stream itself."""
    every = ((layer, place) for layer, block in enumerate(model.blocks) for place in block.norming.values())
    return [f"blocks.{layer}.{place}.hook_scale" for layer, place in every]


def _where_written(
    model: HookedModel, cache: ActivationCache, direction: Float[Tensor, "batch pos d_model"]
) -> dict[str, Tensor]:
    """By component, what reads the same number off the stream in which it is written: the direction, gone back through the norms
    of the stream that lie between, their scales held. Nothing where there are none."""
    found: dict[str, Tensor] = {}
    for layer in reversed(range(model.cfg.n_layers if _scales(model) else 0)):
        block = model.blocks[layer]
        for group in reversed(model.names.branches(layer)):
            found |= {f"{layer}_{kind}_out": direction for kind in group}
            for place in (block.norming[kind] for kind in group if kind in block.norming):
                scale = cache[f"blocks.{layer}.{place}.hook_scale"]
                direction = getattr(block, place).seen_before(direction, scale).detach()
            found["embed"] = direction
    return found


def _through_norm(
    model: HookedModel, last: Tensor, held: Mapping[str, Tensor], u: Tensor
) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, " batch"]]:
    """(direction, bias): u . ln_final(x) = direction . x + bias, with the norm's points held. Every norm is then linear."""
    with torch.inference_mode(False), torch.enable_grad():
        u = u.clone()  # tensors of an inference mode outside take no part in gradients
        with model.hooks([(name, _standing(value.clone())) for name, value in held.items()]):
            x = torch.zeros(last.shape, dtype=last.dtype, device=last.device, requires_grad=True)
            read = (model.ln_final(x).double() * u).sum((1, 2))
        with exact(x):
            (direction,) = torch.autograd.grad(read.sum(), x)
    return direction, read.detach()


def held_at_last(model: HookedModel) -> tuple[str, ...]:
    """`held_at_last(model)`: the points with which the final norm is linear: its scale, and what else it weighs by."""
    return tuple(f"ln_final.{name}" for name in model.ln_final.held_points)


def _standing(value: Tensor) -> Callable[..., Tensor]:
    return lambda own, hook: value.to(own)


def _looks(model: HookedModel, batch: Batch, pos: Positions) -> tuple[Float[Tensor, "batch pos"], Any]:
    """With which weight each position enters each row's logit, and how a reader is told."""
    real = inputs.real(model, batch)
    pooling = model.pooling()
    if pooling is not None:
        if pos is not None:
            raise InputError(f"pos={pos!r}: {model.title} has one output a row, read where its head reads it.")
        return pooling.double().expand(real.shape), "pooled"
    place = one_a_row(-1 if pos is None else pos, "pos", real)
    looks = torch.nn.functional.one_hot(place, real.shape[1]).to(real.device)
    return looks.double(), [own[0] for own in listed(looks.bool(), real)]


def _ids(model: HookedModel, tokens: Tokens, rows: int, what: str) -> Tensor:
    if isinstance(tokens, str):
        tokens = model.to_single_token(tokens)
    elif isinstance(tokens, Sequence):
        tokens = [model.to_single_token(token) if isinstance(token, str) else token for token in tokens]
    ids, size = tensor_of(tokens, "The token", device=model.W_U.device), model.W_U.shape[1]
    if (
        ids.is_floating_point()
        or ids.dtype == torch.bool
        or ids.ndim > 1
        or (ids.ndim == 1 and len(ids) not in (1, rows))
    ):
        raise InputError(f"{what}={_said(tokens)}: give one id for all {rows} rows, or one a row.")
    if bool(((ids < 0) | (ids >= size)).any()):
        raise InputError(f"{what}={_said(tokens)} is out of range: the logits have {size} entries (0 to {size - 1}).")
    return ids.reshape(-1).expand(rows)


def _columns(model: HookedModel, tokens: Tokens, rows: int, what: str) -> Float[Tensor, "batch d_model"]:
    return model.W_U.T[_ids(model, tokens, rows, what)].double()


def _biases(model: HookedModel, tokens: Tokens, rows: int) -> Float[Tensor, " batch"]:
    return model.b_U[_ids(model, tokens, rows, "token")].double()


def _said(tokens: Tokens) -> Any:
    return (
        tokens.tolist() if isinstance(tokens, Tensor) else list(tokens) if isinstance(tokens, list | tuple) else tokens
    )
