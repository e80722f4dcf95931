"""Vision Mamba: golden vectors, a slow literal forward, edits, image order, checkpoints, images."""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook("gatedlens", "beartype.beartype")

import gatedlens as gl  # noqa: E402
from gatedlens.errors import CheckpointError, InputError, PointError  # noqa: E402
from gatedlens.hooks.vim import HookedViM, vim_rows  # noqa: E402
from gatedlens.hooks.vim.checkpoint import OFFICIAL, SHORT, VisionMamba, variant_config  # noqa
from gatedlens.model.padding import Padding  # noqa

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent.parent / "golden"
FOLDERS = ("vim_midcls_div2", "vim_headcls_nodiv", "vim_v1_midcls")
CLS = {
    "middle": {},
    "head": {"use_middle_cls_token": False},
    "tail": {"use_middle_cls_token": False, "use_end_cls_token": True},
    "double": {"use_double_cls_token": True},
    "mean": {"if_cls_token": False},
    "last": {"if_cls_token": False, "final_pool_type": "none"},
}
KINDS = {
    "v2": {},
    "v2-undivided": {"if_divide_out": False, **CLS["double"]},
    "v1": {"bimamba_type": "v1", **CLS["head"]},
    "none": {"bimamba_type": "none", **CLS["last"]},
    "v2-scaled": {"init_layer_scale": 0.5, **CLS["tail"]},
    "v2-layernorm": {"rms_norm": False, "if_abs_pos_embed": False, **CLS["mean"]},
}


def tiny(kind: str = "v2", dtype: torch.dtype = torch.float64, seed: int = 0, **sizes) -> HookedViM:
    return HookedViM.tiny(seed, dtype, **{**KINDS[kind], **sizes})


def images(model, batch: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *model.image_shape, generator=generator, dtype=torch.float64).to(model.cfg.dtype)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


# -- a literal forward: one position, one equation at a time, from the paper and the parameters alone -----------------


class Literal:
    """`Literal(wrapped, edit=(name, function))(images)`: logits; `.at[name]` holds each row's value in image order."""

    def __init__(self, wrapped: VisionMamba, edit=None):
        self.w, self.p = wrapped, dict(wrapped.named_parameters())
        self.edit = edit
        self.at: dict[str, torch.Tensor] = {}

    def row(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if self.edit is not None and self.edit[0] == name:
            value = self.edit[1](value)
        self.at[name] = value
        return value

    def norm(self, name: str, weight: str, x: torch.Tensor) -> torch.Tensor:
        bias = self.p.get(f"{weight}.bias")
        if bias is not None:
            x = x - x.mean(-1, keepdim=True)
        scale = self.row(f"{name}.hook_scale", ((x * x).mean(-1, keepdim=True) + 1e-5) ** 0.5)
        normalized = self.row(f"{name}.hook_normalized", x / scale)
        out = self.p[f"{weight}.weight"] * normalized
        return self.row(f"{name}.hook_out", out if bias is None else out + bias)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        w, p, arg = self.w, self.p, self.w.config
        size, stride = arg["patch_size"], arg["stride"]
        n = (arg["img_size"] - size) // stride + 1
        patches = []
        for top in range(0, n * stride, stride):
            for left in range(0, n * stride, stride):
                square = image[:, :, top : top + size, left : left + size]
                kernel = p["patch_embed.proj.weight"]
                patches.append((square[:, None] * kernel).sum((2, 3, 4)) + p["patch_embed.proj.bias"])
        tokens = list(self.row("hook_patch_embed", torch.stack(patches, 1)).unbind(1))
        many = len(tokens)
        if not w.if_cls_token:
            places = []
        elif w.use_double_cls_token:
            places = [0, many + 1]
            tokens = [
                p["cls_token_head"][0].expand(len(image), -1),
                *tokens,
                p["cls_token_tail"][0].expand(len(image), -1),
            ]
        else:
            places = [many // 2 if w.use_middle_cls_token else many if w.use_end_cls_token else 0]
            tokens.insert(places[0], p["cls_token"][0].expand(len(image), -1))
        resid = torch.stack(tokens, 1)
        resid = self.row("hook_embed", resid + p["pos_embed"] if w.if_abs_pos_embed else resid)
        for layer in range(arg["depth"]):
            resid = self.block(layer, resid)
        normed = self.norm("ln_final", "norm_f", resid)
        if places:
            features = sum(normed[:, at] for at in places) / len(places)
        else:
            features = normed.mean(1) if arg["final_pool_type"] == "mean" else normed[:, -1]
        features = self.row("hook_features", features)
        return self.row("hook_logits", features @ p["head.weight"].T + p["head.bias"])

    def block(self, layer: int, resid: torch.Tensor) -> torch.Tensor:
        name, own = f"blocks.{layer}.", f"layers.{layer}.mixer."
        mixer = self.w.layers[layer].mixer
        resid = self.row(name + "hook_resid_pre", resid)
        n = self.norm(name + "ln1", f"layers.{layer}.norm", self.row(name + "hook_mixer_in", resid))
        xz = n @ self.p[own + "in_proj.weight"].T
        channels = xz.shape[-1] // 2
        x = self.row(name + "mixer.hook_x", xz[..., :channels])
        z = self.row(name + "mixer.hook_gate_pre", xz[..., channels:])
        gated = self.direction(name + "mixer.fwd.", own, x, z, backward=False)
        if mixer.bimamba_type != "none":
            gated = gated + self.direction(name + "mixer.bwd.", own, x, z, backward=True)
        if mixer.bimamba_type == "v2" and mixer.if_divide_out:
            gated = gated / 2
        gated = self.row(name + "mixer.hook_gated", gated)
        out = gated @ self.p[own + "out_proj.weight"].T
        out = self.row(name + "hook_mixer_out", out * self.p.get(own + "gamma", 1))
        return self.row(name + "hook_resid_post", resid + out)

    def direction(self, name: str, own: str, x: torch.Tensor, z: torch.Tensor, backward: bool) -> torch.Tensor:
        v2 = backward and own + "conv1d_b.weight" in self.p

        def w(key: str) -> torch.Tensor:
            if backward and key == "A_log":
                return self.p[own + "A_b_log"]
            module, _, rest = key.partition(".")
            return self.p[own + (f"{module}_b{'.' if rest else ''}{rest}" if v2 else key)]

        x, z = self.row(name + "hook_x", x), self.row(name + "hook_gate_pre", z)
        batch, length, channels = x.shape
        kernel = w("conv1d.weight")[:, 0]
        width, states = kernel.shape[1], w("A_log").shape[1]
        taps = []
        for pos in range(length):
            sees = [pos + (width - 1) - k if v2 else pos - (width - 1) + k for k in range(width)]
            zero = torch.zeros_like(x[:, 0])
            taps.append(
                torch.stack([kernel[:, k] * (x[:, s] if 0 <= s < length else zero) for k, s in enumerate(sees)], -1)
            )
        c = self.row(name + "hook_conv_taps", torch.stack(taps, 1)).sum(-1) + w("conv1d.bias")
        c = self.row(name + "hook_conv", c)
        u = self.row(name + "hook_u", c / (1 + torch.exp(-c)))
        ranks = w("dt_proj.weight").shape[1]
        selected = u @ w("x_proj.weight").T
        dt_rank = self.row(name + "hook_dt_rank", selected[..., :ranks])
        B = self.row(name + "hook_B", selected[..., ranks : ranks + states])
        C = self.row(name + "hook_C", selected[..., ranks + states :])
        dt_pre = self.row(name + "hook_dt_pre", dt_rank @ w("dt_proj.weight").T + w("dt_proj.bias"))
        dt = self.row(name + "hook_dt", torch.log1p(torch.exp(dt_pre)))
        reset = self.row(name + "hook_reset", x.new_zeros(batch, length, 1))
        state = self.row(name + "hook_state_start", x.new_zeros(batch, channels, states))
        A = -torch.exp(w("A_log"))
        decay = self.row(name + "hook_decay", torch.exp(dt[..., None] * A) * (1 - reset)[..., None])
        write = self.row(name + "hook_write", dt[..., None] * B[:, :, None] * u[..., None])
        after: list = [None] * length
        for pos in reversed(range(length)) if backward else range(length):
            state = decay[:, pos] * state + write[:, pos]
            after[pos] = state
        read = self.row(name + "hook_state", torch.stack(after, 1))
        scan = self.row(name + "hook_scan", (C[:, :, None] * read).sum(-1))
        y = self.row(name + "hook_y", scan + w("D") * u)
        gate = self.row(name + "hook_gate", z / (1 + torch.exp(-z)))
        return self.row(name + "hook_gated", y * gate)


# -- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS)
def test_golden(folder):
    """The official implementation's numbers, every intermediate it wrote down."""
    from safetensors.torch import load_file

    model, io = gl.from_pretrained(GOLDEN / folder, device="cpu"), load_file(GOLDEN / folder / "io.safetensors")
    with torch.no_grad():
        logits, cache = model.run_with_cache(io["input"])
    found = {"logits": logits, "features": cache["hook_features"], "patch_embed": cache["hook_patch_embed"]}
    for layer in range(model.cfg.n_layers):
        found[f"layers.{layer}.norm_out"] = cache[f"blocks.{layer}.ln1.hook_out"]
        found[f"layers.{layer}.mixer_out"] = cache["mixer_out", layer]
        found[f"layers.{layer}.residual"] = cache["resid_pre", layer]
    for call, way in enumerate(("fwd", "bwd")):  # layer 0: forward, then backward on the flipped sequence
        direction = model.blocks[0].mixer.get_submodule(way)
        points = {"u": "u", "B": "B", "C": "C", "y": "y", "y_gated": "gated", "z": "gate_pre"}
        for theirs, ours in points.items():
            found[f"scan_call.{call}.{theirs}"] = cache[f"blocks.0.mixer.{way}.hook_{ours}"].mT
        bias = direction.weights.dt_proj.bias.detach()
        found[f"scan_call.{call}.delta_pre_softplus_nobias"] = (cache[f"blocks.0.mixer.{way}.hook_dt_pre"] - bias).mT
        found[f"scan_call.{call}.A"] = direction.A.detach()
        found[f"scan_call.{call}.D"], found[f"scan_call.{call}.delta_bias"] = direction.weights.D.detach(), bias
    for name, value in io.items():
        if name in found:
            ours = found.pop(name)
            ours = ours.flip(-1) if name.startswith("scan_call.1.") and ours.ndim == 3 else ours
            assert torch.allclose(ours, value, rtol=0, atol=1e-5), name
    assert not found, f"not in io: {list(found)}"


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_its_equation(kind):
    model = tiny(kind)
    x = images(model)
    logits, cache = model.run_with_cache(x, names_filter=lambda name: True)
    literal = Literal(model.wrapped)
    assert relative(logits, literal(x)) < 1e-11
    assert list(literal.at) == list(model.names), (
        "the literal forward and the rows name the same points in the same order"
    )
    for name, value in literal.at.items():
        assert cache[name].shape == value.shape, name
        assert torch.allclose(cache[name], value, rtol=1e-9, atol=1e-12), name
        point = model.names[name]
        assert [s for s in point.shape(model.cfg.sizes) if isinstance(s, int)] == [
            size for size, dim in zip(value.shape, point.dims, strict=True) if dim not in ("batch", "pos")
        ]


@pytest.mark.parametrize("place", CLS)
def test_every_place_of_the_class_token(place):
    model = HookedViM.tiny(3, torch.float64, **CLS[place])
    x = images(model)
    assert relative(model(x), Literal(model.wrapped)(x)) < 1e-11
    assert model.cfg.n_ctx == model.grid.length == model(x, stop_at_layer=0).shape[1]


@pytest.mark.parametrize("kind", ["v2", "v1", "none"])
def test_gradients(kind):
    """Of the loss, for every parameter and the image, against autograd through the literal forward."""
    model = tiny(kind)
    parameters = dict(model.wrapped.named_parameters())
    x, labels = images(model).requires_grad_(), torch.tensor([1, 4])
    ours = torch.autograd.grad(model(x, return_type="loss", labels=labels), [x, *parameters.values()])
    loss = torch.nn.functional.cross_entropy(Literal(model.wrapped)(x), labels)
    theirs = torch.autograd.grad(loss, [x, *parameters.values()])
    for name, a, b in zip(["image", *parameters], ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-11), name


def test_gradient_by_finite_differences():
    model = tiny()
    x = images(model, 1).requires_grad_()
    (grad,) = torch.autograd.grad(model(x).pow(2).sum(), x)
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        slope = (model(x + 1e-5 * direction).pow(2).sum() - model(x - 1e-5 * direction).pow(2).sum()) / 2e-5
    assert abs((grad * direction).sum().item() - slope.item()) < 1e-6 * abs(slope.item())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.06), (torch.float16, 0.01)])
def test_dtypes(dtype, tolerance):
    exact = tiny()
    model = HookedViM.tiny(0, dtype)
    x = images(exact)
    logits, cache = model.run_with_cache(x.to(dtype), names_filter=lambda name: True)
    assert relative(logits.double(), exact(x)) < tolerance
    assert cache["logits"].dtype == torch.float32
    assert cache["resid_post", 0].dtype == torch.float32  # residual_in_fp32
    assert cache["blocks.0.mixer.bwd.hook_state"].dtype == torch.float32
    assert cache["blocks.0.mixer.bwd.hook_u"].dtype == dtype


def test_a_batch_is_its_images():
    model = tiny()
    x = images(model, 3)
    assert relative(model(x), torch.cat([model(row.unsqueeze(0)) for row in x])) < 1e-12
    assert torch.equal(model(x[0]), model(x[:1]))  # one image without its batch axis


# -- directions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, sees", [("v2", range(6, 10)), ("v1", range(3, 10))])
def test_image_order(kind, sees):
    """bwd at position p knows the tokens from the last down to p, fwd those up to p: both at the same index p."""
    model, p = tiny(kind), 6
    tensors: dict[str, torch.Tensor] = {}
    names = [f"blocks.0.mixer.{way}.hook_state" for way in ("fwd", "bwd")] + ["blocks.0.mixer.hook_x"]
    with model.hooks([(name, lambda t, hook: tensors.update({hook.name: t})) for name in names]):
        model(images(model, 1))
    for name, known in zip(names, (range(7), sees), strict=False):
        (grad,) = torch.autograd.grad(tensors[name][:, p].sum(), tensors[names[-1]], retain_graph=True)
        assert [pos for pos in range(10) if grad[0, pos].abs().max() > 0] == list(known)  # v1's conv still looks back


def test_backward_is_forward_on_the_reversed_sequence():
    """With its parameters in fwd's place and the sequence reversed, fwd computes what bwd did."""
    model = tiny()
    state = model.wrapped.state_dict()
    swapped = {
        k: state[b] if (b := re.sub(r"(conv1d|x_proj|dt_proj|A|D)(?=[._]|$)", r"\1_b", k)) in state else v
        for k, v in state.items()
    }
    other = tiny()
    other.wrapped.load_state_dict(swapped)
    resid = torch.randn(2, 10, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    _, cache = model.run_with_cache(resid, names_filter="blocks.0.mixer.bwd.*", start_at_layer=0)
    _, flipped = other.run_with_cache(resid.flip(1), names_filter="blocks.0.mixer.fwd.*", start_at_layer=0)
    for name, value in cache.items():
        theirs = flipped[name.replace("bwd", "fwd")]
        assert torch.allclose(value, theirs.flip(1) if "start" not in name else theirs, atol=1e-12), name


def test_halving():
    """div2 halves what the two directions sum to; v1 never does, whatever the flag says, nor does a causal one."""
    assert tiny("v2").blocks[0].mixer.scale == 0.5
    for options in (
        {"if_divide_out": False},
        {"if_devide_out": False},
        {"bimamba_type": "v1"},
        {"bimamba_type": "none"},
    ):
        assert HookedViM.tiny(**options).blocks[0].mixer.scale == 1.0
    assert HookedViM.tiny(if_divide_out=True, if_devide_out=False).cfg.divide_out


# -- hooks ----------------------------------------------------------------------------------------------------------


def edited(model, x, name, function):
    with model.hooks([(name, function)]):
        return model(x)


@pytest.mark.parametrize("kind", ["v2", "v1"])
def test_edits_take_effect(kind):
    """An edit at each point, in place or returned, has the literal forward's effect in value and in gradient."""
    model = tiny(kind, depth=1, use_middle_cls_token=True)  # in the middle: a token at the head never reads fwd's decay
    x = images(model, 1).requires_grad_()
    generator = torch.Generator().manual_seed(5)
    plain = model(x)
    for name in model.names:
        noise: dict = {}

        def change(t, noise=noise):
            if "n" not in noise:
                noise["n"] = torch.randn(t.shape, dtype=t.dtype, generator=generator)
            return t * (1 + 0.1 * noise["n"]) + 0.1 * noise["n"]

        def in_place(t, hook, change=change):
            t.copy_(change(t.clone()))

        expected = Literal(model.wrapped, (name, change))(x)
        (expected_grad,) = torch.autograd.grad(expected.pow(2).sum(), x)
        for hook in (lambda t, hook, change=change: change(t), in_place):
            out = edited(model, x, name, hook)
            assert relative(out, expected) < 1e-10, name
            assert relative(out, plain) > 1e-5, f"{name}: the edit did nothing"
            (grad,) = torch.autograd.grad(out.pow(2).sum(), x)
            assert torch.allclose(grad, expected_grad, rtol=1e-7, atol=1e-10), name


def test_gradients_at_every_point():
    """incl_bwd's gradient predicts what a small edit at the point does."""
    model, labels = tiny(depth=1), torch.tensor([2])
    x = images(model, 1)
    _, cache = model.run_with_cache(x, return_type="loss", labels=labels, incl_bwd=True, names_filter=lambda name: True)
    generator = torch.Generator().manual_seed(6)
    for name in model.names:
        step = 1e-6 * torch.randn(cache[name].shape, dtype=torch.float64, generator=generator)
        up, down = (
            model.run_with_hooks(x, return_type="loss", labels=labels, fwd_hooks=[(name, lambda t, hook, s=s: t + s)])
            for s in (step, -step)
        )
        predicted = 2 * (cache[f"{name}_grad"] * step).sum()
        assert torch.allclose(up - down, predicted, rtol=1e-4, atol=1e-12), name


def test_a_propagating_state_patch_runs_toward_the_front_of_the_image():
    """decay := 0, write := s at p makes s the state after p: bwd then carries it to every position before p."""
    model, p = tiny(), 6
    x, name = images(model, 1), "blocks.0.mixer.bwd."

    def put(value):
        def hook(t, hook):
            t[:, p] = value

        return hook

    hooks = [(name + "hook_decay", put(0.0)), (name + "hook_write", put(2.0))]
    with model.hooks(hooks):
        _, patched = model.run_with_cache(x, names_filter=name + "*")
    _, clean = model.run_with_cache(x, names_filter=name + "*")
    state = clean[name + "hook_state"]
    assert torch.equal(patched[name + "hook_state"][:, p + 1 :], state[:, p + 1 :])
    assert (patched[name + "hook_state"][:, p] == 2).all()
    moved = clean[name + "hook_decay"][:, p - 1] * 2 + clean[name + "hook_write"][:, p - 1]
    assert torch.allclose(patched[name + "hook_state"][:, p - 1], moved)


def test_lazy_points_cost_nothing_unheard():
    model, x = tiny(), images(tiny())
    lazy = [name for name, point in model.names.points.items() if point.lazy]
    assert len(lazy) == 2 * 2 * 5
    with torch.no_grad():
        plain = model(x)
        _, cache = model.run_with_cache(x)
    assert not any(name in cache for name in lazy)
    assert all(model.hook_dict[name].visits == 0 for name in lazy)
    for name in lazy:
        assert relative(edited(model, x, name, lambda t, hook: None), plain) < 1e-12
        assert model.hook_dict[name].visits == 1


@pytest.mark.parametrize("kind", ["v2", "v1", "none"])
def test_firing_order_is_the_order_of_the_rows(kind):
    model, fired = tiny(kind), []
    with model.hooks([(lambda name: True, lambda t, hook: fired.append(hook.name))]):
        model(images(model, 1))
    assert fired == list(model.names)
    assert ("blocks.0.mixer.bwd.hook_y" in fired) == (kind != "none")


def test_names():
    model = tiny()
    _, cache = model.run_with_cache(
        images(model), names_filter=["blocks.*.hook_layer_input", "blocks.*.mixer.*.hook_y"]
    )
    assert torch.equal(cache["blocks.1.hook_layer_input"], cache["mixer_in", 1])  # MambaLens's word
    both = cache["blocks.0.mixer.fwd.hook_y"] + cache["blocks.0.mixer.bwd.hook_y"]
    assert torch.equal(cache["blocks.0.mixer.hook_y"], both / 2)  # a view: what the gate multiplies
    assert torch.equal(cache["y", 0, "mixer.bwd"], cache["blocks.0.mixer.bwd.hook_y"])
    with pytest.raises(PointError, match=r"ambiguous.*fwd.hook_y.*bwd.hook_y"):
        cache["y", 0]
    with pytest.raises(PointError, match="Did you mean"):
        model.run_with_cache(images(model), names_filter="blocks.0.mixer.bwd.hook_sate")
    with pytest.raises(PointError):
        tiny("none").names.find("blocks.0.mixer.bwd.hook_y")
    assert len(model.hook_table()) == 2 + len(vim_rows()) + 3 + 2


def test_logit_attribution():
    """TransformerLens's residual tools work at the class token: the components sum to the logit."""
    model = tiny()
    logits, cache = model.run_with_cache(images(model))
    parts, labels = cache.decompose_resid(apply_ln=True, return_labels=True)
    at = model.grid.cls[0]
    read = (model.wrapped.norm_f.weight * parts[:, :, at]) @ model.tokens_to_residual_directions(3) + model.b_U[
        3
    ] / len(parts)
    assert labels == ["embed", "0_mixer_out", "1_mixer_out"]
    assert torch.allclose(read.sum(0), logits[:, 3])


@pytest.mark.parametrize("way", ["fwd", "bwd"])
def test_implicit_attention_of_a_direction(way):
    """o = A x + r of each direction, from its factors in the order of its scan."""
    model = tiny()
    _, cache = model.run_with_cache(images(model))
    direction, name = model.blocks[1].mixer.get_submodule(way), f"blocks.1.mixer.{way}."
    factors = direction.factors(lambda leaf: cache[name + leaf], Padding(), None)
    operator = gl.ImplicitAttention((factors,), Padding(), model, 1)
    assert operator.check().relative < 1e-12
    assert relative(direction.along(operator.output()), cache[name + "hook_gated"]) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("kind", ["v1", "v2", "none"])
def test_implicit_attention_of_every_kind_and_place_of_the_class_token(kind):
    """o = A x + r, and every view of A is the dense matrix, which is a full one but for kind "none"."""
    from tests.attention.test_layer import check_views

    for cls in CLS.values():
        model = tiny(kind, **cls)
        A = gl.implicit_attention(model, images(model), layer=1)
        assert A.check().relative < 1e-12
    for view in (A, A.without("conv"), A.without("scan"), A.only("scan"), A.paper("unified")):
        check_views(view)
    contributions, direction = A.contributions(), torch.randn(model.cfg.d_model, dtype=torch.float64)
    whole = torch.cat(list(contributions.blocks()), dim=1)
    assert torch.allclose(contributions.along(direction), whole @ direction, rtol=0, atol=1e-12)
    total = whole.sum(2) + contributions.remainder()
    _, cache = model.run_with_cache(images(model), names_filter="blocks.1.hook_mixer_out")
    assert relative(total, cache["mixer_out", 1]) < 1e-10
    above = A.dense().triu(1).abs().max()
    assert above == 0 if kind == "none" else above > 0


# -- options --------------------------------------------------------------------------------------------------------


def test_layers_and_return_types():
    model, labels = tiny(), [0, 3]
    x = images(model)
    logits = model(x)
    assert torch.equal(model(model(x, stop_at_layer=1), start_at_layer=1), logits)
    assert torch.equal(model(model(x, stop_at_layer=-1), start_at_layer=-1), logits)
    loss = model(x, return_type="loss", labels=labels)
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(logits, torch.tensor(labels)))
    both = model(x, "both", labels)
    assert torch.equal(both.logits, logits) and torch.equal(both.loss, loss)
    assert model(x, return_type=None) is None


@pytest.mark.parametrize(
    "options, why",
    [
        ({"attention_mask": torch.ones(2, 10)}, "no padding"),
        ({"return_state": True}, "no state"),
        ({"state": object()}, "no state"),
        ({"position_ids": torch.arange(10)}, "positions are those of the patches"),
        ({"return_type": "loss"}, "labels"),
        ({"return_type": "loss", "labels": [1]}, "one class number an image"),
        ({"return_type": "loss", "labels": [0, 5]}, "classes are 0 to 4"),
        ({"return_type": "logit"}, "'logits', 'loss', 'both' or None"),
        ({"stop_at_layer": 3}, "has 2 layers"),
    ],
)
def test_options_that_make_no_sense(options, why):
    model = tiny()
    with pytest.raises(InputError, match=why):
        model(images(model), **options)


@pytest.mark.parametrize("shape", [(2, 3, 12, 13), (2, 1, 12, 12), (0, 3, 12, 12), (12, 12)])
def test_wrong_images(shape):
    with pytest.raises(InputError):
        tiny()(torch.zeros(shape))


def test_other_wrong_inputs():
    model = tiny()
    with pytest.raises(InputError, match="reads float images"):
        model(torch.zeros(1, 3, 12, 12, dtype=torch.uint8))
    with pytest.raises(InputError, match="PIL image"):
        model("cat.jpg")
    with pytest.raises(InputError, match=r"\[batch, 10, 16\]"):
        model(torch.zeros(1, 9, 16), start_at_layer=1)
    with pytest.raises(InputError, match="no next token"):
        model.generate("a cat")
    with pytest.raises(TypeError, match="Did you mean 'labels'"):
        model(images(model), label=[0, 1])


# -- parameters -----------------------------------------------------------------------------------------------------


def test_parameters_are_shared_and_read_at_call_time():
    wrapped = tiny().wrapped
    model = gl.wrap(wrapped)
    assert isinstance(model, HookedViM)
    assert {id(p) for p in model.parameters()} == {id(p) for p in wrapped.parameters()}
    x, other = images(model), tiny(seed=9)
    wrapped.load_state_dict(copy.deepcopy(other.wrapped.state_dict()), assign=True)
    assert torch.equal(model(x), other(x))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        wrapped.layers[0].mixer.D_b.zero_()
    assert torch.equal(twin(x), other(x)) and not torch.equal(model(x), other(x))


def test_an_official_module_wraps():
    """The official class has its constructor's attributes and no config; HiddenMambaAttn's fork has the typo."""
    exact = tiny("v2-undivided")
    wrapped = copy.deepcopy(exact.wrapped)
    del wrapped.config, wrapped.use_end_cls_token
    for layer in wrapped.layers:
        layer.mixer.if_devide_out = layer.mixer.if_divide_out
        del layer.mixer.if_divide_out
    assert torch.equal(gl.wrap(wrapped)(images(exact)), exact(images(exact)))
    wrapped.if_rope = True
    with pytest.raises(CheckpointError, match="VisionMamba has if_rope"):
        gl.wrap(wrapped)


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_official_state_dict(size):
    """Key for key and shape for shape the released checkpoints'."""
    head, *lines = (GOLDEN / f"vim_{size}_state_dict.txt").read_text().splitlines()
    official = {key: json.loads(shape) for key, shape in (line.split("\t") for line in lines if line)}
    with torch.device("meta"):
        wrapped = VisionMamba(**variant_config(head.split()[1]))
    assert {key: list(value.shape) for key, value in wrapped.state_dict().items()} == official
    assert len(official) == 415 and f"params {sum(p.numel() for p in wrapped.parameters())}" in head


def test_variants():
    counts = {}
    for name in (*SHORT, *OFFICIAL):
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in VisionMamba(**variant_config(name)).parameters())
    assert counts["vim_base"] == 97_598_440 and counts["vim_tiny_stride8"] == 7_250_344
    with pytest.raises(CheckpointError, match="Did you mean 'vim_small'"):
        variant_config("vim_smal")


def checkpoint(hooked, path: Path, **args) -> Path:
    """A file as hustvl/Vim's main.py writes it."""
    state = hooked.wrapped.state_dict()
    torch.save(
        {
            "model": state,
            "optimizer": {"state": {}, "param_groups": []},
            "epoch": 3,
            "args": argparse.Namespace(**args),
        },
        path,
    )
    return path


def test_single_file(tmp_path):
    """The variant from args.model, sizes from the shapes; or the variant from the caller."""
    model = tiny(dtype=torch.float32)
    x, official = images(model), next(iter(OFFICIAL))
    loaded = gl.from_pretrained(
        checkpoint(model, tmp_path / "vim_t.pth", model=official, input_size=12, lr=1e-3), device="cpu"
    )
    assert torch.equal(loaded(x), model(x)) and loaded.cfg.cls == "middle" and loaded.cfg.stride == (4, 4)
    nameless = checkpoint(model, tmp_path / "nameless.pth", input_size=12)
    with pytest.raises(CheckpointError, match=r"variant=.*vim_tiny_stride8"):
        gl.from_pretrained(nameless)
    assert torch.equal(gl.from_pretrained(nameless, variant="vim_small", device="cpu")(x), model(x))
    assert gl.from_pretrained(nameless, variant="vim_small", dtype="bfloat16", device="cpu").cfg.dtype == torch.bfloat16
    torch.save(dict(model.wrapped.state_dict()), tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match="positions for 9 patches"):
        gl.from_pretrained(tmp_path / "bare.pth", variant="vim_tiny")  # 224 x 224 images have 3,136 patches of 4
    with pytest.raises(CheckpointError, match="no variant"):
        gl.from_pretrained(nameless, variant="vim_huge")


def test_overlapping_patches_in_a_single_file(tmp_path):
    model = tiny(dtype=torch.float32, stride=2)
    path = checkpoint(model, tmp_path / "s8.pth", model="vim_tiny_stride8", input_size=12)
    loaded = gl.from_pretrained(path, device="cpu")
    assert loaded.grid == model.grid and loaded.grid.length == 26
    assert torch.equal(loaded(images(model)), model(images(model)))


def test_refused_files(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    torch.save({"model": tiny().wrapped.state_dict(), "args": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="can run code"):
        gl.from_pretrained(tmp_path / "evil.pth")
    state = tiny().wrapped.state_dict()
    del state["layers.1.mixer.D_b"]
    torch.save({"model": state, "args": argparse.Namespace(model="vim_tiny", input_size=12)}, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match=r"is missing 1 weights: layers.1.mixer.D_b"):
        gl.from_pretrained(tmp_path / "less.pth")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="no architecture"):
        gl.from_pretrained(tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="There is no file"):
        gl.from_pretrained("vim_s_midclstok_80p5acc.pth")


@pytest.mark.parametrize("kind", KINDS)
def test_folder(kind, tmp_path):
    model = tiny(kind, dtype=torch.float32)
    model.wrapped.save_pretrained(tmp_path)
    loaded = gl.from_pretrained(tmp_path, device="cpu")
    assert torch.equal(loaded(images(model)), model(images(model)))
    with pytest.raises(CheckpointError, match="one file"):
        gl.from_pretrained(tmp_path, variant="vim_tiny")


@pytest.mark.parametrize(
    "options, why",
    [
        ({"if_rope": True}, "if_rope"),
        ({"if_bidirectional": True}, "if_bidirectional"),
        ({"flip_img_sequences_ratio": 0.5}, "flip_img_sequences_ratio"),
        ({"final_pool_type": "max"}, "final_pool_type"),
        ({"bimamba_type": "v3"}, "bimamba_type"),
        ({"use_end_cls_token": True}, "use_middle_cls_token"),
        ({"num_classes": 0}, "num_classes"),
        ({"img_size": 2}, "img_size"),
    ],
)
def test_unsupported_models_are_named(options, why):
    with pytest.raises(CheckpointError, match=why):
        HookedViM.tiny(**options)


# -- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", CLS)
def test_grid(place):
    grid = HookedViM.tiny(img_size=16, stride=2, **CLS[place]).grid  # 7 x 7 overlapping patches of 4
    assert (grid.rows, grid.columns) == (7, 7)
    assert [grid.position(*at) for at in ((0, 0), (6, 6))] == [grid.patches[0], grid.patches[-1]]
    for pos in range(grid.length):
        at = grid.place(pos)
        assert (at is None) == (pos in grid.cls)
        if at is not None:
            assert grid.position(*at) == pos
            left, top, right, bottom = grid.box(pos)
            assert (top, left, bottom - top, right - left) == (2 * at[0], 2 * at[1], 4, 4)
    values = torch.arange(float(grid.length)).expand(2, -1)
    assert grid.fold(values).shape == (2, 7, 7) and grid.fold(values)[0, 3, 4] == grid.position(3, 4)
    with pytest.raises(InputError):
        grid.position(7, 0)
    with pytest.raises(InputError):
        grid.place(grid.length)


def test_grid_of_the_released_sizes():
    for name, length, cls in (("vim_tiny", 197, 98), ("vim_tiny_stride8", 730, 364)):
        with torch.device("meta"):
            model = HookedViM(VisionMamba(**{**variant_config(name), "depth": 1}))
        assert (model.grid.length, model.grid.cls) == (length, (cls,))


def test_grid_is_where_the_pixels_are():
    """A change of one patch's pixels changes hook_embed at its position alone."""
    model = tiny()
    x = images(model, 1)
    pos = model.grid.position(1, 2)
    left, top, right, bottom = model.grid.box(pos)
    changed = x.clone()
    changed[:, :, top:bottom, left:right] += 1
    moved = (model(x, stop_at_layer=0) - model(changed, stop_at_layer=0)).abs().amax(-1)[0]
    assert moved.nonzero().flatten().tolist() == [pos]


@pytest.mark.parametrize("width, height", [(500, 333), (333, 500), (256, 256), (90, 1000)])
def test_preprocess(width, height):
    """Shorter side to 256, bicubic; the longer truncated; the centre cropped; ImageNet's normalisation."""
    from PIL import Image

    pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.frombytes("RGB", (width, height), pixels.numpy().tobytes())
    with torch.device("meta"):
        model = HookedViM(VisionMamba(**{**variant_config("vim_tiny"), "depth": 1}))
    ours = model.preprocess(image)
    longer = 256 * max(width, height) // min(width, height)
    new = (longer, 256) if width > height else (256, longer)
    resized = torch.tensor(list(image.resize(new, Image.BICUBIC).getdata())).reshape(new[1], new[0], 3)
    top, left = round((new[1] - 224) / 2), round((new[0] - 224) / 2)
    crop = resized[top : top + 224, left : left + 224].permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(ours, (crop - mean[:, None, None]) / std[:, None, None], atol=1e-6)


def test_images_go_straight_in():
    from PIL import Image

    model = HookedViM.tiny(channels=1, img_size=8)
    digit = Image.frombytes("L", (8, 8), bytes(range(0, 256, 4)))
    assert torch.equal(model(digit), model(model.preprocess(digit)))
    assert torch.allclose(model([digit, digit])[1:], model(digit), atol=1e-5)
    assert model.preprocess(digit).flatten()[:2].tolist() == pytest.approx([-1, 2 * 4 / 255 - 1])
    grey = HookedViM.tiny().preprocess(Image.new("L", (12, 12), 255))
    assert torch.allclose(
        grey[:, 0, 0], (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    )


def test_images_that_do_not_fit():
    from PIL import Image

    model = HookedViM.tiny()
    with pytest.raises(InputError, match=r"mode 'RGBA'.*convert\('RGB'\)"):
        model.preprocess(Image.new("RGBA", (12, 12)))
    with pytest.raises(InputError, match=r"13 x 12.*resize\(\(12, 12\)\)"):
        model.preprocess(Image.new("RGB", (13, 12)))
    with pytest.raises(InputError, match="not a Tensor"):
        model.preprocess(torch.zeros(3, 12, 12))
    with pytest.raises(InputError, match="1 or 3 channels"):
        HookedViM.tiny(channels=4).preprocess(Image.new("RGB", (12, 12)))
    with pytest.raises(InputError, match=r"mode 'RGB'.*1 channel reads L"):
        HookedViM.tiny(channels=1).preprocess(Image.new("RGB", (12, 12)))
