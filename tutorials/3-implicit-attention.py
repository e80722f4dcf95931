# %% [markdown]
# # 3. Implicit attention: an account of a prediction that adds up
#
# [Open in Colab](https://colab.research.google.com/github/gatedlens/gatedlens/blob/main/tutorials/3-implicit-attention.ipynb)
#
# One idea: **a gated-linear layer is, once its gates are fixed, a matrix between tokens; because the matrix is exact, what
# it says can be added up to the prediction.** We ask a small Mamba that has learnt to recall which token gave it the answer,
# by how much, and by which way.

# %% tags=["skip-execution"]
# %pip install -q "gatedlens[plot]"  # in Colab

# %%
import torch

import gatedlens as gl
from gatedlens import profiles

torch.set_grad_enabled(False)
model = gl.from_pretrained("gatedlens/mamba-recall")
prompt = "and gnu fig B 4 F 1 gnu but but but A 2 hay but D 4 hay ? F"
tokens = model.to_str_tokens(prompt)
logits, cache = model.run_with_cache(prompt)
print(model.to_string(logits[0, -1].argmax()))  # the value of F

# %% [markdown]
# ## All layers at once
#
# Without `layer` you get a stack, from one cache or one forward. A layer's operator is derived when you ask for it.

# %%
stack = gl.implicit_attention(cache)
print(stack)
for attention in stack:
    print(attention, attention.check())
figure = gl.plot.layers(dict(zip(stack.names, stack.abs_mean(progress=False)[:, 0], strict=True)), tokens)

# %% [markdown]
# ## Factors
#
# Per channel, `A = diag(gate) (S + diag(skip)) diag(act) M`: convolution, activation, scan with its skip, gate. Each can be
# left out. The papers' matrices are `paper("unified")` and `paper("hidden")`; both leave out the skip, which is not small.

# %%
attention = stack[-1]
whole = attention.abs_mean()[0]
for name, part in {
    "unified": attention.paper("unified"),
    "hidden": attention.paper("hidden"),
    "no conv": attention.without("conv"),
}.items():
    differs = (part.abs_mean()[0] - whole).norm() / whole.norm()
    print(f"{name:8} differs from the whole by {differs:.0%}")

# %% [markdown]
# ## The account
#
# `contributions` are the vectors that each token writes into the residual stream at each other: the matrix, times what the
# token holds, times the output projection. Along a direction they are numbers. Ours is the logit of the answer "1" minus that
# of "4", a wrong value, read through the final norm as it was on this prompt.

# %%
wrong, right = model.to_single_token("4"), model.to_single_token("1")
read = (model.W_U[:, right] - model.W_U[:, wrong]) * model.ln_final.weights.weight / cache["ln_final.hook_scale"][0, -1]
given = attention.contributions()
shares = given.along(read)[0, -1]  # what each token gives at the last position
rest = given.remainder()[0, -1] @ read + cache["resid_pre", -1][0, -1] @ read
difference = logits[0, -1, right] - logits[0, -1, wrong]
for at in shares.abs().topk(3).indices.tolist():
    print(f"{tokens[at]:>4} at {at:2}: {shares[at]:+.2f}")
print(f"all tokens {shares.sum():+.2f}, everything else {rest:+.2f}, the logit difference {difference:+.2f}")
assert torch.allclose(shares.sum() + rest, difference, atol=1e-3), "the account adds up"
answer = tokens.index("1")
assert shares.argmax() == answer and shares[answer] > 0.8 * difference, "and one token pays for most of it"

# %% [markdown]
# ## By which way
#
# A token comes into the scan by the convolution, which reads four tokens. Which of its taps brought the answer?

# %%
by_tap = [given.tap(back).along(read)[0, -1, answer] for back in range(given.n_taps)]
for back, value in enumerate(by_tap):
    print(f"{back} tokens later: {value:+.2f}")
assert torch.allclose(torch.stack(by_tap).sum(), shares[answer], atol=1e-3)

# %% [markdown]
# The scan picks the value up a few places *behind* it: knocking out the value's own position would miss it.
#
# ## How far a layer looks
#
# Profiles are defined alike for every architecture: rows of |A| as shares, distances in real tokens. Half of what this layer
# reads is close by, and some channels look much further than others.

# %%
print("half-life of the layers:", [round(v, 2) for v in stack.profiles(progress=False).half_life[:, 0].tolist()])
far = profiles.of_channels(attention).mean_distance[0]
order = far.argsort()
print(f"mean distance by channel: {far.min():.1f} to {far.max():.1f} tokens")
near, distant = attention.grouped([order[:16], order[-16:]])[0, :, -1].abs()  # the last row of two groups of channels
print(f"the nearest-looking channels read {tokens[near.argmax()]!r}, the farthest-looking {tokens[distant.argmax()]!r}")

# %% [markdown]
# ## With heads, under a delta rule, in a hybrid
#
# The matrix is as exact where a head of channels shares a state (Mamba-2, RWKV-7, gated delta nets), where each step first erases
# what its probe finds, and in an attention layer. What all tokens write still sums to the layer's output; and without the edge
# from the answer to the last token the models no longer prefer it as they did.

# %%
for name, layer in {"mamba2-recall": 0, "gdn-recall": 0, "rwkv7-recall": 0, "hybrid-recall": 1}.items():
    other = gl.from_pretrained(f"gatedlens/{name}")
    logits, cache = other.run_with_cache(prompt)
    A = gl.implicit_attention(cache, layer=layer)
    wrote = A.contributions()
    total, out = wrote.row(-1).sum(1) + wrote.remainder()[:, -1], cache["mixer_out", layer][:, -1]
    assert A.check().relative < 1e-5 and torch.allclose(total, out, rtol=1e-4, atol=1e-4)
    with gl.knockout.cut(answer, -1).on(other):
        without = other(prompt)
    margins = [(one[0, -1, right] - one[0, -1, wrong]).item() for one in (logits, without)]
    print(f"{name:14} logit difference {margins[0]:5.1f}, without the edge {margins[1]:5.1f};", end=" ")
    by_head = A.abs_mean(heads=slice(None))[0, :, -1, answer] if layer == 0 else A.abs_mean()[0, -1, answer].flatten()
    print("it reads the answer by", ", ".join(f"{x:.2f}" for x in by_head), "in each head" * (layer == 0))
    assert margins[0] > 3 and margins[1] < 0.5 * margins[0]

# %% [markdown]
# ## Through all layers
#
# `rollout` chains the layers through the residual stream: products of `I + A`, signed and not normalised. It is a summary
# and no account: between the layers are norms and gates that it does not follow.

# %%
rolled = stack.rollout(progress=False)[0, -1]
for at in rolled[:-1].abs().topk(3).indices.tolist():
    print(f"{tokens[at]:>4} at {at:2}: {rolled[at]:+.4f}")
