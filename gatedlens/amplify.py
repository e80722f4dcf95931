"""AMPLIFY: what a small proxy model looks at, written as rationales into the prompt of another model.

    labels = ["positive", "negative"]                       # each one token; {"good": " positive", ...} where it is not itself
    p = amplify.probabilities(proxy, texts, labels)         # text label
    hard = amplify.select(p, right, n=4)                    # the texts whose right label the proxy misses most surely
    shots = [amplify.explain(proxy, texts[i], right[i], labels, k=3, method="lrp") for i in hard]
    prompt = amplify.prompt(shots, question)                # shots with rationales, then the question
    amplify.probabilities(model, [prompt], labels, ask="{text}")      # what the prompted model says

1 a proxy, small enough to explain; 2 the examples that it gets wrong with the most confidence; 3 their explanation with respect
to the right label, token scores averaged to words, the k highest kept; 4 each example with "The key words: a, b are crucial
clues for predicting y as the correct answer." as a shot. Krishna et al. 2023 (AMPLIFY, arXiv 2305.11426); with implicit
attention as the method: HA (arXiv 2403.01590), UIA (arXiv 2405.16504). Neither model is changed, and both are local.

Templates hold {text}, {rationale}, {words} and {label}. ask ends where the label is to follow: its next token is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from gatedlens.attribution import Attribution
from gatedlens.attribution import method as method_of
from gatedlens.errors import InputError, did_you_mean
from gatedlens.metrics import at_position
from gatedlens.model.language import HookedLanguageModel
from gatedlens.options import checked
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.result.rounding import order

__all__ = [
    "Labels",
    "Shot",
    "Spans",
    "explain",
    "fill",
    "key_words",
    "label_tokens",
    "misclassification",
    "probabilities",
    "prompt",
    "select",
    "token_spans",
    "word_scores",
]

ASK = "{text}\nAnswer:"
SHOT = "{text}\n{rationale}Answer: {label}"
RATIONALE = "The key words: {words} are crucial clues for predicting {label} as the correct answer.\n"
BETWEEN, COMMA = "\n\n", ", "
WORD = re.compile(r"\w+(?:['’-]\w+)*")
MERGES: dict[str, Callable[[list[float]], float]] = {
    "mean": lambda scores: sum(scores) / len(scores),
    "sum": sum,
    "max": max,
}
Labels = Sequence[str] | Mapping[str, str]
Spans = Sequence[tuple[int, int]]

# For editors and type checkers: whoever passes something else gets the error of `label_tokens`.
if TYPE_CHECKING:
    LanguageModel: TypeAlias = HookedLanguageModel
else:
    LanguageModel = Any


@dataclass(frozen=True)
class Shot:
    """An example with its right label, and the words that a proxy's explanation puts first (none: no rationale)."""

    text: str
    label: str
    words: tuple[str, ...] = ()

    @checked
    def rationale(self, template: str = RATIONALE, comma: str = COMMA) -> str:
        """`shot.rationale()`: the template filled with its words and label; empty if it has no words.

        template: may hold {words} and {label}; comma: what stands between words. InputError for another name in braces.
        """
        return fill(template, words=comma.join(self.words), label=self.label) if self.words else ""


# -- which examples -------------------------------------------------------------------------------------------------


@checked
@torch.no_grad()
def probabilities(
    model: LanguageModel,
    texts: Sequence[str],
    labels: Labels,
    ask: str = ASK,
    batch_size: int = 16,
    progress: bool = True,
) -> Float[Tensor, "text label"]:
    """`gl.amplify.probabilities(model, texts, ["positive", "negative"])`: [text, label].

    P(label | text, it is one of the labels): the softmax over the labels' logits at the end of `ask`, a template with {text}.
    labels: texts of one token each, or a dict label -> text of its token. InputError for no texts, fewer than two labels, a label
    that is no single token, a batch_size below 1, and a model that is no language model.
    """
    ids = list(label_tokens(model, labels).values())
    if isinstance(texts, str) or not texts:
        raise InputError(f"texts={texts!r}: give a list of at least one text.")
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: give at least 1.")
    rows = []
    for start in tqdm(range(0, len(texts), batch_size), disable=not progress, desc="amplify", unit="batch"):
        batch, _ = model.prepare([fill(ask, text=text) for text in texts[start : start + batch_size]])
        logits = at_position(model(batch), model.reads_from(batch).argmax(1))
        rows.append(at_least_float32(logits[:, ids]).softmax(-1).cpu())
    return torch.cat(rows)


@checked
def misclassification(p: Float[Tensor, "text label"], right: Sequence[int]) -> Float[Tensor, " text"]:
    """`gl.amplify.misclassification(p, right)`: how surely each text is classified wrongly, [text], -1 to 1.

    The misclassification confidence score: the largest p of a wrong label minus p of the right one. p: `probabilities`; right:
    the number of the right label of each text. InputError for another number of them, or one that is no label. Krishna et al.
    2023 (AMPLIFY, arXiv 2305.11426).
    """
    right = [int(y) for y in right]
    if len(right) != len(p) or p.shape[1] < 2 or not all(0 <= y < p.shape[1] for y in right):
        raise InputError(f"right={right}: one of 0 to {p.shape[1] - 1} for each of {len(p)} texts, two labels or more.")
    chosen = torch.tensor(right).unsqueeze(1)
    return p.scatter(1, chosen, -torch.inf).amax(1) - p.gather(1, chosen).squeeze(1)


@checked
def select(
    p: Float[Tensor, "text label"], right: Sequence[int], n: int, among: Sequence[int] | None = None
) -> list[int]:
    """`gl.amplify.select(p, right, n=4)`: the numbers of the `n` texts with the highest misclassification confidence.

    Highest first; ties keep their order. among: the texts to choose from. The paper takes those that the model to be prompted
    gets wrong. InputError for more texts than there are, or one that is none; and as of `misclassification`.
    """
    scores = misclassification(p, right)
    pool = list(range(len(p))) if among is None else list(among)
    if not 1 <= n <= len(pool) or not all(0 <= i < len(p) for i in pool):
        raise InputError(f"n={n}: there are {len(pool)} texts to choose from, of 0 to {len(p) - 1}.")
    return [pool[i] for i in order(scores[pool])[:n].tolist()]


# -- which words ----------------------------------------------------------------------------------------------------


@checked
def explain(
    model: LanguageModel,
    text: str,
    label: str,
    labels: Labels,
    k: int = 3,
    method: str | Callable[..., Attribution] = "gradient_attention",
    ask: str = ASK,
    merge: str = "mean",
    **options: Any,
) -> Shot:
    """`gl.amplify.explain(proxy, text, "positive", labels, k=3, method="lrp")`: the Shot of a text, with its key words.

    `method` (a name, or a function like those of `gl.attribution`) explains the label's logit at the end of `ask`; of the text's
    own words the `k` with the highest scores are kept. merge: how the scores of a word's tokens become the word's, see
    `word_scores`. options: the method's. InputError for a label that is none of `labels`, and a tokenizer that is not fast.
    """
    tokens = label_tokens(model, labels)
    if label not in tokens:
        raise InputError(f"label={label!r} is none of {list(tokens)}.{did_you_mean(label, tokens)}")
    run = method_of(method) if isinstance(method, str) else method
    asked, before = fill(ask, text=text), len(ask.partition("{text}")[0])
    found = run(model, asked, tokens[label], **options)
    spans = [(start - before, end - before) for start, end in token_spans(model, asked)]
    if len(spans) != found.scores.shape[-1]:
        raise InputError(f"{text!r} is {len(spans)} tokens, and {found.method} scored {found.scores.shape[-1]}.")
    return Shot(text, label, key_words(word_scores(text, spans, found.scores[0].tolist(), merge), k))


@checked
def token_spans(model: LanguageModel, text: str) -> list[tuple[int, int]]:
    """`gl.amplify.token_spans(model, text)`: where each token stands in the text, as characters [start, end).

    The tokens are those of `model.to_tokens(text)`; a special one is (0, 0). InputError for a tokenizer that is not fast.
    """
    if not getattr(model.tokenizer, "is_fast", False):
        raise InputError("Merging tokens to words needs a fast tokenizer (transformers' *Fast): it knows their places.")
    spans = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    special = model.to_tokens(text).shape[1] - len(spans)  # the BOS token, if the model wants one
    return [(0, 0)] * special + [(int(start), int(end)) for start, end in spans]


@checked
def word_scores(text: str, spans: Spans, scores: Sequence[float], merge: str = "mean") -> list[tuple[str, float]]:
    """`gl.amplify.word_scores(text, spans, scores, merge="mean")`: [(word, score)] in the order of the text.

    A token belongs to the word that holds most of its characters, one without any (punctuation, white space, special
    tokens) to none. merge: "mean" (the paper's), "sum", "max". Words that no token stands for are left out. InputError for
    another merge, and unless there is a score for each token.
    """
    if merge not in MERGES:
        raise InputError(f"merge={merge!r}: it is {', '.join(map(repr, MERGES))}.{did_you_mean(merge, MERGES)}")
    if len(spans) != len(scores):
        raise InputError(f"{len(spans)} tokens and {len(scores)} scores: one for each.")
    words = list(WORD.finditer(text))
    given: list[list[float]] = [[] for _ in words]
    for (start, end), score in zip(spans, scores, strict=True):
        shared = [min(end, word.end()) - max(start, word.start()) for word in words]
        if shared and max(shared) > 0:
            given[shared.index(max(shared))].append(score)
    return [(word.group(), MERGES[merge](some)) for word, some in zip(words, given, strict=True) if some]


@checked
def key_words(scored: Sequence[tuple[str, float]], k: int) -> tuple[str, ...]:
    """`gl.amplify.key_words(scored, k=3)`: the `k` words with the highest scores, highest first.

    A word that stands more than once (in any case) counts once. InputError for a k below 1.
    """
    if k < 1:
        raise InputError(f"k={k}: give at least 1.")
    best: dict[str, str] = {}
    for place in order([score for _, score in scored]).tolist():
        best.setdefault(scored[place][0].lower(), scored[place][0])
    return tuple(best.values())[:k]


# -- the prompt -----------------------------------------------------------------------------------------------------


@checked
def prompt(
    shots: Sequence[Shot],
    text: str,
    ask: str = ASK,
    shot: str = SHOT,
    rationale: str = RATIONALE,
    between: str = BETWEEN,
    comma: str = COMMA,
) -> str:
    """`gl.amplify.prompt(shots, question)`: the shots, each with its rationale and label, and then the question `text`.

    A shot without words is an ordinary one. ask, shot, rationale: templates, see the head of `gl.amplify`; between: what stands
    between shots. InputError for a name in braces that the template may not hold.
    """
    rationales = [one.rationale(rationale, comma) for one in shots]
    filled = [
        fill(shot, text=one.text, rationale=why, label=one.label) for one, why in zip(shots, rationales, strict=True)
    ]
    return between.join([*filled, fill(ask, text=text)])


@checked
def fill(template: str, **values: str) -> str:
    """`gl.amplify.fill("{text} Answer:", text="Good.")`: the template with each {name} replaced by its value.

    Braces in a value are text. InputError for a name that has no value.
    """

    def value(found: re.Match[str]) -> str:
        if found[1] not in values:
            names = ", ".join("{" + name + "}" for name in values)
            raise InputError(f"The template {template!r} asks for {found[0]}; it may hold {names}.")
        return values[found[1]]

    return re.sub(r"\{(\w+)\}", value, template)


def label_tokens(model: LanguageModel, labels: Labels) -> dict[str, int]:
    """`gl.amplify.label_tokens(model, ["positive", "negative"])`: {label: the id of its token}.

    labels: texts of one token each, or a dict label -> text of its token. InputError for fewer than two, for one that is no
    single token, and for a model that is no language model.
    """
    if not isinstance(model, HookedLanguageModel):
        raise InputError(f"AMPLIFY takes language models of gatedlens, not {type(model).__name__}.")
    if isinstance(labels, str) or len(labels) < 2 or len(set(labels)) < len(labels):
        raise InputError(f"labels={labels!r}: give two or more different ones.")
    said = labels if isinstance(labels, Mapping) else {label: label for label in labels}
    return {label: model.to_single_token(token) for label, token in said.items()}
