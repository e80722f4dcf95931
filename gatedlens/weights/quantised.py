"""Quantised weights, dequantised as they are read, each by the package that quantised it.

    bitsandbytes 4 bit (nf4, fp4)       W = code[q] * absmax of a block, absmax itself quantised or not
    bitsandbytes 8 bit                  W = q * row scale / 127
    torchao                             the tensor's own `dequantize()`
    compressed-tensors                  its own `decompress`: packed integers, fp8, block scales
    fp8 in blocks (DeepSeek-V3's)       W = q * scale of its tile, by `weight_scale_inv`

Only weights are dequantised. What a vendor's forward quantises besides (activations, in bitsandbytes' 8 bit and in dynamic
schemes) is computed in full here. Dettmers et al. 2022 (arXiv 2208.07339) and 2023 (arXiv 2305.14314); DeepSeek-V3, arXiv
2412.19437, section 3.3.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatedlens.files import optional
from gatedlens.weights.reader import Reader, WeightOf, as_floats, held_weight

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
EXTRA = "quantised"


class FourBit(Reader):
    """bitsandbytes' Linear4bit, Embedding4bit: a packed byte holds two codes."""

    def fits(self, module: nn.Module) -> bool:
        return type(held_weight(module)).__name__ == "Params4bit"

    def weight(self, module: nn.Module, weight_of: WeightOf) -> Tensor:
        held: Any = held_weight(module)
        if held.quant_state is None:
            return as_floats(held)
        return optional("bitsandbytes", EXTRA).functional.dequantize_4bit(held.data, held.quant_state)

    def told(self, module: nn.Module) -> str:
        held: Any = held_weight(module)
        nested = held.quant_state is not None and held.quant_state.nested
        return f"bitsandbytes 4 bit ({held.quant_type}{', double quantised' if nested else ''})"


class EightBit(Reader):
    """bitsandbytes' Linear8bitLt: W = q * scale / 127, a scale a row."""

    def fits(self, module: nn.Module) -> bool:
        return type(held_weight(module)).__name__ == "Int8Params"

    def weight(self, module: nn.Module, weight_of: WeightOf) -> Tensor:
        held: Any = held_weight(module)
        if held.dtype != torch.int8:
            return as_floats(held)
        state: Any = vars(module).get("state")
        scale = held.SCB if held.SCB is not None else state.SCB  # its forward moves it from the weight to its state
        return optional("bitsandbytes", EXTRA).functional.int8_vectorwise_dequant(held.data, scale)

    def told(self, module: nn.Module) -> str:
        return "bitsandbytes 8 bit"


class TorchAo(Reader):
    """torchao's tensors, which stand in plain modules."""

    def fits(self, module: nn.Module) -> bool:
        return type(held_weight(module)).__module__.startswith("torchao.")

    def weight(self, module: nn.Module, weight_of: WeightOf) -> Tensor:
        held: Any = held_weight(module)
        return _without_activations(held.data).dequantize()

    def told(self, module: nn.Module) -> str:
        return f"torchao ({type(_without_activations(held_weight(module))).__name__})"


def _without_activations(held: Any) -> Any:
    """The weight in a tensor that quantises activations as well."""
    inner = vars(held).get("original_weight_tensor")
    return held if inner is None else inner


class CompressedTensors(Reader):
    """compressed-tensors': a module with a `quantization_scheme`, its weight packed or unpacked already."""

    def fits(self, module: nn.Module) -> bool:
        return "quantization_scheme" in vars(module) and vars(module)["quantization_scheme"].weights is not None

    def weight(self, module: nn.Module, weight_of: WeightOf) -> Tensor:
        held = held_weight(module)
        if held is not None and held.is_floating_point() and held.dtype not in FP8:
            return held.detach()
        scheme: Any = vars(module)["quantization_scheme"]
        base = optional("compressed_tensors.compressors.base", EXTRA)
        compressor = base.BaseCompressor.get_value_from_registry(_format(module))
        own = {**module._parameters, **module._buffers}
        state = {name: tensor.detach() for name, tensor in own.items() if tensor is not None}
        return compressor.decompress(state, scheme)["weight"]

    def told(self, module: nn.Module) -> str:
        return f"compressed-tensors ({_format(module)})"


def _format(module: nn.Module) -> str:
    scheme: Any = vars(module)["quantization_scheme"]
    return str(getattr(scheme.format, "value", scheme.format))


class Fp8Blocks(Reader):
    """fp8 in tiles, as DeepSeek-V3 keeps it: transformers' FP8Linear, or any module with `weight_scale_inv`."""

    def fits(self, module: nn.Module) -> bool:
        held = held_weight(module)
        return held is not None and held.dtype in FP8 and module._parameters.get("weight_scale_inv") is not None

    def weight(self, module: nn.Module, weight_of: WeightOf) -> Tensor:
        held, scale = held_weight(module), module._parameters["weight_scale_inv"]
        assert held is not None and scale is not None
        return from_blocks(held.detach(), scale.detach(), vars(module).get("block_size"))

    def told(self, module: nn.Module) -> str:
        return "fp8 in blocks"


class Fp8Experts(Reader):
    """The same of experts that stand in one tensor: [expert, out, in], with `{name}_scale_inv`."""

    names: ClassVar[tuple[str, ...]] = ("gate_up_proj", "up_proj", "down_proj")

    def fits(self, module: nn.Module) -> bool:
        held = module._parameters.get("down_proj")
        return held is not None and held.dtype in FP8 and "down_proj_scale_inv" in module._parameters

    def kind(self, module: nn.Module) -> type[nn.Module] | None:
        return nn.Module

    def weight(self, module: nn.Module, weight_of: WeightOf) -> Tensor:
        raise NotImplementedError  # it has several

    def read(self, module: nn.Module, name: str, weight_of: WeightOf) -> Tensor | None:
        held, scale = module._parameters[name], module._parameters[f"{name}_scale_inv"]
        assert held is not None and scale is not None
        return from_blocks(held.detach(), scale.detach(), vars(module).get("block_size"))

    def told(self, module: nn.Module) -> str:
        return "fp8 in blocks, of all experts"


def from_blocks(
    q: Float[Tensor, "*expert out in"], scale: Tensor, block: tuple[int, int] | list[int] | None
) -> Float[Tensor, "*expert out in"]:
    """`from_blocks(q, scale, (128, 128))`: W[i, j] = q[i, j] * scale[i // rows, j // columns] in float32; the last tiles may be
    smaller. One scale for all: block is None."""
    wide = scale.float()
    if block is not None:
        wide = wide.repeat_interleave(block[0], dim=-2)[..., : q.shape[-2], :]
        wide = wide.repeat_interleave(block[1], dim=-1)[..., : q.shape[-1]]
    elif wide.ndim:
        wide = wide.view(*wide.shape, *[1] * (q.ndim - wide.ndim)) if wide.ndim < q.ndim else wide
    return q.float() * wide
