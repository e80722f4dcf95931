# %% [markdown]
# # 5. Causal tracing: where does the answer travel?
#
# [Open in Colab](https://colab.research.google.com/github/gatedlens/gatedlens/blob/main/tutorials/5-causal-tracing.ipynb)
#
# One idea: **spoil what matters, put one clean activation back, and see whether the prediction returns.** If it does, what
# was needed passes through there (Meng et al. 2022; for Mamba Sharma, Atkinson and Bau 2024). In a transformer the
# information sits in the residual stream until attention fetches it. In a recurrent model there is another place where it can
# be: the state. We follow one token through a small Mamba that recalls values by their keys, and then through a Griffin and
# an RWKV that learnt the same.

# %% tags=["skip-execution"]
# %pip install -q "gatedlens[plot]"  # in Colab

# %%
import torch

import gatedlens as gl

torch.set_grad_enabled(False)
model = gl.from_pretrained("gatedlens/mamba-recall")
prompt = "and gnu fig B 4 F 1 gnu but but but A 2 hay but D 4 hay ? F"
tokens = model.to_str_tokens(prompt)
subject = tokens.index("1")  # the value of F, which the model must say at the end
answer = model.to_single_token("1")

# %% [markdown]
# ## Noise
#
# Gaussian noise on the embedding of the value: 6 times the embeddings' standard deviation, 10 draws. A cell of the map is how
# much of the answer's probability returns when the residual stream *of that layer at that position* is as in the clean run.

# %%
noisy = gl.tracing.causal_trace(
    model, prompt, gl.metrics.probability(answer), subject=[subject], noise=6, samples=10, progress=False
)
print(f"clean {noisy.facts['clean']:.2f}, corrupted {noisy.facts['corrupted']:.2f}")
for cell in noisy.top(3, signed=True):
    print(f"layer {cell['layer']}, {cell.get('pos_label')!r} at {cell['pos']}: {cell['value']:+.2f}")
figure = noisy.plot()
assert noisy["pos"][subject] == "1*", "the subject is marked"

# %% [markdown]
# Two cells: the value itself after layer 0, and the last position after layer 1. Between them there is **nothing**: at no
# position on the way does the residual stream hold the answer.

# %%
total = noisy.facts["total_effect"]
assert noisy.at(layer=0).values.argmax() == subject and noisy.at(layer=1).values.argmax() == len(tokens) - 1
between = noisy.values[:, subject + 1 : -1]
assert between.abs().max() < 0.1 * total, "the residual stream is empty on the way"

# %% [markdown]
# ## A counterfactual
#
# Noise is not something that the model has met. A counterfactual is: the same prompt with another value. The subject is then
# where the two differ, the metric a logit difference, and one forward is enough for a cell. With many prompts, positions are
# named by what stands there, one number a prompt.

# %%
batch = gl.tasks.recall(400, seed=0)
kept = (batch.answer_pos <= 14).nonzero().flatten()[:12]
clean, answers, at = batch.tokens[kept], batch.answers[kept], batch.answer_pos[kept]
values = gl.tasks.ids(gl.tasks.VALUES)
others = values[(answers - values[0] + 1) % len(values)]
changed = clean.clone()
changed[torch.arange(len(clean)), at] = others
metric = gl.metrics.logit_difference(answers, others)
places = {"key": at - 1, "value": at, **{f"+{k}": at + k for k in range(1, 6)}, "?": -2, "last": -1}


def trace(model, point, **options):
    """Which share of the total effect each cell brings back."""
    found = gl.tracing.causal_trace(
        model, clean, metric, corrupt=changed, positions=places, point=point, progress=False, **options
    )
    shares = found.values / found.facts["total_effect"]
    print(f"\n{point} {options or ''}\n" + " " * 8 + "".join(f"{place:>8}" for place in found["pos"]))
    for layer, row in zip(found["layer"], shares.tolist(), strict=True):
        print(f"layer {layer} " + "".join(f"{value:8.2f}" for value in row))
    return dict(zip(found["layer"], (dict(zip(places, row, strict=True)) for row in shares.tolist()), strict=True))


resid = trace(model, "resid_post")
assert resid[0]["value"] > 0.9 and resid[1]["last"] > 0.99

# %% [markdown]
# ## Inside the mixer
#
# Any point can be restored. In the mixer of layer 1 the answer is at `hook_x` where it stands, but it is *written into the
# state* two tokens later: the convolution carries it there. And it is read off the state at the last position.

# %%
x = trace(model, "mixer.hook_x")
write = trace(model, "mixer.hook_write")
scan = trace(model, "mixer.hook_scan")
assert x[1]["value"] > 0.9, "it comes in where it stands"
assert write[1]["+2"] > 0.9 and abs(write[1]["value"]) < 0.05, "it is written two tokens behind"
assert scan[1]["last"] > 0.9, "and it is read at the end"

# %% [markdown]
# So the way is: embedding of the value, residual stream there, conv of layer 1, state from two tokens behind, readout at the
# query. Cutting what the value itself writes into the
# state would change next to nothing.
#
# ## Windows
#
# Where several layers share the work, each alone brings back little. `window=k` restores k layers at once (around the
# layer; windows end where the model does). In the Griffin two recurrent layers read the value at the query, each for about
# half; no single one is "the" place.

# %%
griffin = gl.from_pretrained("gatedlens/griffin-recall")
single = trace(griffin, "mixer.hook_scan")
both = trace(griffin, "mixer.hook_scan", window=2)  # layer 1: the layers 0 and 1
assert max(row["last"] for row in single.values()) < 0.6
assert both[1]["last"] > 0.8

# %% [markdown]
# ## Another architecture, the same question
#
# RWKV has no convolution: it shifts what its keys and values read by one token, and writes the value where it stands.

# %%
rwkv = gl.from_pretrained("gatedlens/rwkv-recall")
stream, written = trace(rwkv, "resid_post"), trace(rwkv, "mixer.hook_write", window=2)
assert written[1]["value"] > 0.9 and abs(written[1]["+2"]) < 0.1
for name, found in {"mamba": resid, "rwkv": stream}.items():
    on_the_way = max(abs(row[f"+{k}"]) for row in found.values() for k in range(2, 6))
    print(f"{name}: at most {on_the_way:.2f} of the answer is in the residual stream on the way")
    assert on_the_way < 0.1
