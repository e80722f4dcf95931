# %% [markdown]
# # 4. Patching: find a circuit, then check it by breaking it
#
# [Open in Colab](https://colab.research.google.com/github/gatedlens/gatedlens/blob/main/tutorials/4-patching.ipynb)
#
# One idea: **run the model on a prompt that it would answer differently, put back what it had computed on the right one,
# one place at a time, and see where the answer comes back.** What restores it carries the answer; what carries the answer
# can be broken. The models are the recall models of tutorial 1: a key, its value, noise, a question.

# %% tags=["skip-execution"]
# %pip install -q "gatedlens[plot]"  # in Colab

# %%
import torch

import gatedlens as gl
from gatedlens import ablation, patching

NAMES = ("mamba-recall", "griffin-recall")
models = {name: gl.from_pretrained(f"gatedlens/{name}", device="cpu") for name in NAMES}

# %% [markdown]
# ## A pair of prompts
#
# They differ in one token, the value of the asked key. `answers` and `wrong` are what each should say; the metric is the
# difference of their logits at the last position, one number a prompt.

# %%
clean = gl.tasks.recall(1, seed=0)
values = gl.tasks.ids(gl.tasks.VALUES)
corrupted = clean.with_answer(values[(clean.answers - values[0] + 1) % len(values)])
words = [gl.tasks.VOCABULARY[i] for i in clean.tokens[0]]
answer, last = int(clean.answer_pos), len(words) - 1
print(*words)
print("in the corrupted prompt", gl.tasks.VOCABULARY[corrupted.answers[0]], "stands for", words[answer], "at", answer)

metric = gl.metrics.logit_difference(clean.answers, corrupted.answers)
caches = {}
for name, model in models.items():
    with torch.no_grad():
        logits, caches[name] = model.run_with_cache(clean.tokens, names_filter=lambda point: True)
        print(f"{name:15} clean {metric(logits).item():+.2f}, corrupted {metric(model(corrupted.tokens)).item():+.2f}")

# %% [markdown]
# ## Where does the answer travel?
#
# TransformerLens's function and direction: the clean residual stream is put into the corrupted run before each block, at
# each position. The result is a `Result`: a tensor with names, labels and a picture. 1 is the clean run, 0 the corrupted
# one. Before block 0 everything is at the value; behind the last block everything is at the last token. What lies
# between carries it there.

# %%
for name, model in models.items():
    found = patching.get_act_patch_resid_pre(
        model, corrupted.tokens, caches[name], metric, normalised=True, progress=False
    )
    print(name, f"({found.facts['cells']} cells)")
    for layer in found["layer"]:
        row = found.at(layer=layer)
        print(f"  before block {layer}: {row[answer]:+.2f} at the value, {row[last]:+.2f} at the last token")
    figure = found.plot()
    assert abs(found[0, answer] - 1) < 1e-3 and found[0, last].abs() < 1e-3
    after = patching.get_act_patch_resid_post(
        model, corrupted.tokens, caches[name], metric, normalised=True, progress=False
    )
    assert abs(after[-1, last] - 1) < 1e-3 and after[-1, answer].abs() < 1e-3

# %% [markdown]
# ## Which mixer moves it, and through what?
#
# `get_act_patch_mixer_out` patches what each mixer writes. In Mamba one mixer does all of it at the last token: the mover.
# In Griffin the mixers share the work. What they bring has come through their states: a patched state goes on (decay 0,
# write the clean state at that position), so it restores the answer at every position from the value to the question, and
# at none before.

# %%
options = {"normalised": True, "progress": False}
movers = {}
for name, model in models.items():
    written = patching.get_act_patch_mixer_out(model, corrupted.tokens, caches[name], metric, **options)
    states = patching.get_act_patch_state(model, corrupted.tokens, caches[name], metric, **options)
    print(f"{name:15} the mixers' outputs at the last token:", *(f"{v:+.2f}" for v in written[:, last].tolist()))
    for layer in states["layer"]:
        row = states.at(layer=layer)
        print(f"    state of block {layer}:", *(f"{words[t]}:{row[t]:+.2f}" for t in range(answer - 1, len(words))))
        assert row[:answer].abs().max() < 0.05
    movers[name] = [layer for layer in states["layer"] if states.at(layer=layer)[last - 1] > 0.2]
    print("    the answer is carried in the state of block", *movers[name])
assert movers == {"mamba-recall": [1], "griffin-recall": [0, 1]}

# %% [markdown]
# ## Which channels?
#
# Any axis can be swept. Eight groups of channels of what the mover's output projection reads, and the taps of its conv:
# a value enters the state a few positions after it was read.

# %%
mamba, cache = models["mamba-recall"], caches["mamba-recall"]
groups = patching.get_act_patch_by_channel_group(mamba, corrupted.tokens, cache, metric, **options)
print("channel groups of block 1:", *(f"{v:+.2f}" for v in groups.at(layer=1).tolist()))
taps = patching.get_act_patch_by_tap(mamba, corrupted.tokens, cache, metric, **options)
print("taps of block 1, oldest first:", *(f"{v:+.2f}" for v in taps.at(layer=1).tolist()))
assert groups.at(layer=1).sum() > 0.5 and taps.at(layer=1).sum() > 0.5

# %% [markdown]
# ## Break it
#
# Patching says what is enough on one pair of prompts. If the circuit is right, then breaking it must cost the answer on
# all prompts, and breaking as much elsewhere must not. At the question mark we make a block forget everything it has read
# (its decay is set to 0 there, once): the block that carries the answer, and the one that does not. Blind choice among the
# four values of a prompt is right in a quarter of the cases, a little more where a value occurs twice.

# %%
many = gl.tasks.recall(200, seed=1)
question = many.tokens.shape[1] - 2


@torch.no_grad()
def accuracy(model, *blocks):
    """The share of right answers when some blocks forget at the question mark."""
    cuts = [ablation.zero(f"blocks.{layer}.mixer.hook_decay", pos=question) for layer in blocks]
    with sum(cuts[1:], cuts[0]).on(model) if cuts else model.hooks():
        return (model(many.tokens)[:, -1].argmax(-1) == many.answers).float().mean().item()


for name, model in models.items():
    whole, broken = accuracy(model), accuracy(model, *movers[name])
    each = {layer: accuracy(model, layer) for layer in (0, 1)}
    print(
        f"{name:15} whole {whole:.0%}; forgetting in",
        *(f"block {layer}: {v:.0%};" for layer, v in each.items()),
        end=" ",
    )
    print(f"in what carries the answer ({movers[name]}): {broken:.0%}")
    assert whole > 0.95 and broken < 0.45
    if name == "mamba-recall":
        assert each[0] > 0.95, "the other block's memory is not needed"
    else:
        assert all(0.5 < v < 0.95 for v in each.values()), "each of the two is worth something without the other"
