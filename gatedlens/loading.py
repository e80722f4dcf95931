"""Where models come from: a hub name, a folder, a bundled model, or a model that you already have.

model = gl.from_pretrained("state-spaces/mamba-130m-hf")      # transformers' layout, from the hub
model = gl.from_pretrained("path/to/folder")                   # the same, or an original checkpoint's layout
model = gl.from_pretrained("vim_s_midclstok_80p5acc.pth")      # an original checkpoint that is one file
model = gl.from_pretrained("gatedlens/mamba-recall")           # bundled: trained, tiny, no network
model = gl.wrap(hf_model, tokenizer)                           # shares hf_model's parameters
model = gl.from_pretrained("path/to/folder", adapter="lora")   # with an adapter of peft; its own folder will do, too
model = gl.from_pretrained("path/to/folder", offload="disk")   # larger than the memory

What is read is checked before it is used, and before anything is built: the config against its fields (`fields.py`), the
files and their tensors (`checkpoint.py`), the tensors against what the config asks for.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from gatedlens.errors import CheckpointError, did_you_mean
from gatedlens.formats import adapting, quantisation
from gatedlens.formats.refused import NAMESAKES, heard, why_not_opened
from gatedlens.hooks import architectures
from gatedlens.model import checkpoint, fields, fit, placement
from gatedlens.model import tokenizer as tokenizers
from gatedlens.model.base import HookedModel
from gatedlens.model.checkpoint import about, reading
from gatedlens.model.config import FLOATS, dtype_name, dtype_of
from gatedlens.model.language import HookedLanguageModel
from gatedlens.model.tokenizer import TokenizerLike
from gatedlens.model.vision import HookedVisionModel
from gatedlens.model.watch import check_plain
from gatedlens.options import checked
from gatedlens.weights import AsRead, bare, disk

# What `wrap` and `from_pretrained` return: an editor completes the methods of both; isinstance tells which it is. A fifth
# architecture is one of the two, or joins the union.
Model: TypeAlias = HookedLanguageModel | HookedVisionModel
# What they take; for type checkers alone, since the functions say more of what is none.
if TYPE_CHECKING:
    Vendors: TypeAlias = nn.Module
    NameOrPath: TypeAlias = str | Path
    HubOption: TypeAlias = str | int | Path | torch.device | Mapping[Any, Any] | None
else:
    Vendors = NameOrPath = HubOption = Any

log = logging.getLogger("gatedlens")
BUNDLED = Path(__file__).parent / "bundled"
PLACING = ("device_map", "max_memory", "offload_folder")  # what `hub` says of placement
ONE_FILE = (".pth", ".pt", ".bin", ".safetensors")
ONE_EXPERT = re.compile(r".*\.experts\.(?=\d+\.)")
PART = re.compile(r"(model\.)?[a-z_]+(\.\d+)?")  # of a model, of a tensor's name: mtp, model.visual, model.layers.42


def bundled_models() -> list[str]:
    """`gl.bundled_models()`: the names of the trained models that come with gatedlens, "gatedlens/mamba-recall" and so on."""
    return [f"gatedlens/{folder.name}" for folder in sorted(BUNDLED.iterdir()) if (folder / "config.json").exists()]


def supported() -> str:
    """What can be loaded, for messages."""
    kinds = (f"{a.title} ({', '.join(n for n in a.wraps if n != 'Weights')})" for a in architectures().values())
    return f"Supported are {'; '.join(kinds)}; and the bundled {', '.join(bundled_models())}."


# -- a model that exists --------------------------------------------------------------------------------------------


@checked
def wrap(model: Vendors, tokenizer: TokenizerLike = None, *, model_name: str | None = None) -> Model:
    """`gl.wrap(MambaForCausalLM(...))`: hook points around a model's own parameters, which are shared, not copied.

    The architecture follows from the model's class (or that of a base class); CheckpointError for one that is not
    supported.
    """
    if isinstance(model, HookedModel):
        raise CheckpointError(f"This is a {type(model).__name__} already: use it as it is, or wrap its `.wrapped`.")
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"wrap takes a model, not {type(model).__name__}: gl.from_pretrained loads one by name.")
    model = adapting.base_of(model)
    hooked = _architecture_of(model)
    if hooked is None:
        raise CheckpointError(_unknown(model))
    check_plain(bare(model))
    config, name = getattr(model, "config", None), type(model).__name__
    known = getattr(config, "name_or_path", "") if not isinstance(config, dict) else ""
    opened = _opened(hooked, model, str(model_name or known or name), tokenizer)
    _tell_nonfinite(opened.cfg.model_name, model)
    return opened


def _architecture_of(model: nn.Module) -> Any:
    """The architecture that wraps a class of this name (or that of a base class); None if none does."""
    names = {base.__name__ for base in type(model).__mro__}
    named = [hooked for hooked in architectures().values() if names & set(hooked.wraps)]
    return next((hooked for hooked in named if hooked.fits(model)), named[0] if named else None)


def _opened(hooked: Any, wrapped: nn.Module, name: str, tokenizer: Any) -> Any:
    """The hooked model; CheckpointError for a module that lacks what its class has, or whose config is not as expected."""
    tokenizer = tokenizers.tokenizer_of(tokenizer)
    with reading(name, f"({type(wrapped).__name__}) is not built as {hooked.title} is"):
        opened = hooked(wrapped, model_name=name, tokenizer=tokenizer)
    told = opened.as_read.told()
    if told:
        log.info("%s: %s.", name, told)
    return opened


def _unknown(model: nn.Module) -> str:
    """Why a model is not wrapped, and what could be."""
    name = type(model).__name__
    inside = next(((path, part) for path, part in model.named_modules() if path and _architecture_of(part)), None)
    if inside is not None:
        path, part = inside
        return f"{name} is around a {type(part).__name__}: gl.wrap(model.{path}) takes that."
    hint = NAMESAKES.get(name, "") or why_not_opened(name)
    if not hint:
        hint = did_you_mean(name, [known for hooked in architectures().values() for known in hooked.wraps]).strip()
    if name.endswith("Model"):
        hint = f"Wrap the model with its head (…ForCausalLM). {hint}".strip()
    return f"gatedlens does not know {name}. {hint} {supported()}".replace("  ", " ")


@torch.no_grad()
def _tell_nonfinite(name: str, model: nn.Module) -> None:
    """Warn of weights that are NaN or infinite: whatever reads them is so too."""

    def finite(p: Tensor) -> bool:
        low, high = p.aminmax()  # NaN if any number is; no second tensor of this size
        return bool(torch.isfinite(low)) and bool(torch.isfinite(high))

    wrong = []
    for place, module in model.named_modules():
        with disk.reading([module]):
            plain = (
                (n, p)
                for n, p in module.named_parameters(place, False)
                if type(p) is nn.Parameter and p.dtype in FLOATS
            )
            wrong += [path for path, p in plain if not p.is_meta and p.numel() and not finite(p)]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        warnings.warn(f"{name}: {', '.join(wrong[:4])}{more} hold NaN or infinite numbers.", stacklevel=3)


# -- a model that is named ------------------------------------------------------------------------------------------


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
    file = _one_file(path)
    with about(name):
        if file is not None:
            hooked, wrapped = _from_file(file, variant, dtype, hub, offload is not None)
            if tokenizer is None and issubclass(hooked, HookedLanguageModel):
                tokenizer = tokenizers.beside_file(file)
        else:
            if variant is not None:
                raise CheckpointError(f"variant={variant!r} is for a checkpoint that is one file; {name} is none.")
            source = _source(name)
            hooked, wrapped = _from_folder(source, name, dtype, hub, offload is not None)
            tokenizer = tokenizers.beside(source, hub) if tokenizer is None else tokenizer
        if offload is not None:
            folder: Any = hub.get("offload_folder")
            disk.put_on_disk(wrapped, folder)
        if adapter is not None:
            apart = {key: value for key, value in hub.items() if key not in ("revision", "subfolder")}  # of the model
            wrapped = adapting.put_on(wrapped, adapter, apart)
        _tell_nonfinite(name, wrapped)
        if hub.get("device_map") is None:
            _move(wrapped, device)
        elif not placement.is_placed(wrapped):  # transformers has placed its own
            wrapped = placement.spread(wrapped, **{key: hub[key] for key in PLACING if key in hub})
        return _opened(hooked, wrapped.eval(), name, tokenizer)


@checked
def skeleton(name_or_path: NameOrPath, *, variant: str | None = None, **hub: HubOption) -> Model:
    """`gl.loading.skeleton("path/to/folder")`: the hooked model that a config asks for, with names and shapes and no weights.

    It lies on the meta device. Of a folder or hub name only config.json is read, of a checkpoint in one file the shapes. Options
    and errors as in `from_pretrained`.
    """
    name, file = str(name_or_path), _one_file(Path(name_or_path).expanduser())
    with about(name):
        if file is not None:
            hooked, where, config, _ = _told_by_file(file, variant, hub)
            return _opened(hooked, _empty(hooked, where, config), name, None)
        source = _source(name)
        hooked, where, config = _told_by_folder(source, name, hub)
        if _by_transformers(hooked, config):
            return _opened(hooked, _asked_for(source, where, hub).eval(), name, None)
        stored = dtype_of(
            config.get("dtype") or config.get("torch_dtype"), CheckpointError
        )  # where an original's config says it
        return _opened(hooked, _empty(hooked, where, config).to(stored).eval(), name, None)


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


def _as_stored(files: checkpoint.Files, dtype: torch.dtype | None, source: str) -> torch.dtype:
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


def _check_options(hub: Mapping[str, Any]) -> None:
    """CheckpointError for options that nobody would hear: transformers has more, an original checkpoint has these."""
    known = (*checkpoint.HUB, *PLACING, "trust_remote_code")  # the last one goes to the tokenizer
    for name in (name for name in hub if name not in known):
        raise CheckpointError(
            f"{name} is no option of gl.from_pretrained for an original checkpoint.{did_you_mean(name, known)}"
        )


def _from_folder(
    source: str, name: str, dtype: torch.dtype | None, hub: Mapping[str, Any], on_disk: bool
) -> tuple[Any, nn.Module]:
    """(architecture, module) of a folder or hub repository with a config.json. on_disk: its tensors stay views of the files."""
    hooked, where, config = _told_by_folder(source, name, hub)
    if on_disk:
        quantised = quantisation.of(config)
        if quantised is not None:
            raise CheckpointError(
                f"offload='disk' reads weights as they are stored, and those of {name} are quantised "
                f"({quantisation.method(quantised)}): they are smaller in memory already. Leave offload out."
            )
        dtype = _as_stored(checkpoint.find(source, hub), dtype, name)
    if _by_transformers(hooked, config):
        return hooked, _from_transformers(hooked, source, where, config, dtype, hub)
    _check_options(hub)
    return hooked, _from_original(hooked, source, where, config, checkpoint.find(source, hub).tensors(), dtype, on_disk)


def _told_by_folder(source: str, name: str, hub: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """(architecture, where the config stands, config) of a folder or hub repository."""
    where, config = _config(source, hub)
    kind, every = config.get("model_type"), architectures().values()
    by_transformers = (one for one in every if _by_transformers(one, config))
    by_layout = (one for one in every if one.layout.knows(config))
    hooked: Any = next(chain(by_transformers, by_layout), None)
    if hooked is None:
        what = f"model_type {kind!r}" if kind else f"a config.json with {', '.join(list(config)[:6]) or 'nothing'}"
        why = f"{why_not_opened(str(kind))} ".lstrip()
        raise CheckpointError(f"{name} has {what}, which gatedlens does not support. {why}{supported()}")
    asked = hooked.hub_fields if _by_transformers(hooked, config) else hooked.layout.fields
    fields.check(config, asked, where)
    return hooked, where, config


def _by_transformers(hooked: Any, config: Mapping[str, Any]) -> bool:
    """Whether transformers reads a checkpoint with this config."""
    return config.get("model_type") in hooked.hub_types


def _one_file(path: Path) -> Path | None:
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


def _from_file(
    path: Path, variant: str | None, dtype: torch.dtype | None, hub: Mapping[str, Any], on_disk: bool
) -> tuple[Any, nn.Module]:
    """(architecture, module) of an original checkpoint in one file: tensors, or `{"model": tensors, "args": ...}`."""
    hooked, where, config, state = _told_by_file(path, variant, hub)
    dtype = _as_stored(checkpoint.Files((path,), None, {}), dtype, str(path)) if on_disk else dtype
    return hooked, _from_original(hooked, str(where), where, config, state, dtype, on_disk)


def _told_by_file(
    path: Path, variant: str | None, hub: Mapping[str, Any]
) -> tuple[Any, Path, dict[str, Any], dict[str, Tensor]]:
    """(architecture, file, config, tensors) of an original checkpoint in one file; its config is read off the shapes."""
    _check_options(hub)
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


def _config(source: str, hub: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(where it stands, what it says) of a folder's or hub repository's config.json."""
    path = checkpoint.file_of(source, "config.json", hub)
    if path is not None:
        return path, checkpoint.read_json(path)
    if Path(source).is_dir():
        found = ", ".join(sorted(p.name for p in Path(source).iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{source} has no config.json (it holds {found}).")
    raise CheckpointError(f"{source} has no config.json on the hub, or it cannot be reached.\n{supported()}")


def _from_transformers(
    hooked: Any, source: str, where: Any, config: Mapping[str, Any], dtype: torch.dtype | None, hub: Mapping[str, Any]
) -> nn.Module:
    """transformers loads it, once the tensors that the files hold are known to fit; we make sure that none was left."""
    files = checkpoint.find(source, hub)
    if quantisation.of(config) is not None:
        return _from_quantised(hooked, source, where, config, dtype, hub, files.names())
    held = files.shapes()
    fields.check_depth(config, hooked.hub_fields, where, len(held))
    expected = _asked_for(source, where, hub)
    names = {name for name, _ in expected.named_parameters(remove_duplicate=False)}
    prefix = next((p for p in checkpoint.prefixes(held) if any(name.removeprefix(p) in names for name in held)), "")
    _check_shapes(source, expected, {name.removeprefix(prefix): shape for name, shape in held.items()})
    if prefix:
        hub = {"key_mapping": {f"^{re.escape(prefix)}": ""}, **hub}
    model = _by_its_class(source, dtype, ignore_mismatched_sizes=True, **hub)
    _say_unread(source, held, model)
    return model


def _by_its_class(source: str, dtype: torch.dtype | None, **options: Any) -> nn.Module:
    """What transformers loads; CheckpointError unless the files held exactly what the model has."""
    from transformers import AutoModelForCausalLM

    # With peft installed transformers looks for an adapter too, and asks the hub for it unless it is told so once more.
    adapters = {name: options[name] for name in ("cache_dir", "local_files_only") if name in options}
    with reading(source, "cannot be loaded"), _quiet() if Path(source).is_dir() else nullcontext():
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype or "auto", output_loading_info=True, adapter_kwargs=adapters, **options
        )
    fit.check(source, info["missing_keys"], info["unexpected_keys"], info.get("mismatched_keys", ()))
    return model


def _from_quantised(
    hooked: Any,
    source: str,
    where: Any,
    config: Mapping[str, Any],
    dtype: torch.dtype | None,
    hub: Mapping[str, Any],
    held: Mapping[str, Path],
) -> nn.Module:
    """The same of quantised weights, whose shapes are those of their packed form: transformers alone knows whether they fit."""
    quantised = quantisation.of(config) or {}
    quantisation.need(quantised)
    fields.check_depth(config, hooked.hub_fields, where, len(held))
    with _unsaid():
        model = _by_its_class(source, dtype, **quantisation.options(quantised), **hub)
    _say_unread(source, held, model)
    if AsRead(model).plain:  # nothing is left to be dequantised as it is read
        into, count = str(next(model.parameters()).dtype).removeprefix("torch."), quantisation.packed(held)
        log.info(
            "%s: %d matrices were dequantised while loading, %s into %s.",
            source,
            count,
            quantisation.method(quantised),
            into,
        )
    return model


def _say_unread(source: str, held: Iterable[str], model: Any) -> None:
    """One line in the log on tensors that transformers leaves in the files: a vision tower, what predicts several tokens."""
    patterns = [re.compile(one) for one in model._keys_to_ignore_on_load_unexpected or ()]
    names = [name for name in held if any(pattern.search(name) for pattern in patterns)]
    parts = Counter(found[0] for name in names if (found := PART.match(name)))
    if parts:
        told = ", ".join(f"{part} ({count} tensors)" for part, count in parts.items())
        log.warning("%s: not read, as in transformers, and not opened: %s.", source, told)


def _asked_for(source: str, where: Any, hub: Mapping[str, Any]) -> nn.Module:
    """The model that a config.json of transformers' asks for, without memory for its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {name: value for name, value in hub.items() if name not in PLACING}
    with reading(where, "asks for a model that transformers cannot build"), _unsaid(), torch.device("meta"):
        config, _ = AutoConfig.from_pretrained(source, return_unused_kwargs=True, **options)
        return AutoModelForCausalLM.from_config(config)


def _check_shapes(source: str, expected: nn.Module, held: Mapping[str, Any]) -> None:
    """Refuse tensors of other shapes, and a model that is larger than all that the files hold.

    Whether a name is missing or left over, transformers says: it knows older names, too.
    """
    wanted = expected.state_dict()
    mismatched = fit.misshapen(wanted, held)
    asked, there = sum(p.numel() for p in expected.parameters()), sum(shape.numel() for shape in held.values())
    if mismatched or asked > there:
        # Files hold experts one by one, where the model has them stacked: neither is missing, neither left over.
        apart = {name: found[0] for name in held if (found := ONE_EXPERT.match(name))}
        missing = {name for name in fit.missing(expected, held) if f"{name.rpartition('.')[0]}." not in apart.values()}
        fit.check(source, missing, set(held) - set(wanted) - set(apart), mismatched)


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


@contextmanager
def _unsaid() -> Iterator[None]:
    """Without transformers' words on a model that is built for its shapes alone: that kernels are missing, which nobody runs."""
    from transformers.utils import logging as hf_logging

    said = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(said)


def _from_original(
    hooked: Any,
    source: str,
    where: Any,
    config: dict[str, Any],
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    on_disk: bool,
) -> nn.Module:
    """An original checkpoint into the architecture's own parameter module, which is built once everything fits."""
    fields.check_depth(config, hooked.layout.fields, where, len(state))
    expected = _empty(hooked, where, config)
    wanted = expected.state_dict()
    with reading(source, f"holds tensors that are not as {hooked.title}'s are"), about(source):
        bare = [{name.removeprefix(p): t for name, t in state.items()} for p in checkpoint.prefixes(state)]
        found = [hooked.layout.rename(one) for one in bare]
    renamed = next((one for one in found if set(one) & set(wanted)), found[0])
    shapes = {name: tensor.shape for name, tensor in renamed.items()}
    fit.check(source, fit.missing(expected, renamed), set(renamed) - set(wanted), fit.misshapen(wanted, shapes))
    if on_disk:
        return fit.holding(expected, renamed)
    wrapped: nn.Module = hooked.layout.empty(config)
    wrapped.load_state_dict(renamed, strict=False)
    return wrapped.to(dtype or next(iter(renamed.values())).dtype)


def _empty(hooked: Any, where: Any, config: dict[str, Any]) -> nn.Module:
    """The module that an original checkpoint's config asks for, without memory for its weights."""
    with reading(where, f"asks for a {hooked.title} that cannot be built"), about(where), torch.device("meta"):
        module: nn.Module = hooked.layout.empty(config)
    return module
