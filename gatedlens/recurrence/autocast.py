"""Autocast: our own mathematics runs in the precision of its tensors, whatever `torch.autocast` is on around it.

    with exact(x):                      # a matrix product of float32 is one of float32
        total = left @ right

A model's forward follows the user's autocast, as its own code would. What is derived from its activations (implicit attention,
contributions, cuts, relevance), the recurrences and gradients that we ask for do not: half precision overflows where they do not.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def exact(like: Tensor) -> AbstractContextManager[Any]:
    """Where autocast is on for the device of `like`, it is off in the block."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if is_on(like) else nullcontext()


def is_on(like: Tensor) -> bool:
    """Whether autocast is on for the device of `like`."""
    device = like.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
