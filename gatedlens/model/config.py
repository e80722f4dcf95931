"""HookedConfig: TransformerLens's words for a model's sizes, which each architecture extends with its own; and dtypes.

model.cfg.d_model, model.cfg.sizes["channel"], model.cfg.to_dict()
dtype_of("bfloat16"), dtype_of("torch.bfloat16"), dtype_of(torch.bfloat16); None stays None
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from gatedlens.errors import GatedlensError, InputError


@dataclass(kw_only=True)
class HookedConfig:
    """`model.cfg`. `n_heads` is 1 where a mixer has no heads; `n_ctx` bounds nothing in a recurrence, it is what the
    model was trained on (or a nominal 2048). `sizes` maps axis names of hook points to numbers.
    """

    model_name: str
    architecture: str
    n_layers: int
    d_model: int
    d_vocab: int
    n_ctx: int = 2048
    n_heads: int = 1
    act_fn: str = "silu"
    normalization_type: str | None = "RMS"
    eps: float = 1e-5
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    tokenizer_name: str | None = None
    logits_soft_cap: float | None = None  # logits are cap * tanh(logits / cap); None: as they are
    default_prepend_bos: bool = True
    default_padding_side: str = "left"
    d_vocab_out: int = -1
    d_head: int = -1
    d_mlp: int | None = None
    attn_only: bool = True
    positional_embedding_type: str = "none"
    use_attn_result: bool = False
    original_architecture: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        self.d_vocab_out = self.d_vocab if self.d_vocab_out == -1 else self.d_vocab_out
        self.d_head = self.d_model if self.d_head == -1 else self.d_head

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis that does not depend on the input."""
        return {"d_model": self.d_model, "d_vocab": self.d_vocab_out, "one": 1}

    def to_dict(self) -> dict[str, Any]:
        """`model.cfg.to_dict()`: every field, by name."""
        return asdict(self)


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def dtype_of(dtype: Any, error: type[GatedlensError] = InputError) -> torch.dtype | None:
    """The floating dtype; `error` for anything else."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found is not None and found in FLOATS:
        return found
    if dtype is None:
        return None
    names = ", ".join(dtype_name(one) for one in FLOATS)
    raise error(f"dtype={dtype!r}: it is {names} (a name or a torch.dtype), or None for what is there.")


def dtype_name(dtype: torch.dtype) -> str:
    """`dtype_name(torch.float16)`: "float16"."""
    return str(dtype).removeprefix("torch.")
