# %% [markdown]
# # 15. Lenses: what a layer would say, and what a state would
#
# [Open in Colab](https://colab.research.google.com/github/gatedlens/gatedlens/blob/main/tutorials/15-what-a-state-would-say.ipynb)
#
# One idea: **a state cannot be read by itself, but every prompt brings the vectors that read it.** So we let prompts read one
# state and see what each of them would hear. A Mamba-2 that has learnt to recall keeps four pairs of a key and a value in its
# states; four questions make it say all four, though it was asked only one. Then we check what the lens says by moving states.

# %% tags=["skip-execution"]
# %pip install -q "gatedlens[plot]"  # in Colab

# %%
import torch

import gatedlens as gl

torch.set_grad_enabled(False)
model = gl.from_pretrained("gatedlens/mamba2-recall")
batch = gl.tasks.recall(64, seed=0)
rows, before_question = torch.arange(len(batch.tokens)), batch.tokens.shape[1] - 3
_, ours = model.run_with_cache(batch.tokens, names_filter="*.hook_state")
print(model.to_string(batch.tokens[0]))

# %% [markdown]
# ## What a layer would say
#
# The logit lens reads a layer's residual stream as if it were the last. Two lenses that are fitted do better where a layer does
# not yet speak the last one's language: the J-lens takes the mean Jacobian from there to the last layer, the tuned lens an affine
# map that was trained to predict what the model predicts. How far is each from the model's own prediction?

# %%
train = [gl.tasks.recall(32, seed=100 + seed).tokens for seed in range(4)]
j_lens = gl.lens.jacobian_lens(model, train[0][:4], skip_first=1, dim_batch=16, progress=False)
tuned = gl.lens.tuned_lens(model, train, steps=40, lr=3e-3, progress=False)
for read in (
    gl.lens.logit_lens(model, batch.tokens),
    j_lens.read(model, batch.tokens),
    tuned.read(model, batch.tokens),
):
    off = read.divergence().mean_over("pos")
    said = ", ".join(f"{layer}: {value:.2f}" for layer, value in zip(off["layer"], off.values.tolist(), strict=True))
    print(f"{read.called:10} nats from the prediction after {said}")

# %%
tuned.read(model, batch.tokens[:1]).plot()

# %% [markdown]
# The last column is the question: after the first layer the value is the likeliest token already. It can only come from that
# layer's states, and what the second adds from its own. What do they hold?
#
# ## What a state would say
#
# `gl.lens.state_lens(model, source, reader)` takes the state of the source after a position, here the one before `?`, and lets
# every position of the reader read it: by the reader's own C, through its own gate, norm and output projection, to the logits.
# Only what is read is another's. The readers are the prompts themselves, but each asks for another of its keys.

# %%
found = {}
for pair in range(batch.pair_pos.shape[1]):
    place = batch.pair_pos[:, pair]
    reader = batch.tokens.clone()
    reader[:, -1] = batch.tokens[rows, place - 1]  # "? K", K this pair's key
    lens = gl.lens.state_lens(model, ours, reader, pos=before_question)
    values = gl.tasks.ids(gl.tasks.VALUES)
    for layer in lens.layers:
        heard = values[lens.logits(layer)[:, -1][:, values].argmax(-1)]
        found[pair, layer] = (heard == batch.tokens[rows, place]).float().mean()
    key, value = (model.to_string(batch.tokens[0, place[0] - shift]) for shift in (1, 0))
    print(f"asked for {key}, whose value is {value}, the first prompt's last states say {model.to_string(heard[0])}")
right = gl.Result(
    torch.tensor([[found[pair, layer] for layer in lens.layers] for pair in range(4)]),
    ("pair", "layer"),
    {"pair": ["first", "second", "third", "fourth"], "layer": lens.layers},
    "How often a layer's states say a pair's value",
    "share of prompts",
)
print(right.values)
assert right.values.mean(0)[-1] > 0.9, "the states hold all pairs, not the one that was asked for alone"
right.plot()

# %% [markdown]
# No pair stands out: before the question nobody knows which will be asked, so the states hold all four. What is read is a matter
# of the reader.
#
# ## Which head holds it, and since when
#
# What a state gives to a logit is a sum over its heads, values and keys, exactly: `shares`. We ask for the right value against
# one that stands nowhere in the prompt.

# %%
absent = torch.tensor([next(v for v in values.tolist() if v not in row) for row in batch.tokens.tolist()])
lens = gl.lens.state_lens(model, ours, batch.tokens, pos=before_question)
heads = torch.stack(
    [lens.shares(batch.answers, absent, layer=layer).values.sum((2, 3)).mean(0) for layer in lens.layers]
)
by_head = gl.Result(heads, ("layer", "head"), {}, "What each head's state gives to the right value", "logit difference")
by_head.plot()

# %% [markdown]
# And along the prompt: the state after each position, read by the question at the end.

# %%
read_at = range(1, before_question + 1, 2)
since = torch.stack(
    [
        gl.lens.state_lens(model, ours, batch.tokens, pos=pos).attribution(batch.answers, absent).values.sum(1)
        for pos in read_at
    ],
    dim=1,
)
away = torch.tensor(read_at)[None] - batch.answer_pos[:, None]
course = torch.stack([since[away == tokens].mean() for tokens in range(-4, 6)])
labels, title = {"token": [*range(-4, 6)]}, "Since when the states say the value, which is token 0"
gl.Result(course, ("token",), labels, title, "logit difference").plot()

# %%
print([round(value, 1) for value in course.tolist()])
assert course[4:].min() > 2 * course[:4].max(), "nothing is there before the value was read"

# %% [markdown]
# ## Is that so? An intervention
#
# A lens says what a state *would* say. Let it: we put the states of another prompt in place of the run's own just before the
# question, in the four heads that the lens names first, or in the four others. The other prompt is the same with another value at
# the queried key: that value is what the lens hears in its states, and what the model must now answer.

# %%
other = batch.with_answer(absent)
_, theirs = model.run_with_cache(other.tokens, names_filter="*.hook_state")
ranked = [(layer, head) for layer, head in torch.cartesian_prod(torch.arange(2), torch.arange(4)).tolist()]
ranked.sort(key=lambda place: -float(heads[place[0], place[1]]))


def moved(places):
    """(how often the run still gives its own value, how often the other prompt's)"""
    patch = sum(
        (gl.states.patch(theirs, before_question, layers=layer, head=head) for layer, head in places[1:]),
        gl.states.patch(theirs, before_question, layers=places[0][0], head=places[0][1]),
    )
    with patch.on(model):
        given = model(batch.tokens)[:, -1].argmax(-1)
    return [(given == wanted).float().mean().item() for wanted in (batch.answers, other.answers)]


switched = {}
for name, places in {"the four that the lens names": ranked[:4], "the other four": ranked[4:]}.items():
    own, switched[name] = moved(places)
    print(f"states moved in {name:28} own value {own:4.0%}, the other prompt's {switched[name]:4.0%}")
assert switched["the four that the lens names"] > 0.8 and switched["the other four"] < 0.2

# %% [markdown]
# The heads that the lens names carry the answer, and the others do not. The lens was linear all along: with a run's own state,
# what it says and what the mixer writes without one (`lens.rest`) are the mixer's output, to rounding. What it leaves out is what
# later layers make of an earlier one's answer; that is what the intervention is for.
