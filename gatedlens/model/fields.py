"""Fields: what each key of a config.json may hold, said once; a value that does not fit is refused by its name.

FIELDS = {"d_model": SIZE, "n_layer": layers_of(9), "rms_norm": FLAG, "ssm_cfg": table(d_state=SIZE).or_null()}
check({"d_model": 16, "n_layer": "2"}, FIELDS, "folder/config.json")
# CheckpointError: folder/config.json: n_layer is '2'; expected is a whole number from 1 to 2147483647.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeAlias

from gatedlens.errors import CheckpointError

LARGEST = 2**31 - 1
# What a key of a config may hold; for type checkers alone, since `check` says more of what it may not.
if TYPE_CHECKING:
    ConfigValue: TypeAlias = int | float | str | Sequence[Any] | Mapping[str, Any] | None
else:
    ConfigValue = Any


@dataclass(frozen=True)
class Field:
    """`expected` in words, whether a value `fits`, and, of a table, the fields `inside`.

    layer_tensors: what it counts are layers, each of so many tensors at least, so that a checkpoint bounds it.
    """

    expected: str
    fits: Callable[[Any], bool]
    inside: Mapping[str, Field] = field(default_factory=dict)
    layer_tensors: int = 0

    def or_null(self) -> Field:
        """The same, or null."""
        fits = self.fits
        return replace(self, expected=f"{self.expected}, or null", fits=lambda v: v is None or fits(v))

    def __or__(self, other: Field) -> Field:
        """Either of the two."""
        return Field(f"{self.expected}, or {other.expected}", lambda v: self.fits(v) or other.fits(v))


def whole(low: int, high: int = LARGEST) -> Field:
    """A whole number between two bounds, both included."""
    return Field(
        f"a whole number from {low} to {high}",
        lambda v: isinstance(v, Integral) and not isinstance(v, bool) and low <= int(v) <= high,
    )


def number(expected: str, fits: Callable[[float], bool], largest: float = LARGEST) -> Field:
    """A number, neither NaN nor infinite, that fits."""

    def holds(v: Any) -> bool:
        if not isinstance(v, int | float) or isinstance(v, bool):
            return False
        return -largest <= v <= largest and fits(float(v))  # NaN is not between them

    return Field(expected, holds)


def layers_of(tensors: int) -> Field:
    """The number of layers that have so many tensors at least."""
    return replace(whole(1), layer_tensors=tensors)


def one_of(*known: Any) -> Field:
    """One of some values."""
    return Field(" or ".join(repr(k) for k in known), lambda v: any(type(v) is type(k) and v == k for k in known))


def listed(each: Field, low: int = 0) -> Field:
    """A list of at least `low` values that each fit."""
    return Field(
        f"a list{f' of {low} or more' if low else ''}, each {each.expected}",
        lambda v: isinstance(v, list | tuple) and len(v) >= low and all(each.fits(one) for one in v),
    )


def table(**inside: Field) -> Field:
    """An object with these keys, among others."""
    return Field("an object {...}", lambda v: isinstance(v, Mapping), inside)


SIZE = whole(1)
COUNT = whole(0)
INTEGER = whole(-LARGEST)
POSITIVE = number("a number above 0", lambda v: v > 0)
THETA = number(
    "a number from 0 to 1e18, above 0", lambda v: v > 0, 1e18
)  # the base of a rotary embedding: 1e11 in Falcon-H1
NOT_NEGATIVE = number("a number, 0 or more", lambda v: v >= 0)
NUMBER = number("a number", lambda v: True)
EPS = number("a number from 0 to 1", lambda v: 0 <= v <= 1)
SHARE = number("a number above 0, at most 1", lambda v: 0 < v <= 1)
FLAG = Field("true or false", lambda v: isinstance(v, bool))
TEXT = Field("a text", lambda v: isinstance(v, str))
PAIR = SIZE | Field(
    "two of them", lambda v: isinstance(v, list | tuple) and len(v) == 2 and all(SIZE.fits(one) for one in v)
)
IDS = COUNT | listed(COUNT)
IDS = replace(IDS, expected="a token id, a list of them, or null", fits=IDS.or_null().fits)
FLOAT = one_of("float16", "bfloat16", "float32", "float64").or_null()
NONE = Field("null", lambda v: not v)
METHODS = ("bitsandbytes", "torchao", "compressed-tensors", "fp8")  # whose weights are dequantised as they are read


def _is_read(config: Any) -> bool:
    """Whether a quantization_config is of a method that is read; an old one of bitsandbytes names none."""
    if not config or not isinstance(config, Mapping):
        return not config
    method = config.get("quant_method", "bitsandbytes" if {"load_in_8bit", "load_in_4bit"} & set(config) else None)
    return str(getattr(method, "value", method)).lower() in METHODS


QUANTISED = Field(f"null, or of {', '.join(METHODS)}; else load the model without quantisation", _is_read)
TRANSFORMERS = {  # what transformers keeps in the config.json of every model
    "torch_dtype": FLOAT,
    "dtype": FLOAT,
    "quantization_config": QUANTISED,
    "tie_word_embeddings": FLAG,
    "bos_token_id": IDS,
    "eos_token_id": IDS,
    "pad_token_id": IDS,
}


def check(config: Any, fields: Mapping[str, Field], where: Any, required: Iterable[str] = ()) -> None:
    """CheckpointError unless `config` is an object whose values fit their fields; other keys are nobody's business."""
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{where} is {_short(config)}; expected is an object {{...}}.")
    for name in required:
        if name not in config:
            raise CheckpointError(f"{where} lacks {name}; expected is {fields[name].expected}.")
    _check(config, fields, where, "")


def _check(config: Mapping[str, Any], fields: Mapping[str, Field], where: Any, outer: str) -> None:
    for name, known in fields.items():
        if name not in config:
            continue
        value = config[name]
        if not known.fits(value):
            raise CheckpointError(f"{where}: {outer}{name} is {_short(value)}; expected is {known.expected}.")
        if known.inside and isinstance(value, Mapping):
            _check(value, known.inside, where, f"{outer}{name}.")


def check_depth(config: Mapping[str, Any], fields: Mapping[str, Field], where: Any, tensors: int) -> None:
    """CheckpointError for more layers than a checkpoint of so many tensors can have: before they are built."""
    for name, known in fields.items():
        value = config.get(name, 0) if known.layer_tensors else 0
        layers = len(value) if isinstance(value, list | tuple) else value
        if layers * known.layer_tensors > tensors:
            raise CheckpointError(
                f"{where}: {name} asks for {layers} layers, and the checkpoint holds {tensors} tensors in all; expected are "
                f"at least {known.layer_tensors} a layer."
            )
        if known.inside and isinstance(config.get(name), Mapping):
            check_depth(config[name], known.inside, f"{where}: {name}", tensors)


def _short(value: Any) -> str:
    """A value as it is shown: no longer than a line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
