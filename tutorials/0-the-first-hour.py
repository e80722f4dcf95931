# %% [markdown]
# # 0. The first hour: an exploratory analysis of a Mamba
#
# [Open in Colab](https://colab.research.google.com/github/gatedlens/gatedlens/blob/main/tutorials/0-the-first-hour.ipynb)
#
# One idea: **the habits of TransformerLens's exploratory analysis work on a recurrent model, and one more object makes
# up for the attention patterns that it lacks.** In the order in which one would do it: load a model, see that it does
# the task, cache a run, ask who writes the answer (direct logit attribution), where it is first decided (logit lens),
# what carries it (activation patching), which token it is read from (implicit attention), and what it cannot do without
# (ablation). The model is small enough to check every claim.

# %% tags=["skip-execution"]
# %pip install -q "gatedlens[plot]"  # in Colab

# %%
import torch

import gatedlens as gl

torch.set_grad_enabled(False)
model = gl.from_pretrained("gatedlens/mamba-recall", device="cpu")
model

# %% [markdown]
# ## Does it do the task?
#
# It reads pairs of a key (a capital) and a value (a digit) among noise words, then `?` and a key, and must say that
# key's value. We take a few prompts, and for each its counterfactual: the same, with another value behind the key that
# is asked for.

# %%
clean = gl.tasks.recall(8, seed=0)
corrupted = clean.with_answer(clean.answers.roll(1))
for tokens, answer in zip(clean.tokens[:3], clean.answers[:3], strict=True):
    print(" ".join(model.to_str_tokens(tokens)[1:]), "->", model.to_string(answer))
logits, cache = model.run_with_cache(clean.tokens)
guessed = logits[:, -1].argmax(-1)
print(f"right: {(guessed == clean.answers).float().mean():.0%}")
assert (guessed == clean.answers).all()

# %% [markdown]
# One number a prompt says how sure it is: the logit of the right value minus that of the other prompt's. On the
# corrupted prompts it has the other sign.

# %%
metric = gl.metrics.logit_difference(clean.answers, corrupted.answers)
print("clean    ", *(f"{v:+.1f}" for v in metric(logits).tolist()))
print("corrupted", *(f"{v:+.1f}" for v in metric(model(corrupted.tokens)).tolist()))

# %% [markdown]
# ## What is in the cache?
#
# The residual stream has TransformerLens's names. A mixer stands where attention stood, and every intermediate of it is
# a point. Decay, write and state hold a number for every channel and state: they are cached when they are asked for by
# name.

# %%
for name in ("resid_pre", "mixer_out", "dt", "gate"):
    print(f"{name:10} {tuple(cache[name, 1].shape)}")
states = model.run_with_cache(clean.tokens, names_filter="blocks.*.mixer.hook_state")[1]
print("state      ", tuple(states["state", 1].shape), "batch pos channel state")
print(model.hook_table(layer=1)["blocks.1.mixer.hook_state"]["equation"])

# %% [markdown]
# ## Who writes the answer? Direct logit attribution
#
# The residual stream is a sum, and the unembedding is linear (the final norm's scale held): so the logit difference is
# a sum of what each component wrote. It is all in one mixer.

# %%
shares = gl.lens.logit_attribution(model, clean.tokens, clean.answers, corrupted.answers)
by_component = shares.values.mean(0)
for component, share in zip(shares["component"], by_component.tolist(), strict=True):
    print(f"{component:14} {share:+.2f}")
assert torch.allclose(shares.values.sum(1).float(), metric(logits), atol=1e-3), "the shares sum to the logit difference"
writer = shares["component"][int(by_component.argmax())]
assert writer == "1_mixer_out"
shares.at(batch=0).plot()

# %% [markdown]
# ## Where is it decided? The logit lens
#
# What the model would say if it stopped after each layer, at every position of the first prompt. At the last position
# the answer stands behind layer 1 and not before.

# %%
lens = gl.lens.logit_lens(model, clean.tokens[:1])
answer = model.to_string(clean.answers[0])
print("after each layer, at the last position:", *(words[-1] for words in lens.words()), "; the answer is", answer)
assert lens.words()[-1][-1] == answer and lens.words()[1][-1] != answer
lens.plot()

# %% [markdown]
# ## What carries it? Activation patching
#
# The clean run's residual stream is put into the corrupted run, one layer and position at a time, for all eight prompts
# in one call: 1 is the clean run's logit difference, 0 the corrupted one's. Before block 1 it still sits on the value's
# own token.

# %%
patched = gl.patching.get_act_patch_resid_pre(model, corrupted.tokens, cache, metric, normalised=True, progress=False)
print("positions of the answers:", sorted(set(clean.answer_pos.tolist())))
patched.plot()

# %% [markdown]
# ## Which token does it read? Implicit attention
#
# A Mamba has no attention pattern, but once its gates are held a layer is linear in its input: `A x + r`, with a matrix
# `A` for each channel. It is derived from the cache and checked against what the layer computed. The row of the last
# position peaks where the value stands: that is the pattern of an induction head, in a recurrence.

# %%
attention = gl.implicit_attention(cache, layer=1)
print(attention.check())
row = attention.row(-1).abs().mean(1)  # batch src
found = row.argmax(-1)
print("strongest source:", found.tolist())
print("answers stand at:", clean.answer_pos.tolist())
assert (found == clean.answer_pos).float().mean() >= 0.75
gl.plot.heatmap(attention.abs_mean()[0], model.to_str_tokens(clean.tokens[0]), title="what layer 1 reads")

# %% [markdown]
# ## What can it not do without? Ablation and knockout
#
# Whole components of the mixer that writes, one at a time; and one single read: the last position no longer reads the
# answer's token in layer 1, everything else is as it was. Blind choice among the four values of a prompt is right in a
# quarter of the cases.

# %%
many = gl.tasks.recall(100, seed=1)


def accuracy(step=None):
    """The share of right answers, while an intervention holds."""
    with step.on(model) if step is not None else model.hooks():
        return (model(many.tokens)[:, -1].argmax(-1) == many.answers).float().mean().item()


found = {
    "nothing": accuracy(),
    "the gate of layer 1": accuracy(gl.ablation.open_gate(1)),
    "the conv of layer 1": accuracy(gl.ablation.identity_conv(1)),
    "the scan of layer 1": accuracy(gl.ablation.no_scan(1)),
    "the read of the answer": accuracy(gl.knockout.cut(src=many.answer_pos, dst=-1, layers=1)),
    "another read": accuracy(gl.knockout.cut(src=1, dst=-1, layers=1)),
}
for what, right in found.items():
    print(f"without {what:24} {right:.0%}")
assert found["nothing"] > 0.95 and found["another read"] > 0.9
assert found["the scan of layer 1"] < 0.5 and found["the read of the answer"] < 0.5

# %% [markdown]
# ## What we know after an hour
#
# The answer is written by layer 1's mixer (DLA), not before (lens); until then it waits on its own token (patching);
# the last position reads it there through the scan (implicit attention), and cutting that one read takes the answer
# away (knockout). Tutorials 3 to 5 take each of these further; [the table of questions](../docs/questions.md) names a
# function for each.
