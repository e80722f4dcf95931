"""Rows from their equations, slow and plain: what an architecture's test puts together, and holds its points against.

`literal(cache, model, layer)` is the test's own: every row of one block by name, computed from the rows that its equation names,
as they stand in the cache. Then an edit anywhere must be in every row that follows.
"""

from __future__ import annotations

import torch

from tests.helpers import relative


def block_rows_hold(model, literal, tokens) -> None:
    """Every row of every block is its equation."""
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=lambda name: True)
        for layer in range(model.cfg.n_layers):
            rows = literal(cache, model, layer)
            assert set(rows) == {row.name for row in model.rows_for(layer)}, "a row has no literal equation here"
            for name, value in rows.items():
                assert relative(cache[f"blocks.{layer}.{name}"], value) < 1e-11, (layer, name)


def block_rows_hold_after_edits(model, literal, tokens, layer: int) -> None:
    """An edit anywhere in a layer: each later row equals its equation of the (edited) rows that it names, and the logits move."""
    with torch.no_grad():
        plain = model(tokens)
        for row in model.rows_for(layer):
            noise = torch.Generator().manual_seed(3)

            def edit(x, hook, noise=noise):
                return x * 1.3 + 0.1 * torch.rand(x.shape, generator=noise, dtype=x.dtype)

            with model.hooks([(f"blocks.{layer}.{row.name}", edit)]):
                logits, cache = model.run_with_cache(tokens, names_filter=lambda name: True)
            for at in range(layer, model.cfg.n_layers):
                for name, value in literal(cache, model, at).items():
                    if (at, name) != (layer, row.name):
                        assert relative(cache[f"blocks.{at}.{name}"], value) < 1e-11, (row.name, at, name)
            assert relative(logits, plain) > 1e-6, f"the edit of {row.name} had no effect"


def rms(x, eps):
    return (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def norm(out, c, part, weights, x, eps) -> None:
    """The rows of a norm: an RMSNorm, or, of weights with a bias, a LayerNorm."""
    bias = dict(weights.named_parameters()).get("bias")
    x = x if bias is None else x - x.mean(-1, keepdim=True)
    out[f"{part}.hook_scale"] = rms(x, eps)
    out[f"{part}.hook_normalized"] = x / c(f"{part}.hook_scale")
    out[f"{part}.hook_out"] = weights.weight * c(f"{part}.hook_normalized") + (0 if bias is None else bias)


def before(x):
    """Each position's predecessor, 0 at the first."""
    shift = torch.zeros_like(x)
    for t in range(1, x.shape[1]):
        shift[:, t] = x[:, t - 1]
    return shift


def conv_taps(x, weight):
    """The summands of a causal depthwise convolution: [b, l, ..., tap] of x [b, l, ...] and weight [c, 1, tap]."""
    flat, K = x.flatten(2), weight.shape[-1]
    taps = torch.zeros(*flat.shape, K, dtype=x.dtype)
    for t in range(x.shape[1]):
        for k in range(max(0, K - 1 - t), K):
            taps[:, t, :, k] = weight[:, 0, k] * flat[:, t - (K - 1) + k]
    return taps.unflatten(2, x.shape[2:])


def recurrence(out, c, decay, u, key, erase=None, probe=None) -> None:
    """The rows between hook_reset and hook_state: decay, erase and probe without the reset, which is put in here.

    decay [b, l, h, n] or [b, l, h, 1], u [b, l, h, v], key, erase and probe [b, l, h, n].
    """
    batch, length, heads, values = u.shape
    whole = (batch, length, heads, values, key.shape[-1])
    kept = 1 - c("mixer.hook_reset")[..., None]
    out["mixer.hook_reset"] = torch.zeros(batch, length, 1, dtype=u.dtype)
    out["mixer.hook_state_start"] = torch.zeros(batch, heads, values, whole[-1], dtype=u.dtype)
    out["mixer.hook_decay"] = (decay * kept).unsqueeze(-2).expand(whole)
    out["mixer.hook_write"] = torch.einsum("blhv,blhk->blhvk", u, key)
    if erase is not None:
        out["mixer.hook_erase"] = erase.unsqueeze(-2).expand(whole)
        out["mixer.hook_probe"] = probe * kept
    states = []
    for t in range(length):
        last = c("mixer.hook_state")[:, t - 1] if t else c("mixer.hook_state_start")
        state = c("mixer.hook_decay")[:, t] * last + c("mixer.hook_write")[:, t]
        if erase is not None:
            found = torch.einsum("bhvk,bhk->bhv", last, c("mixer.hook_probe")[:, t])
            state = state - found.unsqueeze(-1) * c("mixer.hook_erase")[:, t]
        states.append(state)
    out["mixer.hook_state"] = torch.stack(states, 1)
