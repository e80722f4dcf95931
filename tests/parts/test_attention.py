"""Attention of every kind against its equation in loops: grouped heads, windows, rotary, norms, gates."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gatedlens.model.hookpoint import rows_of
from gatedlens.model.norm import GemmaNorm, NormOfHeads
from gatedlens.model.run import DocumentRun
from gatedlens.model.state import RecurrentState
from gatedlens.parts.attention import Attention, AttentionKind

D, H, KV, W = 8, 4, 2, 6  # d_model, query heads, key heads, d_head
KINDS = {
    "plain": AttentionKind(rotary=False),
    "windowed": AttentionKind(windowed=True, rotary=False),
    "rotary": AttentionKind(),
    "normed": AttentionKind(normed="(1 + w) * normalized"),
    "gated": AttentionKind(gated=True, rotary=False),
    "all": AttentionKind(windowed=True, normed="(1 + w) * normalized", gated=True),
    "normed over all heads": AttentionKind(normed="w * normalized", together=True),
}
INV_FREQ = torch.tensor([1.0, 0.1], dtype=torch.float64)  # turns 4 of 6


def made(kind, layer=0):
    torch.manual_seed(0)
    w = nn.Module()
    w.q_proj = nn.Linear(D, (2 if kind.gated else 1) * H * W)
    w.k_proj, w.v_proj, w.o_proj = nn.Linear(D, KV * W), nn.Linear(D, KV * W), nn.Linear(H * W, D)
    w.attention_dropout = 0.0
    rows, norms = kind.rows("this test"), None
    if kind.normed:
        for name in ("q_norm", "k_norm"):
            norm = nn.Module()
            heads = {"q_norm": H, "k_norm": KV}[name] if kind.together else 1
            norm.weight = nn.Parameter(torch.randn(heads * W))
            w.add_module(name, norm)
        w.double()
        made_by = NormOfHeads if kind.together else GemmaNorm
        norms = tuple(made_by(getattr(w, name), rows_of(name, rows), 1e-6) for name in ("q_norm", "k_norm"))
    window = 3 if kind.windowed else None
    return Attention(w.double(), rows, layer, kind, W, window, SimpleNamespace(inv_freq=INV_FREQ), norms)


def literal(part, n):
    """One row at positions 0, 1, ...: out, a pair of positions at a time."""
    w, kind = part.weights, part.kind
    q, k, v = w.q_proj(n), w.k_proj(n).view(-1, KV, W), w.v_proj(n).view(-1, KV, W)
    q = q.view(len(n), H, -1)
    q, gate = q[..., :W], q[..., W:]
    if kind.together:
        q, k = (
            x * norm.weight.view(x.shape[1:]) / (x.pow(2).mean((1, 2), keepdim=True) + 1e-6).sqrt()
            for x, norm in ((q, w.q_norm), (k, w.k_norm))
        )
    elif kind.normed:
        q, k = (
            x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + norm.weight)
            for x, norm in ((q, w.q_norm), (k, w.k_norm))
        )
    if kind.rotary:
        q, k = turned(q), turned(k)
    out = torch.zeros(len(n), H, W, dtype=torch.float64)
    for i in range(len(n)):
        for h in range(H):
            seen = [j for j in range(i + 1) if part.window is None or i - j < part.window]
            scores = torch.stack([q[i, h] @ k[j, h // (H // KV)] for j in seen]) / W**0.5
            for share, j in zip(scores.softmax(0), seen, strict=True):
                out[i, h] = out[i, h] + share * v[j, h // (H // KV)]
    if kind.gated:
        out = out * torch.sigmoid(gate)
    return w.o_proj(out.flatten(1))


def turned(x):
    out = x.clone()
    for t in range(len(x)):
        for j, frequency in enumerate(INV_FREQ):
            angle = t * frequency
            out[t, :, j] = x[t, :, j] * angle.cos() - x[t, :, j + 2] * angle.sin()
            out[t, :, j + 2] = x[t, :, j + 2] * angle.cos() + x[t, :, j] * angle.sin()
    return out


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_its_equation_whole_and_at_every_split(name):
    part = made(KINDS[name])
    n = torch.randn(2, 7, D, dtype=torch.float64)
    want = torch.stack([literal(part, row) for row in n])
    places = torch.arange(7).expand(2, 7)
    torch.testing.assert_close(part(n, DocumentRun(places)), want, atol=1e-12, rtol=0)
    for cut in range(1, 7):
        first = DocumentRun(places[:, :cut], left={})
        part(n[:, :cut], first)
        rest = DocumentRun(places[:, cut:], before=RecurrentState(first.left, torch.full((2,), cut)))
        torch.testing.assert_close(part(n[:, cut:], rest), want[:, cut:], atol=1e-12, rtol=0)
        assert first.left["blocks.0.keys"].shape[1] == (min(cut, 2) if part.window else cut)


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_its_rows_fire_in_order_and_its_matrix_is_its_output(name):
    kind, fired, values = KINDS[name], [], {}
    part = made(kind)
    for place, point in part.named_modules():
        if point.__class__.__name__ == "HookPoint":
            point.name = place
            point.add_hook(lambda x, hook: (fired.append(hook.name), values.update({hook.name: x.clone()}))[0])
    n = torch.randn(2, 5, D, dtype=torch.float64)
    run = DocumentRun(torch.arange(5).expand(2, 5))
    part(n, run)
    assert fired == [row.name for row in kind.rows("this test")]
    sizes = {"batch": 2, "pos": 5, "key_pos": 5, "head": H, "kv_head": KV, "d_head": W, "one": 1}
    for row in kind.rows("this test"):
        assert tuple(values[row.name].shape) == tuple(sizes[dim] for dim in row.dims), row.name
    (factors,) = part.branches(values.__getitem__, run.padding, None)
    o = factors.scan.apply(factors.x) if factors.gate is None else factors.gate * factors.scan.apply(factors.x)
    torch.testing.assert_close(o, factors.o, atol=1e-12, rtol=0)
