# %% [markdown]
# # 14. A released model: what changes when the weights are real
#
# [Open in Colab](https://colab.research.google.com/github/gatedlens/gatedlens/blob/main/tutorials/14-a-released-model.ipynb)
#
# One idea: **the code is that of the other tutorials, and four questions come first: what is it, does it fit, is it the
# model, does it do the task.** The cells are written for `state-spaces/mamba-130m-hf`. Where it cannot be loaded (no
# network, no cache of the hub) they fall back to the bundled byte-level model of *Moby-Dick*, and every cell runs all
# the same.

# %% tags=["skip-execution"]
# %pip install -q "gatedlens[plot]"  # in Colab

# %%
import torch

import gatedlens as gl

torch.set_grad_enabled(False)
RELEASED, BUNDLED = "state-spaces/mamba-130m-hf", "gatedlens/mamba-moby"


def there(name):
    """Whether a model can be had: from the hub's cache on this machine, or over the network."""
    try:
        return gl.inspect(name) is not None
    except (gl.CheckpointError, OSError) as error:
        print(f"{name}: {str(error).splitlines()[0][:100]}")
        return False


name = RELEASED if there(RELEASED) else BUNDLED
print("we take", name)

# %% [markdown]
# ## What is it, and does it fit?
#
# `inspect` reads the config alone. The numbers to look at are the cache's: one row of 1,024 tokens with every point
# that is not lazy. `dtype="bfloat16"` halves both, `names_filter=` is what one uses in practice.

# %%
print(gl.inspect(name, tokens=1024))

# %% [markdown]
# ## Is it the model?
#
# `verify` holds the open forward against the vendor's own, and the claims of this package against one another, on these
# weights and on your machine. It takes some dozens of forwards. Do it once for a checkpoint, before you believe a
# number.

# %%
model = gl.from_pretrained(name, device="cpu")
found = gl.verify(model)
print(found)
assert found.passed

# %% [markdown]
# ## Does it do the task?
#
# A prompt and its continuation first: what a model cannot do, no method explains. The released model knows the world,
# the bundled one knows the spelling of one book.

# %%
if name == RELEASED:
    clean, corrupted, right, wrong = (
        "The Eiffel Tower is in the city of",
        "The Colosseum, too, is in the city of",
        " Paris",
        " Rome",
    )
else:
    clean, corrupted = "It was the whiteness of the whal", "It was the whiteness of the ship"
    right, wrong = "e", "s"
for text in (clean, corrupted):
    likely = model(text)[0, -1].softmax(-1).topk(3)
    print(
        repr(text), *(f"{model.to_string([i])!r} {p:.0%}" for p, i in zip(*(t.tolist() for t in likely), strict=True))
    )

# %% [markdown]
# ## Where is it decided?
#
# The probability of the right token, layer by layer and place by place.

# %%
lens = gl.lens.logit_lens(model, clean)
found = lens.probability(right)
print(f"after the last layer: {float(found[-1, -1]):.2f}")
found.plot()

# %% [markdown]
# ## Who writes it, and which token does it come from?
#
# Direct logit attribution by source token: the mixers' outputs are split by their implicit attention, and all of it
# sums to the logit of the right token over that of the wrong one.

# %%
shares = gl.lens.token_attribution(model, clean, right, wrong)
by_source = shares.at(batch=0).values.sum(0)
words = shares["src"]
for place in by_source.abs().topk(min(5, len(by_source))).indices.tolist():
    print(f"{words[place]!r:>12}: {by_source[place]:+.2f}")
ids = [model.to_single_token(word) for word in (right, wrong)]
logits = model(clean)[0, -1]
assert torch.allclose(by_source.sum().float(), logits[ids[0]] - logits[ids[1]], atol=1e-2)

# %% [markdown]
# ## Which layers read how far?
#
# One number a layer and a position says what a recurrent model is about: how much of the attention goes to tokens
# farther away than its convolution reaches.

# %%
stack = gl.implicit_attention(model, clean, layers=None)
for layer, matrix in zip(range(model.cfg.n_layers), stack.mean(), strict=False):
    far = matrix[0].abs().tril(-4).sum() / matrix[0].abs().sum()
    print(f"layer {layer:2}: {far:.0%} of the attention is farther back than 3 tokens")

# %% [markdown]
# ## Patch, at the price of one layer at a time
#
# A sweep over every layer and position of a deep model is many runs. `resid_pre` of a few layers first;
# `results="sweep.json"` writes as it goes, and the same call goes on after a stop. Both prompts must be equally long.

# %%
if len(model.to_str_tokens(clean)) == len(model.to_str_tokens(corrupted)):
    metric = gl.metrics.logit_difference(*ids)
    _, cache = model.run_with_cache(clean, names_filter="blocks.*.hook_resid_pre")
    swept = gl.patching.get_act_patch_resid_pre(model, corrupted, cache, metric, normalised=True, progress=False)
    print(swept)
    shown = swept.plot()
else:
    shown = "the two prompts have different lengths: find a pair that has the same"
shown
