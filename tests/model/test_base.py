"""What every architecture's hook points promise: they fire, in order and shape; edits act exactly; lazy ones are free."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

import gatedlens as gl
from gatedlens.hooks.mamba import HookedMamba
from tests.helpers import earlier, example, in_parts, relative


def mixer_points(model, leaf: str) -> list[str]:
    """The full names of all points with this leaf (ViM has one a direction)."""
    return [name for name in model.names if name.rpartition(".")[2] == leaf]


# -- firing ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_declared_point_fires_with_its_declared_shape_in_order(model):
    fired = []

    def note(x, hook):
        fired.append((hook.name, tuple(x.shape)))

    input = example(model)
    model.run_with_hooks(input, fwd_hooks=[(lambda name: True, note)])
    assert [name for name, _ in fired] == list(model.names)
    length = dict(fired)["blocks.0.hook_resid_pre"][1]
    for name, shape in fired:
        point = model.names[name]
        assert shape[0] == 2 and len(shape) == len(point.dims), name
        for dim, size in zip(point.dims, shape, strict=True):
            if dim in ("pos", "key_pos"):
                assert size == length, name
            elif dim != "batch":
                assert size == model.cfg.sizes[dim], (name, dim)


@torch.no_grad()
def test_observed_or_not_results_agree(model):
    input = example(model)
    plain = model(input)
    for names in (None, lambda name: True, "blocks.*.hook_state", "blocks.*.hook_decay", "blocks.*.hook_write"):
        out, _ = model.run_with_cache(input, names_filter=names)
        assert relative(out, plain) < 1e-12


@torch.no_grad()
def test_lazy_points_are_built_only_for_listeners(model):
    lazy = [name for name, point in model.names.points.items() if point.lazy]
    input = example(model)

    def visits():
        return {name: model.hook_dict[name].visits for name in lazy}

    before = visits()
    model(input)
    model.run_with_cache(input)
    model.run_with_hooks(input, fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: None)])
    assert visits() == before
    for name in lazy:
        before = visits()
        _, cache = model.run_with_cache(input, names_filter=name)
        assert visits() == before | {name: before[name] + 1}
        assert list(cache.cache_dict) == [name]


def torch_hooks(module):
    """Every way in which torch can listen to a module, as (name, function that registers and returns the handle)."""
    yield "forward", lambda: module.register_forward_hook(lambda m, i, o: None)
    yield "forward_pre", lambda: module.register_forward_pre_hook(lambda m, i: None)
    yield "full_backward", lambda: module.register_full_backward_hook(lambda m, i, o: None)
    yield "full_backward_pre", lambda: module.register_full_backward_pre_hook(lambda m, o: None)
    yield "everywhere", lambda: register_module_forward_hook(lambda m, i, o: None)


def test_plain_torch_hooks_of_every_kind_count_as_listeners(model):
    name = mixer_points(model, "hook_state")[0] if mixer_points(model, "hook_state") else "blocks.0.hook_resid_pre"
    point, input = model.hook_dict[name], example(model)
    for kind, register in torch_hooks(point):
        before, handle = point.visits, register()
        model(input)
        handle.remove()
        assert point.visits == before + 1, kind
        model(input)
        assert point.visits == before + 1, kind


# -- edits ----------------------------------------------------------------------------------------------------------


def every_point(model) -> list[str]:
    """All points outside the blocks and those of the first block of each kind, but for those that only choose."""
    kinds = {model.rows_for(layer): layer for layer in reversed(range(model.cfg.n_layers))}
    chosen = tuple(f"blocks.{layer}." for layer in kinds.values())
    some = [name for name in model.names if not name.startswith("blocks.") or name.startswith(chosen)]
    return [name for name in some if not model.names.points[name].chooses]


def continued(model) -> dict:
    """Options that make every point matter: a state to go on from, where there are states (a start state of zeros that
    the first position forgets, as Griffin's does, would make an edit of it vain)."""
    if not isinstance(model, gl.HookedLanguageModel):
        return {}
    with torch.no_grad():
        return {"state": model(example(model, seed=7), return_state=True)[1]}


@torch.no_grad()
@in_parts
def test_returned_and_in_place_edits_are_the_same_and_reach_the_output(model, part):
    input, options = example(model), continued(model)
    clean = model(input, **options)
    for name in every_point(model)[part]:

        def returned(x, hook):
            return x * 0.7 + 0.05

        def in_place(x, hook):
            x.mul_(0.7).add_(0.05)

        a = model.run_with_hooks(input, fwd_hooks=[(name, returned)], **options)
        b = model.run_with_hooks(input, fwd_hooks=[(name, in_place)], **options)
        assert torch.equal(a, b), name
        assert not torch.allclose(a, clean, rtol=1e-6, atol=1e-9), f"an edit of {name} has no effect"
    assert torch.equal(model(input, **options), clean)


@in_parts
def test_gradients_of_edits_are_exact_at_every_point(model, part):
    """d output / d (an edit along a random direction) by autograd equals central differences, in place and returned."""
    input = example(model)
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(model(input).shape, generator=generator, dtype=torch.float64)
    for name in every_point(model)[part]:
        directions = {}

        def push(size, returned, name=name, directions=directions):
            def edit(x, hook):
                if name not in directions:
                    directions[name] = torch.randn(x.shape, generator=generator, dtype=x.dtype)
                if returned:
                    return x + size * directions[name]
                x += size * directions[name]
                return None

            return (model.run_with_hooks(input, fwd_hooks=[(name, edit)]) * weight).sum()

        for returned in (True, False):
            size = torch.zeros((), dtype=torch.float64, requires_grad=True)
            (exact,) = torch.autograd.grad(push(size, returned), size)
            with torch.no_grad():
                whole, half = ((push(step, True) - push(-step, True)) / (2 * step) for step in (1e-5, 5e-6))
                numeric = (4 * half - whole) / 3  # the error of both by the third derivative is gone
            assert torch.allclose(exact, numeric, rtol=1e-5, atol=1e-7), (name, returned, exact, numeric)


@torch.no_grad()
def test_mixer_in_reaches_the_mixer_only(model):
    input = example(model)

    def zero(x, hook):
        x.zero_()

    with model.hooks([("blocks.0.hook_mixer_in", zero)]):
        _, cache = model.run_with_cache(input)
    _, clean = model.run_with_cache(input)
    assert torch.equal(cache["resid_pre", 0], clean["resid_pre", 0])
    moved = cache["blocks.0.hook_resid_mid" if "blocks.0.hook_resid_mid" in model.names else "blocks.0.hook_resid_post"]
    beside = [f"blocks.0.hook_{name}_out" for name in model.names.branches(0)[0] if name != "mixer"]
    rest = sum((clean[name] for name in beside), clean["resid_pre", 0])
    assert torch.allclose(moved, rest + cache["mixer_out", 0])
    assert not torch.allclose(cache["mixer_out", 0], clean["mixer_out", 0])


def set_at(t, value):
    def hook(x, hook):
        x[:, t] = value

    return hook


@torch.no_grad()
def test_decay_and_write_propagate_and_a_state_edit_stays():
    model = HookedMamba.tiny(dtype=torch.float64)
    tokens, t, block = example(model, pos=8), 3, "blocks.0.mixer."
    every = [f"{block}hook_{w}" for w in ("decay", "write", "state", "scan")]
    _, clean = model.run_with_cache(tokens, names_filter=every)
    for leaf in ("hook_decay", "hook_write"):
        with model.hooks([(block + leaf, set_at(t, 0.0))]):
            _, cache = model.run_with_cache(tokens, names_filter=every)
        changed = ~torch.isclose(cache["scan", 0], clean["scan", 0]).all(-1).all(0)
        assert changed.tolist() == [False] * t + [True] * (8 - t), leaf
    with model.hooks([(f"{block}hook_state", set_at(t, 0.0))]):
        _, cache = model.run_with_cache(tokens, names_filter=every)
    changed = ~torch.isclose(cache["scan", 0], clean["scan", 0]).all(-1).all(0)
    assert changed.nonzero().flatten().tolist() == [t]


@torch.no_grad()
def test_the_state_patch_sets_the_state_and_propagates():
    """DESIGN: set decay[t] := 0 and write[t] := the new state; the rest follows, as in a run that began there."""
    model = HookedMamba.tiny(dtype=torch.float64)
    tokens, t = example(model, pos=8), 3
    new = torch.randn(2, 32, 4, dtype=torch.float64)
    hooks = [("blocks.0.mixer.hook_decay", set_at(t, 0.0)), ("blocks.0.mixer.hook_write", set_at(t, new))]
    with model.hooks(hooks):
        patched, cache = model.run_with_cache(tokens, names_filter="blocks.0.mixer.hook_state")
    assert torch.allclose(cache["state", 0][:, t], new)
    with model.hooks(hooks):
        _, prefix = model(tokens[:, : t + 1], return_state=True)
    assert torch.allclose(prefix["scan", 0], new)
    assert relative(model(tokens[:, t + 1 :], state=prefix), patched[:, t + 1 :]) < 1e-12


# -- hooks ----------------------------------------------------------------------------------------------------------


def test_hooks_are_removed_also_after_an_exception(model):
    def fail(x, hook):
        raise RuntimeError("user")

    with pytest.raises(RuntimeError, match="user"):
        model.run_with_hooks(example(model), fwd_hooks=[("blocks.0.hook_resid_pre", fail)])
    assert not model.list_hooks()
    with pytest.raises(RuntimeError, match="user"), model.hooks([("blocks.*.hook_resid_pre", fail)]):
        model(example(model))
    assert not model.list_hooks()


def test_an_unknown_name_among_good_ones_adds_no_hook(model):
    hooks = [("blocks.0.hook_resid_pre", lambda x, hook: None), ("blocks.0.hook_resid_prx", lambda x, hook: None)]
    with pytest.raises(gl.PointError, match="Did you mean 'blocks.0.hook_resid_pre'"):
        model.run_with_hooks(example(model), fwd_hooks=hooks)
    assert not model.list_hooks()


def test_add_hook_takes_globs_and_predicates_and_reset_removes_them(model):
    seen = []
    model.add_hook("blocks.*.hook_resid_post", lambda x, hook: seen.append(hook.name))
    model.add_hook(lambda name: name == "blocks.0.hook_mixer_out", lambda x, hook: seen.append(hook.name))
    model(example(model))
    assert seen == ["blocks.0.hook_mixer_out", *(f"blocks.{i}.hook_resid_post" for i in range(model.cfg.n_layers))]
    model.reset_hooks()
    model(example(model))
    assert len(seen) == 1 + model.cfg.n_layers


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x[:, :1], "returned shape"),
        (lambda x: x.float(), "float32; the activation is torch.float64"),
        (lambda x: 3, "returned int"),
        (lambda x: x.to("meta"), "on meta"),
    ],
)
def test_a_hook_that_returns_something_else_is_named(model, make, message):
    with pytest.raises(gl.HookError, match=message) as error:
        model.run_with_hooks(example(model), fwd_hooks=[("blocks.1.hook_mixer_out", lambda x, hook: make(x))])
    assert "blocks.1.hook_mixer_out" in str(error.value)
    assert not model.list_hooks()


def test_a_hook_on_a_layer_that_is_not_run_raises(model):
    with pytest.raises(gl.PointError, match=r"blocks.1.hook_mixer_out.*never ran"):
        model.run_with_hooks(
            example(model), fwd_hooks=[("blocks.1.hook_mixer_out", lambda x, hook: None)], stop_at_layer=1
        )


@torch.no_grad()
def test_stop_and_start_at_layer(model):
    input = example(model)
    whole, cache = model.run_with_cache(input)
    resid = model(input, stop_at_layer=1)
    assert torch.equal(resid, cache["resid_post", 0])
    assert torch.equal(model(input, stop_at_layer=1 - model.cfg.n_layers), resid)
    assert relative(model(resid, start_at_layer=1, **earlier(model, input)), whole) < 1e-12
    assert model(input, return_type=None) is None
    with pytest.raises(gl.InputError, match="stop_at_layer=99"):
        model(input, stop_at_layer=99)


def test_the_table_has_a_row_for_every_point(model):
    table = model.hook_table(layer=None)
    assert [row["name"] for row in table] == list(model.names)
    assert list(table.to_dataframe().columns) == list(table.rows[0])
    assert "hook_resid_pre" in str(table) and "<table>" in table._repr_html_()
    row = table["blocks.0.hook_resid_pre"]
    assert row["shape"] == ("batch", "pos", model.cfg.d_model) and row["bytes_per_token"] == 8 * model.cfg.d_model
    assert len(model.hook_table()) == len(
        [n for n in model.names if not n.startswith("blocks.") or n.startswith("blocks.0.")]
    )


def test_models_can_be_copied_and_moved(model):
    twin, input = copy.deepcopy(model), example(model)
    assert torch.equal(twin(input), model(input))
    twin.to(torch.float32)
    assert twin.cfg.dtype == torch.float32 and model.cfg.dtype == torch.float64
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    with torch.no_grad():
        for p in twin.double().parameters():
            p.mul_(0.5)
    assert not torch.equal(twin(input), model(input))


def test_the_mode_is_that_of_the_wrapped_model(model):
    assert model.training == model.wrapped.training


@torch.no_grad()
def test_a_run_without_output_fires_every_point_all_the_same(model):
    inputs = example(model)
    _, whole = model.run_with_cache(inputs)
    out, cache = model.run_with_cache(inputs, return_type=None)
    assert out is None and list(cache.keys()) == list(whole.keys())
    assert all(torch.equal(cache[name], whole[name]) for name in whole.cache_dict)
    seen = []
    assert (
        model.run_with_hooks(inputs, return_type=None, fwd_hooks=[("hook_logits", lambda x, hook: seen.append(x))])
        is None
    )
    assert len(seen) == 1
