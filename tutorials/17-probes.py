# %% [markdown]
# # 17. Probes: what can be read, and what the model reads
#
# [Open in Colab](https://colab.research.google.com/github/gatedlens/gatedlens/blob/main/tutorials/17-probes.ipynb)
#
# One idea: **that a probe reads a thing does not say that the model has learnt it, nor that the model uses it.** Two controls
# ask the first (labels in random order, a model that has learnt nothing), an ablation of what is read asks the second, with an
# ablation as large elsewhere beside it.

# %% tags=["skip-execution"]
# %pip install -q "gatedlens[plot]"  # in Colab

# %%
from contextlib import nullcontext

import torch

import gatedlens as gl

torch.set_grad_enabled(False)
model = gl.from_pretrained("gatedlens/mamba-recall")
batch = gl.tasks.recall(300, seed=0)  # prompts, answers, and where the answer stands
print(model.to_string(batch.tokens[0]), "->", model.to_string(batch.answers[0]))

# %% [markdown]
# ## Where can the answer be read?
#
# A probe of each layer at four places: at the value itself, two tokens behind it, at the `?`, and at the last token, which has
# to answer. A quarter of the prompts is held out. The same probes are fitted to a model of the same architecture whose weights
# are in random order.

# %%
points = "blocks.*.hook_resid_post"
cache = model.run_with_cache(batch.tokens, names_filter=points)[1]
nothing = gl.probes.untrained(model).run_with_cache(batch.tokens, names_filter=points)[1]
places = {"value": batch.answer_pos, "value+2": batch.answer_pos + 2, "?": -2, "last": -1}
found = gl.probes.sweep(cache, batch.answers, points, places, untrained=nothing, progress=False)
for measure in ("accuracy", "shuffled labels", "random weights"):
    print(f"{measure:16}", found.at(measure=measure).values.round(decimals=2).tolist())
figure = found.at(measure="accuracy").plot()

# %%
learned, random = found.at(measure="accuracy", layer=1), found.at(measure="random weights", layer=1)
assert learned.at(pos="value").values > 0.8 and random.at(pos="value").values > 0.8
assert learned.at(pos="last").values > 0.9 > 0.5 > random.at(pos="last").values

# %% [markdown]
# At the value itself random weights read it as well as learnt ones: the token stands there, and nothing had to be learnt. At
# the last token only the model that has learnt to recall holds it. (With labels in random order every probe is near chance, one
# in eight.)
#
# ## Does the model use it?
#
# What the probe reads *along* is one thing, what the model writes another. We take away, at the last token, first the
# directions of the probe's weights, then those in which the answers differ on average; each time a placebo moves every vector
# exactly as far, another way.

# %%
fresh = gl.tasks.recall(400, seed=9)


def right(change=None, rows=slice(None)):
    """How often fresh prompts are answered."""
    with nullcontext() if change is None else change.on(model):
        return (model(fresh.tokens)[:, -1].argmax(-1) == fresh.answers)[rows].float().mean().item()


probe = gl.probes.fit(cache, batch.answers, ("resid_post", 1), pos=-1)
print(probe)
print(f"as it is {right():.0%}")
for along in ("weights", "means"):
    own, other = right(probe.ablate(-1, along=along)), right(probe.placebo(1).ablate(-1, along=along))
    print(f"without what is read along its {along:7} {own:4.0%}, placebo {other:4.0%}")
assert right(probe.ablate(-1, along="weights")) > 0.9 and right(probe.placebo(1).ablate(-1, along="means")) > 0.9
assert right(probe.ablate(-1, along="means")) < 0.3

# %% [markdown]
# Without the directions of its weights a probe reads nothing, and the model answers as before: the weights look where the
# classes are easiest told apart, the answer stands there and elsewhere. Without what differs between the answers on average it
# is at chance.
#
# ## In the rows of one class
#
# An ablation by class says what that class needs. As many random rows of others are its control; so is a placebo.

# %%
three = int(gl.tasks.ids(("3",)))
mine = fresh.answers == three
drawn = gl.probes.matched_rows(fresh.answers, three, seed=0)
changes = {
    "rows that answer 3": probe.ablate(-1, along="means", labels=fresh.answers, of=three),
    "as many other rows": probe.ablate(-1, along="means", labels=drawn, of=True),
    "the mean of 3, in all rows": probe.remove_mean(three, -1),
    "its placebo, in all rows": probe.placebo(2).remove_mean(three, -1),
}
table = {name: (right(change, mine), right(change, ~mine)) for name, change in changes.items()}
for name, (own, others) in table.items():
    print(f"{name:27} answers 3: {own:4.0%}, others: {others:4.0%}")
assert table["rows that answer 3"][0] < 0.2 and table["rows that answer 3"][1] > 0.98
assert table["the mean of 3, in all rows"][0] < 0.5 < 0.9 < min(table["its placebo, in all rows"])

# %% [markdown]
# ## Readable and no longer used
#
# The key that is asked for can be read at the last token in both layers. The second layer's scan looks the value up by it, so
# in front of that layer it is needed. Behind it, it is still there to be read, and to take it away costs no more than a few
# answers that share its directions.

# %%
keys = batch.tokens[:, -1]
for layer in range(2):
    asked = gl.probes.fit(cache, keys, ("resid_post", layer), pos=-1)
    own, other = (right(one.ablate(-1, along="means")) for one in (asked, asked.placebo(1)))
    print(f"layer {layer}: read {asked.facts['accuracy']:.0%}; without it {own:.0%} right, placebo {other:.0%}")
    assert asked.facts["accuracy"] > 0.8 and (own < 0.5 if layer == 0 else own > 0.7)

# %% [markdown]
# A store (`gl.store.harvest`) goes where the cache stood, for a corpus that no cache holds; `probe.save` keeps what was fitted.
