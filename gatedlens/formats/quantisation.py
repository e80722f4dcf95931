"""What a quantization_config means for loading: which package it needs, how transformers is asked, and what is said of it.

    need(config)                      # ImportError that names the extra, where the package is missing
    options(config)                   # what transformers is passed beside the name
    packed(names)                     # how many of a checkpoint's tensors are scales of quantised ones

bitsandbytes' and torchao's weights stay as they are and are dequantised as they are read. compressed-tensors' are dequantised by
transformers while it loads them, as fp8 in blocks is where there is no GPU for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gatedlens.files import optional

EXTRA = "quantised"
PACKAGES = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "compressed-tensors": "compressed_tensors"}
SCALES = (
    "weight_scale_inv",
    "weight_scale",
    "_scale_inv",
)  # beside a quantised tensor, as compressed-tensors and fp8 name them


def of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization_config of a config.json, or of the text model in it; None without."""
    inner = config.get("text_config")
    return config.get("quantization_config") or (of(inner) if isinstance(inner, Mapping) else None)


def method(config: Mapping[str, Any]) -> str:
    """By which package: "bitsandbytes", also where an old config does not say so."""
    return str(config.get("quant_method", "bitsandbytes"))


def need(config: Mapping[str, Any]) -> None:
    """ImportError that names the extra which brings what `config` needs, where it is missing."""
    if method(config) in PACKAGES:
        optional(PACKAGES[method(config)], EXTRA)


def options(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers is passed to load a checkpoint with this quantization_config."""
    if method(config) != "compressed-tensors":
        return {}
    from transformers import CompressedTensorsConfig

    return {"quantization_config": CompressedTensorsConfig(dequantize=True)}


def packed(names: Iterable[str]) -> int:
    """How many tensors of a checkpoint are quantised, by the scales beside them."""
    return sum(name.endswith(SCALES) for name in names)
