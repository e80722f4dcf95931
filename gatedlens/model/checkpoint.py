"""Checkpoints: the files that hold a model's tensors, read with every doubt named before anything is built.

files = find("folder", {})                 # one file, or the shards that an index names
files.shapes()                             # {name: shape}, from headers where the format has them
files.tensors()                            # {name: tensor}: dense floats that the files really hold
tensors, told = unpacked(path, load(path)) # a training script's file: tensors, and what it says of them
"""

from __future__ import annotations

import argparse
import json
import pickle
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gatedlens.errors import CheckpointError, GatedlensError
from gatedlens.model.config import FLOATS, dtype_name

HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")  # what says where to look
INDEX = ".index.json"
NAMES = ("model.safetensors", "pytorch_model.bin")  # in the order in which transformers looks, each alone or in shards
STORED = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}  # by safetensors' words
CONTAINERS = ("model", "state_dict", "model_state_dict")  # where training scripts put a model's tensors


# -- where a file is ------------------------------------------------------------------------------------------------


def file_of(source: str, name: str, hub: Mapping[str, Any]) -> Path | None:
    """A file of a folder or hub repository; None when it has none by this name."""
    if Path(source).is_dir():
        path = Path(source) / (hub.get("subfolder") or "") / name
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is a folder; expected is a file.")
        return path if path.exists() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, name, **{k: v for k, v in hub.items() if k in HUB}))
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source} cannot be read from the hub: {error}") from error


@contextmanager
def reading(path: Any, what: str = "is damaged or cut short") -> Iterator[None]:
    """What a foreign reader raises, whatever it is, as a CheckpointError that names the file."""
    try:
        yield
    except GatedlensError:
        raise
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(f"{path} {what}: {type(error).__name__}: {said}") from error


@contextmanager
def about(path: Any) -> Iterator[None]:
    """A CheckpointError that does not say which file it speaks of says it."""
    try:
        yield
    except CheckpointError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}") from error


# -- JSON -----------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError for one that is not UTF-8, no JSON, no object, or has a key twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = next((key for key in keys if keys.count(key) > 1), None) if len(set(keys)) < len(keys) else None
        if twice is not None:
            raise CheckpointError(f"{path} has the key {twice!r} twice in one object; expected is one value.")
        return dict(pairs)

    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} cannot be loaded: it is not UTF-8 ({error}).") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be loaded: it is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; expected is an object {{...}}.")
    return value


# -- tensors --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Files:
    """The files of one checkpoint. `weight_map` says which file an index puts a tensor in; empty without an index."""

    paths: tuple[Path, ...]
    index: Path | None
    weight_map: Mapping[str, str]

    def shapes(self, numbers: Sequence[str] = ()) -> dict[str, torch.Size]:
        """The shape of each tensor, from the headers where the format has them. numbers: how the names of those end that are
        whole numbers; any other tensor that is no weight is refused."""
        return self._merged({path: _shapes(path, tuple(numbers)) for path in self.paths})

    def names(self) -> dict[str, Path]:
        """In which file each tensor is, of any dtype."""
        return self._merged({path: dict.fromkeys(_names(path), path) for path in self.paths})

    def dtype(self) -> torch.dtype:
        """That of most bytes."""
        bytes_of: Counter[torch.dtype] = Counter()
        for path in self.paths:
            for dtype, size in _sizes(path):
                bytes_of[dtype] += size
        return bytes_of.most_common(1)[0][0]

    def tensors(self) -> dict[str, Tensor]:
        """Each tensor by its name."""
        return self._merged({path: read_tensors(path) for path in self.paths})

    def _merged(self, parts: Mapping[Path, dict[str, Any]]) -> dict[str, Any]:
        """One dictionary of all parts, which must hold what the index says and nothing twice."""
        merged: dict[str, Any] = {}
        for path, part in parts.items():
            twice = next((name for name in part if name in merged), None)
            if twice is not None:
                raise CheckpointError(f"{path} holds {twice}, and another shard of {self.index} holds it too.")
            lost = [name for name, file in self.weight_map.items() if file == path.name and name not in part]
            if lost:
                raise CheckpointError(f"{path} lacks {', '.join(lost[:4])}, which {self.index} puts in it.")
            merged |= part
        return merged


def find(source: str, hub: Mapping[str, Any]) -> Files:
    """The files that hold the tensors: safetensors first, else pickles; one file, or the shards of an index."""
    for name in NAMES:
        path = file_of(source, name, hub)
        if path is not None:
            return Files((path,), None, {})
        index = file_of(source, f"{name}{INDEX}", hub)
        if index is not None:
            return _sharded(source, index, hub)
    raise CheckpointError(f"{source} has neither {' nor '.join(NAMES)} (nor an index of shards).")


def _sharded(source: str, index: Path, hub: Mapping[str, Any]) -> Files:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is {weight_map!r:.80}; expected is an object of names to files.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_beside(shard):
            raise CheckpointError(
                f"{index}: weight_map puts {name} in {shard!r:.80}; expected is the name of a file in the same folder."
            )
    paths = []
    for shard in sorted(set(weight_map.values())):
        path = file_of(source, shard, hub)
        if path is None:
            raise CheckpointError(f"{source} lacks the shard {shard} that {index.name} names.")
        paths.append(path)
    return Files(tuple(paths), index, weight_map)


def _is_beside(name: str) -> bool:
    """Whether a name is that of a file in the folder itself: no path, on any system."""
    plain = name not in ("", ".", "..") and "\0" not in name
    return plain and PurePosixPath(name).name == name and PureWindowsPath(name).name == name


def _names(path: Path) -> list[str]:
    if path.suffix != ".safetensors":
        return list(read_tensors(path))
    with reading(path), safe_open(str(path), "pt") as file:
        return list(file.keys())


def _sizes(path: Path) -> list[tuple[torch.dtype, int]]:
    """Dtype and bytes of each tensor; of a safetensors file nothing is read but its header."""
    if path.suffix != ".safetensors":
        return [(tensor.dtype, tensor.nbytes) for tensor in read_tensors(path).values()]
    with reading(path), safe_open(str(path), "pt") as file:
        slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 (not a dict)
        known = [(STORED[part.get_dtype()], torch.Size(part.get_shape())) for part in slices]
    return [(dtype, shape.numel() * dtype.itemsize) for dtype, shape in known]


def _shapes(path: Path, numbers: tuple[str, ...] = ()) -> dict[str, torch.Size]:
    if path.suffix != ".safetensors":
        return {name: tensor.shape for name, tensor in read_tensors(path).items()}
    with reading(path), safe_open(str(path), "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        for name, part in slices.items():
            if part.get_dtype() not in STORED and not name.endswith(numbers):
                raise _no_weight(path, name, part.get_dtype())
        return {name: torch.Size(part.get_shape()) for name, part in slices.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a pickle; a pickle that carries code is refused."""
    return unpacked(path, load(path))[0]


def load(path: Path) -> Any:
    """What a file holds: of a pickle, tensors, plain data and the Namespace in which training scripts keep options."""
    try:
        with reading(path):
            if path.suffix == ".safetensors":
                return load_file(path)
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except CheckpointError as error:
        if not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
        raise CheckpointError(
            f"{path} is refused: it holds more than tensors (a pickle can run code), or is damaged. "
            f"Ask for a safetensors file. ({str(error.__cause__).splitlines()[0]})"
        ) from error


def unpacked(path: Path, loaded: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, told) of what a file holds: tensors by name, or `{"model": tensors, "args": options}`."""
    told: dict[str, Any] = {}
    inner = next((key for key in CONTAINERS if isinstance(loaded, dict) and isinstance(loaded.get(key), dict)), None)
    if inner is not None:
        args = loaded.get("args")
        told = (
            dict(vars(args)) if isinstance(args, argparse.Namespace) else dict(args) if isinstance(args, dict) else {}
        )
        loaded = loaded[inner]
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointError(f"{path} holds no state dict (names to tensors).")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path} holds no state dict (names to tensors): {name!r:.80} is a {type(tensor).__name__}."
            )
        _check_tensor(path, name, tensor)
    return dict(loaded), told


def _check_tensor(path: Path, name: str, tensor: Tensor) -> None:
    """CheckpointError unless the file holds every number of `tensor`, and they are floats."""
    if tensor.dtype not in FLOATS:
        raise _no_weight(path, name, dtype_name(tensor.dtype))
    if tensor.layout != torch.strided or tensor.is_meta:
        raise CheckpointError(f"{path}: {name} is {tensor.layout} on {tensor.device}; expected is a dense tensor.")
    held = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.itemsize > held:
        raise CheckpointError(
            f"{path}: {name} claims the shape {list(tensor.shape)}, and the file holds {held} bytes of it; expected are "
            f"{tensor.numel() * tensor.itemsize}."
        )


def _no_weight(path: Path, name: str, dtype: str) -> CheckpointError:
    floats = ", ".join(dtype_name(one) for one in FLOATS)
    return CheckpointError(f"{path}: {name} is {dtype}; expected are floats ({floats}): quantised weights do not load.")


# -- names ----------------------------------------------------------------------------------------------------------


def prefixes(names: Iterable[str]) -> Iterator[str]:
    """ "", and what stands in front of every name, a word at a time: "module.", "module._orig_mod."."""
    words = [name.split(".") for name in names]
    shared = 0
    while words and all(len(word) > shared for word in words):
        yield "".join(f"{word}." for word in words[0][:shared])
        if len({word[shared] for word in words}) > 1:
            return
        shared += 1


def shape_of(state: Mapping[str, Tensor], name: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor that a layout must have, with so many axes and none of them empty."""
    if name not in state:
        raise CheckpointError(f"It lacks {name}, a tensor of {axes} axes.")
    shape = tuple(state[name].shape)
    if len(shape) != axes or 0 in shape:
        raise CheckpointError(f"{name} has shape {list(shape)}; expected are {axes} axes, none of them 0.")
    return shape


def depth(names: Iterable[str], stem: str) -> int:
    """How many layers names such as `blocks.3.ln1.weight` (stem "blocks.") speak of; all from 0 on must be there."""
    words = {name.removeprefix(stem).split(".")[0] for name in names if name.startswith(stem)}
    wrong = next((word for word in sorted(words) if not (word.isascii() and word.isdecimal() and len(word) < 10)), None)
    if wrong is not None:
        raise CheckpointError(f"It has {stem}{wrong}; expected is the number of a layer.")
    numbers = {int(word) for word in words}
    gap = next((i for i in range(len(numbers)) if i not in numbers), None)
    if gap is not None or not numbers:
        what = f"has {stem}{max(numbers)} and " if numbers else ""
        raise CheckpointError(f"It {what}lacks {stem}{gap or 0}: layers are numbered from 0, without gaps.")
    return len(numbers)


def save_checkpoint(folder: str | Path, config: Mapping[str, Any], module: nn.Module) -> None:
    """`save_checkpoint("folder", config, weights)`: config.json and model.safetensors, as `gl.from_pretrained` reads them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=1) + "\n")
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in module.state_dict().items()}
    save_file(state, folder / "model.safetensors")
