"""The graph of a recall answer holds what is known of it: the value's token, and where content is mixed with the token before it,
the key's, reach the answer's logit."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens.dictionaries import TopK
from gatedlens.dictionaries.training import train
from gatedlens.feature_graph import attribute

BEHIND_THEIR_KEY = (
    "mamba",
    "mamba2",
    "rwkv",
    "rwkv7",
)  # a conv or a token shift writes the key into the value's content


@pytest.mark.parametrize("name", ["mamba", "mamba2", "rwkv", "rwkv7", "gdn", "hybrid"])
def test_the_value_and_its_key_reach_the_answer(name):
    model, batch = gl.from_pretrained(f"gatedlens/{name}-recall", device="cpu"), gl.tasks.recall(3, seed=0)
    for row in range(3):
        answer, value, key = int(batch.answers[row]), int(batch.answer_pos[row]), int(batch.key_pos[row])
        graph = attribute(model, batch.tokens[row : row + 1], logits=[answer], progress=False)
        assert graph.check().relative < 1e-5
        small, effect = graph.prune(), {}
        for node in graph.of("token"):
            effect[node.pos] = abs(float(graph.predict({node: 0.0}).values[0]))
        logit = small.of("logit")[0]
        first = sorted(effect, key=lambda pos: -effect[pos])
        assert small.reaches(small.of("token", value)[0], logit) and value in first[:2]
        if name in BEHIND_THEIR_KEY:
            assert small.reaches(small.of("token", key)[0], logit)


def test_trained_features_tell_the_mechanism():
    """Mamba: the tokens of the pair make features at the value, which make the answer through the last mixer; and clamping them
    takes the answer away, in the graph and in truth."""
    model, batch = gl.from_pretrained("gatedlens/mamba-recall", device="cpu"), gl.tasks.recall(256, seed=1)
    point = "blocks.0.hook_resid_post"
    with torch.no_grad():
        _, cache = model.run_with_cache(batch.tokens, names_filter=point)
    sae = train(cache[point], point, 128, TopK(4), steps=150, batch_size=128, lr=1e-2, progress=False)
    asked = gl.tasks.recall(6, seed=0)
    for row in range(3):
        value, key = int(asked.answer_pos[row]), int(asked.key_pos[row])
        graph = attribute(model, asked.tokens[row : row + 1], [sae], logits=[int(asked.answers[row])], progress=False)
        assert graph.replacement > 0.5 and graph.completeness > 0.8
        small = graph.prune(0.7, 0.9)
        (logit,), stored = small.of("logit"), small.of("feature", value)
        assert stored and all(small.reaches(node, logit) for node in stored)
        made_of = {edge.source for node in stored for edge in graph.into(node)[:4]}
        assert graph.of("token", key)[0].id in made_of and graph.of("token", value)[0].id in made_of
        done = graph.intervene(dict.fromkeys(stored, 0.0))
        assert float(done.predicted.values) < -3 and float(done.true.values) < -1 and done.rounding < 1e-4


@pytest.mark.slow
def test_transcoders_of_griffins_mlps_show_the_way():
    """Griffin's first mixer stands before an MLP, whose errors hide what reached it; with transcoders the value shows."""
    model, batch = gl.from_pretrained("gatedlens/griffin-recall", device="cpu"), gl.tasks.recall(256, seed=1)
    ends = [(f"blocks.{layer}.ln2.hook_out", f"blocks.{layer}.hook_mlp_out") for layer in range(3)]
    with torch.no_grad():
        _, cache = model.run_with_cache(batch.tokens, names_filter=[name for pair in ends for name in pair])
    options = {"steps": 200, "batch_size": 256, "lr": 6e-3, "progress": False}
    found = [
        train({name: cache[name] for name in pair}, pair[0], 256, TopK(4), out_point=pair[1], **options)
        for pair in ends
    ]
    asked = gl.tasks.recall(4, seed=0)
    for row in range(4):
        tokens, answer = asked.tokens[row : row + 1], int(asked.answers[row])
        without = attribute(model, tokens, logits=[answer], progress=False)
        graph = attribute(model, tokens, found, logits=[answer], progress=False)
        assert graph.check().relative < 1e-5 and graph.replacement > without.replacement + 0.2
        small = graph.prune()
        assert small.reaches(small.of("token", int(asked.answer_pos[row]))[0], small.of("logit")[0])
