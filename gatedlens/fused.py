"""Fused: mamba-ssm's CUDA kernels, where there is a GPU, the packages (`pip install 'gatedlens[cuda]'`), and no listener.

b batch, l pos, c channel, n state, r dt_rank. The kernels read [b, c, l], with positions innermost.

    mamba_inner      a whole Mamba mixer but its input projection: nothing inside is heard, no padding, no carried state
    rms_norm         torch's own, which is one kernel on a GPU: nothing inside is heard
    selective_scan   the recurrence alone, from a zero state: the lazy points inside it are not heard

They are imported when the first CUDA tensor arrives and never on a CPU. Where they cannot be had one line is logged and
gatedlens's own forward runs, with the same numbers; `with gl.fused.off(): ...` runs it anyway. Limits of the kernels: they
start from a zero state, no gradient flows through the state that they leave, and they have no second derivative.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from gatedlens.recurrence.transforms import transformed

__all__ = ["Kernels", "fits", "kernels", "kernels_for", "mixer", "off", "selective_scan"]

log = logging.getLogger("gatedlens")
DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what they are compiled for
TAPS = (2, 3, 4)  # the widths that causal-conv1d knows
_wanted = ContextVar("fused kernels are wanted", default=True)


if TYPE_CHECKING:

    class MixerWeights(Protocol):
        """A mixer's parameters by mamba-ssm's names."""

        in_proj: Any
        conv1d: Any
        x_proj: Any
        dt_proj: Any
        out_proj: Any
        D: Any

else:
    MixerWeights = Any


@dataclass(frozen=True)
class Kernels:
    """mamba-ssm's functions, by its own names and with its own signatures; `mamba_inner` needs causal-conv1d as well."""

    selective_scan: Callable[..., Any]
    mamba_inner: Callable[..., Any] | None


@functools.cache
def kernels() -> Kernels | None:
    """`gl.fused.kernels()`: the kernels, imported once; None where they cannot be imported, which is logged once."""
    try:
        interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    except (ImportError, OSError) as error:  # OSError: compiled for another torch or CUDA
        log.warning(
            "mamba-ssm's fused kernels cannot be imported (%s): gatedlens runs its own scan, which is slower on a GPU and "
            "gives the same numbers. pip install 'gatedlens[cuda]' brings them.",
            error,
        )
        return None
    inner = interface.mamba_inner_fn if interface.causal_conv1d_fn is not None else None
    if inner is None:
        log.warning("causal-conv1d is not installed: only mamba-ssm's scan runs fused. pip install 'gatedlens[cuda]'.")
    return Kernels(interface.selective_scan_fn, inner)


@contextmanager
def off() -> Iterator[None]:
    """`with gl.fused.off(): ...`: gatedlens's own forward on a GPU too, for comparison or a second derivative."""
    token = _wanted.set(False)
    try:
        yield
    finally:
        _wanted.reset(token)


def fits(x: Tensor) -> bool:
    """`gl.fused.fits(x)`: whether fused kernels can run on a tensor: its device, its dtype, and no torch.func transform
    around it.
    """
    if x.device.type not in DEVICES or x.dtype not in DTYPES or not _wanted.get():
        return False
    return not transformed()


def kernels_for(x: Tensor) -> Kernels | None:
    """`gl.fused.kernels_for(x)`: mamba-ssm's kernels, if they can run on a tensor."""
    return kernels() if fits(x) else None


def selective_scan(
    run: Kernels,
    dt: Float[Tensor, "batch pos channel"],
    B: Float[Tensor, "batch pos state"],
    C: Float[Tensor, "batch pos state"],
    u: Float[Tensor, "batch pos channel"],
    A: Float[Tensor, "channel state"],
) -> tuple[Float[Tensor, "batch pos channel"], Float[Tensor, "batch channel state"]]:
    """`scan, last = gl.fused.selective_scan(run, dt, B, C, u, A)`, from a zero state: what `recurrence.scan` gives of
    Mamba's terms.
    """
    dt, B, C, u = (rearrange(t, "b l c -> b c l").contiguous() for t in (dt, B, C, u))
    scan, last = run.selective_scan(u, dt, A.contiguous(), B, C, return_last_state=True)
    return rearrange(scan, "b c l -> b l c"), last.to(A.dtype)


def mixer(
    inner: Callable[..., Any], n: Float[Tensor, "batch pos d_model"], w: MixerWeights, A: Float[Tensor, "channel state"]
) -> Float[Tensor, "batch pos d_model"]:
    """`gl.fused.mixer(inner, n, w, A)`: out_proj(SSM(SiLU(conv(x))) * SiLU(z)) of a mixer's parameters `w`, x and z =
    in_proj(n).
    """
    xz = rearrange(w.in_proj.weight @ rearrange(n, "b l d -> d (b l)"), "c (b l) -> b c l", b=len(n))
    if w.in_proj.bias is not None:
        xz = xz + w.in_proj.bias.to(xz.dtype).unsqueeze(-1)
    return inner(
        xz, w.conv1d.weight, w.conv1d.bias, w.x_proj.weight, w.dt_proj.weight, w.out_proj.weight, w.out_proj.bias,
        A, None, None, w.D.float(), delta_bias=w.dt_proj.bias.float(), delta_softplus=True,
    )  # fmt: skip
