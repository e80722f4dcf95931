"""The fused kernels: where they run, where they must not, and that what goes in and out of them is what they document.

A CPU has no CUDA kernels, so functions with mamba-ssm's signatures, layouts and limits, written from its documentation,
stand in for them; with a GPU and the packages the real ones are compared too.
"""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import gatedlens as gl
from gatedlens import fused
from tests.helpers import example, relative


class Stand:
    """mamba-ssm's functions on a CPU; `calls` counts them."""

    def __init__(self):
        self.calls = {"scan": 0, "inner": 0}

    def scan(self, u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
        self.calls["scan"] += 1
        assert u.stride(-1) == 1 and A.dtype == torch.float32 and u.dtype == delta.dtype
        return self.literal(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)

    def literal(self, u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, last=False):
        """[b, c, l] in and out; one position after the other, from a zero state."""
        dt = delta.float() + (0 if delta_bias is None else delta_bias.unsqueeze(-1))
        dt = F.softplus(dt) if delta_softplus else dt
        state, out = torch.zeros(len(u), *A.shape), []
        for t in range(u.shape[2]):
            write = (dt[:, :, t] * u[:, :, t].float()).unsqueeze(-1) * B[:, :, t].unsqueeze(1)
            state = torch.exp(dt[:, :, t].unsqueeze(-1) * A) * state + write
            out.append((state * C[:, :, t].unsqueeze(1)).sum(-1))
        y = torch.stack(out, -1) + (0 if D is None else D.unsqueeze(-1) * u)
        y = (y if z is None else y * F.silu(z)).to(u.dtype)
        return (y, state.detach()) if last else y

    def inner(
        self, xz, conv, bias, x_proj, dt_proj, out_proj, out_bias, A, B=None, C=None, D=None, delta_bias=None,
        delta_softplus=True,
    ):  # fmt: skip
        self.calls["inner"] += 1
        assert B is None and C is None and D.dtype == delta_bias.dtype == torch.float32
        x, z = xz.chunk(2, dim=1)
        c = F.conv1d(F.pad(x, (conv.shape[-1] - 1, 0)), conv, bias, groups=len(conv))
        u = F.silu(c)
        r, n = dt_proj.shape[1], A.shape[1]
        dt, B, C = (x_proj @ u).split([r, n, n], dim=1)
        y = self.literal(u, dt_proj @ dt, A, B, C, D, z, delta_bias, delta_softplus)
        return F.linear(y.mT, out_proj, out_bias)


@pytest.fixture
def stand(monkeypatch):
    stand = Stand()
    monkeypatch.setattr(fused, "DEVICES", ("cpu",))
    monkeypatch.setattr(fused, "kernels", lambda: fused.Kernels(stand.scan, stand.inner))
    return stand


@pytest.fixture
def mamba():
    return gl.HookedMamba.tiny(seed=0)


def test_a_forward_that_nobody_watches_is_one_kernel_a_layer(stand, mamba):
    tokens = example(mamba)
    out = mamba(tokens)
    assert stand.calls == {"scan": 0, "inner": 2}
    with fused.off():
        own = mamba(tokens)
    assert stand.calls["inner"] == 2 and relative(out, own) < 1e-5


def test_a_norm_that_nobody_watches_is_one_kernel(stand, mamba, monkeypatch):
    seen, norm = [], F.rms_norm
    monkeypatch.setattr(F, "rms_norm", lambda *a: seen.append(a) or norm(*a))
    tokens = example(mamba)
    out = mamba.run_with_hooks(tokens, fwd_hooks=[("blocks.0.ln1.hook_scale", lambda x, hook: None)])
    assert len(seen) == 2, "layer 1's and the final one's"
    with fused.off():
        assert relative(out, mamba(tokens)) < 1e-5 and len(seen) == 2


def test_gradients_agree(stand, mamba):
    tokens, found = example(mamba), {}
    for road in ("fused", "own"):
        mamba.wrapped.zero_grad()
        with fused.off() if road == "own" else torch.enable_grad():
            mamba(tokens, return_type="loss").backward()
        found[road] = {name: p.grad.clone() for name, p in mamba.wrapped.named_parameters()}
    assert all(relative(found["fused"][name], found["own"][name]) < 1e-4 for name in found["own"])


def test_a_listener_at_an_eager_point_leaves_the_scan_fused(stand, mamba):
    tokens = example(mamba)
    out, cache = mamba.run_with_cache(tokens)
    assert stand.calls == {"scan": 2, "inner": 0}
    with fused.off():
        own, own_cache = mamba.run_with_cache(tokens)
    assert relative(out, own) < 1e-5 and relative(cache["scan", 1], own_cache["scan", 1]) < 1e-5


@pytest.mark.parametrize("name", ["hook_decay", "hook_write", "hook_state", "hook_state_start"])
def test_a_listener_inside_the_recurrence_gets_our_own(stand, mamba, name):
    mamba.run_with_cache(example(mamba), names_filter=f"blocks.0.mixer.{name}")
    assert stand.calls == {"scan": 0, "inner": 1}, "layer 1 has no listener"


def test_an_edit_still_takes_effect(stand, mamba):
    tokens = example(mamba)
    hook = ("blocks.1.mixer.hook_dt", lambda dt, hook: dt * 0)
    edited = mamba.run_with_hooks(tokens, fwd_hooks=[hook])
    with fused.off():
        assert relative(edited, mamba.run_with_hooks(tokens, fwd_hooks=[hook])) < 1e-5
    assert stand.calls == {"scan": 1, "inner": 1}


def test_states_and_padding(stand, mamba):
    tokens = example(mamba, pos=9)
    with torch.no_grad():
        whole = mamba(tokens)
        _, state = mamba(tokens[:, :4], return_state=True)
        assert stand.calls == {"scan": 2, "inner": 2}, "the state comes from the scan's kernel"
        assert relative(mamba(tokens[:, 4:], state=state), whole[:, 4:]) < 1e-5
        assert stand.calls == {"scan": 2, "inner": 2}, "the kernels start from zero: a carried state is ours"
        mask = torch.ones_like(tokens, dtype=torch.bool)
        mask[0, :3] = False
        out = mamba(tokens, attention_mask=mask)
        assert stand.calls == {"scan": 4, "inner": 2}
        assert relative(out[:1, 3:], mamba(tokens[:1, 3:])) < 1e-5


def test_gradients_through_a_state_are_ours(stand, mamba):
    _, state = mamba(example(mamba), return_state=True)
    assert stand.calls == {"scan": 0, "inner": 0}
    assert all(state["scan", layer].requires_grad for layer in range(2))


def test_what_the_kernels_cannot_do_is_ours(stand):
    for model in (gl.HookedMamba.tiny(dtype=torch.float64), gl.HookedMamba.tiny(ssm_cfg={"d_state": 4, "d_conv": 5})):
        model(example(model))
    assert stand.calls == {"scan": 2, "inner": 0}, "float64 not at all; five taps the scan alone"
    model = gl.HookedMamba.tiny()
    torch.func.vmap(lambda resid: model(resid.unsqueeze(0), start_at_layer=2), randomness="error")(
        torch.randn(2, 3, 16)
    )
    assert stand.calls == {"scan": 2, "inner": 0}


def test_vision_mamba_scans_both_ways_in_the_kernel(stand):
    model = gl.HookedViM.tiny(seed=0)
    images = example(model).float()
    with torch.no_grad():
        out = model(images)
        assert stand.calls["scan"] == 2 * model.cfg.n_layers
        with fused.off():
            assert relative(out, model(images)) < 1e-5


def test_without_the_packages_one_line_says_so(monkeypatch, caplog):
    monkeypatch.setattr(fused, "DEVICES", ("cpu",))
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", None)
    fused.kernels.cache_clear()
    model = gl.HookedMamba.tiny()
    with caplog.at_level(logging.WARNING, "gatedlens"):
        model(example(model))
        model(example(model))
    fused.kernels.cache_clear()
    assert len(caplog.records) == 1 and "pip install 'gatedlens[cuda]'" in caplog.text


def test_a_cpu_never_imports_them():
    code = (
        "import sys, torch, gatedlens as gl\nm = gl.HookedMamba.tiny()\nm(torch.tensor([[1, 2, 3]]))\n"
        "print('mamba_ssm' in sys.modules, gl.hooks.mamba.fused.kernels.cache_info().misses)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "0"], done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_real_kernels_agree_on_a_gpu(dtype):
    pytest.importorskip("mamba_ssm", reason="mamba-ssm is not installed (pip install 'gatedlens[cuda]')")
    model = gl.HookedMamba.tiny(seed=0, d_model=64, n_layer=4, ssm_cfg={"d_state": 16}).to(dtype).cuda()
    tokens = example(model, pos=300).cuda()
    mamba_out = model(tokens)
    with fused.off():
        own = model(tokens)
    assert relative(mamba_out, own) < (1e-4 if dtype == torch.float32 else 5e-2)
