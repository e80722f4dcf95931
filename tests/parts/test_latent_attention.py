"""Latent attention against its equation in loops, and against transformers' own modules."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from gatedlens.model.hookpoint import rows_of
from gatedlens.model.norm import Norm
from gatedlens.model.padding import Padding
from gatedlens.model.run import DocumentRun
from gatedlens.model.state import RecurrentState
from gatedlens.parts.latent_attention import LatentAttention, LatentKind

D, H, OWN, SHARED, V, R, RQ = (
    8,
    3,
    4,
    2,
    5,
    6,
    7,
)  # d_model, heads, a key's own part and its shared one, values, latents
KINDS = {
    "plain": LatentKind(rotary=False),
    "rotary": LatentKind(),
    "pairs": LatentKind(pairs=True),
    "narrow q": LatentKind(rotary=False, narrow_q=True),
    "all": LatentKind(pairs=True, narrow_q=True),
}
INV_FREQ = torch.tensor([0.7], dtype=torch.float64)


def made(kind):
    """Transformers' own module by its names, in float64, and the open part over it."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        hidden_size=D, num_attention_heads=H, num_key_value_heads=H, q_lora_rank=RQ if kind.narrow_q else None,
        kv_lora_rank=R, qk_rope_head_dim=SHARED, qk_nope_head_dim=OWN, v_head_dim=V, attention_bias=True,
        rope_interleave=kind.pairs, attn_implementation="eager", rope_theta=50.0,
    )  # fmt: skip
    w = DeepseekV3Attention(config, 0).double().eval()
    with torch.no_grad():
        for p in w.parameters():
            p.copy_(torch.randn_like(p) * (0.5 if p.ndim > 1 else 1))
    rows = kind.rows()
    norms = (
        Norm(w.q_a_layernorm, rows_of("q_norm", rows), 1e-6) if kind.narrow_q else None,
        Norm(w.kv_a_layernorm, rows_of("kv_norm", rows), 1e-6),
    )
    return LatentAttention(w, rows, 0, kind, V, norms, SimpleNamespace(inv_freq=INV_FREQ)), config


def rms(x, weight):
    return weight * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


def turned(x, t, pairs):
    """A vector of `SHARED` numbers turned by its position."""
    out, half = x.clone(), SHARED // 2
    for j, frequency in enumerate(INV_FREQ):
        angle = t * frequency
        one, two = (x[2 * j], x[2 * j + 1]) if pairs else (x[j], x[j + half])
        out[j], out[j + half] = one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()
    return out


def literal(part, n):
    """One row at positions 0, 1, ...: (out, pattern), a pair of positions at a time."""
    w, kind = part.weights, part.kind
    q = w.q_b_proj(rms(w.q_a_proj(n), w.q_a_layernorm.weight)) if kind.narrow_q else w.q_proj(n)
    q = q.view(len(n), H, OWN + SHARED).clone()
    both = w.kv_a_proj_with_mqa(n)
    latent, shared = both[:, :R], both[:, R:].clone()
    kv = w.kv_b_proj(rms(latent, w.kv_a_layernorm.weight)).view(len(n), H, OWN + V)
    if kind.rotary:
        for t in range(len(n)):
            shared[t] = turned(shared[t], t, kind.pairs)
            for h in range(H):
                q[t, h, OWN:] = turned(q[t, h, OWN:], t, kind.pairs)
    z = torch.zeros(len(n), H, V, dtype=torch.float64)
    pattern = torch.zeros(H, len(n), len(n), dtype=torch.float64)
    for i in range(len(n)):
        for h in range(H):
            scores = torch.stack([q[i, h] @ torch.cat([kv[j, h, :OWN], shared[j]]) for j in range(i + 1)])
            pattern[h, i, : i + 1] = (scores / (OWN + SHARED) ** 0.5).softmax(0)
            for j in range(i + 1):
                z[i, h] += pattern[h, i, j] * kv[j, h, OWN:]
    return w.o_proj(z.flatten(1)), pattern


@pytest.fixture(params=list(KINDS))
def part(request):
    return made(KINDS[request.param])[0]


def run_of(length, batch=1, **options):
    return DocumentRun(torch.arange(length).expand(batch, -1), **options)


@torch.no_grad()
def test_it_is_its_equation(part):
    n = torch.randn(2, 7, D, dtype=torch.float64)
    out = part(n, run_of(7, 2))
    for row in range(2):
        torch.testing.assert_close(out[row], literal(part, n[row])[0], rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["rotary", "pairs", "all"])
def test_it_is_what_transformers_computes(kind):
    part, config = made(KINDS[kind])
    rotary = DeepseekV3RotaryEmbedding(config)
    part.__dict__["rotary"] = rotary
    n = torch.randn(1, 6, D, dtype=torch.float64)
    angles = rotary(n, torch.arange(6).unsqueeze(0))
    mask = torch.full((6, 6), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    theirs = part.weights(n, angles, mask)[0]
    # transformers takes cos and sin, and the softmax, in float32
    torch.testing.assert_close(part(n, run_of(6)), theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_every_point_is_its_equation(part):
    n, got = torch.randn(1, 5, D, dtype=torch.float64), {}
    fired = []
    for row in part.kind.rows():
        name = row.name
        point = part.get_submodule(name)
        point.add_hook(lambda x, hook, name=name: (fired.append(name), got.__setitem__(name, x.clone()))[0] and None)
    out = part(n, run_of(5))
    w, kind = part.weights, part.kind
    assert fired == [row.name for row in part.kind.rows()]
    literal_out, pattern = literal(part, n[0])
    torch.testing.assert_close(out[0], literal_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got["hook_pattern"][0], pattern, rtol=1e-12, atol=1e-12)
    both = w.kv_a_proj_with_mqa(n)
    torch.testing.assert_close(got["hook_kv_latent"], both[..., :R], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got["hook_k_shared"], both[..., R:], rtol=1e-12, atol=1e-12)
    kv = w.kv_b_proj(got["kv_norm.hook_out"]).view(1, 5, H, OWN + V)
    torch.testing.assert_close(got["hook_k"][..., :OWN], kv[..., :OWN], rtol=1e-12, atol=1e-12)
    shared = got["hook_rot_k_shared" if kind.rotary else "hook_k_shared"]
    torch.testing.assert_close(got["hook_k"][..., OWN:], shared[:, :, None].expand(-1, -1, H, -1), rtol=0, atol=0)
    torch.testing.assert_close(got["hook_v"], kv[..., OWN:], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_it_goes_on_from_a_state_and_passes_over_padding(part):
    n = torch.randn(1, 6, D, dtype=torch.float64)
    whole = part(n, run_of(6))
    first = run_of(4, left={})
    out = part(n[:, :4], first)
    state = RecurrentState(first.left, torch.tensor([4]), "this test")
    rest = part(n[:, 4:], DocumentRun(torch.tensor([[4, 5]]), before=state))
    torch.testing.assert_close(torch.cat([out, rest], 1), whole, rtol=1e-12, atol=1e-12)
    mask = torch.tensor([[False, True, True, False, True, True]])
    padding = Padding.of(mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    some = part(n, DocumentRun(positions, padding))
    alone = part(n[:, mask[0]], run_of(4))
    torch.testing.assert_close(some[:, mask[0]], alone, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_the_implicit_attention_is_its_pattern(part):
    n, got = torch.randn(2, 5, D, dtype=torch.float64), {}
    for name in part.attention_points:
        getattr(part, name).add_hook(lambda x, hook, name=name: got.__setitem__(name, x.clone()))
    part(n, run_of(5, 2))
    (factors,) = part.branches(lambda name: got[name], Padding(), None)
    dense = got["hook_pattern"].repeat_interleave(V, dim=1)  # batch channel dst src
    torch.testing.assert_close(torch.einsum("bcij,bjc->bic", dense, factors.x), factors.o, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_an_edit_of_the_shared_key_reaches_every_head(part):
    name = "hook_rot_k_shared" if part.kind.rotary else "hook_k_shared"
    n, got = torch.randn(1, 5, D, dtype=torch.float64), {}
    point = getattr(part, name)
    part.hook_k.add_hook(lambda x, hook: got.__setitem__("k", x.clone()))
    point.add_hook(lambda x, hook: torch.full_like(x, 3.0))
    part(n, run_of(5))
    assert (got["k"][..., OWN:] == 3).all()
