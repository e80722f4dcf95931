"""Tokenizers: transformers' as they are, a folder's loaded, and all others behind the same few words.

model.set_tokenizer(AutoTokenizer.from_pretrained("gpt2"))      # as it is
model.set_tokenizer("folder")                                   # loaded by transformers
model.set_tokenizer(tokenizers.Tokenizer.from_file(path))       # as transformers' fast one
model.set_tokenizer(tiktoken.get_encoding("gpt2"))              # behind an Adapter; so are rwkv's and sentencepiece's
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from gatedlens.errors import CheckpointError, InputError
from gatedlens.model.checkpoint import HUB, read_json, reading
from gatedlens.model.world_vocabulary import WorldVocabulary

log = logging.getLogger(__name__)
FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
PILE, WORLD = "20B_tokenizer.json", "rwkv_vocab_v*.txt"  # what lies beside RWKV-LM's checkpoints
JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
# What `tokenizer=` takes. For type checkers alone: `tokenizer_of` says more of what is none.
if TYPE_CHECKING:

    class Encodes(Protocol):
        """transformers' tokenizers, tiktoken's, sentencepiece's, RWKV's, and your own."""

        def encode(self, *args: Any, **kwargs: Any) -> Any: ...
        def decode(self, *args: Any, **kwargs: Any) -> Any: ...

    TokenizerLike: TypeAlias = Encodes | str | Path | None
else:
    TokenizerLike = Any
MISSING: Any = object()  # what a tokenizer lacks
IDS = {  # what each special id is called: an attribute, or a method as in sentencepiece
    "bos_token_id": ("bos_token_id", "bos_id"),
    "eos_token_id": ("eos_token_id", "eos_id", "eot_token"),
    "pad_token_id": ("pad_token_id", "pad_id"),
}
WORDS = {  # special tokens whose name says what they are, for a `tokenizers.Tokenizer`, which does not tell
    "bos_token": ("<bos>", "<s>", "[BOS]", "<|begin_of_text|>"),
    "eos_token": ("<eos>", "</s>", "[EOS]", "<|endoftext|>", "<|end_of_text|>"),
    "pad_token": ("<pad>", "[PAD]"),
    "unk_token": ("<unk>", "[UNK]"),
}
PLAINLY: dict[
    str, dict[str, Any]
] = {  # what encodes a text without special tokens around it, by the package that a tokenizer comes from
    "tokenizers": {"add_special_tokens": False},
    "tiktoken": {"allowed_special": "all"},
}


def tokenizer_of(given: TokenizerLike) -> Any:
    """What encodes and decodes as transformers' tokenizers do: `given` itself, what its folder holds, or an Adapter.

    None stays None. InputError for what cannot encode and decode.
    """
    from tokenizers import Tokenizer

    if given is None:
        return None
    if isinstance(given, str | Path):
        return load(given, {})
    if isinstance(given, Tokenizer):
        return _fast(given)
    can = all(callable(getattr(given, word, None)) for word in ("encode", "decode"))
    if isinstance(given, type) or not can:
        inside = getattr(given, "tokenizer", None)
        hint = " It holds a tokenizer: pass its `.tokenizer`." if inside is not None else ""
        named = f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
        raise InputError(
            f"tokenizer is {named}; expected is one of transformers' tokenizers, a folder of one, or an object with "
            f"encode(text) and decode(ids).{hint}"
        )
    return given if all(getattr(given, word, MISSING) is not MISSING for word in IDS) else Adapter(given)


def _fast(inner: Any) -> Any:
    """A `tokenizers.Tokenizer` as transformers' fast tokenizer; its special tokens are those whose names say it."""
    from transformers import PreTrainedTokenizerFast

    special = {token.content for token in inner.get_added_tokens_decoder().values() if token.special}
    named: dict[str, Any] = {role: next((w for w in words if w in special), None) for role, words in WORDS.items()}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **{role: word for role, word in named.items() if word})


class Adapter:
    """`Adapter(tiktoken.get_encoding("gpt2"))`: transformers' encode, decode and special ids over any tokenizer.

    `inner` has encode(text), which gives ids or something with `.ids`, and decode(ids). Special ids are those that it
    names (bos_token_id, bos_id(), eot_token, ...); a BOS is prepended where there is one, as with transformers'.
    """

    is_fast = False  # it does not tell where its tokens stand in the text
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None

    def __init__(self, inner: Any):
        self.inner = inner
        self.name_or_path = str(getattr(inner, "name", "") or type(inner).__name__)
        for name, attributes in IDS.items():
            setattr(self, name, self._told(attributes))

    def _told(self, attributes: Iterable[str]) -> int | None:
        """The first of these that is a token id: -1 and the like stand for none."""
        for attribute in attributes:
            try:
                value = getattr(self.inner, attribute)
            except (AttributeError, KeyError):  # tiktoken looks its `eot_token` up
                continue
            value = value() if callable(value) else value
            if isinstance(value, int) and value >= 0:
                return value
        return None

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The ids of a text; special tokens that are written out in it are read as such."""
        ids = self.inner.encode(text, **PLAINLY.get(type(self.inner).__module__.partition(".")[0], {}))
        ids = [int(i) for i in getattr(ids, "ids", ids)]
        return [self.bos_token_id, *ids] if add_special_tokens and self.bos_token_id is not None else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of ids."""
        hidden = {getattr(self, name) for name in IDS} if skip_special_tokens else set()
        return self.inner.decode([int(i) for i in ids if int(i) not in hidden])

    def get_vocab(self) -> dict[str, int]:
        """Its words, where it tells them."""
        words: Any = getattr(self.inner, "get_vocab", dict)()
        return dict(words) if isinstance(words, Mapping) else {}


# -- from files -----------------------------------------------------------------------------------------------------


def load(source: str | Path, hub: Mapping[str, Any]) -> Any:
    """The tokenizer of a folder or hub name; CheckpointError if transformers cannot load one."""
    from transformers import AutoTokenizer

    where = Path(source).expanduser()
    if where.is_dir():
        _check_files(where)
        source = str(where)
    elif where.is_file():
        raise CheckpointError(f"tokenizer={str(source)!r} is a file; expected is the folder that holds it.")
    options = {name: value for name, value in hub.items() if name in (*HUB, "trust_remote_code")}
    options |= _unknown_config(where / (hub.get("subfolder") or ""))
    with reading(source, "holds no tokenizer that transformers can load"):
        return AutoTokenizer.from_pretrained(str(source), **options)


def _unknown_config(folder: Path) -> dict[str, Any]:
    """`config=` for a folder whose config.json names a model that transformers lacks (RWKV-7): it would read the same, and warn
    that it makes another model of it."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = folder / "config.json"
    told = read_json(path) if path.is_file() else {}
    if told.get("model_type") is None or told["model_type"] in CONFIG_MAPPING or "auto_map" in told:
        return {}
    return {"config": PreTrainedConfig.from_dict(told)}


def beside(source: str, hub: Mapping[str, Any]) -> Any:
    """The tokenizer beside a model; None (logged) if there is none, or only one that this machine cannot run.

    CheckpointError if its files are damaged.
    """
    folder = Path(source) / (hub.get("subfolder") or "")
    if folder.is_dir():
        if not any((folder / name).exists() for name in FILES):
            return None
        told = _check_files(folder)
        if (folder / "tokenizer.json").exists() and "auto_map" not in told:
            return load(source, hub)
    try:
        return load(source, hub)
    except CheckpointError as error:
        log.warning("%s; pass tokenizer=... or token ids.", error)
        return None


def beside_file(checkpoint: Path) -> Any:
    """The tokenizer that lies beside a checkpoint of one file: a folder's usual files, or those that RWKV-LM's checkpoints come
    with (the World models' vocabulary, the Pile models' 20B_tokenizer.json); None if there is none.

    CheckpointError if its files are damaged.
    """
    from tokenizers import Tokenizer

    folder = checkpoint.parent
    pile, world = folder / PILE, sorted(folder.glob(WORLD))
    if any((folder / name).exists() for name in FILES):
        return beside(str(folder), {})
    if world:
        return Adapter(WorldVocabulary.read(world[-1]))
    if pile.is_file():
        with reading(pile, "is no tokenizer"):
            return _fast(Tokenizer.from_file(str(pile)))
    return None


def _check_files(folder: Path) -> dict[str, Any]:
    """CheckpointError for a damaged file of a tokenizer; else what its tokenizer_config.json says."""
    from tokenizers import Tokenizer

    told: dict[str, Any] = {}
    for name in JSON:
        path = folder / name
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder; expected is a file of a tokenizer.")
        if path.exists():
            found = read_json(path)
            told = found if name == "tokenizer_config.json" else told
    if (folder / "tokenizer.json").exists():
        with reading(folder / "tokenizer.json", "is no tokenizer"):
            Tokenizer.from_file(str(folder / "tokenizer.json"))
    return told
