"""A peft adapter: the folder that holds one, the model that it is of, and the module that peft wraps around a model.

    base_of(peft_model)               # the model inside a PeftModel, its adapters in place
    is_alone("folder")                # adapter_config.json and no model beside it
    put_on(model, "folder")           # the model with the adapter's layers in it

An adapter stays as it is: it is merged with the weights as they are read (`weights/adapters.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gatedlens.errors import CheckpointError
from gatedlens.files import optional
from gatedlens.model.checkpoint import HUB, file_of, read_json, read_tensors, reading

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def base_of(model: nn.Module) -> nn.Module:
    """The model in a PeftModel; any other as it is. CheckpointError for what stands beside weights, as prompts do."""
    if not type(model).__module__.startswith("peft.") or "base_model" not in model._modules:
        return model
    outer: Any = model
    if outer.active_peft_config.is_prompt_learning:
        kind = outer.active_peft_config.peft_type
        raise CheckpointError(
            f"The adapter is {getattr(kind, 'value', kind)}, which puts learned tokens into the input: it is no change of "
            "weights, and gatedlens reads LoRA alone. Give the tokens' embeddings to model(resid, start_at_layer=0) yourself."
        )
    return outer.get_base_model()


def is_alone(path: str | Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    folder = Path(path).expanduser()
    with reading(path, "is no path"):  # too long a name, for one
        return (folder / CONFIG).is_file() and not (folder / "config.json").exists()


def base_named_by(path: str | Path) -> str:
    """The name of the model that an adapter is of, as its config says it."""
    where = Path(path).expanduser() / CONFIG
    name = read_json(where).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"{where} names no base model (base_model_name_or_path is {name!r}): "
            f"gl.from_pretrained(model, adapter={str(path)!r}) says which it is."
        )
    return name


def put_on(model: nn.Module, path: str | Path, hub: Mapping[str, Any]) -> nn.Module:
    """`model` with the layers of an adapter in it, which hold what the adapter's file does, all of it. path: a folder, or a hub
    name."""
    peft = optional("peft", "adapters")
    folder = Path(path).expanduser()
    source = str(folder if folder.is_dir() else path)
    if file_of(source, CONFIG, hub) is None:
        raise CheckpointError(f"adapter={str(path)!r}: there is no {CONFIG}; expected is a folder that peft saved.")
    file = next((found for name in WEIGHTS if (found := file_of(source, name, hub)) is not None), None)
    if file is None:
        raise CheckpointError(f"{source} has neither {' nor '.join(WEIGHTS)}.")
    with reading(source, "is no adapter of this model"):
        outer = peft.PeftModel.from_pretrained(model, source, **{k: v for k, v in hub.items() if k in HUB})
        wanted = set(peft.get_peft_model_state_dict(outer))
    held = set(read_tensors(file))
    for what, names in (("lacks", wanted - held), ("has unknown", held - wanted)):
        if names:
            more = ", ..." if len(names) > 4 else ""
            raise CheckpointError(
                f"{file} {what} {len(names)} weights: {', '.join(sorted(names)[:4])}{more}. It is an adapter of another model."
            )
    return base_of(outer)
