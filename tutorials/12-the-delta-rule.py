# %% [markdown]
# # 12. The delta rule: what a write removes
#
# [Open in Colab](https://colab.research.google.com/github/gatedlens/gatedlens/blob/main/tutorials/12-the-delta-rule.ipynb)
#
# One idea: **a delta rule does not only write into its state, it first takes out what its probe finds there, and that can be
# switched off.** We ask a gated delta net that has learnt to recall for a key that was written twice. Which heads forget the
# first value, at which tokens, and what does the model say when they cannot?

# %% tags=["skip-execution"]
# %pip install -q "gatedlens[plot]"  # in Colab

# %%
import torch

import gatedlens as gl

torch.set_grad_enabled(False)
model = gl.from_pretrained("gatedlens/gdn-recall")
batch = gl.tasks.rewritten_recall(400, seed=1)
rows = torch.arange(len(batch.tokens))
prompt = batch.tokens[0]
print(model.to_string(prompt))
print("the model says", model.to_string(model(prompt[None])[0, -1].argmax()))

# %% [markdown]
# ## With and without
#
# `state_t = decay state_{t-1} - erase (probe . state_{t-1}) + key value`: `gl.ablation.no_erase` leaves the middle term out.
# How often does the model then give the second value of the key, and how often the first, which no longer counts?


# %%
def answers(intervention=None):
    """(how often the second value is given, how often the first)"""
    if intervention is None:
        given = model(batch.tokens)[:, -1].argmax(-1)
    else:
        with intervention.on(model):
            given = model(batch.tokens)[:, -1].argmax(-1)
    return [(given == wanted).float().mean().item() for wanted in (batch.answers, batch.old_answers)]


heads = model.cfg.sizes["head"]
found = {"the whole model": answers(), "nothing erases": answers(gl.ablation.no_erase())}
for layer in range(model.cfg.n_layers):
    for head in range(heads):
        found[f"layer {layer}, head {head} does not"] = answers(gl.ablation.no_erase(layer, head=head))
for name, (second, first) in found.items():
    print(f"{name:24} second value {second:4.0%}, first value {first:4.0%}")
assert found["the whole model"][0] > 0.99 and found["the whole model"][1] < 0.01
assert found["nothing erases"][1] > 0.4, "it can no longer tell which of the two counts"

# %% [markdown]
# One head forgets for the whole model. Without its erase both values are in the state, and the answer is a coin toss between
# them. It is never a value of another key: the recall itself works as before.
#
# ## At which tokens
#
# The convolution in front of the scan reads four tokens, so a pair is written a little behind where it stands. We let the head
# erase nowhere but at some tokens, counted from the second value.

# %%
layer, head = max(
    ((one, other) for one in range(model.cfg.n_layers) for other in range(heads)),
    key=lambda place: found[f"layer {place[0]}, head {place[1]} does not"][1],
)
erase = f"blocks.{layer}.mixer.hook_erase"


def erasing_only(first, last):
    """The head erases from `first` to `last` tokens behind the second value, and nowhere else."""
    near = torch.arange(batch.tokens.shape[1]) - batch.answer_pos[:, None]
    kept = (near >= first) & (near <= last)

    def edit(x, hook):
        x[:, :, head] *= kept[..., None, None]
        return x

    with model.hooks([(erase, edit)]):
        given = model(batch.tokens)[:, -1].argmax(-1)
    return (given == batch.answers).float().mean().item()


for first, last in ((0, 0), (0, 1), (0, 2), (0, 3)):
    print(f"erasing from {first} to {last} tokens behind the second value alone: right {erasing_only(first, last):.0%}")
assert erasing_only(0, 3) > 0.9 > erasing_only(0, 0)

# %% [markdown]
# Two tokens behind the value is where the pair is written, and where the head must erase: there alone is as good as everywhere.
#
# ## How it finds the first value
#
# The probe is the key itself. Two pairs with the same key letter are written under nearly the same key, so what the second one
# takes out is what the first has put in; other pairs stand nearly at right angles, and stay.

# %%
_, cache = model.run_with_cache(batch.tokens, names_filter=f"blocks.{layer}.mixer.*")
keys = cache["k", layer][:, :, head]  # unit vectors
behind = 2
first, second = keys[rows, batch.old_pos + behind], keys[rows, batch.answer_pos + behind]
same = (first * second).sum(-1).mean().item()
other = keys[rows, batch.pair_pos[:, 1] + behind]  # a pair of another key
apart = (other * second).sum(-1).abs().mean().item()
print(f"cosine of the keys of both writes {same:.2f}, of another pair's {apart:.2f}")
assert same > 0.5 > 0.3 > apart

# %% [markdown]
# `gl.profiles.collisions` says the same of all pairs of tokens at once, and exactly: `found[i, j]` is what the probe of `i` finds
# of the content of `j` in the state, which the step then takes out. `gl.profiles.rewrite` says how much of the state that is.

# %%
met = gl.profiles.collisions(cache, layer, heads=head).found[:, 0]
at = batch.answer_pos + behind
of_first, of_other = (met[rows, at, pos + behind].abs().mean().item() for pos in (batch.old_pos, batch.pair_pos[:, 1]))
erased = gl.profiles.rewrite(cache, layer).erased[..., head]
print(f"the second write finds {of_first:.2f} of the first and {of_other:.2f} of another pair,")
print(f"and erases {erased[rows, at].mean():.0%} of the state, the other tokens {erased.nanmean():.0%}")
assert of_first > 2 * of_other and erased[rows, at].mean() > erased.nanmean()

# %% [markdown]
# ## For one reader alone
#
# `no_erase` changes the state for every later token. A knockout changes one edge: `cut_erase(src, dst)` lets `dst` read the state
# as it would be if `src` had erased nothing, `cut_scan` as if it had written nothing, `cut_update` as if it had done neither.

# %%
where, edges = {"layers": layer, "head": head}, {}
for name, how in {
    "erased nothing": gl.knockout.cut_erase,
    "written nothing": gl.knockout.cut_scan,
    "done neither": gl.knockout.cut_update,
}.items():
    second, first = edges[name] = answers(how(at, -1, **where))
    print(f"as if the second write had {name:16} second value {second:4.0%}, first value {first:4.0%}")
assert edges["done neither"][1] > 0.99, "the first value stands there as if nothing had happened"

# %% [markdown]
# Without both, for the last token alone, the model gives the first value in every prompt: that one edge is all of the rewrite.
#
# The implicit attention knows of it: what the last token reads of a value is what all later steps have left of it.

# %%
attention = gl.implicit_attention(cache, layer=layer)
read = attention.row(-1, heads=head).abs().mean(1)
now, before = read[rows, batch.answer_pos].mean().item(), read[rows, batch.old_pos].mean().item()
print(f"the last token reads {now:.2f} of the second value and {before:.2f} of the first")
assert now > 1.5 * before
figure = gl.plot.heatmap(attention.abs_mean(heads=head)[0, 0], model.to_str_tokens(prompt))
