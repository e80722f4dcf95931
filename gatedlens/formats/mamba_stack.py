"""A stack of Mamba or Mamba-2 as transformers and mamba-ssm lay it out: under `backbone`, between an embedding and a head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.errors import CheckpointError
from gatedlens.formats.transformers_config import config_of, is_hf, norm_eps
from gatedlens.model import fields
from gatedlens.model.base import Wrapped
from gatedlens.model.config import HookedConfig
from gatedlens.model.language import HookedLanguageModel
from gatedlens.model.norm import Norm, eps_of
from gatedlens.recurrence.scanning import at_least_float32


@dataclass(kw_only=True)
class StackConfig(HookedConfig):
    """What the cfg of Mamba and that of Mamba-2 have in common."""

    d_inner: int
    d_state: int
    d_conv: int
    expand: float = 2
    residual_in_fp32: bool = True
    use_bias: bool = False
    use_conv_bias: bool = True
    tie_word_embeddings: bool = True


class MambaStack(HookedLanguageModel):
    """Blocks under `backbone`, between an embedding and `lm_head`: as transformers and mamba-ssm lay out Mamba and Mamba-2."""

    cfg: StackConfig

    @classmethod
    def told(cls, wrapped: Wrapped, model_name: str) -> Mapping[str, Any]:
        """`HookedMamba.told(wrapped, "mine")`: the config of a wrapped model, by name.

        CheckpointError for a value that does not fit, for a hybrid, and for a model without layers.
        """
        if len(wrapped.backbone.layers) == 0:
            raise CheckpointError(f"{model_name} has no layers.")
        given = config_of(wrapped)
        fields.check(given, cls.hub_fields if is_hf(wrapped.config) else cls.layout.fields, f"{model_name}'s config")
        if given.get("attn_layer_idx") or given.get("d_intermediate"):
            raise CheckpointError(
                f"{model_name} mixes {cls.title} with attention or MLP layers (attn_layer_idx={given.get('attn_layer_idx')}, "
                f"d_intermediate={given.get('d_intermediate')}); gatedlens supports pure {cls.title} stacks."
            )
        return given

    @staticmethod
    def check_activation(wrapped: Wrapped, given: Mapping[str, Any], model_name: str) -> None:
        """`HookedMamba.check_activation(wrapped, given, "mine")`: CheckpointError for a mixer whose activation is no SiLU."""
        for layer in wrapped.backbone.layers:
            act = vars(layer.mixer).get("activation", given.get("hidden_act", "silu"))
            if act not in ("silu", "swish"):
                raise CheckpointError(f"{model_name} has hidden_act={act!r}; gatedlens supports 'silu'.")

    @staticmethod
    def shared(wrapped: Wrapped, given: Mapping[str, Any], d_inner: int) -> dict[str, Any]:
        """`MambaConfig(**cls.shared(wrapped, given, d_inner), ...)`: what any such stack says in its cfg."""
        first, weight = wrapped.backbone.layers[0], embedding_of(wrapped).weight
        mixer = first.mixer
        return {
            "n_layers": len(wrapped.backbone.layers),
            "d_model": weight.shape[1],
            "d_vocab": weight.shape[0],
            "normalization_type": "RMS" if getattr(first.norm, "bias", None) is None else "LN",
            "eps": eps_of(first.norm, norm_eps(given)),
            "dtype": mixer.in_proj.weight.dtype,
            "device": str(weight.device),
            "original_architecture": type(wrapped).__name__,
            "d_inner": d_inner,
            "d_conv": mixer.conv1d.weight.shape[-1],
            "expand": d_inner / weight.shape[1],
            "residual_in_fp32": bool(vars(first).get("residual_in_fp32", given.get("residual_in_fp32", True))),
            "use_bias": mixer.in_proj.bias is not None,
            "use_conv_bias": mixer.conv1d.bias is not None,
            "tie_word_embeddings": wrapped.lm_head.weight is weight,
        }

    def make_final_norm(self, rows: tuple[Point, ...]) -> Norm:
        return Norm(self.wrapped.backbone.norm_f, rows, self.cfg.eps, centred=self.cfg.normalization_type == "LN")

    @property
    def embedding(self) -> Any:
        return embedding_of(self.wrapped)

    @property
    def unembedding(self) -> Any:
        return self.wrapped.lm_head

    def stream(self, embedded: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return at_least_float32(embedded) if self.cfg.residual_in_fp32 else embedded


def has_matrix_states(wrapped: Any) -> bool:
    """Whether the first mixer of a model has one decay a head, A_log [head], as Mamba-2's."""
    layers = getattr(getattr(wrapped, "backbone", None), "layers", None) or [None]
    A_log = getattr(getattr(layers[0], "mixer", None), "A_log", None)
    return isinstance(A_log, Tensor) and A_log.ndim == 1


def writes_two_terms(wrapped: Any) -> bool:
    """Whether the first mixer of a model has a bias of B for each head, B_bias [head, rank, state], as Mamba-3's."""
    layers = getattr(getattr(wrapped, "backbone", None), "layers", None) or [None]
    bias = getattr(getattr(layers[0], "mixer", None), "B_bias", None)
    return isinstance(bias, Tensor) and bias.ndim == 3


def is_hybrid(wrapped: Any) -> bool:
    """Whether a stack around Mamba-2 has more than it: attention or MLPs between, or channels beside the heads of a mixer."""
    layers = list(getattr(getattr(wrapped, "backbone", None), "layers", None) or [])
    mixers: list[Any] = [getattr(layer, "mixer", None) for layer in layers]
    scans = [mixer for mixer in mixers if getattr(getattr(mixer, "A_log", None), "ndim", 0) == 1]
    if not scans:
        return False
    # in_proj gives z, what the conv reads, and dt; out_proj reads as many channels as z has.
    own = scans[0]
    rows = own.out_proj.in_features + own.conv1d.out_channels + len(own.A_log)
    return len(scans) < len(layers) or "mlp" in layers[0]._modules or own.in_proj.out_features > rows


def embedding_of(wrapped: Any) -> Any:
    """`backbone.embeddings` in transformers, `backbone.embedding` in mamba-ssm."""
    names = dict(wrapped.backbone.named_children())
    return names.get("embeddings", names.get("embedding"))
