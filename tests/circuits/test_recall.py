"""On models trained to recall, gradients find what exact patching finds, and the mechanism: the answer is read where it
stands, and a mixer brings it to the last position.

The counterfactual of each prompt has another value at the queried key; the metric is the difference of the two values'
logits, about 11 to 15 in the clean run and as much below zero in the other.
"""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens import circuits
from tests.circuits.helpers import measured, spearman

ROWS = 16
MATTERS = 0.1  # logits; exact patching does at least this at 5 to 10 % of the cells
LEAVES = ("hook_resid_pre", "hook_mixer_out")
METHODS = {
    "plain": (circuits.attribution_patch, {}),
    "input": (circuits.attribution_patch_ig, {"steps": 5, "progress": False}),
    "activation": (circuits.attribution_patch_ig_activations, {"steps": 5, "progress": False}),
}


class Recalling:
    """A bundled model in float64 with its prompts, exact activation patching of it and what each method says."""

    def __init__(self, architecture):
        self.model = gl.from_pretrained(f"gatedlens/{architecture}-recall", device="cpu").to(torch.float64)
        self.task, values = gl.tasks.recall(ROWS, seed=2), gl.tasks.ids(gl.tasks.VALUES)
        others = values[((values == self.task.answers.unsqueeze(1)).long().argmax(1) + 3) % len(values)]
        self.clean, self.corrupted = self.task.tokens, self.task.with_answer(others).tokens
        self.metric = gl.metrics.logit_difference(self.task.answers, others)
        self.given = (self.model, self.clean, self.corrupted, self.metric)
        self.exact = {leaf: self.patched(leaf) for leaf in LEAVES}
        self.found = {(leaf, method): self.attributed(leaf, method) for leaf in LEAVES for method in METHODS}

    def patched(self, leaf):
        """[layer, batch, pos], one run a cell."""
        with torch.no_grad():
            _, cache = self.model.run_with_cache(self.clean, names_filter=f"blocks.*.{leaf}")
        base, length = measured(self.model, self.corrupted, metric=self.metric), self.clean.shape[1]
        effect = torch.zeros(self.model.cfg.n_layers, ROWS, length, dtype=torch.float64)
        for layer in range(len(effect)):
            name = f"blocks.{layer}.{leaf}"
            for pos in range(length):

                def patch(x, hook, pos=pos, name=name):
                    x[:, pos] = cache[name][:, pos]

                effect[layer, :, pos] = measured(self.model, self.corrupted, [(name, patch)], self.metric) - base
        return effect

    def attributed(self, leaf, method):
        function, options = METHODS[method]
        return function(*self.given, f"blocks.*.{leaf}", keep=("batch", "pos"), **options).values


SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("griffin", "rwkv")]


@pytest.fixture(scope="module", params=["mamba", *SLOWER])
def recalling(request):
    return Recalling(request.param)


@pytest.mark.parametrize("leaf", LEAVES)
def test_gradients_rank_cells_as_exact_patching_does(recalling, leaf):
    """Plain attribution misjudges sizes (the metric saturates) and falls behind where it matters; the integrals do not."""
    exact = recalling.exact[leaf]
    matters = exact.abs() > MATTERS
    assert 0.04 < matters.double().mean() < 0.12
    rank, size = {}, {}
    for method in METHODS:
        got = recalling.found[leaf, method]
        rank[method] = spearman(got[matters], exact[matters])
        size[method] = float(torch.corrcoef(torch.stack([got.flatten(), exact.flatten()]))[0, 1])
    print(leaf, rank, size)
    assert rank["input"] > 0.75 and rank["activation"] > 0.93
    assert size["input"] > 0.95 and size["activation"] > 0.98
    assert 0.5 < rank["plain"] < rank["input"] and 0.65 < size["plain"] < size["input"]


@pytest.mark.parametrize("method", METHODS)
def test_they_find_where_the_answer_is_and_where_it_goes(recalling, method):
    first, answer_pos = recalling.found["hook_resid_pre", method][0], recalling.task.answer_pos
    right = (first.argmax(1) == answer_pos).double().mean()
    assert right > 0.85 if method == "plain" else right == 1, "before the first layer it stands in the answer's place"
    assert (first[torch.arange(ROWS), answer_pos - 1].abs() < 1e-9).all(), "nothing differs before the answer"
    mixers, exact = recalling.found["hook_mixer_out", method].mean(1), recalling.exact["hook_mixer_out"].mean(1)
    assert mixers[-1].argmax() == mixers.shape[1] - 1, "and in the end at the last position"
    if method != "plain":  # of the Griffin model's two layers that bring it, plain attribution prefers the second
        assert mixers[:, -1].argmax() == exact[:, -1].argmax(), "brought there by the layer that patching finds"


def test_edges_rank_as_exact_edge_patching_does_and_make_faithful_circuits(recalling):
    exact = circuits.edge_patch(*recalling.given, progress=False)
    plain, integrated = circuits.eap(*recalling.given), circuits.eap_ig(*recalling.given, progress=False)
    rank, size = {}, {}
    for name, found in (("EAP", plain), ("EAP-IG", integrated)):
        both = [some.scores.values[exact.kept] for some in (found, exact)]
        rank[name], size[name] = spearman(*both), float(torch.corrcoef(torch.stack(both))[0, 1])
    print(rank, size)
    assert rank["EAP-IG"] > 0.8 and size["EAP-IG"] > 0.9 and rank["EAP"] > 0.75
    assert size["EAP"] < size["EAP-IG"]
    half = integrated.top(len(exact) // 2 + 1)
    others = exact.keep(edge for edge in exact.edges if edge not in half.edges)
    assert half.faithfulness(*recalling.given) > 0.9 and others.faithfulness(*recalling.given) < 0.1


@pytest.mark.parametrize("recalling", ["mamba"], indirect=True)
def test_the_circuit_of_the_mamba_model_is_a_chain(recalling):
    found = circuits.eap_ig(*recalling.given, progress=False).top(3)
    assert {str(edge) for edge in found.edges} == {"embed -> 0.mixer", "0.mixer -> 1.mixer", "1.mixer -> logits"}
    direct = circuits.path_patch(*recalling.given, "1.mixer", "logits", pos=-1)
    assert torch.allclose(direct, recalling.exact["hook_mixer_out"][1, :, -1], atol=1e-10)
    whole = measured(recalling.model, recalling.clean, metric=recalling.metric)
    whole = whole - measured(recalling.model, recalling.corrupted, metric=recalling.metric)
    assert (direct > 0.9 * whole).all(), "the last mixer writes the answer"
