"""AMPLIFY: hand-made scores with literal answers, sub-words, every method by name, prompts letter by letter, mistakes."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens import amplify
from gatedlens.amplify import Shot
from gatedlens.attribution import METHODS

VOCABULARY = ["<unk>", "<bos>", "good", "bad", "film", "##s", "un", "##happy", "a", "Answer", ":", ",", "the", "key"]
FEW = {"occlusion": {"progress": False}, "integrated_gradients": {"n_steps": 4}, "smoothgrad": {"n_samples": 3}}


def wordpieces(bos=True):
    """A tokenizer that splits `unhappy` into `un` and `##happy`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordPiece({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<bos>" if bos else None)


@pytest.fixture
def speaker(lm):
    """Each language model, reading the words above."""
    before = lm.tokenizer
    lm.set_tokenizer(wordpieces())
    yield lm
    lm.set_tokenizer(before)


# -- which examples -------------------------------------------------------------------------------------------------

P = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.3, 0.5], [0.1, 0.1, 0.8], [0.3, 0.4, 0.3]])


def test_misclassification_confidence_by_hand():
    found = amplify.misclassification(P, [0, 0, 1, 1])
    assert torch.allclose(found, torch.tensor([0.1 - 0.9, 0.5 - 0.2, 0.8 - 0.1, 0.3 - 0.4]))


def test_the_surest_mistakes_come_first():
    assert amplify.select(P, [0, 0, 1, 1], 4) == [2, 1, 3, 0]
    assert amplify.select(P, [0, 0, 1, 1], 2, among=[3, 0, 1]) == [1, 3]
    assert amplify.select(P, [1, 1, 1, 1], 4) == [0, 2, 1, 3]  # 0.8, 0.7, 0.2, -0.1
    assert amplify.select(torch.full((3, 2), 0.5), [0, 1, 0], 3) == [0, 1, 2], "ties keep their order"


@torch.no_grad()
def test_probabilities_are_those_of_each_text_alone(speaker):
    texts = ["a unhappy film", "the good films, the bad films", "a"]
    for labels in (["good", "bad"], {"yes": "good", "no": "bad", "films": "film"}):
        found = amplify.probabilities(speaker, texts, labels, batch_size=2, progress=False)
        ids = [VOCABULARY.index(word) for word in (labels.values() if isinstance(labels, dict) else labels)]
        for row, text in zip(found, texts, strict=True):
            e = speaker(f"{text}\nAnswer:")[0, -1, ids].exp()
            assert torch.allclose(row, e / e.sum(), atol=1e-12)


# -- which words ----------------------------------------------------------------------------------------------------


def test_token_scores_become_word_scores():
    text = "An un-happy end, isn't it?"
    spans = [(0, 0), (0, 2), (3, 5), (5, 6), (6, 11), (11, 15), (15, 16), (16, 19), (19, 22), (22, 25), (25, 26)]
    scores = [9.0, 1.0, 2.0, 6.0, 4.0, -1.0, 7.0, 0.5, 1.5, 3.0, 8.0]
    want = [("An", 1.0), ("un-happy", 4.0), ("end", -1.0), ("isn't", 1.0), ("it", 3.0)]
    assert amplify.word_scores(text, spans, scores) == want
    sums = [("An", 1.0), ("un-happy", 12.0), ("end", -1.0), ("isn't", 2.0), ("it", 3.0)]
    assert amplify.word_scores(text, spans, scores, "sum") == sums
    assert [score for _, score in amplify.word_scores(text, spans, scores, "max")] == [1.0, 6.0, -1.0, 1.5, 3.0]
    # a token over two words is the longer part's; words without a token, and text around the words, are left out
    assert amplify.word_scores("to be", [(0, 5), (1, 2)], [2.0, 4.0]) == [("to", 3.0)]
    assert amplify.word_scores("?!", [(0, 1), (1, 2)], [1.0, 2.0]) == [] == amplify.word_scores("a", [(-3, 0)], [1.0])


def test_key_words_are_the_best_different_ones():
    scored = [("the", 0.1), ("Film", 0.5), ("bad", 0.4), ("film", 0.9), ("THE", 0.3), ("worst", -2.0)]
    assert amplify.key_words(scored, 2) == ("film", "bad")
    assert amplify.key_words(scored, 9) == ("film", "bad", "THE", "worst")
    assert amplify.key_words([], 3) == ()


@pytest.mark.parametrize("bos", [True, False])
def test_tokens_are_found_in_the_text(bos):
    model = gl.HookedMamba.tiny()
    model.set_tokenizer(wordpieces(bos))
    text = "the unhappy films"
    spans = amplify.token_spans(model, text)
    assert spans[-5:] == [(0, 3), (4, 6), (6, 11), (12, 16), (16, 17)]
    assert spans[:-5] == [(0, 0)] * bos and len(spans) == model.to_tokens(text).shape[1]


def test_bytes_of_one_letter_go_to_its_word(moby_model):
    text = "Queequeg’s café"
    spans = amplify.token_spans(moby_model, text)
    assert len(spans) == 1 + len(text.encode())
    scores = [0.0] + [1.0] * len("Queequeg’s".encode()) + [5.0] + [2.0] * len("café".encode())
    assert amplify.word_scores(text, spans, scores, "sum") == [("Queequeg’s", 12.0), ("café", 10.0)]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_explains(speaker, name):
    """The words of the text alone are ranked, by the mean score of their tokens in the whole question."""
    text, label = "the unhappy films , bad", "bad"
    options = FEW.get(name, {})
    found = amplify.explain(
        speaker, text, label, ["good", "bad"], k=3, method=name, ask="a key : {text} Answer:", **options
    )
    scores = METHODS[name](speaker, f"a key : {text} Answer:", VOCABULARY.index("bad"), **options).scores[0].tolist()
    the, un, happy, film, s, _, bad = scores[4:11]  # behind <bos> a key :
    words = {"the": the, "unhappy": (un + happy) / 2, "films": (film + s) / 2, "bad": bad}
    assert found == Shot(text, label, tuple(sorted(words, key=lambda word: -words[word])[:3]))
    same = amplify.explain(speaker, text, label, ["good", "bad"], 3, METHODS[name], "a key : {text} Answer:", **options)
    assert same == found


def test_the_right_label_is_explained_not_the_predicted_one(recall_model):
    text, values = "B 4 and F 1 gnu ? F", list(gl.tasks.VALUES)
    p = amplify.probabilities(recall_model, [text], values, ask="{text}", progress=False)
    assert values[int(p.argmax())] == "1"
    seen = []

    def mine(model, input, target):
        seen.append((input, target))
        return gl.attribution.lrp(model, input, target)

    shot = amplify.explain(recall_model, text, "4", values, k=2, method=mine, ask="{text}")
    assert seen == [(text, recall_model.to_single_token("4"))] and shot.label == "4"
    assert set(amplify.explain(recall_model, text, "1", values, k=2, method="lrp", ask="{text}").words) == {"F", "1"}


# -- the prompt -----------------------------------------------------------------------------------------------------


def test_a_prompt_letter_by_letter():
    shots = [Shot("A dull {film}.", "negative", ("dull", "film")), Shot("Fine {label}!", "positive")]
    assert amplify.prompt(shots, "Is it {text}?") == (
        "A dull {film}.\nThe key words: dull, film are crucial clues for predicting negative as the correct answer.\n"
        "Answer: negative\n\nFine {label}!\nAnswer: positive\n\nIs it {text}?\nAnswer:"
    )
    assert amplify.prompt([], "Why?") == "Why?\nAnswer:"
    mine = {"ask": "Q {text} A", "shot": "{text}={label}{rationale}", "rationale": "({words})", "between": "|"}
    assert (
        amplify.prompt(shots, "x", **mine, comma=" ")
        == "A dull {film}.=negative(dull film)|Fine {label}!=positive|Q x A"
    )


# -- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: amplify.probabilities(m, "B 4 ? B", ["1", "4"]), "give a list of at least one text"),
        (lambda m: amplify.probabilities(m, [], ["1", "4"]), "give a list"),
        (lambda m: amplify.probabilities(m, ["B"], ["1", "4"], batch_size=0), "batch_size=0"),
        (lambda m: amplify.probabilities(m, ["B"], ["1"]), "two or more different"),
        (lambda m: amplify.probabilities(m, ["B"], ["1", "1"]), "two or more different"),
        (lambda m: amplify.probabilities(m, ["B"], ["1", "1 4"]), "'1 4' is 2 tokens"),
        (lambda m: amplify.probabilities(m, ["B"], ["1", "4"], ask="{txt}"), r"asks for \{txt\}; it may hold \{text\}"),
        (lambda m: amplify.explain(m, "B", "5", ["1", "4"], ask="{text}"), "label='5' is none of"),
        (lambda m: amplify.explain(m, "B", "1", ["1", "4"], method="lpr", ask="{text}"), "Did you mean 'lrp'"),
        (lambda m: amplify.explain(m, "B", "1", ["1", "4"], k=0, method="lrp", ask="{text}"), "k=0"),
        (lambda m: amplify.explain(m, "B", "1", ["1", "4"], merge="men", ask="{text}"), "merge='men'.*'mean'"),
        (lambda m: amplify.misclassification(P, [0, 1]), "for each of 4 texts"),
        (lambda m: amplify.misclassification(P, [0, 1, 2, 3]), "0 to 2"),
        (lambda m: amplify.select(P, [0, 0, 0, 0], 5), "there are 4 texts"),
        (lambda m: amplify.select(P, [0, 0, 0, 0], 1, among=[7]), "n=1"),
        (lambda m: amplify.word_scores("a", [(0, 1)], []), "1 tokens and 0 scores"),
        (lambda m: amplify.prompt([], "x", ask="{text} {label}"), r"asks for \{label\}"),
        (lambda m: amplify.probabilities(gl.HookedViM.tiny(), ["x"], ["1", "4"]), "not HookedViM"),
    ],
)
def test_mistakes_of_amplify_are_explained(recall_model, call, message):
    with pytest.raises(gl.InputError, match=message):
        call(recall_model)


def test_a_slow_tokenizer_is_explained():
    class Slow:
        bos_token_id = eos_token_id = pad_token_id = None

        def encode(self, text, add_special_tokens=True):
            return [1]

        def decode(self, ids):
            return "a"

    model = gl.HookedMamba.tiny()
    model.set_tokenizer(Slow())
    with pytest.raises(gl.InputError, match="fast tokenizer"):
        amplify.token_spans(model, "a")
