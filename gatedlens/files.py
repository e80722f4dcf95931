"""Files: JSON that every reader takes, saved files that are whole or not there, and packages that may be missing.

    to_json({"a": float("nan")})                     # '{"a": null}': what is no finite number is null
    in_page({"tokens": ["<!--", "</script>"]})       # JSON for a <script type='application/json'>: no `<` stands in it

    write_json(path, value.to_dict()); data = read_json(path, "result")
    write_whole(path, data)                          # a file that is replaced: all or nothing, whatever stops it
    tensors, meta = read_tensors(path)               # safetensors
    fields = Fields(data, "result", path); fields.words("axes")     # each field by its kind, or an error that names it

    pyarrow = optional("pyarrow", "store")           # the module, or an ImportError that names the extra which brings it

Errors name the file. InputError for a file of ours that is damaged or is no such file; CheckpointError for one of tensors.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatedlens.errors import CheckpointError, GatedlensError, InputError

if TYPE_CHECKING:
    from torch import Tensor

# -- JSON -----------------------------------------------------------------------------------------------------------


def to_json(value: Any, indent: int | None = None) -> str:
    """`to_json({"a": 1.5})`: JSON, which knows no NaN and no infinity; what is neither text, number, list nor object is
    said as a text.
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False, default=str)


def in_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`in_json(facts)`: what `to_json` makes of fields by name, read back: what it says as a text is a text."""
    found: dict[str, Any] = json.loads(to_json(fields))
    return found


def in_page(value: Any) -> str:
    """`in_page(value)`: JSON for a script element of a page, where nothing but `<` can begin what ends it, or a comment."""
    return to_json(value).replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


# -- saved files ----------------------------------------------------------------------------------------------------

MISSING: Any = object()  # in place of a field that is not there


def write_json(path: str | Path, data: Mapping[str, Any]) -> Path:
    """`write_json(path, data)`: write JSON, and return the path; a file that was there is replaced whole, or not at all.

    InputError, and nothing is written, for what JSON cannot hold.
    """
    write_whole(Path(path), as_json(path, data).encode())
    return Path(path)


def write_whole(path: Path, data: bytes) -> None:
    """`write_whole(path, data)`: replace a file by `data`, all or nothing, also when the machine stops."""
    # The new file is written beside the old one and takes its name at the end: whoever reads meanwhile reads the old one.
    path = path.resolve()  # behind a link lies the file that is meant
    if path.exists() and not path.is_file():  # a pipe, a device
        path.write_bytes(data)
        return
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else the name may reach the disk before the bytes do
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last; Windows knows no such thing."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def as_json(path: str | Path, data: Mapping[str, Any], indent: int | None = 1) -> str:
    """`data` as JSON; InputError that names the field which JSON cannot hold. indent=None is faster to write."""
    return (
        "{\n" + ",\n".join(f"{json.dumps(name)}: {_json_of(path, name, data[name], indent)}" for name in data) + "\n}"
    )


def _json_of(path: str | Path, name: str, value: Any, indent: int | None) -> str:
    try:
        return json.dumps(value, indent=indent)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} is not written: JSON cannot hold the field {name!r} ({error}).") from error


def read_json(path: str | Path, kind: str) -> Any:
    """What `write_json` wrote; InputError for a file that cannot be read, or is not JSON and so no saved `kind`."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read as a saved {kind}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number of too many digits, too many brackets
        raise InputError(f"{path} is no saved {kind}: it is not JSON ({error}).") from error


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file; CheckpointError for one that cannot be read."""
    from safetensors import SafetensorError, safe_open  # late: the command line writes JSON, and waits for no torch

    try:
        with safe_open(str(path), "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:  # the last two: from torch, on odd headers
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}.") from error


class Fields:
    """The fields of something saved, each asked for by its kind; `error` names the file, the field and what was expected.

    fields = Fields(data, "result", "sweep.json")
    axes, shape = fields.words("axes"), fields.sizes("shape")
    """

    def __init__(self, data: Any, kind: str, where: str | Path = "This", error: type[GatedlensError] = InputError):
        self.kind, self.where, self.error = kind, where, error
        if not isinstance(data, Mapping):
            raise error(f"{where} is no saved {kind}: it holds {_told(data)}; expected fields by name.")
        self.data = data

    def wrong(self, name: str, expected: str) -> GatedlensError:
        """The error for a field that is not what was expected."""
        there = f"is {_told(self.data[name])}" if name in self.data else f"is missing among {_told(list(self.data))}"
        return self.error(f"{self.where} is no saved {self.kind}: its field {name!r} {there}; expected {expected}.")

    def check(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise self.wrong(name, expected)

    def get(self, name: str, expected: str, fits: Callable[[Any], bool]) -> Any:
        """The field `name`, if it is there and `fits`."""
        value = self.data.get(name, MISSING)
        self.check(value is not MISSING and fits(value), name, expected)
        return value

    def format(self, number: int) -> None:
        """Check the version that the file was written in."""
        self.get("format", f"{number}, the format that this version reads", lambda v: type(v) is int and v == number)

    def word(self, name: str) -> str:
        return self.get(name, "text", lambda v: isinstance(v, str))

    def words(self, name: str) -> list[str]:
        """Texts that differ from one another."""
        return self.get(name, "a list of different words", lambda v: _listed(v, str) and len(set(v)) == len(v))

    def sizes(self, name: str) -> list[int]:
        return self.get(name, "a list of sizes", lambda v: _listed(v, int) and all(0 <= n < 2**31 for n in v))

    def numbers(self, name: str) -> list[float | None]:
        """Numbers, with null for those that were not measured."""
        expected = "a list of numbers (null: not measured)"
        found = self.get(name, expected, lambda v: isinstance(v, list) and all(n is None or is_number(n) for n in v))
        return [None if n is None else float(n) for n in found]

    def fields(self, name: str) -> Mapping[str, Any]:
        """Fields within the field."""
        return self.get(name, "fields by name", lambda v: isinstance(v, Mapping) and all(isinstance(k, str) for k in v))


def _listed(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(one) is kind for one in value)


def is_number(value: Any) -> bool:
    """Whether it is a number that float64 holds."""
    return type(value) is float or (type(value) is int and abs(value) < 2**1023)


def _told(value: Any) -> str:
    """A value as an error shows it: not all of a long one."""
    said = repr(value)
    return said if len(said) <= 100 else f"{said[:97]}..."


# -- optional packages ----------------------------------------------------------------------------------------------


def optional(module: str, extra: str) -> Any:
    """`optional("pyarrow", "store")`: the module, or an ImportError that names the extra which brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"This needs {package}, which is not installed: pip install 'gatedlens[{extra}]'.") from error
