"""Dtypes, however they are written: `of("bfloat16")`, `of("torch.bfloat16")`, `of(torch.bfloat16)`; None stays None."""

from __future__ import annotations

from typing import Any

import torch

from gatedlens.errors import GatedlensError, InputError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def of(dtype: Any, error: type[GatedlensError] = InputError) -> torch.dtype | None:
    """The floating dtype; `error` for anything else."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found is not None and found in FLOATS:
        return found
    if dtype is None:
        return None
    names = ", ".join(name(one) for one in FLOATS)
    raise error(f"dtype={dtype!r}: it is {names} (a name or a torch.dtype), or None for what is there.")


def name(dtype: torch.dtype) -> str:
    """`name(torch.float16)`: "float16"."""
    return str(dtype).removeprefix("torch.")
