"""The first Zamba: every row against its literal equation; transformers in true float64 and where it is wrong; padding,
documents."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import gatedlens as gl
from gatedlens.hooks.zamba import HookedZamba
from gatedlens.recurrence.decay_matrix import DecayScan
from gatedlens.recurrence.literal import literal_states
from gatedlens.recurrence.side_by_side import SideBySide
from tests.helpers import relative
from tests.hooks import battery
from tests.hooks import literal as literally

TOKENS = torch.randint(40, (2, 11), generator=torch.Generator().manual_seed(0))
SHARING = {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]}
VARIANTS = {
    "tiny": SHARING,
    "biases, four groups": {**SHARING, "mamba_proj_bias": True, "n_mamba_heads": 4, "num_key_value_heads": 4},
    "one group, no bias of the conv": {
        "num_hidden_layers": 3, "n_mamba_heads": 1, "mamba_conv_bias": False, "mamba_d_conv": 2,
        "layers_block_type": ["hybrid", "linear_attention", "hybrid"],
    },
}  # fmt: skip


def tiny(variant: str = "tiny", dtype: torch.dtype = torch.float64, **sizes) -> HookedZamba:
    return HookedZamba.tiny(seed=1, dtype=dtype, **VARIANTS[variant], **sizes)


@pytest.fixture(params=VARIANTS)
def model(request):
    return tiny(request.param)


def literal(cache, model, layer: int) -> dict[str, torch.Tensor]:
    """Every row of one block from its equation, with loops, reading the rows it names from the cache."""
    out, w, cfg = {}, model.wrapped.model.layers[layer], model.cfg

    def c(name):
        return cache[f"blocks.{layer}.{name}"]

    decoder = w._modules.get("mamba_decoder", w)
    if decoder is not w:
        inner, shared = {}, w.shared_transf

        def within(name):
            return c(f"shared.{name}")

        inner["hook_read"], inner["hook_embed"] = c("hook_resid_pre"), cache["resid_pre", 0]
        inner["hook_in"] = torch.cat([within("hook_read"), within("hook_embed")], -1)
        literally.norm_rows(inner, within, "ln1", within("hook_in"), shared.input_layernorm.weight, cfg.eps)
        scores = (cfg.d_head / 2) ** -0.5
        literally.attention(inner, within, shared.self_attn, within("ln1.hook_out"), cfg.d_head, scores=scores)
        inner["hook_attn_out"] = literally.linear(within("attn.hook_z").flatten(2), shared.self_attn.o_proj)
        literally.norm_rows(inner, within, "ln2", within("hook_attn_out"), shared.pre_ff_layernorm.weight, cfg.eps)
        mlp, read = shared.feed_forward, within("ln2.hook_out")
        inner["mlp.hook_pre"], inner["mlp.hook_pre_linear"] = (
            literally.linear(read, mlp.gate_proj),
            literally.linear(read, mlp.up_proj),
        )
        pre = within("mlp.hook_pre")
        inner["mlp.hook_post"] = pre * (1 + torch.erf(pre / 2**0.5)) / 2 * within("mlp.hook_pre_linear")
        inner["hook_out"] = literally.linear(literally.linear(within("mlp.hook_post"), mlp.down_proj), w.linear)
        out |= {f"shared.{name}": value for name, value in inner.items()}
    literally.around(out, c, cache, layer, (("mixer",),))
    literally.norm_rows(out, c, "ln1", c("hook_mixer_in"), decoder.input_layernorm.weight, cfg.eps)
    mamba(out, c, decoder.mamba)
    return out


def mamba(out, c, m) -> None:
    """Mamba's mixer, a group of channels at a time, and a position at a time."""
    batch, length = TOKENS.shape
    given = literally.linear(c("ln1.hook_out"), m.in_proj)
    G, width, N = m.A_log.shape
    R, channels = m.dt_proj_weight.shape[2], G * width
    out["mixer.hook_x"] = torch.stack([given[..., 2 * i] for i in range(channels)], -1)
    out["mixer.hook_gate_pre"] = torch.stack([given[..., 2 * i + 1] for i in range(channels)], -1)
    out["mixer.hook_conv_taps"] = literally.conv_taps(c("mixer.hook_x"), m.conv1d.weight)
    out["mixer.hook_conv"] = c("mixer.hook_conv_taps").sum(-1) + (0 if m.conv1d.bias is None else m.conv1d.bias)
    out["mixer.hook_u"] = literally.silu(c("mixer.hook_conv"))
    ranks, Bs, Cs, pres, decays, writes, reads = [], [], [], [], [], [], []
    for g in range(G):
        own = slice(g * width, (g + 1) * width)
        selected = c("mixer.hook_u")[..., own] @ m.x_proj_weight[g].T
        ranks.append(selected[..., :R]), Bs.append(selected[..., R : R + N]), Cs.append(selected[..., R + N :])
        pres.append(c("mixer.hook_dt_rank")[:, :, g] @ m.dt_proj_weight[g].T + m.dt_proj_bias[g])
        dt = c("mixer.hook_dt")[..., own, None]
        kept = 1 - c("mixer.hook_reset")[..., None]
        decays.append(torch.exp(dt * -torch.exp(m.A_log[g])) * kept)
        writes.append(dt * c("mixer.hook_B")[:, :, g, None] * c("mixer.hook_u")[..., own, None])
        reads.append((c("mixer.hook_state")[:, :, own] * c("mixer.hook_C")[:, :, g, None]).sum(-1))
    for name, found in (("dt_rank", ranks), ("B", Bs), ("C", Cs)):
        out[f"mixer.hook_{name}"] = torch.stack(found, 2)
    out["mixer.hook_dt_pre"] = torch.cat(pres, -1)
    out["mixer.hook_dt"] = torch.log1p(torch.exp(c("mixer.hook_dt_pre")))
    out["mixer.hook_reset"] = torch.zeros(batch, length, 1, dtype=torch.float64)
    out["mixer.hook_state_start"] = torch.zeros(batch, channels, N, dtype=torch.float64)
    out["mixer.hook_decay"], out["mixer.hook_write"] = torch.cat(decays, 2), torch.cat(writes, 2)
    states = []
    for t in range(length):
        before = c("mixer.hook_state")[:, t - 1] if t else c("mixer.hook_state_start")
        states.append(c("mixer.hook_decay")[:, t] * before + c("mixer.hook_write")[:, t])
    out["mixer.hook_state"] = torch.stack(states, 1)
    out["mixer.hook_scan"] = torch.cat(reads, -1)
    out["mixer.hook_y"] = c("mixer.hook_scan") + m.D.flatten() * c("mixer.hook_u")
    out["mixer.hook_gate"] = literally.silu(c("mixer.hook_gate_pre"))
    out["mixer.hook_gated"] = c("mixer.hook_y") * c("mixer.hook_gate")
    out["hook_mixer_out"] = literally.linear(c("mixer.hook_gated"), m.out_proj)


def test_every_row_is_its_equation(model):
    battery.rows_are_their_equations(model, literal, TOKENS)


@pytest.mark.parametrize("layer", [0, 1], ids=["Mamba", "behind a shared block"])
def test_after_an_edit_every_row_downstream_is_its_equation(layer):
    battery.edits_reach_every_row(tiny(), literal, layer, TOKENS)


def test_kinds_are_all_that_stand_in_a_model():
    assert {kind for variant in VARIANTS for kind in tiny(variant).cfg.kinds} == set(HookedZamba.kinds())


@torch.no_grad()
def test_logits_are_transformers_in_true_float64(model):
    with battery.true_float64():
        want = model.wrapped(TOKENS, use_cache=False).logits
    assert relative(model(TOKENS), want) < 1e-12


def test_gradients_are_transformers():
    battery.gradients_are_transformers(tiny(dtype=torch.float32), TOKENS)


@torch.no_grad()
def test_half_precision_is_as_close_as_transformers_is():
    model = tiny(dtype=torch.bfloat16)
    theirs = model.wrapped(TOKENS, use_cache=False).logits
    battery.half_precision_is_as_close_as_transformers_is(tiny(dtype=torch.float32), model, theirs, TOKENS)


@torch.no_grad()
def test_a_saved_folder_is_opened(tmp_path):
    given = tiny(dtype=torch.float32)
    given.wrapped.save_pretrained(tmp_path)
    model = gl.from_pretrained(tmp_path, device="cpu")
    assert isinstance(model, HookedZamba) and relative(model(TOKENS), given(TOKENS)) < 1e-6
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if "x_proj_weight" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(gl.CheckpointError, match="is missing"):
        gl.from_pretrained(tmp_path, device="cpu")


def test_what_is_not_supported_is_named():
    with pytest.raises(gl.CheckpointError, match="hidden_act is 'relu'; expected is 'gelu'"):
        tiny(hidden_act="relu")
    with pytest.raises(gl.CheckpointError, match="hidden_mamba_act is 'gelu'; expected is 'silu' or 'swish'"):
        tiny(hidden_mamba_act="gelu")


def test_the_implicit_attention_reconstructs_every_layer(model):
    battery.attention_reconstructs_every_layer(model, TOKENS)


@torch.no_grad()
def test_groups_side_by_side_are_one_scan():
    """Of terms with groups: what a head for each channel makes of them, in every view; some channels in any order."""
    model = tiny("biases, four groups")
    _, cache = model.run_with_cache(TOKENS)
    A = gl.implicit_attention(cache, layer=0)
    scan = A.factors.scan
    assert isinstance(scan, SideBySide) and all(isinstance(part, DecayScan) for part in scan.parts)
    dense = A.dense()
    for some in ([0], [31, 3, 9], list(range(31, -1, -2))):
        assert torch.allclose(A.select(some).dense(), dense[:, some], atol=1e-13)
        assert A.select(some).check().relative < 1e-11
    assert torch.allclose(A.mean(), dense.mean(1), atol=1e-13)
    assert torch.allclose(A.abs_mean(), dense.abs().mean(1), atol=1e-13)
    terms, u = scan.recurrence(), A.branches[0].x
    states = literal_states(terms, u.unsqueeze(-1), torch.zeros(2, 32, 1, 4, dtype=torch.float64))
    want = (states.squeeze(3) * terms.read).sum(-1)
    assert relative(scan.apply(u), want) < 1e-12
    for own in (gl.profiles.rewrite(cache, layer=0).relative, gl.profiles.decay_half_life(cache, layer=0)):
        assert own.shape[-1] in (32, 4) and not own[:, 1:].isnan().all()


@torch.no_grad()
@pytest.mark.parametrize("listening", [False, True], ids=["", "inside"])
def test_padding_and_holes_count_for_nothing(model, listening):
    battery.padding_and_holes_count_for_nothing(model, TOKENS, listening)


@torch.no_grad()
@pytest.mark.parametrize("listening", [False, True], ids=["", "inside"])
def test_packed_documents_are_as_if_each_stood_alone(model, listening):
    battery.packed_documents_stand_alone(model, TOKENS, listening)


def test_every_split_continues(model):
    battery.every_split_continues(model, TOKENS)


def test_generation_is_that_of_the_whole_prompt():
    battery.generation_is_that_of_the_whole_prompt(tiny(), TOKENS)
