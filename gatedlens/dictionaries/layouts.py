"""Layouts: dictionaries as other tools lay them down, read from a folder of yours; none of these tools is imported.

    gl.dictionaries.load("saes/blocks.3.hook_resid_pre")      # SAELens: cfg.json, sae_weights.safetensors; versions 1 to 6
    gl.dictionaries.load("saes/layers.3.mlp")                 # sparsify: cfg.json, sae.safetensors
    gl.dictionaries.load("layer_20/width_16k/average_l0_71")  # Gemma Scope: params.npz
    gl.dictionaries.load("gated.safetensors")                 # what Dictionary.save wrote
    gl.dictionaries.load("gatedlens/mamba2-recall")           # bundled: that of a bundled model

A Layout reads a folder as weights by our names and the options of a `Dictionary`. What is said there is folded into the weights
where it can be: a scale of what is read, a scale of the features, decoder rows of length 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from gatedlens.dictionaries.activation import Activation, Gated, JumpReLU, ReLU, TopK
from gatedlens.dictionaries.dictionary import Dictionary
from gatedlens.errors import CheckpointError, InputError, did_you_mean
from gatedlens.files import Fields, read_json, read_tensors
from gatedlens.loading import BUNDLED
from gatedlens.model.config import dtype_of
from gatedlens.options import checked

__all__ = ["load"]

Tensors = dict[str, Tensor]
Scale = int | float | None


@dataclass(frozen=True)
class Layout:
    """`holds`: the files that tell it; `read(folder)`: weights by our names, and the options of a Dictionary."""

    tool: str
    holds: tuple[str, ...]
    read: Callable[[Path, Scale], tuple[Tensors, dict[str, Any]]]

    def is_in(self, folder: Path) -> bool:
        """Whether a folder is laid down so."""
        return all((folder / name).is_file() for name in self.holds)


@checked
def load(
    path: str | Path, point: str | None = None, out_point: str | None = None, scale: int | float | None = None
) -> Dictionary:
    """`gl.dictionaries.load("saes/blocks.3.hook_resid_pre")`: the Dictionary in a folder (or a file) of SAELens, sparsify, Gemma
    Scope, or of `Dictionary.save`.

    point, out_point: what it reads and writes, where the folder does not say or says it in another model's words. scale: what
    activations were multiplied by before it read them, of an SAE whose cfg says "expected_average_only_in"; it is folded into the
    weights.

    CheckpointError for a folder that holds none, that is damaged, or of a kind that is not read; InputError where `point` or
    `scale` is needed. Formats: SAELens 1 to 6 (standard, topk, batchtopk, jumprelu, gated, transcoders and skip transcoders);
    EleutherAI's sparsify (topk; transcoders); Gemma Scope (Lieberum et al. 2024, arXiv 2408.05147).
    """
    path = _bundled(str(path)) or Path(path).expanduser()
    if path.is_file() and path.suffix == ".safetensors" and path.name not in _FILES:
        found = Dictionary.load(path)
        return found if point is None and out_point is None else found.at(point, out_point, found.facts.get("model"))
    folder = path.parent if path.is_file() else path
    for layout in LAYOUTS:
        if layout.is_in(folder):
            return _made(layout, folder, point, out_point, scale)
    if not folder.exists():
        raise CheckpointError(f"{path} is not there.")
    inside = sorted(str(sub.parent.relative_to(folder)) for name in _FILES for sub in folder.glob(f"**/{name}"))
    more = f" Of the {len(inside)} dictionaries below it name one: {', '.join(inside[:5])}." if inside else ""
    kinds = "; ".join(f"{one.tool}: {' and '.join(one.holds)}" for one in LAYOUTS)
    raise CheckpointError(f"{path} holds no dictionary ({kinds}).{more}")


def _bundled(name: str) -> Path | None:
    """The file of a bundled model's dictionary; None for what is no bundled name. CheckpointError where it has none."""
    if not name.startswith("gatedlens/") or Path(name).exists():
        return None
    have = {
        f"gatedlens/{path.parent.parent.name}": path for path in sorted(BUNDLED.glob("*/dictionaries/*.safetensors"))
    }
    if name not in have:
        raise CheckpointError(f"There is no bundled dictionary of {name}; there are those of {', '.join(have)}.")
    return have[name]


def _made(layout: Layout, folder: Path, point: str | None, out_point: str | None, scale: Scale) -> Dictionary:
    tensors, options = layout.read(folder, scale)
    options["point"] = point or options["point"]
    options["out_point"] = out_point or options.get("out_point")
    if options["point"] is None:
        raise InputError(f"{folder} does not say what it reads: load(..., point='blocks.3.hook_resid_post') does.")
    lacks = [name for name in ("W_enc", "W_dec") if name not in tensors]
    if lacks:
        raise CheckpointError(f"{folder} lacks {', '.join(lacks)}: it holds {', '.join(tensors)}.")
    try:
        return Dictionary(**{**tensors, **options})
    except InputError as error:
        raise CheckpointError(f"{folder} is no dictionary of {layout.tool}: {error}") from error


def _fields(folder: Path, tool: str) -> Fields:
    path = folder / "cfg.json"
    try:
        return Fields(read_json(path, f"dictionary of {tool}"), f"dictionary of {tool}", path, CheckpointError)
    except InputError as error:
        raise CheckpointError(str(error)) from error


# -- SAELens --------------------------------------------------------------------------------------------------------

OLD = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}  # 1 to 5
NORMALISED: dict[Any, str] = {None: "none", False: "none", "none": "none", "layer_norm": "layer_norm"}
NORMALISED |= {"constant_norm_rescale": "constant_norm", True: "scaled", "expected_average_only_in": "scaled"}
TOLD = ("model_name", "dataset_path", "context_size", "prepend_bos", "sae_lens_version")


def _topk(weights: Tensors, cfg: Mapping[str, Any]) -> Activation:
    k: Any = cfg.get("k") or (cfg.get("activation_fn_kwargs") or {}).get("k")
    return TopK(k)


def _jumprelu(weights: Tensors, cfg: Mapping[str, Any]) -> Activation:
    for name in ("threshold", "topk_threshold"):
        if name in weights:
            return JumpReLU(weights.pop(name))
    return JumpReLU(weights.pop("log_threshold").exp())


def _gated(weights: Tensors, cfg: Mapping[str, Any]) -> Activation:
    """One sum, p = the gate's own: the other, exp(r_mag) (p - b_gate) + b_mag, hangs on it."""
    gate, scale = weights.pop("b_gate"), weights.pop("r_mag").exp()
    weights["b_enc"] = gate
    return Gated(scale, weights.pop("b_mag") - scale * gate)


MAKES: dict[str, Callable[[Tensors, Mapping[str, Any]], Activation]] = {
    "standard": lambda weights, cfg: ReLU(),
    "topk": _topk,
    "jumprelu": _jumprelu,
    "batchtopk": _jumprelu,
    "matryoshka_batchtopk": _jumprelu,
    "gated": _gated,
    "transcoder": lambda weights, cfg: ReLU(),
    "skip_transcoder": lambda weights, cfg: ReLU(),
    "jumprelu_transcoder": _jumprelu,
    "jumprelu_skip_transcoder": _jumprelu,
}


def _sae_lens(folder: Path, scale: Scale) -> tuple[Tensors, dict[str, Any]]:
    fields = _fields(folder, "SAELens")
    cfg: dict[str, Any] = {OLD.get(str(name), str(name)): value for name, value in fields.data.items()}
    cfg = {**cfg, **(cfg.get("metadata") or {})}  # from version 6 on what was said of the model lies there
    weights, _ = read_tensors(folder / "sae_weights.safetensors")
    dtype = dtype_of(cfg.get("dtype"), CheckpointError)
    weights = {name: held if dtype is None else held.to(dtype) for name, held in weights.items()}
    kind = cfg.get("architecture", "standard")
    if kind == "standard" and cfg.get("activation_fn", "relu") != "relu":
        kind = cfg["activation_fn"]  # until version 5 a TopK was a standard one with another function
    if kind not in MAKES:
        raise CheckpointError(
            f"{folder} is of the architecture {kind!r}, which is not read: it is one of {', '.join(MAKES)}."
            f"{did_you_mean(str(kind), MAKES)}"
        )
    try:
        activation = MAKES[kind](weights, cfg)
    except (KeyError, InputError) as error:
        raise CheckpointError(f"{folder}: an SAE of {kind!r} lacks {error}.") from error
    transcodes = "transcoder" in kind
    _fold(weights, cfg)
    normalise = _normalised(folder, cfg, scale, weights)
    head = cfg.get("hook_head_index")
    options: dict[str, Any] = {
        "point": cfg.get("hook_name"),
        "out_point": cfg.get("hook_name_out") if transcodes else None,
        "activation": activation,
        "centred": bool(cfg.get("apply_b_dec_to_input", True)) and not transcodes,
        "normalise": normalise,
        "index": {} if head is None else {"head": int(head)},
        "facts": _facts(cfg, "SAELens"),
    }
    if transcodes and not options["out_point"]:
        options["out_point"] = _module_out(options["point"])
    if "W_skip" in weights:
        weights["W_skip"] = weights["W_skip"].T.contiguous()
    return weights, options


def _normalised(folder: Path, cfg: Mapping[str, Any], scale: Scale, weights: Tensors) -> str:
    said = cfg.get("normalize_activations")
    if said not in NORMALISED:
        raise CheckpointError(
            f"{folder} normalises activations by {said!r}, which is not read: it is one of {NORMALISED}."
        )
    if NORMALISED[said] != "scaled":
        return NORMALISED[said]
    if scale is None:
        raise InputError(
            f"{folder} was trained on activations times a number that it does not say (normalize_activations={said!r}: so that "
            "their mean length is sqrt(d_in)): load(..., scale=that number), or scale=1 to read them as they are."
        )
    weights["W_enc"] = weights["W_enc"] * scale
    weights["W_dec"], weights["b_dec"] = weights["W_dec"] / scale, weights["b_dec"] / scale
    return "none"


def _fold(weights: Tensors, cfg: Mapping[str, Any]) -> None:
    """Into W_enc and W_dec: features by the lengths of their decoder rows, and the factor of fine-tuning."""
    if cfg.get("rescale_acts_by_decoder_norm"):
        length = weights["W_dec"].norm(dim=-1)
        weights["W_enc"], weights["b_enc"] = weights["W_enc"] * length, weights["b_enc"] * length
        weights["W_dec"] = weights["W_dec"] / length.unsqueeze(-1)
    factor = weights.pop("scaling_factor", weights.pop("finetuning_scaling_factor", None))
    if factor is not None:
        weights["W_dec"] = weights["W_dec"] * factor.unsqueeze(-1)


def _facts(cfg: Mapping[str, Any], tool: str) -> dict[str, Any]:
    facts = {name: cfg[name] for name in TOLD if cfg.get(name) is not None}
    return {**({"model": facts.pop("model_name")} if "model_name" in facts else {}), **facts, "tool": tool}


def _module_out(point: str | None) -> str | None:
    """What a transcoder of a part of a layer writes, where its folder does not say: the output of that part."""
    layer = re.match(r"(blocks\.\d+\.)", point or "")
    part = "mixer" if point and re.search(r"mixer|ln1", point) else "mlp"
    return f"{layer[1]}hook_{part}_out" if layer else None


# -- sparsify -------------------------------------------------------------------------------------------------------


def _sparsify(folder: Path, scale: Scale) -> tuple[Tensors, dict[str, Any]]:
    fields = _fields(folder, "sparsify")
    cfg, (held, _) = fields.data, read_tensors(folder / "sae.safetensors")
    said = cfg.get("activation", "topk")
    if said != "topk":
        raise CheckpointError(f"{folder} has the activation {said!r}; of sparsify's 'topk' is read.")
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec", "W_skip": "W_skip"}
    weights = {names[name]: tensor for name, tensor in held.items() if name in names}
    for name in ("W_enc", "W_skip"):
        if name in weights:
            weights[name] = weights[name].T.contiguous()
    transcodes = bool(cfg.get("transcode", False))
    reads, writes = _of_module(folder.name)
    k = fields.get("k", "a whole number", lambda v: isinstance(v, int) and v > 0)
    return weights, {
        "point": reads if transcodes else writes,
        "out_point": writes if transcodes else None,
        "activation": TopK(k),
        "centred": not transcodes,
        "facts": {"tool": "sparsify"},
    }


def _of_module(name: str) -> tuple[str | None, str | None]:
    """(what it reads, what it writes) of the module that a folder is named after: layers.3, layers.3.mlp, layers.3.mixer."""
    found = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?:\.(\w+))?$", name)
    if not found:
        return None, None
    layer, part = f"blocks.{found[1]}", found[2]
    if part is None:
        return f"{layer}.hook_resid_pre", f"{layer}.hook_resid_post"
    if part in ("mlp", "feed_forward", "channel_mixer"):
        return f"{layer}.ln2.hook_out", f"{layer}.hook_mlp_out"
    if part in ("mixer", "temporal_block", "linear_attn", "mamba", "attn", "self_attn"):
        return f"{layer}.ln1.hook_out", f"{layer}.hook_mixer_out"
    return None, None


# -- Gemma Scope ----------------------------------------------------------------------------------------------------


def _gemma_scope(folder: Path, scale: Scale) -> tuple[Tensors, dict[str, Any]]:
    path = folder / "params.npz"
    try:
        with numpy.load(path) as file:
            held = {re.sub("^w_", "W_", name): torch.from_numpy(file[name]) for name in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if "threshold" not in held:
        raise CheckpointError(f"{path} is none of Gemma Scope's: it lacks threshold and holds {', '.join(held)}.")
    activation, where = JumpReLU(held.pop("threshold")), str(folder.resolve())
    layer, point, out_point = re.search(r"layer_(\d+)", where), None, None
    if layer and "transcoder" in where:
        point, out_point = f"blocks.{layer[1]}.ln2.hook_out", f"blocks.{layer[1]}.hook_mlp_out"
    elif layer:
        parts = {"-res": "hook_resid_post", "-mlp": "hook_mlp_out", "-att": "attn.hook_z"}
        point = next((f"blocks.{layer[1]}.{leaf}" for word, leaf in parts.items() if word in where), None)
    return held, {"point": point, "out_point": out_point, "activation": activation, "facts": {"tool": "Gemma Scope"}}


LAYOUTS = (
    Layout("SAELens", ("cfg.json", "sae_weights.safetensors"), _sae_lens),
    Layout("sparsify", ("cfg.json", "sae.safetensors"), _sparsify),
    Layout("Gemma Scope", ("params.npz",), _gemma_scope),
)
_FILES = tuple(dict.fromkeys(one.holds[-1] for one in LAYOUTS))
