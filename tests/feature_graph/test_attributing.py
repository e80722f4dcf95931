"""Feature graphs: every target is the sum of its edges, on every architecture; edges by hand, and by frozen runs."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens.dictionaries import Dictionary, JumpReLU, TopK
from gatedlens.feature_graph import attribute
from gatedlens.hooks.mamba import HookedMamba
from tests.feature_graph.dictionaries import random_dictionary, three
from tests.helpers import example

TARGETS = [3, (1, 2)]


def graph_of(model, tokens, dictionaries=(), **options):
    return attribute(model, tokens, dictionaries, progress=False, **{"logits": TARGETS, **options})


@pytest.fixture(scope="module")
def mamba():
    return HookedMamba.tiny(seed=0, dtype=torch.float64)


# -- nothing is lost ------------------------------------------------------------------------------------------------


def test_every_target_is_the_sum_of_its_edges(lm):
    """With random dictionaries and with none; and what the sums are is what the model and the dictionaries say."""
    tokens = example(lm)[:1]
    logits = lm(tokens)[0, -1].detach()
    without = graph_of(lm, tokens)
    assert without.check().absolute < 1e-10 and without.of("mixer")
    dictionaries = three(lm, tokens)
    graph = graph_of(lm, tokens, dictionaries, mixers=True)
    assert graph.check().absolute < 1e-10
    wanted = [float(logits[3]), float(logits[1] - logits[2])]
    for one in (without, graph):
        assert torch.allclose(
            torch.tensor([one.value(node) for node in one.of("logit")]).double(), torch.tensor(wanted).double()
        )
    with torch.no_grad():
        _, cache = lm.run_with_cache(tokens, names_filter=[one.point for one in dictionaries])
    for one in dictionaries:
        features = one.encode(cache[one.point].flatten(2))[0]
        nodes = [node for node in graph.of("feature") if node.point == one.out_point]
        assert len(nodes) == int((features > 0).sum()) > 0
        assert all(abs(node.activation - float(features[node.pos, node.number])) < 1e-12 for node in nodes)


def test_interventions_in_a_frozen_run_are_what_the_edges_say(lm):
    """A feature, a mixer's write, an error and a token clamped: along their own edges alone, and through all nodes."""
    tokens = example(lm)[:1]
    graph = graph_of(lm, tokens, three(lm, tokens)[:2], mixers=True)
    clamped = {graph.of(kind)[len(graph.of(kind)) // 2]: 0.3 for kind in ("feature", "mixer", "error", "token")}
    for through in ([], None):
        done = graph.intervene(clamped, through)
        assert done.rounding < 1e-10 * max(1, float(done.predicted.values.abs().max()))
    assert done.predicted.values.abs().max() > 1e-6


def test_in_float32_it_holds_to_1e_5(recall_model):
    batch = gl.tasks.recall(1, seed=0)
    dictionaries = [random_dictionary(recall_model, batch.tokens, "blocks.0.hook_resid_post", n=64)]
    graph = graph_of(recall_model, batch.tokens, dictionaries, logits=None)
    assert graph.check().relative < 1e-5 and graph.check().absolute < 1e-4


@torch.no_grad()
def test_an_edge_by_hand(mamba):
    """Feature -> feature and feature -> logit through the last layer: norms by their scales, the mixer by its matrix."""
    tokens, w = example(mamba)[:1], mamba.wrapped
    last = mamba.cfg.n_layers - 1
    sae = random_dictionary(mamba, tokens, f"blocks.{last}.hook_resid_pre", activation=JumpReLU(0.05))
    gated = random_dictionary(mamba, tokens, f"blocks.{last}.mixer.hook_gated", seed=1)
    with torch.no_grad():
        cache = mamba.run_with_cache(tokens)[1]
    A = gl.implicit_attention(cache, layer=last).dense()[0]  # channel dst src
    layer = w.backbone.layers[last]
    to_x = layer.mixer.in_proj.weight[: A.shape[0]] * layer.norm.weight  # channel d_model
    before, after = cache[f"blocks.{last}.ln1.hook_scale"][0], cache["ln_final.hook_scale"][0]
    to_logit = w.backbone.norm_f.weight * w.lm_head.weight[3] / after[-1]

    def passed(node):
        """What a feature's write is behind A: at each position and channel."""
        x = to_x @ (node.activation * sae.W_dec[node.number] / before[node.pos])
        return (A[:, :, node.pos] * x.unsqueeze(1)).T

    plain = graph_of(mamba, tokens, [sae])
    for node in plain.of("feature")[::3]:
        write = passed(node) @ layer.mixer.out_proj.weight.T
        write[node.pos] += node.activation * sae.W_dec[node.number]
        found = {edge.source: edge.weight for edge in plain.into(plain.of("logit")[0])}
        assert abs(found.get(node.id, 0.0) - float(write[-1] @ to_logit)) < 1e-12
    both = graph_of(mamba, tokens, [sae, gated])
    assert both.check().absolute < 1e-10
    target = [node for node in both.of("feature") if node.point == gated.point][-1]
    found = {edge.source: edge.weight for edge in both.into(target)}
    for node in (node for node in both.of("feature") if node.point == sae.point):
        by_hand = float(passed(node)[target.pos] @ gated.W_enc[:, target.number])
        assert abs(found.get(node.id, 0.0) - by_hand) < 1e-12


# -- options --------------------------------------------------------------------------------------------------------


def test_features_beyond_the_limit_are_counted_with_errors(mamba):
    tokens = example(mamba)[:1]
    dictionaries = three(mamba, tokens)
    whole = graph_of(mamba, tokens, dictionaries)
    for batch_size in (3, 50):
        few = graph_of(mamba, tokens, dictionaries, max_nodes=9, batch_size=batch_size)
        assert few.check().absolute < 1e-10 and len(few.of("feature")) == 9
        assert few.facts["counted with errors"] == len(whole.of("feature")) - 9
        for target in (*few.of("feature"), *few.of("logit")):
            known = {edge.source: edge.weight for edge in whole.into(target)}
            sources = [edge for edge in few.into(target) if few.node(edge.source).kind != "error"]
            assert all(abs(edge.weight - known[edge.source]) < 1e-12 for edge in sources)
    assert few.intervene({few.of("feature")[0]: 0.0}).rounding < 1e-12


def test_mixers_are_nodes_where_there_are_no_dictionaries(mamba):
    tokens = example(mamba)[:1]
    graph = graph_of(mamba, tokens)
    assert len(graph.of("mixer")) == mamba.cfg.n_layers * tokens.shape[1] and not graph.of("error")
    write = mamba.run_with_cache(tokens)[1]["blocks.1.hook_mixer_out"][0]
    assert all(
        abs(node.activation - float(write[node.pos].norm())) < 1e-12 for node in graph.of("mixer") if node.layer == 1
    )
    through = graph_of(mamba, tokens, mixers=False)
    assert not through.of("mixer") and through.check().absolute < 1e-10


@pytest.mark.parametrize("hooked", [HookedMamba, gl.HookedGriffin, gl.HookedRWKV])
def test_padding_is_left_out(hooked):
    lm = hooked.tiny(seed=0, dtype=torch.float64)
    tokens = example(lm)[:1]
    padded = torch.cat([torch.zeros_like(tokens[:, :2]), tokens], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :2] = 0
    alone, found = graph_of(lm, tokens, pos=2), graph_of(lm, padded, attention_mask=mask, pos=2)
    assert [node.id for node in found.nodes] == [node.id for node in alone.nodes]
    assert torch.allclose(found.adjacency, alone.adjacency, atol=1e-12)
    assert len(found.words) == 3  # what comes behind plays no part


def test_packed_documents_do_not_meet(mamba):
    tokens = example(mamba)[:1]
    length = tokens.shape[1]
    ids = torch.tensor([[*range(3), *range(length - 3)]])
    graph = graph_of(mamba, tokens, three(mamba, tokens)[:1], position_ids=ids)
    alone = graph_of(mamba, tokens[:, 3:], three(mamba, tokens)[:1])
    assert graph.check().absolute < 1e-10
    logit = graph.of("logit")[0]
    assert {graph.node(edge.source).pos for edge in graph.into(logit)} - {0} <= set(range(3, length))
    assert abs(graph.value(logit) - alone.value(alone.of("logit")[0])) < 1e-12


def test_the_most_likely_tokens_are_explained_by_default(mamba):
    tokens = example(mamba)[:1]
    graph = graph_of(mamba, tokens, logits=None)
    p = mamba(tokens)[0, -1].softmax(-1)
    nodes = graph.of("logit")
    assert 1 <= len(nodes) <= 10 and nodes[0].number == int(p.argmax())
    assert torch.allclose(graph.probability[-len(nodes) :], p[[node.number for node in nodes]])


def test_a_graph_is_made_without_gradients_of_the_callers_and_leaves_no_hook(mamba):
    tokens = example(mamba)[:1]
    with torch.no_grad():
        graph_of(mamba, tokens, three(mamba, tokens))
    refused(mamba, "has 3 parts", logits=[(1, 2, 3)])
    with torch.inference_mode():
        refused(mamba, "torch.inference_mode forbids them")
    assert not mamba.list_hooks() and all(p.grad is None for p in mamba.wrapped.parameters())


# -- what is refused ------------------------------------------------------------------------------------------------


def refused(model, said, dictionaries=(), **options):
    with pytest.raises(gl.InputError, match=said):
        graph_of(model, options.pop("tokens", example(model)[:1]), dictionaries, **options)


def test_dictionaries_that_do_not_fit_are_refused(mamba):
    tokens, d = example(mamba)[:1], mamba.cfg.d_model
    here, there, inside = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.0.mixer.hook_u"
    post = random_dictionary(mamba, tokens, here)

    def ones(d_in, point, out_point=None, **options):
        d_out = options.pop("d_out", d_in)
        return Dictionary(torch.ones(d_in, 4), torch.ones(4, d_out), point=point, out_point=out_point, **options)

    refused(mamba, f"reads {d - 1} numbers at {here}, where the model has {d}", [ones(d - 1, here)])
    refused(mamba, f"Two dictionaries write {here}", [post, post])
    refused(mamba, "does not carry this point.*mixer.hook_gated", [random_dictionary(mamba, tokens, inside)])
    refused(mamba, "comes before", [ones(d, there, here)])
    refused(mamba, "this one is of several", [ones(2 * d, [here, there], there, d_ins=[d, d], d_out=d)])
    with pytest.raises(gl.PointError, match="hook_resid_psot"):
        graph_of(mamba, tokens, [ones(d, "blocks.0.hook_resid_psot")])


def test_an_edit_inside_a_recurrence_is_refused_and_one_of_the_stream_is_held(mamba):
    tokens = example(mamba)[:1]
    with gl.ablation.zero("blocks.0.mixer.hook_scan").on(mamba):
        refused(mamba, "another hook edits inside its recurrence.*a feature graph", tokens=tokens)
    with gl.ablation.zero("blocks.1.hook_mixer_in", pos=2).on(mamba):
        graph = graph_of(mamba, tokens, three(mamba, tokens))
        assert graph.check().absolute < 1e-10
        assert abs(graph.value(graph.of("logit")[0]) - float(mamba(tokens)[0, -1, 3].detach())) < 1e-12


def test_targets_and_inputs_that_are_none_are_refused(mamba):
    refused(mamba, "a feature is no target of its own", logits=[mamba.cfg.d_vocab])
    refused(mamba, "a target is a logit", logits=[1.5])
    refused(mamba, "has 3 parts", logits=[(1, 2, 3)])
    refused(mamba, "name a token", logits=[])
    refused(mamba, "one prompt; this input has 2 rows", tokens=example(mamba))
    refused(mamba, "pos=99 is out of range", pos=99)
    refused(mamba, "batch_size=0", batch_size=0)
    refused(mamba, "max_nodes=-1", max_nodes=-1)


@pytest.mark.parametrize("options", [{"axes": ("value",)}, {"index": {"head": 1}}])
def test_a_dictionary_of_heads_reads_each_by_itself(options):
    """Of every head, or of one: features head by head, each made of its own head alone, and all else in the errors."""
    model = gl.HookedMamba2.tiny(seed=0, dtype=torch.float64)
    tokens, point = example(model)[:1], "blocks.1.mixer.hook_gated"
    heads, width = model.cfg.sizes["head"], model.cfg.sizes["value"]
    draw = torch.Generator().manual_seed(0)
    W = torch.randn(2, width, 6, generator=draw, dtype=torch.float64)
    sae = Dictionary(W[0], W[1].T.contiguous(), b_dec=W[0, :, 0], point=point, activation=TopK(2), **options)
    graph = graph_of(model, tokens, [random_dictionary(model, tokens, "blocks.0.hook_resid_post"), sae])
    assert graph.check().absolute < 1e-10
    with torch.no_grad():
        x = model.run_with_cache(tokens, names_filter=point)[1][point][0].unflatten(-1, (heads, width))
    features = sae.encode(x if "axes" in options else x[:, 1:2]).flatten(1)
    nodes = [node for node in graph.of("feature") if node.point == point]
    assert len(nodes) == int((features > 0).sum()) > 0
    assert all(abs(node.activation - float(features[node.pos, node.number])) < 1e-12 for node in nodes)
    assert graph.intervene({nodes[0]: 0.0, nodes[-1]: 3.0}).rounding < 1e-12
    clamped = graph.intervene({nodes[-1]: nodes[-1].activation})
    assert clamped.true.values.abs().max() < 1e-12


def test_topk_holds_which_are_on(mamba):
    """A path through a TopK: of the features that are on, each by its own sum."""
    tokens = example(mamba)[:1]
    dictionaries = [
        random_dictionary(mamba, tokens, f"blocks.{layer}.hook_resid_post", activation=TopK(2), seed=layer)
        for layer in (0, 1)
    ]
    graph = graph_of(mamba, tokens, dictionaries)
    first = next(node for node in graph.of("feature") if node.layer == 0 and graph.out_of(node))
    target = next(graph.node(edge.target) for edge in graph.out_of(first) if graph.node(edge.target).kind == "feature")
    done = graph.intervene({first: 2 * first.activation}, through=[target])
    assert done.rounding < 1e-12
    direct = sum(edge.weight for edge in graph.out_of(first) if edge.target == graph.of("logit")[0].id)
    way = next(edge.weight for edge in graph.out_of(first) if edge.target == target.id)
    on = next((edge.weight for edge in graph.out_of(target) if edge.target == graph.of("logit")[0].id), 0.0)
    assert abs(float(done.predicted.values[0]) - (direct + way * on / target.activation)) < 1e-12
