"""`gl.from_pretrained`: a model by its name, with weights; `skeleton`: without. Which of the three ways leads there.

transformers' layout  -> by_transformers.py        an original checkpoint, a folder or one file -> original.py
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from gatedlens.errors import CheckpointError
from gatedlens.formats import adapting, quantisation
from gatedlens.formats.refused import heard
from gatedlens.loading.by_transformers import asked_for, from_transformers
from gatedlens.loading.original import empty, from_original
from gatedlens.loading.sources import (
    PLACING,
    check_options,
    one_file,
    source_of,
    told_by_file,
    told_by_folder,
    transformers_reads,
)
from gatedlens.loading.wrapping import Model, opened, tell_nonfinite
from gatedlens.model import checkpoint, placement
from gatedlens.model import tokenizer as tokenizers
from gatedlens.model.checkpoint import about
from gatedlens.model.config import dtype_name, dtype_of
from gatedlens.model.language import HookedLanguageModel
from gatedlens.model.tokenizer import TokenizerLike
from gatedlens.options import checked
from gatedlens.weights import disk

if TYPE_CHECKING:  # for type checkers alone, since the functions say more of what is none
    NameOrPath: TypeAlias = str | Path
    HubOption: TypeAlias = str | int | Path | torch.device | Mapping[Any, Any] | None
else:
    NameOrPath = HubOption = Any


@checked
def from_pretrained(
    name_or_path: NameOrPath,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    tokenizer: TokenizerLike = None,
    variant: str | None = None,
    revision: str | None = None,
    adapter: NameOrPath | None = None,
    offload: str | None = None,
    **hub: HubOption,
) -> Model:
    """`gl.from_pretrained("state-spaces/mamba-130m-hf", dtype=torch.bfloat16)`: a hooked model in eval mode.

    name_or_path: a bundled model, a local folder, or a hub name; in transformers' layout (config.json with model_type,
    safetensors, sharded or not) or an architecture's original one (mamba-ssm: config.json with d_model and ssm_cfg,
    pytorch_model.bin or safetensors); or an original checkpoint that is one file (RWKV-LM's and ViM's .pth), or a folder
    that holds one and no config.json. What training puts in front of every name (`module.`, `_orig_mod.`) or around the
    tensors (`{"state_dict": ...}`) is taken off. variant: which model such a file holds, where it does not say so itself
    ("vim_small"). dtype: that of the checkpoint if None. device: CUDA where there is one if None. tokenizer: found beside
    the model if None; a folder's or hub name's is loaded. revision and `hub` (token, cache_dir, local_files_only, ...) go
    to the hub; so does device_map="auto", which spreads a large model over devices, main memory and disk (see
    placement.py). adapter: a folder or hub name of a LoRA of peft, which is merged as it is read; a folder that holds an adapter
    alone names its model itself. offload="disk": weights stay in their files and are read as blocks run, on the CPU and in the
    dtype of the file; activations have gradients and weights none (see weights/disk.py). Quantised weights are dequantised as
    they are read, or as they load; a log line says so. Nothing is folded: TransformerLens's `fold_ln=False` and its like are
    heard, and True is refused. Raises CheckpointError, which names the file, what is wrong in it and what was expected, for
    weights that are missing, left over, damaged or of another architecture; warns of weights that are NaN or infinite.
    """
    if isinstance(name_or_path, nn.Module):
        raise CheckpointError("from_pretrained takes a name or a path; gl.wrap(model) takes a model that you have.")
    if not isinstance(name_or_path, str | Path) or not str(name_or_path).strip():
        raise CheckpointError(f"from_pretrained takes a name or a path, not {name_or_path!r}.")
    if device is not None and hub.get("device_map") is not None:
        raise CheckpointError(f"device={device!r} and device_map={hub['device_map']!r}: give one of the two.")
    if offload is not None:
        device = _check_offload(offload, device, hub)
    if adapting.is_alone(name_or_path) and adapter is None:
        name_or_path, adapter = adapting.base_named_by(name_or_path), name_or_path
    hub = heard({"revision": revision, **hub} if revision is not None else hub)
    dtype, device = dtype_of(dtype, CheckpointError), _device(device)
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    file = one_file(path)
    with about(name):
        if file is not None:
            hooked, wrapped = _from_file(file, variant, dtype, hub, offload is not None)
            if tokenizer is None and issubclass(hooked, HookedLanguageModel):
                tokenizer = tokenizers.beside_file(file)
        else:
            if variant is not None:
                raise CheckpointError(f"variant={variant!r} is for a checkpoint that is one file; {name} is none.")
            source = source_of(name)
            hooked, wrapped = _from_folder(source, name, dtype, hub, offload is not None)
            tokenizer = tokenizers.beside(source, hub) if tokenizer is None else tokenizer
        if offload is not None:
            folder: Any = hub.get("offload_folder")
            disk.put_on_disk(wrapped, folder)
        if adapter is not None:
            apart = {key: value for key, value in hub.items() if key not in ("revision", "subfolder")}  # of the model
            wrapped = adapting.put_on(wrapped, adapter, apart)
        tell_nonfinite(name, wrapped)
        if hub.get("device_map") is None:
            _move(wrapped, device)
        elif not placement.is_placed(wrapped):  # transformers has placed its own
            wrapped = placement.spread(wrapped, **{key: hub[key] for key in PLACING if key in hub})
        return opened(hooked, wrapped.eval(), name, tokenizer)


@checked
def skeleton(name_or_path: NameOrPath, *, variant: str | None = None, **hub: HubOption) -> Model:
    """`gl.loading.skeleton("path/to/folder")`: the hooked model that a config asks for, with names and shapes and no weights.

    It lies on the meta device. Of a folder or hub name only config.json is read, of a checkpoint in one file the shapes. Options
    and errors as in `from_pretrained`.
    """
    name, file = str(name_or_path), one_file(Path(name_or_path).expanduser())
    with about(name):
        if file is not None:
            hooked, where, config, _ = told_by_file(file, variant, hub)
            return opened(hooked, empty(hooked, where, config), name, None)
        source = source_of(name)
        hooked, where, config = told_by_folder(source, name, hub)
        if transformers_reads(hooked, config):
            return opened(hooked, asked_for(source, where, hub).eval(), name, None)
        stored = dtype_of(
            config.get("dtype") or config.get("torch_dtype"), CheckpointError
        )  # where an original's config says it
        return opened(hooked, empty(hooked, where, config).to(stored).eval(), name, None)


def _device(device: Any) -> torch.device:
    """The device, if this machine has it; CUDA where there is one if None."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, TypeError, AssertionError) as error:
        raise CheckpointError(
            f"device={device!r}: expected is a device of this machine, as 'cpu' or 'cuda:0' ({error})."
        ) from error


def _check_offload(offload: str, device: Any, hub: Mapping[str, Any]) -> str:
    """The device of a model whose weights are on the disk; CheckpointError for what does not go with that."""
    if offload != "disk":
        raise CheckpointError(f"offload={offload!r}: weights are in memory (None) or on the 'disk'.")
    if hub.get("device_map") is not None:
        raise CheckpointError(f"offload='disk' and device_map={hub['device_map']!r}: give one of the two.")
    if device is not None and torch.device(device).type != "cpu":
        raise CheckpointError(
            f"offload='disk' runs on the CPU, and device={device!r} was asked for: device_map='auto' with offload_folder=... "
            "spreads a model over a GPU, main memory and disk."
        )
    return "cpu"


def _from_folder(
    source: str, name: str, dtype: torch.dtype | None, hub: Mapping[str, Any], on_disk: bool
) -> tuple[Any, nn.Module]:
    """(architecture, module) of a folder or hub repository with a config.json. on_disk: its tensors stay views of the files."""
    hooked, where, config = told_by_folder(source, name, hub)
    if on_disk:
        quantised = quantisation.of(config)
        if quantised is not None:
            raise CheckpointError(
                f"offload='disk' reads weights as they are stored, and those of {name} are quantised "
                f"({quantisation.method(quantised)}): they are smaller in memory already. Leave offload out."
            )
        dtype = as_stored(checkpoint.find(source, hub), dtype, name)
    if transformers_reads(hooked, config):
        return hooked, from_transformers(hooked, source, where, config, dtype, hub)
    check_options(hub)
    return hooked, from_original(hooked, source, where, config, checkpoint.find(source, hub).tensors(), dtype, on_disk)


def _from_file(
    path: Path, variant: str | None, dtype: torch.dtype | None, hub: Mapping[str, Any], on_disk: bool
) -> tuple[Any, nn.Module]:
    """(architecture, module) of an original checkpoint in one file: tensors, or `{"model": tensors, "args": ...}`."""
    hooked, where, config, state = told_by_file(path, variant, hub)
    dtype = as_stored(checkpoint.Files((path,), None, {}), dtype, str(path)) if on_disk else dtype
    return hooked, from_original(hooked, str(where), where, config, state, dtype, on_disk)


def as_stored(files: checkpoint.Files, dtype: torch.dtype | None, source: str) -> torch.dtype:
    """The dtype of weights that stay on the disk, which is that of the file."""
    stored = files.dtype()
    if dtype not in (None, stored):
        raise CheckpointError(
            f"offload='disk' reads weights as they are stored, and {source} stores {dtype_name(stored)}; "
            f"dtype={dtype_name(dtype)} would be another model in memory. Leave dtype out."
        )
    return stored


def _move(wrapped: nn.Module, device: torch.device) -> None:
    """To a device, unless it is there: some quantised models must not be moved at all."""
    if any(t.device != device for t in chain(wrapped.parameters(), wrapped.buffers())):
        wrapped.to(device)
