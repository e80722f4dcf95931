"""What several test files need: inputs for any architecture, golden vectors, and the relative error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gatedlens as gl

GOLDEN = Path(__file__).parent / "golden"

# A test of all points is three tests of a third each, so that architectures can deal them out (tests/conftest.py).
in_parts = pytest.mark.parametrize("part", [slice(k, None, 3) for k in range(3)], ids=lambda part: f"{part.start} of 3")


def example(model, batch: int = 2, pos: int = 7, seed: int = 0):
    """A random input that `model` reads: tokens for a language model, images for a vision model."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, gl.HookedLanguageModel):
        return torch.randint(model.cfg.d_vocab, (batch, pos), generator=generator)
    return torch.randn(batch, *model.image_shape, generator=generator, dtype=torch.float64)


def golden(name: str):
    """(config, weights, io) of a golden folder."""
    folder = GOLDEN / name
    config = json.loads((folder / "config.json").read_text())
    return config, load_file(folder / "model.safetensors"), load_file(folder / "io.safetensors")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |b|; infinities must agree."""
    a, b = (torch.where(a == b, 0.0, t) if torch.isinf(t).any() else t for t in (a, b))
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def by_channel(x: torch.Tensor, model, axis: int) -> torch.Tensor:
    """A state whose axes from `axis` on are those of a head, its values first, as one by channel; any other as it is."""
    return x.flatten(axis, axis + 1) if "value" in model.cfg.sizes else x


def kept(cache, stem: str, state: torch.Tensor, t: int) -> torch.Tensor:
    """What the step `t` leaves of the state before it: decay state, less erase (probe . state) of a delta rule. Where a token
    takes several steps, the later ones look at what the earlier have left."""
    left = cache[f"{stem}hook_decay"][:, t] * state
    if f"{stem}hook_erase" not in cache.cache_dict:
        return left
    for s, (erase, probe) in enumerate(steps_of(cache, stem, t)):
        found = (probe.unsqueeze(-2) * (left if s else state)).sum(-1, keepdim=True)
        left = left - erase * found
    return left


def steps_of(cache, stem: str, t: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(erase, probe) of each step that token `t` takes."""
    erase, probe = (cache[f"{stem}hook_{name}"] for name in ("erase", "probe"))
    if erase.ndim == cache[f"{stem}hook_state"].ndim:
        return [(erase[:, t], probe[:, t])]
    return list(zip(erase[:, t].unbind(1), probe[:, t].unbind(1), strict=True))


def earlier(model, input) -> dict:
    """What a run of `input` that starts at a later layer has to be given beside the residual stream."""
    if not model.hands_on:
        return {}
    with torch.no_grad():
        return {"earlier": model.run_with_cache(input, names_filter=list(model.hands_on))[1]}


def at_real(x: torch.Tensor, mask: torch.Tensor | None, pos: int, dim: int) -> torch.Tensor:
    """Of each row of `x` the entry along `dim` at the row's real position `pos`, negative ones from its last."""
    places = [pos if mask is None else mask[row].nonzero().flatten()[pos] for row in range(len(x))]
    return torch.stack([x[row].select(dim - 1, int(place)) for row, place in enumerate(places)])


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, mask) of token rows of unequal length; padding holds token 1, which must not matter."""
    longest = max(len(row) for row in rows)
    tokens, mask = torch.ones(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(len(row))
        tokens[i, place], mask[i, place] = row, True
    return tokens, mask
