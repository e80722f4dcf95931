"""Implicit attention: exact reconstruction, the literal triple loop, the frozen Jacobian, factors, padding, errors."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import gatedlens as gl
from gatedlens.hooks.mamba import HookedMamba
from gatedlens.recurrence.decay_matrix import DecayScan, blocks
from tests.helpers import at_real, example, padded, relative

LENGTH = 11
CASES = ["plain", "state", "left", "right", "holes+state"]


def cached(model, case: str, seed: int = 0):
    """The cache of one run of the kind `case`."""
    tokens, options = example(model, 2, LENGTH, seed), {}
    if not isinstance(model, gl.HookedLanguageModel) and case != "plain":
        pytest.skip("images have neither states nor padding")
    if "state" in case:
        _, options["state"] = model(example(model, 2, 4, seed + 1), return_state=True)
    if case in ("left", "right"):
        tokens, options["attention_mask"] = padded([tokens[0], tokens[1, :5]], case)
    if "holes" in case:
        mask = torch.ones(2, LENGTH, dtype=torch.bool)
        mask[0, [0, 3, 4]] = mask[1, [2, 9, 10]] = False
        options["attention_mask"] = mask
    return model.run_with_cache(tokens, **options)[1]


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@torch.no_grad()
def test_attention_and_remainder_are_the_layers_output(model, case):
    cache = cached(model, case)
    for layer in range(model.cfg.n_layers):
        check = gl.implicit_attention(cache, layer=layer).check()
        assert check.relative < 1e-10 and check.absolute < 1e-10


@torch.no_grad()
def test_in_float32_to_float32_rounding(model):
    single = copy.deepcopy(model).to(torch.float32)
    cache = cached(single, "plain")
    for layer in range(single.cfg.n_layers):
        assert gl.implicit_attention(cache, layer=layer).check().relative < 1e-5


VARIANTS = {
    "all": lambda A: A,
    "without skip": lambda A: A.without("skip"),
    "scan": lambda A: A.only("scan"),
    "no act": lambda A: A.only("skip", "conv"),
    "unified": lambda A: A.paper("unified"),
    "hidden": lambda A: A.paper("hidden"),
    "no scan": lambda A: A.without("scan"),
}


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_view_of_the_operator_is_the_dense_matrix(model, case, variant):
    cache = cached(model, case)
    for layer in {1, model.cfg.n_layers - 1}:
        check_views(VARIANTS[variant](gl.implicit_attention(cache, layer=layer)))


def check_views(A):
    dense = A.dense()
    batch, length, channels = A.shape
    assert dense.shape == (batch, channels, length, length)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, channels, generator=generator, dtype=torch.float64)
    weights = torch.randn(channels, generator=generator, dtype=torch.float64)
    pairs = {
        "@ x": (A @ x, torch.einsum("bcij,bjc->bic", dense, x)),
        "T @ g": (A.T @ x, torch.einsum("bcij,bic->bjc", dense, x)),
        "T.dense": (A.T.dense(), dense.mT),
        "mean": (A.mean(), dense.mean(1)),
        "abs_mean": (A.abs_mean(), dense.abs().mean(1)),
        "weighted": (A.weighted(weights), torch.einsum("bcij,c->bij", dense, weights)),
        "channels": (A.dense(channels=[3, -1]), dense[:, [3, -1]]),
        **{f"row {i}": (A.row(i), at_real(dense, A.padding.mask, i, 2)) for i in (0, 4, -1)},
        **{f"column {j}": (A.column(j), at_real(dense, A.padding.mask, j, 3)) for j in (0, 4, -1)},
    }
    for name, (got, want) in pairs.items():
        assert torch.allclose(got, want, rtol=0, atol=1e-12 * max(1.0, dense.abs().max().item())), name
    if not any(branch.reverse for branch in A.branches):
        assert torch.equal(dense, dense.tril())


@torch.no_grad()
def test_masked_rows_and_columns_are_zero(lm):
    for side in ("left", "right"):
        cache = cached(lm, side)
        dense = gl.implicit_attention(cache, layer=0).dense()
        out = ~cache.mask
        assert dense.transpose(1, 2)[out].abs().max() == 0 and dense.permute(0, 3, 1, 2)[out].abs().max() == 0


def test_mamba_against_the_literal_triple_loop():
    """UIA eq. 9 with D and bias, one number at a time: o = G (S + D) Z M x + G (S + D) Z b."""
    model = HookedMamba.tiny(dtype=torch.float64)
    with torch.no_grad():
        cache = cached(model, "plain")
    A = gl.implicit_attention(cache, layer=1)
    w = model.wrapped.backbone.layers[1].mixer
    dt, B, C, gate, c = (cache[name, 1] for name in ("dt", "B", "C", "gate", "conv"))
    rate = -torch.exp(w.A_log)
    for d in (0, 17):
        S = torch.zeros(2, LENGTH, LENGTH, dtype=torch.float64)
        M = torch.zeros(LENGTH, LENGTH, dtype=torch.float64)
        for i in range(LENGTH):
            for j in range(i + 1):
                decay = torch.exp(rate[d] * dt[:, j + 1 : i + 1, d].sum(1, keepdim=True))
                S[:, i, j] = (C[:, i] * decay * dt[:, j, d, None] * B[:, j]).sum(-1)
                if i - j < 4:
                    M[i, j] = w.conv1d.weight[d, 0, 3 - (i - j)]
        SD = S + w.D[d] * torch.eye(LENGTH, dtype=torch.float64)
        Z = torch.diag_embed(torch.sigmoid(c[:, :, d]))
        whole = torch.diag_embed(gate[:, :, d]) @ SD @ Z
        assert relative(A.dense(channels=d)[:, 0], whole @ M) < 1e-12
        assert relative(A.bias[:, :, d], (whole @ w.conv1d.bias[d].expand(2, LENGTH, 1)).squeeze(-1)) < 1e-12
        assert relative(A.only("scan").dense(channels=d)[:, 0], S) < 1e-12


MAMBA = ("hook_gate", "hook_dt", "hook_B", "hook_C")
RWKV7 = tuple(f"hook_{name}" for name in ("gate", "scale", "bonus", "log_decay", "kk", "a", "k", "r"))
RWKV6 = tuple(f"hook_{name}" for name in ("gate", "scale", "bonus", "log_decay", "k", "r"))
GRIFFIN = ("hook_gate", "hook_input_gate", "hook_log_decay", "hook_multiplier", "hook_reset")
DELTA = ("hook_gate", "hook_q", "hook_k", "hook_beta", "hook_log_decay", "hook_scale")
# place -> (the input x, the output o, the points held fixed, the (input, output) of SiLUs whose sigmoid is held fixed)
MAMBA3 = tuple(f"hook_{name}" for name in ("gate", "log_decay", "gamma", "beta", "rot_B", "rot_C"))
FROZEN = {
    "mamba": {"mixer": ("hook_x", "hook_gated", MAMBA, (("hook_conv", "hook_u"),))},
    "mamba2": {"mixer": ("hook_x", "hook_gated", (*MAMBA, "hook_scale"), (("hook_conv", "hook_u"),))},
    "mamba3": {"mixer": ("hook_x", "hook_gated", MAMBA3, ())},
    "jamba": {
        "mixer": ("hook_x", "hook_gated", MAMBA, (("hook_conv", "hook_u"),)),
        "attn": ("hook_v", "hook_z", ("hook_pattern",), ()),
    },
    "mamba2_hybrid": {
        "mixer": ("hook_x", "hook_gated", (*MAMBA, "hook_scale"), (("hook_conv", "hook_u"),)),
        "attn": ("hook_v", "hook_z", ("hook_pattern",), ()),
    },
    "zamba": {"mixer": ("hook_x", "hook_gated", MAMBA, (("hook_conv", "hook_u"),))},
    "minimax": {
        "mixer": ("hook_x", "hook_gated", DELTA, (("hook_x", "hook_u"),)),
        "attn": ("hook_v", "hook_z", ("hook_pattern",), ()),
    },
    "mamba_ssm_hybrid": {
        "mixer": ("hook_x", "hook_gated", (*MAMBA, "hook_scale"), (("hook_conv", "hook_u"),)),
        "attn": ("hook_v", "hook_z", ("hook_pattern",), ()),
    },
    "fla": {
        "mixer": ("hook_x", "hook_gated", DELTA, (("hook_conv", "hook_u"),)),
        "attn": ("hook_v", "hook_z", ("hook_pattern",), ()),
    },
    "griffin": {"mixer": ("hook_x", "hook_gated", GRIFFIN, ()), "attn": ("hook_v", "hook_z", ("hook_pattern",), ())},
    "bailing_hybrid": {
        "mixer": ("hook_x", "hook_gated", DELTA, (("hook_conv", "hook_u"),)),
        "attn": ("hook_v", "hook_gated", ("hook_pattern", "hook_gate"), ()),
    },
    "kimi_linear": {
        "mixer": ("hook_x", "hook_gated", DELTA, (("hook_conv", "hook_u"),)),
        "attn": ("hook_v", "hook_z", ("hook_pattern",), ()),
    },
    "olmo_hybrid": {
        "mixer": ("hook_x", "hook_gated", DELTA, (("hook_conv", "hook_u"),)),
        "attn": ("hook_v", "hook_z", ("hook_pattern",), ()),
    },
    "qwen3_next": {
        "mixer": ("hook_x", "hook_gated", DELTA, (("hook_conv", "hook_u"),)),
        "attn": ("hook_v", "hook_gated", ("hook_pattern", "hook_gate"), ()),
    },
    "qwen4_exp": {
        "mixer": ("hook_x", "hook_gated", DELTA, (("hook_conv", "hook_u"),)),
        "attn": ("hook_v", "hook_gated", ("hook_pattern", "hook_gate"), ()),
    },
    "rwkv": {"mixer": ("hook_x", "hook_gated", ("hook_gate", "hook_k"), ())},
    "rwkv6": {"mixer": ("hook_x", "hook_gated", RWKV6, ())},
    "rwkv7": {"mixer": ("hook_x", "hook_gated", RWKV7, ())},
    "vim": {
        "mixer": (
            "hook_x",
            "hook_gated",
            tuple(f"{way}.{name}" for way in ("fwd", "bwd") for name in MAMBA),
            (("fwd.hook_conv", "fwd.hook_u"), ("bwd.hook_conv", "bwd.hook_u")),
        )
    },
    "hgrn": {"mixer": ("hook_x", "hook_gated", ("hook_gate", "hook_log_decay"), (("hook_x", "hook_u"),))},
}


def frozen_forward(model, layer, run):
    """(x, o): the model's own forward of a layer as a function of x alone, gates, dt, B, C, ... held at their values.

    Nothing of the attention code is used: hooks detach what is fixed, and put sigmoid(c) c back together with the
    sigmoid fixed.
    """
    place = model.blocks[layer].mixer.place
    x_name, o_name, fixed, silus = FROZEN[model.cfg.architecture][place]
    stem, live, rows = f"blocks.{layer}.{place}.", {}, {row.name for row in model.rows_for(layer)}
    fixed = [
        name for name in fixed if f"{place}.{name}" in rows
    ]  # of an architecture that mixes kinds, those of this one
    silus = [(c, u) for c, u in silus if f"{place}.{c}" in rows]

    def leaf(x, hook):
        live["x"] = x.detach().clone().requires_grad_()
        return live["x"] * 1.0

    def note(name):
        return lambda x, hook: live.__setitem__(name, x)

    hooks = [(stem + x_name, leaf), (stem + o_name, note("o"))]
    hooks += [(stem + name, lambda x, hook: x.detach()) for name in fixed]
    for c, u in silus:
        hooks.append((stem + c, note(c)))
        hooks.append((stem + u, lambda u, hook, c=c: torch.sigmoid(live[c]).detach() * live[c]))
    run(hooks)
    return live["x"], live["o"]


def test_the_operator_is_the_jacobian_of_the_models_own_frozen_forward(model):
    """Rows by VJP through the forward equal A's rows; any contraction equals A.T @ g, for every kind of layer."""
    input = example(model, 2, LENGTH)
    with torch.no_grad():
        _, cache = model.run_with_cache(input)
    kinds = {model.rows_for(layer): layer for layer in range(model.cfg.n_layers)}
    for layer in kinds.values():

        def run(hooks, layer=layer):
            model.run_with_hooks(input, fwd_hooks=hooks, stop_at_layer=layer + 1)

        x, o = frozen_forward(model, layer, run)
        A = gl.implicit_attention(cache, layer=layer)
        batch, length, channels = A.shape
        groups = channels // (x.shape[2] * x.shape[3]) if x.ndim == 4 else 1  # heads that share one value head

        def per_source(value, x=x, groups=groups, layer=layer):
            """A gradient by x as one by channel: what heads share, they share the gradient's sum of."""
            if x.ndim == 3 or model.blocks[layer].mixer.steps > 1:
                return value
            kv, d = x.shape[2:]
            return value.reshape(*value.shape[:2], kv, groups, d).sum(3)

        def of_x(value, A=A, model=model):
            """What `value` gives of each branch, [batch, pos, channel], as that of x itself."""
            if model.blocks[A.layer].mixer.steps > 1:  # a content of each step, and a branch
                return torch.stack([value(replace(A, branches=(branch,))) for branch in A.branches], 2)
            total = 0
            for branch in A.branches:
                one = value(replace(A, branches=(branch,)))
                if model.cfg.architecture in ("rwkv6", "rwkv7") and branch.scan is not None:
                    # it reads x less its mean over the head
                    heads = one.unflatten(2, (model.cfg.n_heads, -1))
                    one = (heads - heads.mean(-1, keepdim=True)).flatten(2)
                total = total + one
            return total

        o = o.flatten(2) if o.ndim == 4 else o
        for i in (0, length // 2, length - 1):
            (row,) = torch.autograd.grad(o[:, i].sum(), x, retain_graph=True)
            assert torch.allclose(per_source(of_x(lambda one, i=i: one.row(i).mT)), row, rtol=0, atol=1e-12), (layer, i)
        g = torch.randn(batch, length, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        (vjp,) = torch.autograd.grad(o, x, g)
        assert torch.allclose(per_source(of_x(lambda one, g=g: one.T @ g)), vjp, rtol=0, atol=1e-12), layer


def test_it_is_differentiable_in_the_cached_activations():
    model = HookedMamba.tiny(dtype=torch.float64)
    with torch.no_grad():
        cache = cached(model, "plain")
    for name in ("gate", "dt", "B", "C", "conv"):
        key = f"blocks.1.mixer.hook_{name}"
        base = cache.cache_dict[key].clone()
        direction = torch.randn_like(base)

        def value(size, base=base, direction=direction, key=key):
            cache.cache_dict[key] = base + size * direction
            A = gl.implicit_attention(cache, layer=1)
            return A.mean().pow(2).sum() + A.row(-1).pow(2).sum() + A.dense(channels=[0]).pow(2).sum()

        size = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (exact,) = torch.autograd.grad(value(size), size)
        numeric = (value(1e-5) - value(-1e-5)) / 2e-5
        cache.cache_dict[key] = base
        assert torch.allclose(exact, numeric, rtol=1e-5, atol=1e-8), name


@torch.no_grad()
def test_from_a_model_it_asks_only_for_what_it_needs():
    model = HookedMamba.tiny(dtype=torch.float64)
    tokens = example(model)
    _, cache = model.run_with_cache(tokens)
    seen = []
    with model.hooks([(lambda name: True, lambda x, hook: seen.append(hook.name))]):
        A = gl.implicit_attention(model, tokens, layer=0)
    assert relative(A.mean(), gl.implicit_attention(cache, layer=0).mean()) < 1e-12
    assert not any(name.startswith("blocks.1") for name in seen)
    lean = model.run_with_cache(
        tokens, names_filter=[f"blocks.1.mixer.{n}" for n in model.blocks[1].mixer.attention_points]
    )[1]
    assert torch.equal(gl.implicit_attention(lean, layer=-1).mean(), gl.implicit_attention(cache, layer=1).mean())


@torch.no_grad()
def test_on_a_wrapped_transformers_model():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = gl.wrap(MambaForCausalLM(MambaConfig(hidden_size=24, num_hidden_layers=2, vocab_size=30)).eval())
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        model.to(dtype)
        A = gl.implicit_attention(model, torch.randint(30, (2, 40)), layer=1)
        assert A.check().relative < tolerance
        assert A.mean().dtype == torch.float32


def test_nothing_of_state_by_pos_by_pos_is_built():
    """The largest tensor behind mean() stays at chunk size, far below [channel, state, pos, pos]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    scan = random_scan(length=128, channels=64, state=16)
    ones = torch.ones(1, 128, 64, dtype=torch.float64)
    with Watch():
        scan.summed(ones, ones, torch.ones(64, 4, dtype=torch.float64))
    assert largest <= 2 * 128 * 64 * 16


def random_scan(length: int, channels: int = 6, state: int = 3, seed: int = 0) -> DecayScan:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    return DecayScan(
        random(1, length, channels).cumsum(1), -3 * random(channels, state), random(1, length, state) - 0.5,
        random(1, length, channels), random(1, length, state) - 0.5,
    )  # fmt: skip


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9, 31, 64, 100])
def test_blocks_tile_the_triangle_at_every_length(length):
    scan = random_scan(length)
    dense = scan.dense()
    u = torch.randn(1, length, 6, dtype=torch.float64)
    assert relative(torch.einsum("bcij,bjc->bic", dense, u), scan.apply(u)) < 1e-10
    ones = torch.ones(1, length, 6, dtype=torch.float64)
    assert relative(scan.summed(ones, ones, torch.ones(6, 1, dtype=torch.float64)), dense.sum(1)) < 1e-10
    covered = torch.zeros(length, length, dtype=torch.long)
    for lo, mid, hi in blocks(length):
        covered[mid:hi, lo:mid] += 1
    assert covered.max() <= 1


def test_documents_do_not_see_each_other():
    scan = random_scan(12)
    document = torch.tensor([[0] * 5 + [1] * 7])
    packed = DecayScan(scan.time, scan.rate, scan.read, scan.amount, scan.key, document)
    same = document.unsqueeze(2) == document.unsqueeze(1)
    assert torch.allclose(packed.dense(), scan.dense() * same.unsqueeze(1))
    assert torch.allclose(packed.row(8), packed.dense()[:, :, 8]) and torch.allclose(
        packed.column(2), packed.dense()[..., 2]
    )
    u = torch.randn(1, 12, 6, dtype=torch.float64)
    assert torch.allclose(packed.apply(u), torch.einsum("bcij,bjc->bic", packed.dense(), u))
    assert torch.allclose(packed.apply_transposed(u), torch.einsum("bcij,bic->bjc", packed.dense(), u))


def test_long_sequences_keep_their_precision_in_float32():
    """A cumulative time of hundreds would lose small differences in float32; it is kept in float64."""
    scan = random_scan(400)
    narrow = DecayScan(scan.time, scan.rate.float(), scan.read.float(), scan.amount.float(), scan.key.float())
    assert relative(narrow.dense().double(), scan.dense()) < 1e-5


def test_bad_questions_are_explained():
    model = HookedMamba.tiny()
    tokens = example(model)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    A = gl.implicit_attention(cache, layer=0)
    with pytest.raises(gl.InputError, match="layers 0 to 1"):
        gl.implicit_attention(cache, layer=5)
    with pytest.raises(gl.InputError, match="needs an input"):
        gl.implicit_attention(model, layer=0)
    with pytest.raises(gl.InputError, match="needs no input"):
        gl.implicit_attention(cache, tokens, layer=0)
    with pytest.raises(gl.InputError, match="not dict"):
        gl.implicit_attention({}, layer=0)
    with pytest.raises(gl.PointError, match=r"lacks: .*hook_dt"):
        gl.implicit_attention(model.run_with_cache(tokens, names_filter="blocks.0.mixer.hook_x")[1], layer=0)
    with pytest.raises(gl.InputError, match="'gat' is no factor.*Did you mean 'gate'"):
        A.without("gat")
    with pytest.raises(gl.InputError, match="'unified' or 'hidden'"):
        A.paper("uia")
    with pytest.raises(gl.InputError, match="row=7 is out of range"):
        A.row(7)
    with pytest.raises(gl.InputError, match="Channel 32 is out of range"):
        A.dense(channels=[32])
    with pytest.raises(gl.InputError, match=r"takes \[batch, pos, channel\] = \[2, 7, 32\]"):
        A @ torch.zeros(2, 7, 16)
    with pytest.raises(gl.InputError, match="keeps only some positions"):
        gl.implicit_attention(model.run_with_cache(tokens, pos_slice=[1, 2])[1], layer=0)
    with pytest.raises(gl.InputError, match="weights have shape"):
        A.weighted(torch.ones(1))
    with pytest.raises(gl.TooLargeError, match="Ask for mean"):
        A.dense(max_bytes=100)


@torch.no_grad()
def test_channels_by_mask_and_number_types_and_rows_of_a_cache():
    import numpy as np

    model = HookedMamba.tiny(dtype=torch.float64)
    cache = cached(model, "right")
    A = gl.implicit_attention(cache, layer=np.int64(1))
    mask = torch.zeros(32, dtype=torch.bool)
    mask[[3, 7]] = True
    assert torch.equal(A.dense(mask), A.dense([3, 7])) and torch.equal(A.dense(np.int64(3)), A.dense(3))
    part = gl.implicit_attention(cache.apply_slice_to_batch_dim([1]), layer=1)
    assert torch.allclose(part.dense(), A.dense()[1:], atol=1e-14)


@torch.no_grad()
def test_a_convolution_of_one_tap_and_a_carried_state():
    model = HookedMamba.tiny(ssm_cfg={"d_state": 1, "d_conv": 1}, dtype=torch.float64)
    assert gl.implicit_attention(cached(model, "holes+state"), layer=1).check().relative < 1e-12


@torch.no_grad()
def test_a_reset_that_is_none_is_refused(lm):
    """Below 0 or above 1 nothing is a share of a state that is forgotten."""
    name = next(name for name in lm.hook_dict if name.endswith("hook_reset"))
    layer = int(name.split(".")[1])
    for value in (1.5, -0.5):
        with lm.hooks([(name, lambda x, hook, value=value: torch.full_like(x, value))]):
            _, cache = lm.run_with_cache(example(lm))
        with pytest.raises(gl.InputError, match="hook_reset is below 0 or above 1"):
            gl.implicit_attention(cache, layer=layer).mean()
