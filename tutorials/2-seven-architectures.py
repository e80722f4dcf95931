# %% [markdown]
# # 2. Seven architectures, the same words, the same three lines
#
# [Open in Colab](https://colab.research.google.com/github/gatedlens/gatedlens/blob/main/tutorials/2-seven-architectures.ipynb)
#
# One idea: **Mamba, Mamba-2, Griffin, RWKV-4, RWKV-7, gated delta nets (Qwen3-Next) and Vision Mamba fill the same recurrence,**
#
#     state_t = decay_t * state_{t-1} - erase_t (probe_t . state_{t-1}) + write_t
#     scan_t = read_t . state_t      y_t = scan_t + skip * u_t
#
# **so what you write for one runs on the others.** The bundled models are small and trained: the first six answer the recall
# task of tutorial 1, the last reads handwritten digits. `LAYERS` says which layer we look at.

# %% tags=["skip-execution"]
# %pip install -q "gatedlens[plot]"  # in Colab

# %%
import torch

import gatedlens as gl
from gatedlens.bundled.make import digits

LAYERS = {
    "mamba-recall": 1,
    "mamba2-recall": 0,
    "griffin-recall": 1,
    "rwkv-recall": 1,
    "rwkv7-recall": 0,
    "gdn-recall": 0,
    "vim-digits": 1,
}
NAMES = tuple(LAYERS)
RECALL = NAMES[:-1]
models = {name: gl.from_pretrained(f"gatedlens/{name}", device="cpu") for name in NAMES}

# %% [markdown]
# ## How each fills the recurrence
#
# In Mamba, Griffin and RWKV-4 each channel has a state of its own. In the others a head of channels shares a state, a matrix
# [value, state]. RWKV-7 and the gated delta net erase: before a step writes, it takes out what its probe finds. RWKV-4's read
# divides by the second number of its state, so that its weights sum to 1. Vision Mamba runs Mamba's recurrence twice, from
# either end of the image.

# %%
for term in ("decay", "erase", "write", "read", "skip", "conv", "activation before the scan", "gate"):
    print(term)
    for model in models.values():
        print(f"    {type(model).title:13} {model.recurrence.get(term, 'none')}")

# %% [markdown]
# ## The same words
#
# A word means the same thing wherever it occurs. The words that all seven have, and what each adds:

# %%
words = {
    name: {at.rpartition(".")[2] for at in model.names if at.startswith(f"blocks.{LAYERS[name]}.")}
    for name, model in models.items()
}
shared = set.intersection(*words.values())
print("all:", *sorted(shared))
for name, own in words.items():
    print(f"{name} also:", *sorted(own - shared))

# %% [markdown]
# ## The same three lines
#
# Run with a cache, take the implicit attention, look at one row. `look` does not ask which architecture it is given.


# %%
@torch.no_grad()
def look(model, layer, input):
    _, cache = model.run_with_cache(input, names_filter=[f"blocks.{layer}.*", "*hook_logits"])
    attention = gl.implicit_attention(cache, layer=layer)
    return cache, attention, attention.row(-1).abs().mean(1)  # mean over channels


prompts = gl.tasks.recall(200, seed=0)
images, labels = (part[:200] for part in digits()["test"])
inputs = {name: images if name == "vim-digits" else prompts.tokens for name in NAMES}
answers = {name: labels if name == "vim-digits" else prompts.answers for name in NAMES}
seen = {name: look(model, LAYERS[name], inputs[name]) for name, model in models.items()}

for name, (cache, attention, _) in seen.items():
    logits = cache["logits"] if name == "vim-digits" else cache["logits"][:, -1]
    right = (logits.argmax(-1) == answers[name]).float().mean().item()
    print(
        f"{name:15} {right:4.0%} right; A x + r is the layer's output to {attention.check().relative:.0e}; {attention}"
    )
    assert right > 0.9 and attention.check().relative < 1e-5

# %% [markdown]
# ## What differs: does the decay depend on the input?
#
# In all but one a token decides how much is forgotten. RWKV-4's decays are constants of the channel: what it selects, it
# selects by `exp(k)`, in the write. One glob finds `mixer.hook_decay` in six models and `mixer.fwd.hook_decay` and
# `mixer.bwd.hook_decay` in the last.

# %%
for name, (cache, _, _) in seen.items():
    for at in (key for key in cache if key.endswith("hook_decay")):
        change = cache[at].std(1).mean().item()
        print(f"{name:15} {at:31} median {cache[at].median():.3f}, change from token to token {change:.3f}")
        assert (change < 1e-6) == (name == "rwkv-recall")

# %% [markdown]
# ## What is the same: where the answer comes from
#
# The six language models were trained apart, on one task. In how many prompts is the token that the last position reads
# most (itself left out) the one that holds the answer? Blind choice would find it in one of twenty.

# %%
for name in RECALL:
    row = seen[name][2][:, :-1]
    found = (row.argmax(-1) == prompts.answer_pos).float().mean().item()
    print(f"{name:15} {found:.0%}")
    assert found > 0.4

# %%
tokens = [gl.tasks.VOCABULARY[i] for i in prompts.tokens[0]]
figure = gl.plot.layers({name: seen[name][1].abs_mean()[0] for name in RECALL}, tokens, title="One prompt, six models")

# %% [markdown]
# ## What becomes of a state
#
# `gl.profiles` asks all of them alike: in how many tokens does half of a state decay, and how much of it does a token rewrite?
# Of each model the head (or channel) that forgets most slowly. In a delta rule more of the state goes by the erase than by the
# decay. (RWKV-4 holds a quotient, of which there are no such shares.)

# %%
for name in RECALL:
    cache, layer = seen[name][0], LAYERS[name]
    half_life = gl.profiles.decay_half_life(cache, layer).mean((0, 2))
    slowest, shares = int(half_life.argmax()), {}
    if name != "rwkv-recall":
        found = gl.profiles.rewrite(cache, layer)
        shares = {part: share[:, :, slowest].nanmedian().item() for part, share in found._asdict().items()}
        assert (shares["erased"] > shares["decayed"]) == (name in ("rwkv7-recall", "gdn-recall"))
    print(f"{name:15} half-life {half_life[slowest]:6.1f} tokens;", *(f"{part} {x:.2f}" for part, x in shares.items()))

# %% [markdown]
# ## A hybrid: the same words in layers of two kinds
#
# `hybrid-recall` has a gated delta net in layer 0 and softmax attention in layer 1. The same three lines take both: an
# attention layer's matrix is its pattern times its values' path. Who recalls, if it may choose?

# %%
hybrid = gl.from_pretrained("gatedlens/hybrid-recall", device="cpu")
shares = []
for layer, kind in enumerate(hybrid.cfg.kinds):
    _, attention, row = look(hybrid, layer, prompts.tokens)
    shares.append((row[:, :-1].argmax(-1) == prompts.answer_pos).float().mean().item())
    print(
        f"layer {layer}, {kind.mixing:10} reads the answer most in {shares[-1]:.0%}; exact to {attention.check().relative:.0e}"
    )
assert shares[1] > 0.9 > 0.1 > shares[0], "the attention does"

# %% [markdown]
# ## And in an image
#
# A language model's attention is a triangle: it looks back. Vision Mamba's is a sum of two triangles, `branches`, one for
# each direction, and a position is a patch: `model.grid` knows which. Layer 1, what each patch gives to all positions,
# laid out as the image is. (It is what this layer mixes, not yet why the model says 3: that is attribution.)

# %%
vim, attention = models["vim-digits"], seen["vim-digits"][1]
whole = attention.abs_mean()[0]
print("looking back", f"{whole.tril(-1).sum():.2f}", "and ahead", f"{whole.triu(1).sum():.2f}")
assert len(attention.branches) == 2 and whole.triu(1).sum() > 0.1 * whole.sum()
print("digit", labels[0].item(), "predicted", seen["vim-digits"][0]["logits"][0].argmax().item())
for line, given in zip(images[0, 0], vim.grid.fold(whole.mean(0)).repeat_interleave(2, 0), strict=True):
    print(
        "".join(" .:-=+*#@"[int((pixel + 1) * 4)] * 2 for pixel in line.tolist()), *(f"{v:.3f}" for v in given.tolist())
    )
