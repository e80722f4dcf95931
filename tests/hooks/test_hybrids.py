"""Across what mixes tokens in a hybrid: implicit attention, cuts, edges and ablations by kind, against loops by hand."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens.circuits import Graph
from tests.circuits.helpers import METRIC, gradient, measured, put
from tests.helpers import relative
from tests.hooks.hybrids import HYBRIDS, TWO, hybrid

TOKENS, OTHER = (torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
MIXING = ("recurrent", "attention", "conv")


def everything(name):
    return True


@pytest.fixture(params=HYBRIDS)
def model(request):
    found = hybrid(request.param)
    yield found
    assert not found.list_hooks()


@pytest.fixture(params=TWO)
def twofold(request):
    """A model whose layers mix tokens twice."""
    return hybrid(request.param)


def own_of(model):
    """[(layer, place, role)] of every mixer, read off the points: each that has an output is one."""
    found = []
    for layer in range(model.cfg.n_layers):
        stem = f"blocks.{layer}."
        names = [name.removeprefix(stem) for name in model.names.points if name.startswith(stem)]
        for name in names:
            if name.endswith("attn.hook_pattern"):
                found.append((layer, name.removesuffix(".hook_pattern"), "attention"))
            elif name == "mixer.hook_reset":
                found.append((layer, "mixer", "recurrent"))
            elif name == "mixer.hook_in_gate":
                found.append((layer, "mixer", "conv"))
    return found


# -- which is meant -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_each_kind_is_found_wherever_it_stands(model):
    every = own_of(model)
    stack = gl.implicit_attention(model, TOKENS)
    assert sorted(stack.mixers) == sorted((layer, place) for layer, place, _ in every)
    for kind in MIXING:
        own = [(layer, place) for layer, place, role in every if role == kind]
        if not own:
            continue
        where = gl.layers.where(kind=kind)
        assert where.of(model) == sorted({layer for layer, _ in own})
        assert gl.implicit_attention(model, TOKENS, layers=where).mixers == tuple(own)
        assert stack[where].mixers == tuple(own)
        last = gl.layers.where(kind=kind, layers=[own[-1][0]])
        assert gl.implicit_attention(model, TOKENS, layers=[last]).mixers == tuple(own[-1:])
    assert all(where in model.blocks[layer].kinds for layer, _, where in every)


@torch.no_grad()
def test_the_parts_of_a_stack_of_two_mixers_a_layer(twofold):
    stack = gl.implicit_attention(twofold, TOKENS)
    place = "attn" if twofold.cfg.family == "Falcon-H1" else "shared.attn"
    layers = [layer for layer in set(stack.layers) if stack.layers.count(layer) == 2]
    assert stack[layers[0]].mixer.place == "mixer", "the one that writes to the stream first"
    assert stack[layers[0], place].mixer.place == stack[-1, place].mixer.place == place
    assert f"{layers[0]}.{place}" in stack.names and f"{layers[0]}.mixer" in stack.names
    assert len(stack[layers]) == 2 * len(layers) and len(stack[layers[0] : layers[0] + 1]) == 2
    alone = stack[gl.layers.where(kind="attention")]
    assert alone.names == alone.layers and alone[layers[0]].mixer.place == place
    with pytest.raises(gl.InputError, match="this stack of .* holds the layers"):
        alone[layers[0], "mixer"]
    with pytest.raises(gl.InputError, match="mixes tokens at"):
        stack[layers[0], "mlp"]
    with pytest.raises(gl.InputError, match="chains one mixer a layer"):
        gl.attribution.rollout(twofold, TOKENS, start_layer=0, mode="official")
    scores = gl.attribution.rollout(twofold, TOKENS, layers=gl.layers.where(kind="recurrent"), mode="official").scores
    assert scores.shape == TOKENS.shape
    drawn = gl.plot.layers(gl.implicit_attention(twofold, TOKENS[:1]))
    assert [ax.get_title() for ax in drawn.axes][: len(stack)] == [
        f"layer {name}" if isinstance(name, int) else name for name in stack.names
    ]


def test_a_kind_that_is_in_no_layer_that_is_meant_is_named():
    model = hybrid("Bamba")
    with pytest.raises(gl.InputError, match="none of these layers of .* is of this kind; 1 are"):
        gl.layers.where(kind="attention", layers=[0]).of(model)
    with pytest.raises(gl.InputError, match="no layer of"):
        gl.implicit_attention(model, TOKENS, layers=gl.layers.where("conv"))


# -- implicit attention -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_operators_of_all_kinds_are_exact(model):
    """A x + r and its views; what positions bring to the stream sums to what the mixer wrote."""
    _, cache = model.run_with_cache(TOKENS)
    stack = gl.implicit_attention(cache)
    assert stack.check().relative < 1e-11
    for (layer, place), A in zip(stack.mixers, stack, strict=True):
        block = model.blocks[layer]
        wanted = cache[f"blocks.{layer}.{block.written(place)}"]
        given = A.contributions()
        assert relative(given.output(), wanted) < 1e-11
        assert relative(sum(given.column(j) for j in range(8)) + given.remainder(), wanted) < 1e-11


@torch.no_grad()
def test_a_rollout_chains_what_stands_in_a_layer(model):
    stack = gl.implicit_attention(model, TOKENS)
    mean = {one: A.dense().mean(1) for one, A in zip(stack.mixers, stack, strict=True)}
    one = torch.eye(8, dtype=torch.float64).expand(2, 8, 8)
    total, back = one, []
    for layer in range(model.cfg.n_layers):
        block, step = model.blocks[layer], one.clone()
        inside = one + sum(mean[layer, part.mixer] for part in block.inner) if block.inner else one
        for place in block.mixing.values():
            step = step + mean[layer, place] @ inside
        total = step @ total
        back.append(step)
    assert relative(stack.rollout(progress=False), total) < 1e-11
    found = gl.attribution.rollout(model, TOKENS, factors="all", own=True).scores
    assert relative(found, total[:, -1]) < 1e-11
    for kind in MIXING:
        own = [one for one in stack.mixers if model.blocks[one[0]].mixer_at(one[1]).role == kind]
        if own:  # alone, each counts as written to the stream itself
            alone = torch.eye(8, dtype=torch.float64).expand(2, 8, 8)
            for which in own:
                alone = alone + mean[which] @ alone
            where = gl.layers.where(kind=kind)
            assert relative(gl.implicit_attention(model, TOKENS, layers=where).rollout(progress=False), alone) < 1e-11
            assert (
                relative(
                    gl.attribution.rollout(model, TOKENS, layers=where, factors="all", own=True).scores, alone[:, -1]
                )
                < 1e-11
            )


@torch.no_grad()
def test_profiles_are_those_of_each(model):
    stack = gl.implicit_attention(model, TOKENS)
    found = stack.profiles(progress=False)
    for number, A in enumerate(stack):
        for got, want in zip(found, gl.profiles.of_layer(A), strict=True):
            assert torch.allclose(got[number], want, atol=1e-12)
    assert torch.equal(stack.mean(progress=False)[-1], next(reversed(list(stack))).mean())
    attention = gl.implicit_attention(model, TOKENS, layers=gl.layers.where("attention"))
    by_head = attention.profiles(progress=False, heads=slice(None))
    patterns = [A.branches[0].scan.pattern for A in attention]
    assert by_head.sharpness.shape[2] == patterns[0].shape[1], "the heads of an attention, whatever they are called"


def test_gradient_attention_weighs_each_by_what_it_wrote(twofold):
    """Step by step as the rollout, with relu(E grad y * E A) in place of E A."""
    model = twofold
    stack = gl.implicit_attention(model, TOKENS)
    points = {one: f"blocks.{one[0]}.{model.blocks[one[0]].written(one[1])}" for one in stack.mixers}
    leaves = {}

    def leaf(x, hook):
        leaves[hook.name] = x.detach().clone().requires_grad_() if hook.name not in leaves else leaves[hook.name]
        return x + (leaves[hook.name] - leaves[hook.name].detach())

    logits = model.run_with_hooks(TOKENS, fwd_hooks=[(name, leaf) for name in points.values()])
    logits[:, -1, 3].sum().backward(inputs=list(leaves.values()))
    one = torch.eye(8, dtype=torch.float64).expand(2, 8, 8)
    weighed = {
        which: (leaves[points[which]].grad.mean(-1).unsqueeze(2) * A.dense().mean(1).detach()).clamp(min=0)
        for which, A in zip(stack.mixers, stack, strict=True)
    }
    total = one
    for layer, block in enumerate(model.blocks):
        inside = one + sum(weighed[layer, part.mixer] for part in block.inner) if block.inner else one
        total = (one + sum(weighed[layer, place] @ inside for place in block.mixing.values())) @ total
    found = gl.attribution.gradient_attention(model, TOKENS, target=3, factors="all", own=True).scores
    assert relative(found, total[:, -1]) < 1e-9


# -- cuts -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_cut_is_of_the_kind_that_is_meant(model):
    """In the first layer that it changes, the target loses A[i, j] x_j, and what is of another kind there nothing."""
    _, plain = model.run_with_cache(TOKENS)
    every = own_of(model)
    for layer, place, role in every:
        with gl.knockout.cut(2, -1, layers=gl.layers.where(kind=role, layers=layer)).on(model):
            _, cache = model.run_with_cache(TOKENS)
        A = gl.implicit_attention(plain, layer=layer, place=place)
        name = A.mixer.output_name
        want = plain[name].flatten(2).clone()
        want[:, -1] -= A.dense()[:, :, -1, 2] * A.content()[:, 2]
        assert relative(cache[name].flatten(2), want) < 1e-11
        for other, at, _ in every:
            beside = model.blocks[other].mixer_at(at).output_name
            if other < layer or (
                other == layer and at != place and at in model.blocks[layer].mixing.values() and place != "shared.attn"
            ):
                assert torch.equal(cache[beside], plain[beside])


@torch.no_grad()
def test_without_a_kind_a_layer_is_cut_in_all_that_mixes_its_tokens(twofold):
    layer = twofold.cfg.n_layers - 1
    with gl.knockout.cut(2, -1, layers=layer).on(twofold):
        both = twofold(TOKENS)
    kinds = [gl.knockout.cut(2, -1, layers=gl.layers.where(kind, layers=layer)) for kind in ("attention", "recurrent")]
    with (kinds[0] + kinds[1]).on(twofold):
        assert torch.equal(twofold(TOKENS), both)
    alone = [twofold.run_with_hooks(TOKENS, fwd_hooks=one.hooks(twofold)) for one in kinds]
    assert all(relative(one, both) > 1e-8 and relative(one, twofold(TOKENS)) > 1e-8 for one in alone)
    with gl.knockout.cut_renormalised(2, -1, layers=gl.layers.where("attention", layers=layer)).on(twofold):
        assert relative(twofold(TOKENS), both) > 1e-8
    both = gl.knockout.cut_renormalised(2, -1, layers=layer)
    with pytest.raises(gl.InputError, match="where.kind='attention'"), both.on(twofold):
        twofold(TOKENS)


@torch.no_grad()
def test_a_sweep_of_cuts_is_of_the_kind_that_is_meant(model):
    base = measured(model, TOKENS).mean()
    for kind in sorted({role for *_, role in own_of(model)}):
        where = gl.layers.where(kind=kind)
        found = gl.knockout.sweep(model, TOKENS, METRIC, dst=-1, src=[1, 3], layers=where, progress=False)
        assert found["layer"] == where.of(model)
        for row, layer in enumerate(found["layer"]):
            for column, src in enumerate((1, 3)):
                cut = gl.knockout.cut(src, -1, layers=gl.layers.where(kind, layers=layer))
                value = measured(model, TOKENS, cut.hooks(model)).mean()
                assert torch.allclose(found.values[row, column], (value - base) / base.abs(), rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("kind", [None, "attention", "recurrent"])
@pytest.mark.parametrize("name", ["Falcon-H1", "Zamba2", "Zamba", "Granite", "Nemotron-H"])
def test_gather_and_aggregate_are_the_edges_of_each_role(name, kind):
    model = hybrid(name)
    layers = None if kind is None else gl.layers.where(kind=kind)
    segments = [slice(0, 3), [3, 4, 5]]
    found = gl.knockout.gather_and_aggregate(model, TOKENS, METRIC, segments, layers=layers, progress=False)
    base = measured(model, TOKENS).mean()
    edges = {"gather": [([0, 1], 2), ([3, 4], 5)], "aggregate": [([2, 5], -1)]}
    own = [(layer, role) for layer, _, role in own_of(model) if kind in (None, role)]
    assert found["role"] == list(edges) and found["layer"] == [*dict.fromkeys(layer for layer, _ in own), "all"]
    for role, pairs in edges.items():
        for layer in found["layer"]:
            numbers = found["layer"][:-1] if layer == "all" else layer
            some = numbers if kind is None else gl.layers.where(kind, layers=numbers)
            value = measured(model, TOKENS, gl.knockout.pairs(pairs, layers=some).hooks(model)).mean()
            got = found.at(role=role, layer=layer).values
            assert torch.allclose(got, (value - base) / base.abs(), rtol=0, atol=1e-10), (role, layer)
    with pytest.raises(gl.InputError, match="has nothing to gather"):
        gl.knockout.gather_and_aggregate(model, TOKENS, METRIC, [slice(0, 1)], progress=False)
    with pytest.raises(gl.InputError, match="give several"):
        gl.knockout.gather_and_aggregate(model, TOKENS, METRIC, [], progress=False)


@torch.no_grad()
def test_gather_and_aggregate_of_padded_rows_and_some_heads():
    model = hybrid("Falcon-H1")
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    mask[0, :2] = False
    options = {
        "segments": [slice(0, 3), slice(3, 5)],
        "progress": False,
        "layers": gl.layers.where("recurrent"),
        "head": 1,
    }
    found = gl.knockout.gather_and_aggregate(model, TOKENS, METRIC, attention_mask=mask, **options)
    base = measured(model, TOKENS, attention_mask=mask).mean()
    cut = gl.knockout.pairs([([0, 1], 2), ([3], 4)], layers=gl.layers.where("recurrent", layers=1), head=1)
    value = measured(model, TOKENS, cut.hooks(model), attention_mask=mask).mean()
    assert torch.allclose(found.at(role="gather", layer=1).values, (value - base) / base.abs(), rtol=0, atol=1e-10)


# -- edges ------------------------------------------------------------------------------------------------------------


def stores(model, tokens):
    with torch.no_grad():
        return model.run_with_cache(tokens, names_filter=everything)[1]


def test_the_residual_graph_has_every_part_that_mixes_tokens(model):
    graph = Graph.of(model)
    cache = stores(model, TOKENS)
    for receiver in graph.receivers:
        for point, senders in graph.readings(receiver):
            total = sum(cache[sender.writes] for sender in senders)
            assert relative(total, cache[point]) < 1e-11, receiver
    for layer, place, _ in own_of(model):
        name = place.removesuffix(".attn") if "." in place else None
        names = (
            [f"{layer}.{name}"]
            if name
            else [f"{layer}.{key}" for key, at in model.blocks[layer].mixing.items() if at == place]
        )
        assert graph.find(names[0])


def test_edge_attribution_is_its_formula_across_kinds(model):
    good, bad = stores(model, TOKENS), stores(model, OTHER)
    graph, found = Graph.of(model), gl.circuits.eap(model, TOKENS, OTHER, METRIC)
    assert len(found) == len(graph.edges())
    for receiver in graph.receivers:
        wanted = dict.fromkeys(graph.before(receiver), 0.0)
        for point, senders in graph.readings(receiver):
            slope = gradient(model, OTHER, point, bad[point])
            for sender in senders:
                wanted[sender] += float(((good[sender.writes] - bad[sender.writes]) * slope).sum((1, 2)).mean())
        for sender, want in wanted.items():
            assert found.score(sender.name, receiver.name) == pytest.approx(want, abs=1e-9)


@torch.no_grad()
def test_edges_and_circuits_are_exact_across_kinds(twofold):
    model = twofold
    good, bad = stores(model, TOKENS), stores(model, OTHER)
    graph, base = Graph.of(model), measured(model, OTHER)
    found = gl.circuits.edge_patch(model, TOKENS, OTHER, METRIC, progress=False)
    for edge in graph.edges():
        sender, receiver = graph.find(edge.sender), graph.find(edge.receiver)
        moved = good[sender.writes] - bad[sender.writes]
        hooks = [(point, put(bad[point] + moved)) for point, senders in graph.readings(receiver) if sender in senders]
        want = (measured(model, OTHER, hooks) - base).mean()
        assert found.score(*edge) == pytest.approx(float(want), abs=1e-10), edge
    nothing, all_of_it = found.top(0), found
    assert relative(nothing.run(model, TOKENS, OTHER), model(OTHER)) < 1e-11
    assert relative(all_of_it.run(model, TOKENS, OTHER), model(TOKENS)) < 1e-11
    if model.cfg.family != "Falcon-H1":
        shared = next(name for name in graph.names if name.endswith(".shared"))
        layer = int(shared.partition(".")[0])
        assert [edge.receiver for edge in graph.edges() if edge.sender == shared] == [f"{layer}.mixer"]
        with pytest.raises(gl.InputError, match=f"'{shared}' does not reach 'logits': .* come {layer}.mixer"):
            gl.circuits.path_patch(model, TOKENS, OTHER, METRIC, shared)
        by = gl.circuits.path_patch_senders(model, TOKENS, OTHER, METRIC, "logits", progress=False)
        assert shared not in by["sender"]


# -- ablations --------------------------------------------------------------------------------------------------------


def removed(model, mixers, entries=None):
    """The hooks that zero what these mixers hand to their output projections, or some entries of it."""

    def hook(x, hook):
        x = x.clone()
        x[..., slice(None) if entries is None else entries] = 0
        return x

    return [(model.blocks[layer].mixer_at(place).output_name, hook) for layer, place, _ in mixers]


@torch.no_grad()
def test_ablations_by_kind_are_runs_without_it(model):
    base, every = measured(model, TOKENS).mean(), own_of(model)
    found = gl.ablation.by_kind(model, TOKENS, METRIC, progress=False)
    kinds = sorted({role for *_, role in every})
    assert found.axes == ("without",) and found["without"][: len(kinds)] == kinds
    assert found["without"][-1] == " + ".join(kinds)
    for said, value in zip(found["without"], found.values, strict=True):
        own = [one for one in every if one[2] in said.split(" + ")]
        want = (measured(model, TOKENS, removed(model, own)).mean() - base) / base.abs()
        assert torch.allclose(value, want, rtol=0, atol=1e-10), said
    layers = gl.ablation.by_layer(model, TOKENS, METRIC, progress=False)
    for row, layer in enumerate(layers["layer"]):
        here = [one for one in every if one[0] == layer]
        for said, value in zip(layers["without"], layers.values[row], strict=True):
            own = [one for one in here if one[2] in said.split(" + ")]
            if {role for *_, role in own} != set(said.split(" + ")):
                assert value.isnan()
                continue
            want = (measured(model, TOKENS, removed(model, own)).mean() - base) / base.abs()
            assert torch.allclose(value, want, rtol=0, atol=1e-10), (layer, said)


@torch.no_grad()
@pytest.mark.parametrize("name", ["Falcon-H1", "Zamba2", "Bamba"])
def test_ablations_by_head_are_runs_without_it(name):
    model = hybrid(name)
    base = measured(model, TOKENS).mean()
    for kind, axis in (("attention", "q_head"), ("recurrent", "head")):
        found = gl.ablation.by_head(model, TOKENS, METRIC, kind, progress=False)
        own = [one for one in own_of(model) if one[2] == kind]
        assert found["layer"] == [layer for layer, *_ in own] and len(found["head"]) == model.cfg.sizes[axis]
        for row, mixer in enumerate(own):
            for head in found["head"]:
                point = model.blocks[mixer[0]].mixer_at(mixer[1]).output_name
                with gl.ablation.zero(point, **{axis: head}).on(model):
                    want = (METRIC(model(TOKENS)).mean() - base) / base.abs()
                assert torch.allclose(found.values[row, head], want, rtol=0, atol=1e-10)
    with pytest.raises(gl.InputError, match="kind='mixer'"):
        gl.ablation.by_head(model, TOKENS, METRIC, "mixer", progress=False)


@torch.no_grad()
def test_ablations_may_put_a_mean_in():
    model = hybrid("Falcon-H1")
    names = ["blocks.*.mixer.hook_gated", "blocks.*.attn.hook_z"]
    means = gl.ablation.means(model, [OTHER], names, progress=False)
    found = gl.ablation.by_kind(model, TOKENS, METRIC, means=means, progress=False)
    base = measured(model, TOKENS).mean()
    with gl.ablation.mean(names[1], means).on(model):
        want = (METRIC(model(TOKENS)).mean() - base) / base.abs()
    assert torch.allclose(found.at(without="attention").values, want, rtol=0, atol=1e-10)
    with pytest.raises(gl.PointError, match="not the means of"):
        gl.ablation.by_kind(model, TOKENS, METRIC, means=gl.ablation.means(model, [OTHER], names[:1]), progress=False)
    with pytest.raises(gl.InputError, match="per position"):
        every = gl.ablation.means(model, [OTHER], names, per_position=True, progress=False)
        gl.ablation.by_kind(model, TOKENS, METRIC, means=every, progress=False)
    with pytest.raises(gl.PointError, match="has no axis 'head'|no axis head|lacks"):
        gl.ablation.by_head(hybrid("Jamba"), TOKENS, METRIC, "recurrent", progress=False)


@torch.no_grad()
def test_what_one_path_does_that_the_other_does_not():
    """Of a model whose answer hangs on the attention alone: without it all is gone, without the scan nothing."""
    model = hybrid("Falcon-H1")
    with gl.ablation.zero("blocks.*.mixer.hook_gated").on(model):
        found = gl.ablation.by_layer(model, TOKENS, METRIC, progress=False)
        whole = gl.ablation.by_kind(model, TOKENS, METRIC, progress=False)
    assert found.at(without="recurrent").values.abs().max() == 0 and whole.at(without="recurrent").values == 0
    a, both = (found.at(without=said).values for said in ("attention", "attention + recurrent"))
    assert torch.equal(a, both) and a.abs().max() > 1e-4
