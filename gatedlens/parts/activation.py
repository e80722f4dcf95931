"""Activation: an activation function with its word in the equations of rows.

activation_of("silu", "this model").word        # "SiLU", as in hook_post = SiLU(pre) * pre_linear
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.errors import CheckpointError
from gatedlens.recurrence.scanning import at_least_float32


def relu_squared(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """`relu_squared(x)`: max(x, 0)^2 (So et al. 2021, Primer, arXiv 2109.08668)."""
    return F.relu(x).square()


def wide_silu(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """`wide_silu(gate)`: SiLU in at least float32."""
    return F.silu(at_least_float32(x))


def wide_sigmoid(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """`wide_sigmoid(gate)`: the sigmoid in at least float32."""
    return torch.sigmoid(at_least_float32(x))


class Activation(NamedTuple):
    """`word` stands for it in equations, `function` computes it."""

    word: str
    function: Callable[[Tensor], Tensor]


GELU_TANH = Activation("gelu_tanh", partial(F.gelu, approximate="tanh"))
SILU = Activation("SiLU", F.silu)
ACTIVATIONS = {  # by transformers' names
    "silu": SILU,
    "swish": SILU,
    "gelu_pytorch_tanh": GELU_TANH,
    "gelu": Activation("gelu", F.gelu),
    "relu": Activation("relu", torch.relu),
    "relu2": Activation("relu_squared", relu_squared),
}


def activation_of(name: str, model_name: str) -> Activation:
    """`activation_of("silu", "mine")`: the activation of a config's hidden_act; CheckpointError for one that no part has."""
    if name not in ACTIVATIONS:
        raise CheckpointError(
            f"{model_name} has the activation {name!r}; supported are {', '.join(map(repr, ACTIVATIONS))}."
        )
    return ACTIVATIONS[name]
