# %% [markdown]
# # 16. Subspaces of a state: where a memory keeps its values
#
# [Open in Colab](https://colab.research.google.com/github/gatedlens/gatedlens/blob/main/tutorials/16-subspaces-of-a-state.ipynb)
#
# One idea: **a thing is in a subspace if putting another run's component there, and nothing else, gives the other run's answer.**
# A gated delta net remembers pairs of a key and a value in the state of its heads, matrices [value, key]. Which directions of the
# value axis hold the value? Distributed alignment search (DAS) learns them, and controls say what the learning is worth.

# %% tags=["skip-execution"]
# %pip install -q "gatedlens[plot]"  # in Colab

# %%
import tempfile
from pathlib import Path

import torch

import gatedlens as gl

model = gl.from_pretrained("gatedlens/gdn-recall")
base = gl.tasks.recall(160, seed=0)  # prompts, answers, and where the answer stands
values = gl.tasks.ids(tuple("12345678"))
rows = torch.arange(160)

source = base.tokens.clone()  # the same keys and noise; every value is drawn anew
drawn = torch.randint(8, base.pair_pos.shape, generator=torch.Generator().manual_seed(1))
source.scatter_(1, base.pair_pos, values[drawn])
answers = source[rows, base.answer_pos]  # what the base prompt should say, if its memory were the source's
print("base  ", model.to_string(base.tokens[0]), "->", model.to_string(base.answers[0]))
print("source", model.to_string(source[0]), "->", model.to_string(answers[0]))

# %% [markdown]
# ## Which state
#
# First all of a head's state at the `?`, one head at a time: plain patching, scored as an interchange. A score is a Result: how
# often the base prompt then gets the source's answer, the ends of its 95 % interval, and the mean log probability of that
# answer.

# %%
heads, state = model.cfg.sizes["head"], "blocks.{}.mixer.hook_state"
pairs = (base.tokens, source, answers)
for layer in range(model.cfg.n_layers):
    for head in range(heads):
        every = gl.subspaces.random(model, state.format(layer), rank=32, axes="value", head=head)  # all 32 directions
        found = gl.subspaces.score(model, every, *pairs, pos=-2, progress=False).values[:, 0]
        print(f"layer {layer}, head {head}: {found[0]:4.0%} [{found[1]:.0%}, {found[2]:.0%}]")
        if layer == 0 and head == 1:
            assert found[0] > 0.85

# %% [markdown]
# One head of the first layer holds it. (By chance an answer is the source's in one of eight prompts.)
#
# ## Which directions
#
# `axes="value"` makes a vector of each column of the state, one for each of the 16 numbers of a key; one basis turns them all.
# `sweep` fits on half of the pairs and scores on the others. Beside the learned subspace stand three that know nothing: a random
# one, the rotation that training started from, and one fitted to the answers in random order.

# %%
where = {"pos": -2, "axes": "value", "head": 1, "progress": False}
curve = {}
for rank in (1, 2, 4, 7):
    found = gl.subspaces.sweep(model, *pairs, ("state", 0), rank=rank, fit="pca", controls=("random",), **where)
    curve[rank] = dict(zip(found["subspace"], found.values[0].flatten().tolist(), strict=True))
    print(rank, {name: f"{share:.0%}" for name, share in curve[rank].items()})
swept = gl.subspaces.sweep(model, *pairs, ("state", 0), rank=7, epochs=6, batch_size=16, lr=0.05, **where)
for name, accuracy, low, high in zip(swept["subspace"], *swept.values[:3].flatten(1).tolist(), strict=True):
    print(f"{name:9} {accuracy:4.0%} [{low:.0%}, {high:.0%}]")
assert swept.at(measure="interchange accuracy", subspace="das").values > 0.8
assert swept.at(measure="high", subspace="random").values < 0.4 > swept.at(measure="high", subspace="shuffled").values

# %% [markdown]
# Seven of 32 directions do what all of them did, and they are not seven by accident: the vocabulary has eight values, and the
# differences between eight vectors span seven dimensions. Fewer do less. The controls stay near chance, so it is not the method
# that finds an answer in any subspace.

# %%
picture = gl.Result(
    swept.values[0].flatten(),
    ("subspace",),
    {"subspace": swept["subspace"]},
    "A state's interchange, 7 of 32 directions",
    "interchange accuracy",
)
figure = picture.plot()

# %% [markdown]
# ## Check it by interventions
#
# A Subspace is an intervention that saves and loads. On prompts that it has not seen, with other keys at other places, we put the
# values of one memory into another, and then we take them away. Beside DAS stands PCA, which knows no answer: the directions
# along which the state varies most over prompts.

# %%
learned = gl.subspaces.das(model, *pairs, ("state", 0), rank=7, epochs=6, batch_size=32, lr=0.05, **where)
most = gl.subspaces.pca(model, source, ("state", 0), rank=7, pos=-2, axes="value", head=1)
print(
    learned,
    most,
    f"overlap {learned.overlap(most):.2f}, with a random one {learned.overlap(learned.random(2)):.2f}",
    sep="\n",
)

fresh = gl.tasks.recall(100, seed=7)
other = fresh.with_answer(values[torch.arange(100) % 8])


def says(change, wanted):
    """How often the fresh prompts get an answer under an intervention."""
    with change.on(model), torch.no_grad():
        return (model(fresh.tokens)[:, -1].argmax(-1) == wanted).float().mean().item()


found = {}
for name, one in {"DAS": learned, "PCA": most, "random": learned.random(1)}.items():
    rest = one.complement()
    found[name] = [
        says(one.interchange(model, other.tokens, pos=-2), other.answers),
        says(rest.interchange(model, other.tokens, pos=-2), other.answers),
        says(one.ablate(pos=-2), fresh.answers),
    ]
    print(
        f"{name:6} put in {found[name][0]:4.0%}, all but it {found[name][1]:4.0%}; taken away, own answer {found[name][2]:4.0%}"
    )
nothing = says((most + most.complement()).ablate(pos=-2), fresh.answers)
print(f"without any of the head's state: own answer {nothing:.0%}")
assert min(found["DAS"][0], found["PCA"][0]) > 0.8 > 0.3 > found["random"][0]
assert found["DAS"][2] > 0.8 > found["PCA"][2] + 0.3 and abs(found["PCA"][2] - nothing) < 0.1

# %% [markdown]
# Both say which value is answered when they are put in. But without DAS's directions the model still finds its own value: the
# norm behind the scan enlarges what little is left of it elsewhere, and where nothing competes that is enough. Without PCA's
# seven it is as if the head held nothing. So putting in shows that a subspace *can* carry the value, taking away whether it is
# all that does. Ask for both: DAS is trained for the first alone.
#
# A subspace is a file: its basis, and of what it is.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = most.save(Path(folder) / "values.safetensors")
    print(gl.subspaces.Subspace.load(path), f"{path.stat().st_size:,} bytes")
