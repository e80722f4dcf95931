# %% [markdown]
# # 18. A dictionary: find the features of an answer, and check them by steering
#
# [Open in Colab](https://colab.research.google.com/github/gatedlens/gatedlens/blob/main/tutorials/18-a-feature-of-the-answer.ipynb)
#
# One idea: **a dictionary's features are hook points like any other.** A sparse autoencoder is spliced into a Mamba-2 that
# recalls values by their keys. Nothing changes until a feature is edited; then we find, for each of the eight values, the
# feature that says "this is the answer", swap them, and see the model answer what we want. At the end we go one layer down, to
# the rank-one *write* that put the value into the state.

# %% tags=["skip-execution"]
# %pip install -q "gatedlens[plot]"  # in Colab

# %%
import torch

import gatedlens as gl

torch.set_num_threads(1)
torch.set_grad_enabled(False)
model = gl.from_pretrained("gatedlens/mamba2-recall", device="cpu")
sae = gl.dictionaries.load(
    "gatedlens/mamba2-recall"
)  # bundled; yours: a folder of SAELens, sparsify, or what `train` made
batch = gl.tasks.recall(320, seed=11)
print(sae)
print(model.to_string(batch.tokens[0]), "->", model.to_string(batch.answers[0]))

# %% [markdown]
# ## Does it keep what the model needs?
#
# The share of the variance that it explains is one thing; what counts is whether the model still answers with the
# reconstruction in place of its own residual stream. `recovered` is the share of the damage of a zero ablation that it avoids.

# %%
quality = gl.dictionaries.measure(model, sae, batch.tokens, gl.metrics.cross_entropy(batch.answers), batch_size=160)
print(quality)
assert quality.recovered > 0.99 and quality.explained > 0.95

# %% [markdown]
# ## Spliced in, nothing changes
#
# The reconstruction and its error add up to what was there, to the last bit, and features, reconstruction and error are points
# with names of their own. So every tool of gatedlens takes them: caches, hooks, ablations, patching, attribution.

# %%
with gl.dictionaries.splice(model, sae) as (spliced,):
    logits, cache = model.run_with_cache(batch.tokens, names_filter=spliced.features)
    assert torch.equal(logits, model.run_with_cache(batch.tokens)[0])
    features = cache[spliced.features][:, -1]  # at the last position: batch feature
print(spliced.features, "and", spliced.errors[0])

# %% [markdown]
# ## Find the features of the answer
#
# Of each value: which feature is larger, at the last position, where the answer is this value than where it is another? Eight
# values, eight different features.

# %%
values = gl.tasks.ids(tuple("12345678"))
is_answer = [batch.answers == value for value in values]
chosen = [int((features[own].mean(0) - features[~own].mean(0)).argmax()) for own in is_answer]
size = [
    float(features[own, feature][features[own, feature] > 0].mean())
    for own, feature in zip(is_answer, chosen, strict=True)
]
for value, own, feature in zip("12345678", is_answer, chosen, strict=True):
    there, elsewhere = ((features[rows, feature] > 0).float().mean() for rows in (own, ~own))
    print(
        f"{value}: feature {feature} fires in {there:.0%} of the prompts with this answer, in {elsewhere:.0%} of the others"
    )
assert len(set(chosen)) == 8

# %% [markdown]
# The one of 5 fires nearly everywhere, and more strongly where 5 is the answer: it is no clean detector. The others are.

# %% [markdown]
# ## Look at the texts
#
# Where does such a feature fire most, of all positions? The page is self-contained: `page().save("features.html")`.

# %%
found = gl.dictionaries.examples(model, sae, batch.tokens, chosen, n=4)
found.page(chosen[1:3])

# %% [markdown]
# It fires at the key that is asked for, and faintly elsewhere; its decoder row speaks for its own value. That is what we would
# see if it meant "the answer is this value". But a picture is no proof.

# %% [markdown]
# ## Check them: steering
#
# Set all eight to zero at the last position and give one of them the size that it has where it fires, or twice that. If they
# are the answer, the model now says the value of that one. The control does the same with eight other features of the same
# sizes.


# %%
def steered(features_of, scale):
    """How often the model says each value when its feature is put in; a Result [answer, wanted]."""
    said = torch.full((8, 8), float("nan"))
    with gl.dictionaries.splice(model, sae) as (spliced,):
        cut = gl.ablation.zero(spliced.features, feature=features_of, pos=-1)
        for j in range(8):
            put = torch.zeros(sae.n_features)
            put[features_of[j]] = scale * size[j]
            add = gl.ablation.edit(spliced.features, lambda f, point, put=put: f + put, pos=-1)
            with (cut + add).on(model):
                says = model(batch.tokens)[:, -1].argmax(-1) == values[j]
            for i, own in enumerate(is_answer):
                if i != j:
                    said[i, j] = says[own].float().mean()
    labels = {axis: list("12345678") for axis in ("answer", "steered to")}
    return gl.Result(
        said, ("answer", "steered to"), labels, f"Steered, at {scale} times the size", "share of prompts that say it"
    )


once, twice = steered(chosen, 1), steered(chosen, 2)
generator = torch.Generator().manual_seed(0)
others = [i for i in torch.randperm(sae.n_features, generator=generator).tolist() if i not in chosen][:8]
control = steered(others, 2)
for name, result in (("as large as it is", once), ("twice that", twice), ("other features, twice", control)):
    print(f"{name}: the model says what it is steered to in {result.values.nanmean():.1%} of the prompts")
assert twice.values.nanmean() > 0.95 and control.values.nanmean() < 0.1

# %%
once.plot()

# %% [markdown]
# ## Which features does the answer hang on?
#
# The other way round: of all 128, which does patching name? The clean prompt has another value at the queried key; each
# feature is patched by itself, and what that does to the logit difference is measured. The two that it names are the old
# answer's and the new one's.

# %%
one = gl.tasks.recall(1, seed=0)
other = one.with_answer(values[5:6])
metric = gl.metrics.logit_difference(int(other.answers[0]), int(one.answers[0]))
with gl.dictionaries.splice(model, sae) as (spliced,):
    _, clean = model.run_with_cache(other.tokens, names_filter=spliced.features)
    patched = gl.patching.sweep(model, one.tokens, clean, metric, spliced.features, ("feature",), progress=False)
moved = patched.values - metric(model(one.tokens))
first, second = moved.abs().topk(2).indices.tolist()
print(
    model.to_string(one.tokens[0]), "->", model.to_string(one.answers[0]), "; clean:", model.to_string(other.answers[0])
)
print(f"feature {first} moves the logit difference by {moved[first]:.1f}, {second} by {moved[second]:.1f}; the next: "
      f"{moved.abs().topk(3).values[2]:.1f}")  # fmt: skip
old, new = (chosen[values.tolist().index(int(answer))] for answer in (one.answers[0], other.answers[0]))
assert {first, second} == {old, new}

# %% [markdown]
# ## One layer down: the write that carried it
#
# The value came into layer 0's state as an outer product, value key^T, in each head: an atom of the write. What the last
# position reads of it is known in closed form, before any run: it decays on the way, and the gate and the norm behind are
# held. We take out what the answer's position writes, write what it would have written of the other value, and compare with
# the run.

# %%
pos = int(one.answer_pos[0])
_, mine = model.run_with_cache(one.tokens, names_filter=lambda name: name.startswith("blocks.0"))
_, theirs = model.run_with_cache(other.tokens, names_filter=lambda name: name.startswith("blocks.0"))
Atom = gl.dictionaries.WriteAtom
swap, predicted = gl.ablation.Intervention(()), torch.zeros_like(mine["scan", 0][:, -1])
for head in range(model.cfg.sizes["head"]):
    its, others = Atom.of(mine, 0, pos, head), Atom.of(theirs, 0, pos, head)
    swap = swap + its.removed(pos) + others.added(pos)
    predicted += others.scan(mine, pos, at=-1) - its.scan(mine, pos, at=-1)
with swap.on(model):
    logits, run = model.run_with_cache(one.tokens, names_filter="blocks.0.mixer.hook_scan")
measured = run["scan", 0][:, -1] - mine["scan", 0][:, -1]
print(f"the scan of the last position: predicted to {float((predicted - measured).norm() / measured.norm()):.1e}")
print(f"the model says {model.to_string(logits[0, -1].argmax())}, where it said {model.to_string(one.answers[0])}")
assert torch.allclose(predicted, measured, atol=1e-4 * float(measured.abs().max()))
assert int(logits[0, -1].argmax()) == int(other.answers[0])

# %% [markdown]
# And the features of the layer above have followed: the one of the new value is on, the one of the old is off.

# %%
with gl.dictionaries.splice(model, sae) as (spliced,):
    with swap.on(model):
        after = model.run_with_cache(one.tokens, names_filter=spliced.features)[1][spliced.features][0, -1]
    before = model.run_with_cache(one.tokens, names_filter=spliced.features)[1][spliced.features][0, -1]
print(f"feature {old} (the old value): {before[old]:.2f} -> {after[old]:.2f}")
print(f"feature {new} (the new value): {before[new]:.2f} -> {after[new]:.2f}")
assert after[new] > before[new] and after[old] < before[old]
