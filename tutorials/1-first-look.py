# %% [markdown]
# # 1. First look: from a sentence to what a layer attends to
#
# [Open in Colab](https://colab.research.google.com/github/gatedlens/gatedlens/blob/main/tutorials/1-first-look.ipynb)
#
# One idea: **every intermediate of a gated-linear model has a name, and the attention that the model never computes can
# be read off them.** We take a small Mamba that has learnt to recall: it reads pairs of a key and a value among noise,
# then a question, and answers with the value.

# %% tags=["skip-execution"]
# %pip install -q "gatedlens[plot]"  # in Colab

# %%
import gatedlens as gl

model = gl.from_pretrained("gatedlens/mamba-recall")
prompt = "and gnu fig B 4 F 1 gnu but but but A 2 hay but D 4 hay ? F"
tokens = model.to_str_tokens(prompt)
print(model.to_string(model(prompt)[0, -1].argmax()))  # the value of F

# %% [markdown]
# ## Names
#
# `hook_table` lists every hook point: its axes, its shape in this model, the equation that it holds, and where the
# equation comes from. A *lazy* point costs nothing until somebody listens.

# %%
print(model.hook_table(layer=1))

# %% [markdown]
# ## A cache
#
# `run_with_cache` takes names, globs, lists or predicates. Names that you know from MambaLens or TransformerLens work too.

# %%
logits, cache = model.run_with_cache(prompt, names_filter=["blocks.*.mixer.*", "blocks.*.hook_resid_post"])
print(cache)
print("dt    ", tuple(cache["dt", 1].shape), "how long a step each channel takes at each token")
print("decay ", tuple(cache["decay", 1].shape), "how much of its state each channel keeps")
print("state ", tuple(cache["blocks.1.mixer.hook_state"].shape), "what it remembers")
print("delta ", cache["blocks.1.hook_delta"] is cache["dt", 1], "the same tensor by MambaLens's name")

# %% [markdown]
# ## Implicit attention
#
# The recurrence is linear in its input once the gates are fixed, so a layer's output is `A x + r` with a matrix `A` per
# channel: the gate, the scan with its skip, the activation and the convolution, multiplied. It is never stored; you ask
# for what you want to see of it.

# %%
attention = gl.implicit_attention(cache, layer=1)
print(attention)
print(attention.check())  # A x + r against what the layer computed

# %% [markdown]
# What does the last position, which must name the value of F, read?

# %%
row = attention.row(-1).abs().mean(1)[0]  # mean over channels of the first prompt
for value, at in zip(*(t.tolist() for t in row.topk(4)), strict=True):
    print(f"{tokens[at]:>4} at {at:2}: {value:.3f}")
answer = tokens.index("F") + 1
assert row.argmax() == answer, "the strongest source is the token that holds the answer"

# %%
figure = gl.plot.heatmap(attention.abs_mean()[0], tokens, title="mamba-recall, layer 1", value="|attention|")
gl.plot.text(row, tokens, title="what the last position reads")  # in a notebook: the coloured text

# %% [markdown]
# ## An intervention
#
# If the answer comes through that token, then cutting what it writes into layer 1's state must change the answer, and
# cutting another value's must not.


# %%
def forget(position):
    def hook(write, hook):
        write[:, position] = 0

    return hook


values = [i for i, token in enumerate(tokens[:-2]) if token in gl.tasks.VALUES]
clean = model(prompt)[0, -1].softmax(-1)
guess = clean.argmax()
for position in values:
    # The conv carries a value a few places on, so we cut the positions that see it.
    hooks = [("blocks.1.mixer.hook_write", forget(slice(position, position + 3)))]
    cut = model.run_with_hooks(prompt, fwd_hooks=hooks)[0, -1].softmax(-1)
    print(f"without {tokens[position]} at {position:2}: p(answer) {clean[guess]:.2f} -> {cut[guess]:.2f}")
