"""Where models come from: a hub name, a folder, a bundled model, or a model that you already have.

model = gl.from_pretrained("state-spaces/mamba-130m-hf")      # transformers' layout, from the hub
model = gl.from_pretrained("path/to/folder")                   # the same, or an original checkpoint's layout
model = gl.from_pretrained("vim_s_midclstok_80p5acc.pth")      # an original checkpoint that is one file
model = gl.from_pretrained("gatedlens/mamba-recall")           # bundled: trained, tiny, no network
model = gl.wrap(hf_model, tokenizer)                           # shares hf_model's parameters
"""

from __future__ import annotations

import argparse
import json
import logging
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gatedlens import dtypes, placement
from gatedlens.errors import CheckpointError, did_you_mean
from gatedlens.hooks import architectures
from gatedlens.model import HookedModel

log = logging.getLogger(__name__)
BUNDLED = Path(__file__).parent / "bundled"
PLACING = ("device_map", "max_memory", "offload_folder")  # what `hub` says of placement
ONE_FILE = (".pth", ".pt", ".bin", ".safetensors")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def bundled_models() -> list[str]:
    """`["gatedlens/mamba-recall", ...]`: the trained models that come with gatedlens."""
    return [f"gatedlens/{folder.name}" for folder in sorted(BUNDLED.iterdir()) if (folder / "config.json").exists()]


def supported() -> str:
    """What can be loaded, for messages."""
    kinds = (f"{a.title} ({', '.join(n for n in a.wraps if n != 'Weights')})" for a in architectures().values())
    return f"Supported are {'; '.join(kinds)}; and the bundled {', '.join(bundled_models())}."


# -- a model that exists --------------------------------------------------------------------------------------------


def wrap(model: Any, tokenizer: Any = None, *, model_name: str | None = None) -> Any:
    """`gl.wrap(MambaForCausalLM(...))`: hook points around a model's own parameters, which are shared, not copied.

    The architecture follows from the model's class (or that of a base class); CheckpointError for one that is not
    supported.
    """
    if isinstance(model, HookedModel):
        raise CheckpointError(f"This is a {type(model).__name__} already: use it as it is, or wrap its `.wrapped`.")
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"wrap takes a model, not {type(model).__name__}: gl.from_pretrained loads one by name.")
    names = [base.__name__ for base in type(model).__mro__]
    for hooked in architectures().values():
        if set(names) & set(hooked.wraps):
            config = getattr(model, "config", None)
            known = getattr(config, "name_or_path", "") if not isinstance(config, dict) else ""
            return hooked(model, model_name=model_name or known or names[0], tokenizer=tokenizer)
    every = [name for hooked in architectures().values() for name in hooked.wraps]
    hint = did_you_mean(names[0], every)
    if names[0].endswith("Model"):
        hint = " Wrap the model with its head (…ForCausalLM)." + hint
    raise CheckpointError(f"gatedlens does not know {names[0]}.{hint} {supported()}")


# -- a model that is named ------------------------------------------------------------------------------------------


def from_pretrained(
    name_or_path: Any,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    tokenizer: Any = None,
    variant: str | None = None,
    revision: str | None = None,
    **hub: Any,
) -> Any:
    """`gl.from_pretrained("state-spaces/mamba-130m-hf", dtype=torch.bfloat16)`: a hooked model in eval mode.

    name_or_path: a bundled model, a local folder, or a hub name; in transformers' layout (config.json with model_type,
    safetensors, sharded or not) or an architecture's original one (mamba-ssm: config.json with d_model and ssm_cfg,
    pytorch_model.bin or safetensors); or an original checkpoint that is one file (RWKV-LM's and ViM's .pth), or a folder
    that holds one and no config.json. variant: which model such a file holds, where it does not say so itself
    ("vim_small"). dtype: that of the checkpoint if None. device: CUDA where there is one if None. tokenizer: found beside
    the model if None. revision and `hub` (token, cache_dir, local_files_only, ...) go to the hub; so does
    device_map="auto", which spreads a large model over devices, main memory and disk (see placement.py). Raises
    CheckpointError when weights are missing, left over, damaged or of another architecture.
    """
    if isinstance(name_or_path, nn.Module):
        raise CheckpointError("from_pretrained takes a name or a path; gl.wrap(model) takes a model that you have.")
    if device is not None and hub.get("device_map") is not None:
        raise CheckpointError(f"device={device!r} and device_map={hub['device_map']!r}: give one of the two.")
    dtype = dtypes.of(dtype, CheckpointError)
    hub = {"revision": revision, **hub} if revision is not None else hub
    file = _one_file(Path(name_or_path).expanduser())
    if file is not None:
        hooked, wrapped = _from_file(file, variant, dtype)
    else:
        if variant is not None:
            raise CheckpointError(f"variant={variant!r} is for a checkpoint that is one file; {name_or_path} is none.")
        source = _source(str(name_or_path))
        hooked, wrapped = _from_folder(source, str(name_or_path), dtype, hub)
        tokenizer = _tokenizer(source, hub) if tokenizer is None else tokenizer
    if hub.get("device_map") is None:
        wrapped.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    elif not placement.is_placed(wrapped):  # transformers has placed its own
        wrapped = placement.spread(wrapped, **{name: hub[name] for name in PLACING if name in hub})
    return hooked(wrapped.eval(), model_name=str(name_or_path), tokenizer=tokenizer)


def _from_folder(source: str, name: str, dtype: torch.dtype | None, hub: Mapping[str, Any]) -> tuple[Any, nn.Module]:
    """(architecture, module) of a folder or hub repository with a config.json."""
    config = _config(source, hub)
    kind = config.get("model_type")
    for hooked in architectures().values():
        if kind in hooked.hub_types:
            return hooked, _from_transformers(source, dtype, hub)
    for hooked in architectures().values():
        if hooked.is_original(config):
            return hooked, _from_original(hooked, source, config, _state_dict(source, hub), dtype)
    what = f"model_type {kind!r}" if kind else f"a config.json with {', '.join(list(config)[:6])}"
    raise CheckpointError(f"{name} has {what}, which gatedlens does not support. {supported()}")


def _one_file(path: Path) -> Path | None:
    """The checkpoint that is one file: `path` itself, or the only .pth of a folder without a config.json."""
    if path.suffix in ONE_FILE:
        return path
    files = sorted(path.glob("*.pth")) if path.is_dir() and not (path / "config.json").exists() else []
    if len(files) > 1:
        held = ", ".join(file.name for file in files[:4])
        raise CheckpointError(f"{path} holds {len(files)} checkpoints ({held}): name one.")
    return files[0] if files else None


def _from_file(path: Path, variant: str | None, dtype: torch.dtype | None) -> tuple[Any, nn.Module]:
    """(architecture, module) of an original checkpoint in one file: tensors, or `{"model": tensors, "args": ...}`."""
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}. Download the checkpoint and give its path.")
    loaded = _load(path)
    told: dict[str, Any] = {}
    if isinstance(loaded, dict) and isinstance(loaded.get("model"), dict):
        told = dict(vars(loaded["args"])) if isinstance(loaded.get("args"), argparse.Namespace) else {}
        loaded = loaded["model"]
    state = _tensors(path, loaded)
    for hooked in architectures().values():
        config = hooked.config_of_file(state, told, variant)
        if config is not None:
            return hooked, _from_original(hooked, str(path), config, state, dtype)
    held = ", ".join(list(state)[:3])
    raise CheckpointError(f"{path} holds {held}, ...: no architecture that loads from one file. {supported()}")


def _source(name: str) -> str:
    """A folder for bundled and local models, the name itself for the hub."""
    if name.startswith("gatedlens/"):
        if name not in bundled_models():
            raise CheckpointError(
                f"{name!r} is not bundled.{did_you_mean(name, bundled_models())} Bundled are {', '.join(bundled_models())}."
            )
        return str(BUNDLED / name.partition("/")[2])
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise CheckpointError(
            f"There is no folder {path}. Give a folder with a config.json, a hub name, or a bundled model."
        )
    return name


def _config(source: str, hub: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import PretrainedConfig

    if Path(source).is_dir() and not (Path(source) / "config.json").exists():
        found = ", ".join(sorted(p.name for p in Path(source).iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{source} has no config.json (it holds {found}).")
    try:
        config, _ = PretrainedConfig.get_config_dict(source, **hub)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source} cannot be loaded: {error}\n{supported()}") from error
    return dict(config)


def _from_transformers(source: str, dtype: torch.dtype | None, hub: Mapping[str, Any]) -> nn.Module:
    """transformers loads it; we make sure that nothing was missing or left over."""
    from transformers import AutoModelForCausalLM

    try:
        with _quiet() if Path(source).is_dir() else nullcontext():
            model, info = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True, **hub
            )
    except (SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{source} cannot be loaded: {type(error).__name__}: {error}") from error
    _complete(source, info["missing_keys"], info["unexpected_keys"], info.get("mismatched_keys", ()))
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar over local weights."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _complete(source: str, missing: Any, extra: Any, mismatched: Any = ()) -> None:
    """Raise unless a checkpoint held exactly what its config asks for."""
    problems = []
    for what, keys in (("is missing", missing), ("has unknown", extra), ("has misshapen", mismatched)):
        keys = sorted(str(k) for k in keys)
        if keys:
            problems.append(f"{what} {len(keys)} weights: {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}")
    if problems:
        raise CheckpointError(f"The checkpoint {source} {'; it '.join(problems)}. It does not fit its config.json.")


def _from_original(
    hooked: Any, source: str, config: dict[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype | None
) -> nn.Module:
    """An original checkpoint into the architecture's own parameter module."""
    state = hooked.rename(dict(state))
    wrapped: nn.Module = hooked.empty(config)
    expected = wrapped.state_dict()
    shared = {k for k in expected if k not in state and _tied_to_known(wrapped, k, state)}
    mismatched = [
        f"{k} {list(state[k].shape)} for {list(v.shape)}"
        for k, v in expected.items()
        if k in state and state[k].shape != v.shape
    ]
    _complete(source, set(expected) - set(state) - shared, set(state) - set(expected), mismatched)
    wrapped.load_state_dict(state, strict=False)
    file_dtype = next(v.dtype for v in state.values() if v.is_floating_point())
    return wrapped.to(dtype or file_dtype)


def _tied_to_known(module: nn.Module, key: str, state: Mapping[str, Tensor]) -> bool:
    """Whether the parameter `key` is the same object as one that the checkpoint has."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return any(parameters.get(key) is parameters.get(other) for other in state if other in parameters)


def _state_dict(source: str, hub: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of a checkpoint: safetensors first, else a pickle that holds tensors only."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        path = _file(source, index, hub)
        if path is not None:
            shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
            merged: dict[str, Tensor] = {}
            for shard in shards:
                part = _file(source, shard, hub)
                if part is None:
                    raise CheckpointError(f"{source} lacks the shard {shard} that {index} names.")
                merged |= read_tensors(part)
            return merged
    for name in ("model.safetensors", "pytorch_model.bin"):
        path = _file(source, name, hub)
        if path is not None:
            return read_tensors(path)
    raise CheckpointError(f"{source} has neither model.safetensors nor pytorch_model.bin.")


def _file(source: str, name: str, hub: Mapping[str, Any]) -> Path | None:
    """A file of a folder or hub repository; None when it has none by this name."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.exists() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, name, **hub))
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a pickle; a pickle that carries code is refused."""
    return _tensors(path, _load(path))


def _load(path: Path) -> Any:
    """What a file holds: of a pickle, tensors, plain data and the Namespace in which training scripts keep options."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it holds more than tensors (a pickle can run code), or is damaged. "
            f"Ask for a safetensors file. ({str(error).splitlines()[0]})"
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or cut short: {type(error).__name__}: {error}") from error


def _tensors(path: Path, loaded: Any) -> dict[str, Tensor]:
    """`loaded` if it is a state dict."""
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise CheckpointError(f"{path} holds no state dict (names to tensors).")
    return loaded


def _tokenizer(source: str, hub: Mapping[str, Any]) -> Any:
    """The tokenizer beside a model, or None (logged) if there is none."""
    if Path(source).is_dir() and not any((Path(source) / name).exists() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, **hub)
    except (OSError, ValueError, KeyError) as error:
        log.warning(
            "%s has no tokenizer that transformers can load (%s); pass tokenizer=... or token ids.", source, error
        )
        return None
