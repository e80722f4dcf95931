# %% [markdown]
# # 10. From TransformerLens and nnsight
#
# [Open in Colab](https://colab.research.google.com/github/gatedlens/gatedlens/blob/main/tutorials/10-from-transformer-lens-and-nnsight.ipynb)
#
# One idea: **a hooked model is an ordinary citizen of the tools you know, so the same question asked through any of them has the
# same answer.** We ask where a small Mamba keeps the value that it recalls: with TransformerLens's patching, with nnsight, with
# captum, and with the names that MambaLens gave the state.

# %% tags=["skip-execution"]
# %pip install -q "gatedlens[plot]"  # in Colab

# %%
import torch
from transformer_lens import patching
from transformer_lens.tools.analysis.direct_logit_attribution import direct_logit_attribution

import gatedlens as gl

torch.set_grad_enabled(False)
model = gl.from_pretrained("gatedlens/mamba-recall", device="cpu")
prompt = "and gnu fig B 4 F 1 gnu but but but A 2 hay but D 4 hay ? F"
clean = model.to_tokens(prompt)  # what was the value of F? "1"
corrupted = model.to_tokens(prompt.replace("F 1", "F 3"))
words = model.to_str_tokens(prompt)
right, wrong = model.to_single_token("1"), model.to_single_token("3")


def difference(logits):
    return logits[0, -1, right] - logits[0, -1, wrong]


logits, cache = model.run_with_cache(clean)
floor, ceiling = difference(model(corrupted)), difference(logits)
print(f"clean {ceiling:+.2f}, corrupted {floor:+.2f}")

# %% [markdown]
# ## TransformerLens
#
# Its patching runs unchanged: the clean residual stream into the corrupted run, layer by place. Before both layers the answer
# sits on its own token: it is the last mixer that carries it to the end.

# %%
patched = patching.get_act_patch_resid_pre(model, corrupted, cache, difference)
share = (patched - floor) / (ceiling - floor)
for layer, row in enumerate(share):
    best = int(row.argmax())
    print(f"before layer {layer}: {row[best]:.0%} is restored at {words[best]!r}, position {best}")
assert (share.argmax(1) == words.index("1")).all()

# %% [markdown]
# Direct logit attribution is exact as it stands: the final norm's weight is counted, so the shares sum to the difference.

# %%
shares = direct_logit_attribution(model, clean, answer_tokens=right, incorrect_tokens=wrong)
for label, value in zip(shares.labels, shares.attribution[:, 0], strict=True):
    print(f"{label:12} {value:+.2f}")
assert torch.allclose(shares.attribution.sum(), ceiling, atol=1e-3) and shares.attribution.argmax() == 2, (
    "the last mixer"
)

# %% [markdown]
# ## nnsight
#
# `model.nnsight()` is an nnsight model. `hook` finds a point by any name, `tracer.activations` caches by our names. Both
# prompts go through in one forward, and the clean run's stream is written into the corrupted one's, at one layer and place:
# the same number as TransformerLens's.

# %%
traced = model.nnsight()
at = words.index("1")
with traced.trace() as tracer:
    barrier = tracer.barrier(2)
    with tracer.invoke(clean):
        source = traced.hook("blocks.1.hook_resid_pre").output[:, at]
        barrier()
    with tracer.invoke(corrupted):
        barrier()
        traced.hook("blocks.1.hook_resid_pre").output[:, at] = source
        swapped = traced.output.save()
print(f"nnsight {difference(swapped):+.3f}, TransformerLens {patched[1, at]:+.3f}")
assert torch.allclose(difference(swapped), patched[1, at], atol=1e-3)

# %% [markdown]
# A trace builds a lazy point, here the state, only because it is asked for; the cache is an `ActivationCache`, and implicit
# attention follows from it.

# %%
with traced.trace(clean) as tracer:
    kept = tracer.activations(["blocks.1.mixer.*"])
print(kept, "state", list(kept["state", 1].shape), gl.implicit_attention(kept[0], layer=1).check())

# %% [markdown]
# ## MambaLens's names
#
# `hook_h.{t}` is the state after position t, and an edit there goes on, as in MambaLens: the clean state put in place of the
# corrupted one carries the answer into everything that the layer reads later. Which layer holds it?

# %%
_, states = model.run_with_cache(clean, names_filter="blocks.*.mixer.hook_state")
middle = words.index("hay")  # some time after the value, some time before the question
for layer in range(model.cfg.n_layers):
    name = f"blocks.{layer}.hook_h.{middle}"
    out = model.run_with_hooks(corrupted, fwd_hooks=[(name, lambda h, hook: states[hook.name])])
    restored = (difference(out) - floor) / (ceiling - floor)
    print(f"{name}: {restored:.0%} restored")
assert restored > 0.9, "the last layer's state, half way between value and question, is the memory"

# %% [markdown]
# ## captum
#
# Points are modules, so captum takes them as layers. Integrated gradients over the embeddings, from the corrupted prompt to the
# clean one, give the whole difference to the one token that differs.

# %%
from captum.attr import LayerIntegratedGradients  # noqa: E402

with torch.enable_grad():
    gradients = LayerIntegratedGradients(lambda ids: difference(model(ids)).reshape(1), model.hook_dict["hook_embed"])
    attributed = gradients.attribute(clean, baselines=corrupted, n_steps=64, internal_batch_size=1).sum(-1)[0]
print(f"{words[int(attributed.argmax())]!r} gets {attributed.max():.2f} of {ceiling - floor:.2f}")
assert attributed.argmax() == at and torch.allclose(attributed.sum(), ceiling - floor, rtol=0.05)
