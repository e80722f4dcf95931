# %% [markdown]
# # 20. A feature graph: which feature at which token made the answer?
#
# [Open in Colab](https://colab.research.google.com/github/gatedlens/gatedlens/blob/main/tutorials/20-feature-graphs.ipynb)
#
# One idea: **with its gates as they were, a recurrent layer only adds, so an answer is a sum over paths of features, exactly, and
# each path can be cut.** The model reads pairs, `K 8 ... D 8 ... ? D`, and answers with the value of the key. Two sparse
# dictionaries say what its activations hold; the graph says which of their features made which, at which token.

# %% tags=["skip-execution"]
# %pip install -q "gatedlens[plot]"  # in Colab

# %%
import tempfile
from pathlib import Path

import torch

import gatedlens as gl

model = gl.from_pretrained("gatedlens/mamba-recall")
some, asked = gl.tasks.recall(256, seed=1), gl.tasks.recall(6, seed=0)
points = ["blocks.0.hook_resid_post", "blocks.1.mixer.hook_gated"]
with torch.no_grad():
    cache = model.run_with_cache(some.tokens, names_filter=points)[1]
fit = {"steps": 200, "batch_size": 256, "lr": 6e-3, "progress": False}
saes = [gl.dictionaries.train(cache[point], point, 256, gl.dictionaries.TopK(4), **fit) for point in points]
for sae in saes:
    print(sae.point, "variance explained", round(sae.facts["training"]["explained"], 3))

# %% [markdown]
# Why these two points? The stream behind layer 0 is what layer 1 reads, and `hook_gated` is what its scan has put together, just
# before it is written. Between the two stands the token mixing, which stays what it is: an edge from a feature at one token to a
# feature at another passes through the layer's own matrix A, and is exact.
#
# ## The graph

# %%
row = 2
prompt, answer = asked.tokens[row : row + 1], int(asked.answers[row])
key, value = int(asked.key_pos[row]), int(asked.answer_pos[row])
graph = gl.feature_graph.attribute(model, prompt, saes, logits=[answer], progress=False)
print(" ".join(graph.words), "->", model.to_string(answer))
print(graph)
print("off by at most", graph.check().absolute)  # every feature and the logit are the sum of what comes in
assert graph.check().relative < 1e-5

# %% [markdown]
# Hundreds of nodes and thousands of edges; a handful carries the answer. `prune` keeps the nodes that make up 0.7 of the
# influence, and of the edges between them those that make up 0.9. Replacement is how much of all paths ends in tokens rather
# than in what the dictionaries leave over.

# %%
small = graph.prune(0.7, 0.9)
print({name: round(share, 3) for name, share in small.facts["kept"].items()})
for edge in small.edges:
    print(f"{edge.weight:+7.2f}  {small.node(edge.source)} -> {small.node(edge.target)}")
small.plot()

# %% [markdown]
# It can be read from below: the key's token and the value's, next to each other, make one feature at the value. That one makes
# the features of the last token's mixer, seven positions on, and these the logit. So the convolution of layer 0 binds the key to
# the value, and the scan of layer 1 fetches what stands there: what tutorials 4 and 5 found by patching, now feature by feature.

# %%
logit = graph.of("logit")[0]
bound = max(small.of("feature", value), key=lambda node: graph.influence[graph.place(node)])
fetched = [node for node in small.of("feature") if node.point == points[1]]
print(bound)
made_of = [edge.source for edge in graph.into(bound)[:2]]
assert {graph.node(name).pos for name in made_of} == {key, value} and all(
    node.pos == prompt.shape[1] - 1 for node in fetched
)
assert small.reaches(graph.of("token", key)[0], logit) and small.reaches(graph.of("token", value)[0], logit)

# %% [markdown]
# ## Is it so? A path is cut
#
# The feature is clamped at 0, and only the fetched features may respond. The edges say what the logit will do. The same in a
# frozen run must agree to rounding; and the model itself, with all its gates and norms free, is asked what happens in truth. The
# controls: all features at the other three values, clamped likewise; one of these is an 8, too, with the very same feature on.

# %%
done = graph.intervene({bound: 0.0}, through=fetched)
print(done)
print(f"logit {graph.value(logit):.2f}; frozen run and edges differ by {done.rounding:.1e}; gap {float(done.gap):+.2f}")
assert done.rounding < 1e-3 and float(done.predicted.values) < -8 and float(done.true.values) < -8
for other in (int(place) for place in asked.pair_pos[row] if int(place) != value):
    features = {node: 0.0 for node in graph.of("feature", other) if node.point == points[0]}
    control = graph.intervene(features)
    print(f"all {len(features)} features at {graph.words[other]!r} ({other}): {control}")
    assert abs(float(control.true.values)) < 3

# %% [markdown]
# ## What the graph does not know
#
# Gates and decays were held. Take the key's token away, and the graph expects to lose a part of the answer; the model loses it
# all, because the last token no longer finds the place. That is the gap: not what is read, but whether it is.

# %%
for name, place in {"the key": key, "the value": value}.items():
    removed = graph.intervene({graph.of("token", place)[0]: 0.0})
    print(
        f"without {name:9}: predicted {float(removed.predicted.values):+.1f}, in truth {float(removed.true.values):+.1f}"
    )
    assert float(removed.gap) < -1

# %% [markdown]
# In a gated delta net this is all there is of the key: it decides where to read, and adds nothing to what is read. Without any
# dictionary what the mixers write is the nodes.

# %%
delta = gl.from_pretrained("gatedlens/gdn-recall")
plain = gl.feature_graph.attribute(delta, prompt, logits=[answer], progress=False)
for name, place in {"the key": key, "the value": value}.items():
    removed = plain.intervene({plain.of("token", place)[0]: 0.0})
    print(
        f"without {name:9}: predicted {float(removed.predicted.values):+.1f}, in truth {float(removed.true.values):+.1f}"
    )
assert abs(float(plain.predict({plain.of("token", key)[0]: 0.0}).values)) < 1

# %% [markdown]
# ## To look at, and to hand on
#
# A page of its own, on which a click on a node shows its edges; circuit-tracer's JSON, for its pages; and all of it, to load
# again.

# %%
folder = Path(tempfile.mkdtemp())
for name in ("recall.html", "recall.json", "recall.safetensors"):
    print(small.save(folder / name).name, (folder / name).stat().st_size, "bytes")
again = gl.feature_graph.FeatureGraph.load(folder / "recall.safetensors")
assert again.edges == small.edges
