"""Where a model's name leads, and what its config says: a bundled model, a folder, a hub name, a checkpoint in one file."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from gatedlens.errors import CheckpointError, did_you_mean
from gatedlens.formats.refused import why_not_opened
from gatedlens.hooks import architectures
from gatedlens.model import checkpoint, fields
from gatedlens.model.checkpoint import about, reading

BUNDLED = Path(__file__).parent.parent / "bundled"
PLACING = ("device_map", "max_memory", "offload_folder")  # what `hub` says of placement
ONE_FILE = (".pth", ".pt", ".bin", ".safetensors")


def bundled_models() -> list[str]:
    """`gl.bundled_models()`: the names of the trained models that come with gatedlens, "gatedlens/mamba-recall" and so on."""
    return [f"gatedlens/{folder.name}" for folder in sorted(BUNDLED.iterdir()) if (folder / "config.json").exists()]


def supported() -> str:
    """What can be loaded, for messages."""
    kinds = (f"{a.title} ({', '.join(n for n in a.wraps if n != 'Weights')})" for a in architectures().values())
    return f"Supported are {'; '.join(kinds)}; and the bundled {', '.join(bundled_models())}."


def source_of(name: str) -> str:
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


def one_file(path: Path) -> Path | None:
    """The checkpoint that is one file: `path` itself, or the only .pth of a folder without a config.json."""
    with reading(path, "is no path"):  # too long a name, for one
        folder = path.is_dir()
    if path.suffix in ONE_FILE and not folder:
        return path
    files = sorted(path.glob("*.pth")) if folder and not (path / "config.json").exists() else []
    if len(files) > 1:
        held = ", ".join(file.name for file in files[:4])
        raise CheckpointError(f"{path} holds {len(files)} checkpoints ({held}): name one.")
    return files[0] if files else None


def told_by_folder(source: str, name: str, hub: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """(architecture, where the config stands, config) of a folder or hub repository."""
    where, config = _config(source, hub)
    kind, every = config.get("model_type"), architectures().values()
    by_class = (one for one in every if transformers_reads(one, config))
    by_layout = (one for one in every if one.layout.knows(config))
    hooked: Any = next(chain(by_class, by_layout), None)
    if hooked is None:
        what = f"model_type {kind!r}" if kind else f"a config.json with {', '.join(list(config)[:6]) or 'nothing'}"
        why = f"{why_not_opened(str(kind))} ".lstrip()
        raise CheckpointError(f"{name} has {what}, which gatedlens does not support. {why}{supported()}")
    asked = hooked.hub_fields if transformers_reads(hooked, config) else hooked.layout.fields
    fields.check(config, asked, where)
    return hooked, where, config


def _config(source: str, hub: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(where it stands, what it says) of a folder's or hub repository's config.json."""
    path = checkpoint.file_of(source, "config.json", hub)
    if path is not None:
        return path, checkpoint.read_json(path)
    if Path(source).is_dir():
        found = ", ".join(sorted(p.name for p in Path(source).iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{source} has no config.json (it holds {found}).")
    raise CheckpointError(f"{source} has no config.json on the hub, or it cannot be reached.\n{supported()}")


def transformers_reads(hooked: Any, config: Mapping[str, Any]) -> bool:
    """Whether transformers reads a checkpoint with this config."""
    return config.get("model_type") in hooked.hub_types


def told_by_file(
    path: Path, variant: str | None, hub: Mapping[str, Any]
) -> tuple[Any, Path, dict[str, Any], dict[str, Tensor]]:
    """(architecture, file, config, tensors) of an original checkpoint in one file; its config is read off the shapes."""
    check_options(hub)
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}. Download the checkpoint and give its path.")
    held, told = checkpoint.unpacked(path, checkpoint.load(path))
    for prefix in checkpoint.prefixes(held):
        state = {name.removeprefix(prefix): tensor for name, tensor in held.items()}
        for hooked in architectures().values():
            with reading(path, f"is no {hooked.title} that gatedlens can read"), about(path):
                config = hooked.layout.config_of_file(state, told, variant)
            if config is not None:
                fields.check(config, hooked.layout.fields, path)
                return hooked, path, config, state
    names = ", ".join(list(held)[:3])
    raise CheckpointError(f"{path} holds {names}, ...: no architecture that loads from one file. {supported()}")


def check_options(hub: Mapping[str, Any]) -> None:
    """CheckpointError for options that nobody would hear: transformers has more, an original checkpoint has these."""
    known = (*checkpoint.HUB, *PLACING, "trust_remote_code")  # the last one goes to the tokenizer
    for name in (name for name in hub if name not in known):
        raise CheckpointError(
            f"{name} is no option of gl.from_pretrained for an original checkpoint.{did_you_mean(name, known)}"
        )
