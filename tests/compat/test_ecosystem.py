"""docs/ecosystem.md: its code runs, and its table of old nnsight names is true."""

from __future__ import annotations

import linecache
import re

import pytest
import torch
import torch.nn.functional as F

import gatedlens as gl
from gatedlens.compat import transformer_bridge as bridge
from tests.conftest import ROOT
from tests.helpers import example, relative

PAGE = (ROOT / "docs" / "ecosystem.md").read_text()


def test_the_blocks_run_one_after_another():
    pytest.importorskip("nnsight")
    pytest.importorskip("captum")
    scope: dict = {}
    before = torch.is_grad_enabled()
    try:
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", PAGE, re.S)):
            # nnsight reads the source of a `with` block: it must be found under the file's name
            name = f"<ecosystem {number}>"
            linecache.cache[name] = (len(block), None, block.splitlines(keepends=True), name)
            exec(compile(block, name, "exec"), scope)
    finally:
        torch.set_grad_enabled(before)
        bridge.unregister()
    assert scope["attention"].check().relative < 1e-4 and scope["by_decay"].shape[-1] == 16


@torch.no_grad()
def test_the_names_of_the_old_nnsight_model():
    """Each row of the table, recomputed as MambaInterp computed it, is the point that the table names."""
    model = gl.HookedMamba.tiny(seed=0, dtype=torch.float64)
    tokens = example(model)
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: True)
    w, A = model.blocks[1].mixer.weights, model.blocks[1].mixer.A
    xz = F.linear(cache["blocks.1.ln1.hook_out"], w.in_proj.weight)
    x, z = xz.mT.chunk(2, dim=1)
    conv = F.conv1d(x, w.conv1d.weight, w.conv1d.bias, padding=3, groups=32)[..., :7]
    u = F.silu(conv)
    dt, B, C = F.linear(u.mT, w.x_proj.weight).split([1, 4, 4], dim=-1)
    dt = F.linear(dt, w.dt_proj.weight, w.dt_proj.bias).mT
    delta = F.softplus(dt)
    disc_A = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    disc_B = torch.einsum("bdl,bln->bdln", delta, B)
    h, states, reads = torch.zeros(2, 32, 4, dtype=torch.float64), [], []
    for t in range(7):
        h = disc_A[:, :, t] * h + disc_B[:, :, t] * u[:, :, t, None]
        states.append(h)
        reads.append(torch.einsum("bdn,bn->bd", h, C[:, t]))
    scan = torch.stack(reads, 2)
    gated = (scan + u * w.D[:, None]) * F.silu(z)
    old = {
        "hook_x": x, "hook_gate_pre": z, "hook_conv": conv, "hook_u": u, "hook_dt_pre": dt, "hook_dt": delta,
        "hook_B": B.mT, "hook_C": C.mT, "hook_decay": disc_A, "hook_B_bar": disc_B, "hook_state": torch.stack(states, 2),
        "hook_write": disc_B * u[..., None], "hook_scan": scan, "hook_gated": gated,
        "hook_mixer_out": F.linear(gated.mT, w.out_proj.weight).mT,
    }  # fmt: skip
    table = PAGE.split("| MambaInterp |")[1].split("\n## ")[0]
    named = set(re.findall(r"hook_[A-Za-z_]+", table))
    assert named == set(old), "a row without a truth, or a truth without a row"
    for name, value in old.items():
        full = name if name in ("hook_B_bar", "hook_mixer_out") else f"mixer.{name}"
        assert relative(value.transpose(1, 2), cache[f"blocks.1.{full}"]) < 1e-10, name


def test_every_library_has_its_section():
    for library in ("TransformerLens", "nnsight", "MambaLens", "SAELens", "captum", "circuitsvis", "einops, jaxtyping"):
        assert f"\n## {library}\n" in PAGE
