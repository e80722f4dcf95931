# %% [markdown]
# # 19. A state that knows: trained initial states, and two models side by side
#
# [Open in Colab](https://colab.research.google.com/github/gatedlens/gatedlens/blob/main/tutorials/19-a-state-that-knows.ipynb)
#
# One idea: **whatever a recurrent model remembers is its state, so a fact can be put there without touching a weight.** A
# Mamba-2 that recalls keys from its prompt is to know that E is 5, though no prompt says so. Once we train the state in which
# it begins, once its weights. Then we look where the fact is: what the state says, and which layer's weights it takes.

# %% tags=["skip-execution"]
# %pip install -q "gatedlens[plot]"  # in Colab

# %%
import torch

import gatedlens as gl

model = gl.from_pretrained("gatedlens/mamba2-recall")
key, value = gl.tasks.ids(("E", "5"))


def prompts(n, seed):
    """n prompts without an E, each twice: with its own question, and asking for E. And the answers."""
    batch = gl.tasks.recall(4 * n, seed=seed)
    some = [i for i, row in enumerate(batch.tokens) if key not in row][:n]
    own = batch.tokens[some]
    asking = own.clone()
    asking[:, -1] = key
    return torch.cat([own, asking]), torch.cat([batch.answers[some], value.expand(n)])


train = [prompts(24, seed) for seed in range(12)]
tokens, answers = prompts(64, 99)
print(model.to_string(tokens[0]), "   ", model.to_string(tokens[64]))


def right(output):
    """(how often its own question is answered, how often E is 5)"""
    hits = (output[:, -1].argmax(-1) == answers).float()
    return f"own question {hits[:64].mean():4.0%}, E is 5 {hits[64:].mean():4.0%}"


# %% [markdown]
# ## The state
#
# `gl.states.optimise` trains the scan states with which every row begins. The weights stay as they are.

# %%
metrics = [gl.metrics.log_probability(wanted) for _, wanted in train]
trained = gl.states.optimise(model, [given for given, _ in train], metrics, steps=80, lr=0.03, progress=False)
torch.set_grad_enabled(False)
with trained.on(model):
    known = model(tokens)
print("from the empty state:  ", right(model(tokens)))
print("from the trained state:", right(known))
assert (known[64:, -1].argmax(-1) == value).float().mean() > 0.95
trained

# %% [markdown]
# ## What does it say?
#
# The state that is left of it before the question is read by each of the twelve keys, with the state lens: how much does each
# hear 5 more than the mean of all values?

# %%
keys, values = gl.tasks.ids(gl.tasks.KEYS), gl.tasks.ids(gl.tasks.VALUES)
own = tokens[:64]
left = model(own[:, :-2], state=trained.rows(model, 64), return_state=True)[1]
plain = model(own[:, :-2], return_state=True)[1]
heard = torch.zeros(2, len(keys))
for i, state in enumerate((plain, left)):
    for j, one in enumerate(keys):
        reader = own.clone()
        reader[:, -1] = one
        lens = gl.lens.state_lens(model, state, reader)
        by_value = torch.stack([lens.attribution(int(other)).values.sum(1) for other in values], dim=1)
        heard[i, j] = (by_value[:, values == value].squeeze(1) - by_value.mean(1)).mean()
labels = {"state": ["empty", "trained"], "key": list(gl.tasks.KEYS)}
gl.Result(heard, ("state", "key"), labels, "How much each key hears 5 in the state", "logit over the mean").plot()

# %%
others = heard[1][keys != key]
print(f"E hears {heard[1, 4]:.0f}, the other keys at most {others.max():.0f}")
assert heard[1, 4] > 2 * others.max()

# %% [markdown]
# So what was trained looks like any other pair in the state, only louder: it has to last through a whole prompt. Is it there?
# We take the trained state away from one layer at a time.

# %%
rows, empty = trained.rows(model, len(tokens)), trained.rows(model, len(tokens)).map(torch.zeros_like)
for layer in range(model.cfg.n_layers):
    without = gl.states.splice(model, rows, empty, layers=layer, parts="scan")
    print(f"layer {layer} begins empty:  ", right(model(tokens, state=without)))

# %% [markdown]
# ## The weights
#
# The same by a fine-tune. Side by side: what do the layers of both say where E is asked for, and what of it is new?

# %%
tuned = gl.from_pretrained("gatedlens/mamba2-recall")
with torch.enable_grad():
    adam = torch.optim.Adam(tuned.wrapped.parameters(), lr=1e-3)
    for step in range(60):
        given, wanted = train[step % len(train)]
        adam.zero_grad()
        torch.nn.functional.cross_entropy(tuned(given)[:, -1], wanted).backward()
        adam.step()
print("the fine-tune:         ", right(tuned(tokens)))

both = gl.comparing.side_by_side(
    lambda one: gl.lens.logit_lens(one, tokens[64:65]).probability(int(value)), {"base": model, "tuned": tuned}
)
gl.comparing.difference(both, "tuned", "base").plot()

# %% [markdown]
# Which weights carry it? Those of the fine-tune are put into the base, a part of a layer at a time, and those of the base into
# the fine-tune. In the first a part that *suffices* stands out, in the second one that is *needed*.

# %%
metric = gl.metrics.probability(int(value))
into_base = gl.comparing.graft_sweep(model, tuned, tokens[64:], metric, by_part=True, progress=False)
into_tuned = gl.comparing.graft_sweep(tuned, model, tokens[64:], metric, by_part=True, progress=False)
into_base.plot()

# %%
print("the fine-tune's weights in the base:\n", into_base.values, "\nthe base's in the fine-tune:\n", into_tuned.values)
assert into_base.at(part="mixer").values.min() > 0.5, "either layer's mixer is enough"
assert into_tuned.values.min() > 0.9, "and none is needed"

# %% [markdown]
# The fine-tune has written the fact into both mixers, each of which would do alone: no single layer holds it, and whoever had
# asked only what is *needed* would have found nothing. The state that was trained leans on its first layer. Both are the same
# few lines: an intervention on what a model starts from, and one on what it is made of.
