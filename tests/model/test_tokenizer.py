"""Tokenizers that are not transformers' work behind the same words or are named; broken files of them are named, too."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from tokenizers.implementations import ByteLevelBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import gatedlens as gl
from gatedlens.hooks.mamba import HookedMamba
from gatedlens.loading import BUNDLED
from gatedlens.model.tokenizer import load

RECALL, MOBY = BUNDLED / "mamba-recall", BUNDLED / "mamba-moby"
WORDS = ("<s>", "a", "b", "c", "</s>")


class Trie:
    """As rwkv's TRIE_TOKENIZER: encode and decode, no options, no special ids."""

    def encode(self, src):
        return [WORDS.index(word) for word in src.split()]

    def decode(self, tokens):
        return " ".join(WORDS[i] for i in tokens)


class Pieces(Trie):
    """As sentencepiece's processor: special ids are methods, -1 for none."""

    def bos_id(self):
        return 0

    def eos_id(self):
        return 4

    def pad_id(self):
        return -1


class Tiktoken(Trie):
    """As tiktoken's Encoding: options of its own, a name, and only an end of text, which is looked up."""

    name = "words"

    def encode(self, text, *, allowed_special=frozenset()):
        assert allowed_special == "all", "special tokens that are written out in a text are read"
        return super().encode(text)

    @property
    def eot_token(self):
        return {"</s>": 4}["</s>"]


Tiktoken.__module__ = "tiktoken.core"


class Nameless(Trie):
    @property
    def eot_token(self):
        raise KeyError("<|endoftext|>")


def words():
    """A `tokenizers.Tokenizer` of WORDS, whose special tokens are named as usual."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return inner


@pytest.mark.parametrize(
    ("tokenizer", "bos", "eos"),
    [(Trie(), None, None), (Pieces(), 0, 4), (Tiktoken(), None, 4), (Nameless(), None, None), (words(), 0, 4)],
)
def test_other_tokenizers_work(tokenizer, bos, eos):
    model = HookedMamba.tiny()
    model.set_tokenizer(tokenizer)
    assert (model.tokenizer.bos_token_id, model.tokenizer.eos_token_id) == (bos, eos)
    assert model.to_tokens("a b c").tolist() == [[1, 2, 3] if bos is None else [0, 1, 2, 3]]
    assert model.to_str_tokens("a b", prepend_bos=False) == ["a", "b"] and model.to_single_token("c") == 3
    assert model.to_string([1, 2]) == "a b"
    assert model.tokenizer.decode([0, 1, 2, 4], skip_special_tokens=True).split() == [
        word for i, word in enumerate(WORDS) if i in (0, 1, 2, 4) and i not in (bos, eos)
    ]
    assert model(["a b c", "a"]).shape[0] == 2, "rows of unequal length are padded"
    ids = model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, verbose=False)
    assert ids.shape[1] <= 4
    with pytest.raises(gl.InputError, match="cannot encode"):
        model.set_tokenizer(Trie())
        model.to_tokens("unknown")


def test_the_tokenizers_library():
    """Its Tokenizer becomes transformers' fast one, which also tells places; its ready-made ones work."""
    own = gl.wrap(HookedMamba.tiny().wrapped, words()).tokenizer
    assert isinstance(own, PreTrainedTokenizerFast) and own("a b", return_offsets_mapping=True)["offset_mapping"]
    model = HookedMamba.tiny(vocab_size=300)
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(["a b c"], vocab_size=260)
    model.set_tokenizer(made)
    assert model.to_string(model.to_tokens("b a")[0]) == "b a"
    real = AutoTokenizer.from_pretrained(MOBY)
    model.set_tokenizer(real)
    assert model.tokenizer is real, "transformers' stay what they are"


@pytest.mark.parametrize("wrong", [3, object(), Trie, lambda text: [1], ["a", "b"], {"a": 1}])
def test_what_is_no_tokenizer_is_named(wrong):
    with pytest.raises(gl.InputError, match=r"tokenizer is .*encode\(text\) and decode\(ids\)"):
        gl.wrap(HookedMamba.tiny().wrapped, wrong)

    class Processor:
        tokenizer = wrong

    with pytest.raises(gl.InputError, match="pass its `.tokenizer`"):
        HookedMamba.tiny().set_tokenizer(Processor())


def test_folders_of_tokenizers(tmp_path):
    for tokenizer in (str(MOBY), MOBY):
        model = gl.from_pretrained("gatedlens/mamba-recall", tokenizer=tokenizer, device="cpu")
        assert model.tokenizer.bos_token_id == 256
        assert gl.wrap(model.wrapped, tokenizer).tokenizer.bos_token_id == 256
    for wrong in (tmp_path, tmp_path / "nowhere", MOBY / "tokenizer.json", MOBY.parent / "vim-digits"):
        with pytest.raises(gl.CheckpointError, match=str(wrong)):
            gl.from_pretrained("gatedlens/mamba-recall", tokenizer=str(wrong), device="cpu", local_files_only=True)


def test_a_model_that_transformers_lacks_brings_no_warning_of_its_own(capfd):
    """Of a folder whose config.json it does not know, transformers says that it makes another model of it: it does not."""
    found = load(BUNDLED / "rwkv7-recall", {})
    assert found("A 1 ? A")["input_ids"] == gl.from_pretrained("gatedlens/gdn-recall").tokenizer("A 1 ? A")["input_ids"]
    assert "instantiate a model" not in capfd.readouterr().err


def test_an_unknown_word_is_no_word():
    """The recall models' tokenizer has an unknown token, so that other tools can boot it; here it stays an error."""
    inner = AutoTokenizer.from_pretrained(RECALL)
    assert inner.encode("whale") == [30] and inner.unk_token == "<unk>", "the model reads ids 0 to 29"
    model = gl.from_pretrained("gatedlens/mamba-recall", device="cpu")
    assert model.cfg.d_vocab == 30 and model.to_tokens("A 3 ? A").tolist() == [[0, 2, 16, 1, 2]]
    with pytest.raises(gl.InputError, match=r"does not know all words of 'A whale'. It knows only: 1 2 3"):
        model.to_tokens("A whale")


def test_broken_files_are_named(tmp_path):
    """Each key of each file dropped, nulled and retyped, bytes cut and flipped: it loads, or the file is named."""
    whole = shutil.copytree(MOBY, tmp_path / "model")
    wrongs = 0

    def loads():
        try:
            gl.from_pretrained(whole, device="cpu")
        except gl.CheckpointError as error:
            assert str(whole) in str(error)
            return False
        return True

    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = whole / name
        held = path.read_bytes()
        said = json.loads(held)
        for key in said:
            for value in (None, [3]):
                path.write_text(json.dumps({**said, key: value}))
                wrongs += not loads()
            path.write_text(json.dumps({k: v for k, v in said.items() if k != key}))
            wrongs += not loads()
        for text in (b"", b"{", b"[]", b"\xff\xfe", held[: len(held) // 2], b'{"a": 1, "a": 2}'):
            path.write_bytes(text)
            assert not loads(), (name, text[:20])
        path.unlink()
        path.mkdir()
        assert not loads()
        path.rmdir()
        path.write_bytes(held)
    assert loads() and wrongs > 5


# -- beside a checkpoint that is one file -----------------------------------------------------------------------------

WORLD = ["1 '\\x00' 1", "2 'H' 1", "3 'He' 2", "4 'l' 1", "5 'llo' 3", "6 b'\\xc3' 1", "7 b'\\xa9' 1", "8 ' ' 1"]


def checkpoint_in(folder):
    """An RWKV file in a folder of its own."""
    torch.save(gl.HookedRWKV6.tiny(vocab_size=64).wrapped.state_dict(), folder / "RWKV-x060.pth")
    return folder / "RWKV-x060.pth"


def test_the_world_models_vocabulary_is_found(tmp_path):
    """The longest word that fits; bytes that are no text of their own."""
    file = checkpoint_in(tmp_path)
    assert gl.from_pretrained(file, device="cpu").tokenizer is None
    (tmp_path / "rwkv_vocab_v20230424.txt").write_text("\n".join(WORLD), encoding="utf-8")
    model = gl.from_pretrained(file, device="cpu")
    assert (
        model.to_tokens("Hello \u00e9").tolist() == [[3, 5, 8, 6, 7]]
        and model.to_string([3, 5, 8, 6, 7]) == "Hello \u00e9"
    )
    assert model.tokenizer.eos_token_id == 0 and model.to_string([0, 2]) == "H"
    with pytest.raises(gl.InputError, match="begins with the byte 0x7a"):
        model.to_tokens("z")
    (tmp_path / "rwkv_vocab_v20230424.txt").write_text("1 'ab' 3")
    with pytest.raises(gl.CheckpointError, match="line 1: expected is an id, a word and its bytes"):
        gl.from_pretrained(file, device="cpu")


@pytest.mark.parametrize("name", ["20B_tokenizer.json", "tokenizer.json"])
def test_a_tokenizer_beside_a_file_is_found(name, tmp_path):
    file = checkpoint_in(tmp_path)
    shutil.copy(RECALL / "tokenizer.json", tmp_path / name)
    model = gl.from_pretrained(file, device="cpu")
    same = AutoTokenizer.from_pretrained(str(RECALL))
    assert model.to_tokens("D 3 dog", prepend_bos=False).tolist() == [same.encode("D 3 dog", add_special_tokens=False)]
    given = gl.from_pretrained(file, device="cpu", tokenizer=Trie())
    assert given.tokenizer.inner.__class__ is Trie
    (tmp_path / name).write_text("{")
    with pytest.raises(gl.CheckpointError, match=name):
        gl.from_pretrained(file, device="cpu")
