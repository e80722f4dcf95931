# %% [markdown]
# # 6. Attribution in text: eleven answers to one question, and how to tell which is right
#
# [Open in Colab](https://colab.research.google.com/github/gatedlens/gatedlens/blob/main/tutorials/6-attribution-text.ipynb)
#
# One idea: **an explanation is a claim, and claims can be checked.** Which tokens does a prediction come from? Eleven methods
# answer, each with one number a token, and they do not agree. Where the truth is known, as in the recall task, they can be
# scored; where it is not, take the token away and see what happens: that is `occlusion`.

# %% tags=["skip-execution"]
# %pip install -q "gatedlens[plot]"  # in Colab

# %%
import torch

import gatedlens as gl

torch.set_grad_enabled(False)
model = gl.from_pretrained("gatedlens/mamba-recall")
prompt = "and gnu fig B 4 F 1 gnu but but but A 2 hay but D 4 hay ? F"
tokens = model.to_str_tokens(prompt)
answer = tokens.index("1")  # the value of F, which the model says next
needed = {answer, answer - 1, len(tokens) - 1}  # the value, its key, and the key that is asked for

found = gl.attribution.lrp(model, prompt)  # without a target: of the token that the model predicts
print(found)
for cell in found.top(4):
    print(f"{cell.get('pos_label', ''):>4} at {cell['pos']:2}: {cell['value']:+.2f}")
assert found.target == [model.to_single_token("1")] and set(found.order(0)[:3].tolist()) == needed

# %% [markdown]
# ## What a target is
#
# A logit alone is also moved by whatever makes all values likelier. The question is more often "why 1 *and not 4*": a pair is
# a logit difference. A metric of your own works as well.

# %%
why = ("1", "4")
found = gl.attribution.lrp(model, prompt, target=why)
print(
    f"logit difference {found.explained.item():.2f} = tokens {found.scores.sum():.2f} + rest {found.facts['remainder'][0]:.2f}"
)
assert set(found.order(0)[:3].tolist()) == needed
assert abs(found.scores.sum() + found.facts["remainder"][0] - found.explained) < 1e-3, "relevance is conserved"

# %% [markdown]
# ## Against a reference
#
# What is a relevance *of*? lrp's sums to the logit itself. `secant` runs the model twice, on the prompt and on a reference
# that holds nothing but the last token (and BOS), and shares out what lies between the two runs, all of it: gates and decays
# get theirs. `secant_by_layer` says where it stands before each layer: at the value first, in the end where the answer is read.

# %%
between = gl.attribution.secant(model, prompt, why)
reference = between.facts["reference"][0]
print(
    f"{between.explained.item():.2f} here, {reference:.2f} with nothing there: the tokens share {between.scores.sum():.2f}"
)
assert abs(between.scores.sum() - (between.explained.item() - reference)) < 1e-3
by_layer = gl.attribution.secant_by_layer(model, prompt, why).values[0]
for layer, row in zip(("before layer 0", "before layer 1", "in the end"), by_layer, strict=True):
    at = int(row.argmax())
    print(f"{layer:15} most of it at {tokens[at]!r} ({at})")
assert by_layer[-1].argmax() == len(tokens) - 1

# %% [markdown]
# ## Eleven methods
#
# One signature for all, so one loop. Rows are scaled by their largest entry, because units differ: what a token *adds* (lrp,
# secant, integrated gradients), what its absence *costs* (occlusion), what it *sends* (attention).

# %%
QUICK = {"integrated_gradients": {"n_steps": 30}, "occlusion": {"progress": False}}
results = {name: f(model, prompt, why, **QUICK.get(name, {})) for name, f in gl.attribution.METHODS.items()}


def compared(results, title):
    """Scores [method, token] as one picture, each row divided by its largest."""
    scores = torch.stack([one.scores[0].cpu() for one in results.values()])
    shares = scores / scores.abs().amax(1, keepdim=True).clamp(min=1e-12)
    words = next(iter(results.values())).facts["tokens"][0]
    axes, labels = ("method", "token"), {"method": list(results), "token": words}
    return gl.Result(shares, axes, labels, title, "score / largest of its row")


picture = compared(results, "Why 1 and not 4? The 1 behind F is the answer (mamba-recall)").plot()
picture.savefig("6-methods.png", dpi=120, bbox_inches="tight")
for name, one in results.items():
    print(f"{name:21} ranks first:", *(f"{tokens[at]} ({at})" for at in one.order(0)[:3].tolist()))
assert all(set(results[name].order(0)[:3].tolist()) == needed for name in ("lrp", "occlusion"))
assert answer not in results["raw_attention"].order(0)[:3]

# %% [markdown]
# Occlusion and lrp name the three tokens that the task needs: the value, its key, and the key that is asked for. (That
# chance puts the answer first here is chance: one prompt shows what a method says, and no more than that.)
#
# ## Signs
#
# Raw attention and rollout miss the answer. Not because attention does not go there: its channels have different signs, and the
# papers' signed mean over channels lets them cancel. `sign="abs"` adds sizes instead. (No target enters here: these two say
# where a layer looks, not what for.)

# %%
batch = gl.tasks.recall(40, seed=1)


def places(model, method, **options):
    """Mean place of the answer in the order (0: always first; chance: 10), and how often it is the first."""
    others = torch.where(batch.answers == batch.answers.roll(1), batch.answers.roll(7), batch.answers.roll(1))
    found = gl.attribution.method(method)(model, batch.tokens, (batch.answers, others), **options)
    place = found.ranks[torch.arange(len(batch.tokens)), batch.answer_pos]
    return place.double().mean().item(), (place == 0).double().mean().item()


for method in ("raw_attention", "rollout"):
    (signed, _), (size, first) = (places(model, method, sign=sign) for sign in ("signed", "abs"))
    print(f"{method:14} place {signed:4.1f} signed, {size:4.1f} abs (first in {first:.0%})")
    assert size < 1 and signed > 5

# %% [markdown]
# ## Which matrix: hidden or unified
#
# "hidden" is the scan alone (Ali et al.), "unified" has the gate, the activation and the convolution (Zimerman et al.). In
# this Mamba the convolution carries each value one or two tokens on before the scan sees it (tutorial 5). A matrix without it
# points exactly there: behind the answer.

# %%
rows = torch.arange(len(batch.tokens))
for factors in ("hidden", "unified"):
    found = gl.attribution.raw_attention(model, batch.tokens, factors=factors, sign="abs")
    shift = found.scores.argmax(1) - batch.answer_pos
    spread = {f"+{k}" if k else "itself": f"{(shift == k).double().mean():.0%}" for k in (0, 1, 2)}
    print(f"{factors:8} the largest score, seen from the answer:", spread)
    at = (shift == 0) if factors == "unified" else (shift > 0) & (shift <= 2)
    assert at.double().mean() > 0.6

# %% [markdown]
# ## The score sheet
#
# All three architectures, 40 prompts, the difference to another value. 10 is chance. Below 2 is as good as 0: two other tokens
# are needed as well, and what asks for causes (occlusion) rightly ranks them beside the value.

# %%
SHEET = {
    "random": ("random", {}),
    "raw attention": ("raw_attention", {}),
    "raw attention, abs": ("raw_attention", {"sign": "abs"}),
    "rollout, abs": ("rollout", {"sign": "abs"}),
    "gradient attention": ("gradient_attention", {}),
    "gradient attention, official": ("gradient_attention", {"mode": "official", "start_layer": 0}),
    "grad x input": ("grad_x_input", {}),
    "lrp": ("lrp", {}),
    "occlusion": ("occlusion", {"progress": False}),
}
models = {name: gl.from_pretrained(f"gatedlens/{name}-recall") for name in ("mamba", "griffin", "rwkv")}
sheet = {
    label: [places(m, method, **options)[0] for m in models.values()] for label, (method, options) in SHEET.items()
}
print(" " * 30 + "".join(f"{name:>9}" for name in models))
for label, row in sheet.items():
    print(f"{label:30}" + "".join(f"{place:9.2f}" for place in row))
good = [label for label, row in sheet.items() if max(row) < 2]
assert good == ["raw attention, abs", "rollout, abs", "gradient attention, official", "lrp", "occlusion"]
assert all(place > 7 for place in sheet["random"])

# %% [markdown]
# Five hold in all three architectures. What reads attention stands or falls with its options: sizes instead of signs, or the
# steps of the papers' code (`mode="official"`) instead of their formula. (In RWKV that formula is empty, and a warning says
# so: its LayerNorms take the mean of every gradient away, by which the formula weighs.) And these are two- and three-layer
# models with one task: rank methods on the model that you explain.
#
# ## What a gate gets
#
# lrp must decide how a product of content and gate is shared. SiLU(z) in Mamba is content times a weight and gets half. The
# sigmoid in RWKV only weighs, and gets nothing. `gates="half"` gives it half all the same: where its input is near 0 that
# share is divided by next to nothing, and biases get more relevance than there is to explain.

# %%
for gates in ("content", "half", "none"):
    one = gl.attribution.lrp(models["rwkv"], batch.tokens, gates=gates)
    leak = torch.tensor(one.facts["remainder"]).abs().mean().item()
    print(f"{gates:8} place {places(models['rwkv'], 'lrp', gates=gates)[0]:.2f}, into biases {leak:5.1f}")
    assert (leak > one.explained.mean()) == (gates == "half")

# %% [markdown]
# ## Where nobody knows the truth
#
# A byte model of *Moby-Dick*. The name comes twice; which letters make it write the next one? Two accounts, and the same test
# for both: replace the 3 tokens that each ranks first, and 3 drawn by chance, by a space.

# %%
moby = gl.from_pretrained("gatedlens/mamba-moby")
text = "Queequeg sat still. The harpoon of Queeq"
methods = {
    name: QUICK.get(name, {}) for name in ("occlusion", "lrp", "integrated_gradients", "raw_attention", "random")
}
methods["occlusion"] = {"progress": False, "baseline": " "}
said = {name: gl.attribution.method(name)(moby, text, **options) for name, options in methods.items()}
ids = moby.to_tokens(text)
target = said["lrp"].target[0]
before = moby(ids)[0, -1].softmax(-1)[target].item()
print(f"next: {moby.to_string(target)!r} with probability {before:.2f}")
after = {}
for name, one in said.items():
    changed = ids.clone()
    changed[0, one.order(0)[:3]] = moby.to_single_token(" ")
    after[name] = moby(changed)[0, -1].softmax(-1)[target].item()
    top = "".join(moby.to_str_tokens(text)[i] for i in sorted(one.order(0)[:3].tolist()))
    print(f"{name:22} takes {top!r}: {after[name]:.2f} is left")
assert all((left > 0.5 * before) == (name == "random") for name, left in after.items())

# %% [markdown]
# All four found letters that it cannot do without, though not the same ones; chance did not. So the test tells good from
# bad here, and not good from good: one text does not rank methods.
#
# ## To look at
#
# `found.plot()` colours the text, and a notebook shows it; red is for, blue against. In a script, save the page.

# %%
pages = [one.plot() for one in said.values()]
gl.plot.Html("".join(page.body for page in pages), "Why does the name go on?").save("6-moby.html")
figure = compared(said, f"Why {moby.to_string(target)!r} next? (mamba-moby)").plot()
figure.savefig("6-moby.png", dpi=120, bbox_inches="tight")

# %% [markdown]
# Numbers are kept as they are found: `found.save("found.json")` and `gl.attribution.Attribution.load("found.json")`,
# `found.to_dataframe()`, and `found` itself stands wherever a tensor does.
