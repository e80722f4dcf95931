# %% [markdown]
# # 13. Retrieval in a hybrid: the scan or the attention?
#
# [Open in Colab](https://colab.research.google.com/github/gatedlens/gatedlens/blob/main/tutorials/13-retrieval-in-a-hybrid.ipynb)
#
# One idea: **a hybrid can be asked which of its parts does what, by kind, and each answer can be checked by a cut.** The model
# has a gated delta net, then an attention, and has learnt to recall: `C 2 ... C 7 ... ? C` asks for the value that stands behind
# `C` last. Which of the two finds it, what is the other for, and what does the delta rule's erase do here?

# %% tags=["skip-execution"]
# %pip install -q "gatedlens[plot]"  # in Colab

# %%
import torch

import gatedlens as gl

torch.set_grad_enabled(False)
model = gl.from_pretrained("gatedlens/hybrid-recall")
batch = gl.tasks.rewritten_recall(200, seed=1)
print(model.to_string(batch.tokens[0]), "->", model.to_string(model(batch.tokens[:1])[0, -1].argmax()))
print([sorted(block.kinds) for block in model.blocks])


def right(logits):
    """1 for each row whose answer is the second value, else 0: what is measured below."""
    return (logits[:, -1].argmax(-1) == batch.answers).float()


# %% [markdown]
# ## Who does it
#
# `gl.ablation.by_kind` takes away what all mixers of a kind write. Where two kinds stand in for one another neither is missed
# alone; here both are.

# %%
by_kind = gl.ablation.by_kind(model, batch.tokens, right, progress=False)
for kind, change in zip(by_kind["without"], by_kind.values, strict=True):
    print(f"without {kind:24} {1 + change:4.0%} right")
assert by_kind.at(without="attention").values < -0.95 and by_kind.at(without="recurrent").values < -0.4
by_head = gl.ablation.by_head(model, batch.tokens, right, kind="attention", progress=False)
print("without one head of the attention", [f"{1 + change:.0%}" for change in by_head.values[0]])

# %% [markdown]
# Nothing is found without the attention; but either of its heads will do. How do the two layers look at the text? The scan and
# the softmax have a matrix each, so the same numbers can be asked of both.

# %%
stack = gl.implicit_attention(model, batch.tokens)
profile = stack.profiles(progress=False)
for name, far, sharp in zip(stack.names, profile.mean_distance.mean(1), profile.sharpness.mean(1), strict=True):
    print(f"layer {name}: looks {far:.1f} tokens back in the mean, sharpness {sharp:.2f}")
looks = stack[1].abs_mean()[:, -1]
share = looks / looks.sum(-1, keepdim=True)
rows = torch.arange(len(batch.tokens))
places = {"the second value": batch.answer_pos, "the first value": batch.old_pos, "the key": batch.key_pos}
for what, place in places.items():
    print(f"the last token's attention to {what}: {share[rows, place].mean():.1%}")

# %% [markdown]
# The layer of the scan looks a token or two back, the attention goes straight to the value, and not to the key before it. But a
# value does not say whose it is: something must have brought the key there. That would be the scan's part.
#
# ## Gather, then aggregate
#
# A pair is a segment of two tokens. `gather` cuts the edge from each key to its value, `aggregate` those from the values to the
# last token, in one layer at a time.

# %%
pairs = [torch.stack([place - 1, place], dim=1) for place in batch.pair_pos.T]
roles = gl.knockout.gather_and_aggregate(model, batch.tokens, right, pairs, progress=False)
for role in roles["role"]:
    said = {layer: f"{1 + roles.at(role=role, layer=layer).values:.0%}" for layer in roles["layer"]}
    print(f"without what would {role:9} {said}")
gathers, aggregates = roles.at(role="gather"), roles.at(role="aggregate")
assert gathers.at(layer=0).values < -0.05 and gathers.at(layer=1).values == 0
assert aggregates.at(layer=1).values < -0.95 and aggregates.at(layer=0).values == 0

# %% [markdown]
# The first layer gathers, the second aggregates, and neither does the other's work. Where all pairs lose their keys alike the
# model still guesses well: what the gates and the keys of the delta net know is held in a cut. So ask of one pair alone.
#
# ## A prediction, and its check
#
# If the first layer writes the key to its value, then a second value that its key does not reach is no candidate any more, and
# the answer should be the *first* value. And there are two ways from a key to the token behind it: the state, and the short
# convolution in front of it. `cut` closes both; `cut_scan` the state alone, and leaves the convolution.


# %%
def answers(intervention):
    """(how often the second value is given, how often the first)"""
    with intervention.on(model):
        given = model(batch.tokens)[:, -1].argmax(-1)
    return [(given == wanted).float().mean().item() for wanted in (batch.answers, batch.old_answers)]


key, value = batch.key_pos, batch.answer_pos
found = {
    "key -/-> value, in layer 0": answers(gl.knockout.cut(key, value, layers=gl.layers.where(kind="recurrent"))),
    "the same, of its state alone": answers(gl.knockout.cut_scan(key, value, layers=gl.layers.where(kind="recurrent"))),
    "value -/-> the last token, in layer 1": answers(
        gl.knockout.cut(value, -1, layers=gl.layers.where(kind="attention"))
    ),
    "key -/-> the last token, in layer 1": answers(gl.knockout.cut(key, -1, layers=gl.layers.where(kind="attention"))),
    "nothing is erased": answers(gl.ablation.no_erase()),
}
for what, (second, first) in found.items():
    print(f"{what:38} second value {second:4.0%}, first value {first:4.0%}")
assert found["key -/-> value, in layer 0"][1] > 0.6
assert found["the same, of its state alone"][0] > 0.99
assert found["value -/-> the last token, in layer 1"][1] > 0.6
assert found["key -/-> the last token, in layer 1"][0] > 0.99
assert found["nothing is erased"][0] > 0.99

# %% [markdown]
# So it is. The key reaches its value by the convolution, four taps wide, and not by the state; the attention reads the value, and
# if it may not, or if the value lacks its key, it reads the first value of that key. Nothing has to be forgotten for that: the
# delta rule's erase, by which a delta net without attention keeps such values apart (tutorial 12), makes no difference here.
