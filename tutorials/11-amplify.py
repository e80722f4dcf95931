# %% [markdown]
# # 11. AMPLIFY: explanations written into prompts
#
# [Open in Colab](https://colab.research.google.com/github/gatedlens/gatedlens/blob/main/tutorials/11-amplify.ipynb)
#
# One idea: **what a small model looks at can be told to another model, in words.** AMPLIFY (Krishna et al. 2023) takes the
# examples that a small proxy gets wrong most surely, explains each with respect to its *right* answer, and puts the words
# that matter into the prompt: "The key words: dull, plot are crucial clues for predicting negative as the correct answer."
# The papers on implicit attention use it to compare their maps with others in use. The pipeline here is whole; the models
# are tiny, and what it shows on them is not what it shows on large ones.

# %% tags=["skip-execution"]
# %pip install -q "gatedlens[plot]"  # in Colab

# %%
import torch

import gatedlens as gl
from gatedlens import amplify

torch.set_grad_enabled(False)
shots = [amplify.Shot("A dull film, and hardly any plot.", "negative", ("dull", "hardly"))]
print(amplify.prompt(shots, "I laughed all the way."))

# %% [markdown]
# ## A task that the bundled models know
#
# Key-value recall, as text. The labels are the eight values; proxy and prompted model are two architectures. Their
# vocabulary has no "key words", so the templates are bare: a shot is the prompt, its words, its label.

# %%
BARE = {"ask": "{text}", "shot": "{text} {rationale}{label}", "rationale": "{words} ", "between": " ", "comma": " "}
values = list(gl.tasks.VALUES)


def texts(n, seed):
    """(n prompts as text, their right values, and which label those are)"""
    batch = gl.tasks.recall(n, seed)
    words = [[gl.tasks.VOCABULARY[i] for i in row[1:].tolist()] for row in batch.tokens]
    right = [gl.tasks.VOCABULARY[i] for i in batch.answers.tolist()]
    return [" ".join(row) for row in words], right, [values.index(value) for value in right]


def asked(model, prompts):
    return amplify.probabilities(model, prompts, values, ask="{text}", batch_size=100, progress=False)


proxy, model = (gl.from_pretrained(f"gatedlens/{name}-recall") for name in ("griffin", "mamba"))
pool, answers, right = texts(400, seed=0)
p = asked(proxy, pool)
hard = amplify.select(p, right, n=4)
scores = amplify.misclassification(p, right)
print(
    f"the proxy is right in {(scores < 0).float().mean():.1%}; the four chosen:",
    [round(scores[i].item(), 2) for i in hard],
)
assert scores[hard[0]] == scores.max() and list(scores[hard]) == sorted(scores[hard], reverse=True)

# %% [markdown]
# A score above 0 is a mistake; where there are fewer mistakes than shots, the least sure right answers follow.
#
# ## Which words
#
# Any attribution method explains, by its name. Here the truth is known: the words that the answer follows from are the value
# and its key. How often are they the first two words?

# %%
OPTIONS = {"raw_attention": {"sign": "abs"}, "occlusion": {"progress": False}}
found = {}
for method in ("raw_attention", "gradient_attention", "lrp", "occlusion", "random"):
    chosen = [
        amplify.explain(proxy, pool[i], answers[i], values, 2, method, ask="{text}", **OPTIONS.get(method, {}))
        for i in range(40)
    ]
    truth = [{answer, text.split()[-1]} for text, answer in zip(pool[:40], answers[:40], strict=True)]
    found[method] = sum(set(shot.words) == both for shot, both in zip(chosen, truth, strict=True)) / 40
    print(f"{method:20} {found[method]:.0%}   e.g. {chosen[0].words}")
assert found["lrp"] > 0.5 and found["occlusion"] > 0.5 and found["random"] < 0.2

# %% [markdown]
# ## The prompt
#
# Four shots with the words of `lrp`, and for comparison: no shots, the same shots without words, and with words by chance.


# %%
def explained(method):
    return [amplify.explain(proxy, pool[i], answers[i], values, 2, method, ask="{text}") for i in hard]


kinds = {
    "no shots": [],
    "shots": [amplify.Shot(pool[i], answers[i]) for i in hard],
    "shots, words of lrp": explained("lrp"),
    "shots, words by chance": explained("random"),
}
questions, _, wanted = texts(300, seed=1)
print(amplify.prompt(kinds["shots, words of lrp"][:1], questions[0], **BARE))
correct = {}
for kind, some in kinds.items():
    prompts = [amplify.prompt(some, question, **BARE) for question in questions]
    correct[kind] = (asked(model, prompts).argmax(1) == torch.tensor(wanted)).double()
    mean, error = correct[kind].mean().item(), 1.96 * correct[kind].std().item() / len(questions) ** 0.5
    print(f"{kind:24} {mean:6.1%} right, +- {error:.1%}")

# %% [markdown]
# ## What it shows
#
# The words are right, and they are of no use here. The prompted model knows the task without shots; shots make it worse
# (it has only ever seen prompts of one length, and the keys of the shots hold other values). Against the same shots without
# words, compared question by question, words move the result by a few percent, and words by chance as much as the right
# ones: whatever changes, it is not what the words say. A model that never learnt to read rationales cannot gain from
# them. So this tests the pipeline and the words, not AMPLIFY; and it shows why chance belongs into every such comparison.

# %%
for kind in ("shots, words of lrp", "shots, words by chance"):
    gain = correct[kind] - correct["shots"]
    error = 1.96 * gain.std() / len(gain) ** 0.5
    print(f"{kind}, against shots without: {gain.mean():+.1%} +- {error:.1%}")
assert correct["no shots"].mean() > 0.95 and correct["shots"].mean() < correct["no shots"].mean() - 0.05
assert (correct["shots, words of lrp"] - correct["shots, words by chance"]).mean().abs() < 0.1

# %% [markdown]
# ## With a checkpoint and a data set of your own
#
# Any causal language model that loads is a proxy, and any is prompted. The pieces are the ones above, with the default
# templates; labels must be single tokens at the end of "Answer:". IMDB as its folder of text files:
#
#     proxy = gl.from_pretrained("/checkpoints/mamba-130m-hf")
#     model = gl.from_pretrained("/checkpoints/mamba-2.8b-hf", dtype=torch.bfloat16)
#     labels = {"negative": " negative", "positive": " positive"}
#     folders = [sorted(Path(f"aclImdb/train/{name}").glob("*.txt"))[:200] for name in ("neg", "pos")]
#     files = [(f, y) for y, folder in enumerate(folders) for f in folder]
#     reviews, right = [f.read_text()[:1500] for f, _ in files], [y for _, y in files]
#     missed = (amplify.probabilities(model, reviews, labels).argmax(1) != torch.tensor(right)).nonzero().flatten().tolist()
#     hard = amplify.select(amplify.probabilities(proxy, reviews, labels), right, n=4, among=missed)
#     shots = [
#         amplify.explain(proxy, reviews[i], list(labels)[right[i]], labels, k=5, method="gradient_attention", mode="official")
#         for i in hard
#     ]
#     prompts = [amplify.prompt(shots, review) for review in held_out]
#     p = amplify.probabilities(model, prompts, labels, ask="{text}")
#
# ARC-Easy as its JSONL, where each question brings its own choices: write them into the text, and answer by letter.
#
#     labels = {letter: f" {letter}" for letter in "ABCD"}
#     rows = [json.loads(line)["question"] | {"answer": json.loads(line)["answerKey"]} for line in open("ARC-Easy-Dev.jsonl")]
#     text = lambda row: row["stem"] + "".join(f"\n{choice['label']}. {choice['text']}" for choice in row["choices"])
#
# (Some rows have fewer choices, or digits for letters: leave those out.) To compare methods as the papers do, change `method`
# and keep everything else, shots included; report the differences in pairs, and chance ("random") beside them.
