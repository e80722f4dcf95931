"""A small random model for tests and tours: the config that an architecture says, and the one rule for its parameters.

    class HookedMine(HookedLanguageModel):
        small = Tiny("tiny-mine", Weights, {"d_model": 16, "n_layer": 2})
    HookedMine.tiny(seed=0, n_layer=3)

The rule: a matrix or a convolution is noise of variance 1 / (how many numbers it reads); everything else (a gain, a bias, a
decay) is what the module starts with, and noise of standard deviation 0.3. What must differ is told by name, in `draws`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Draw = Callable[[Tensor, Tensor], Tensor]  # (what a parameter starts with, noise) -> its value


def fresh(scale: float) -> Draw:
    """`fresh(0.5)`: noise of this standard deviation."""
    return lambda start, noise: noise * scale


def around(scale: float) -> Draw:
    """`around(0.3)`: what the parameter starts with, and noise of this standard deviation."""
    return lambda start, noise: start + noise * scale


def by_fan_in(gain: float = 1.0) -> Draw:
    """`by_fan_in()`: noise of variance gain^2 / (how many numbers an output is summed over)."""
    return lambda start, noise: noise * gain * noise[0].numel() ** -0.5


MATRIX, OTHER = by_fan_in(), around(0.3)


@dataclass(frozen=True)
class Tiny:
    """`Tiny("tiny-mine", Weights, {"d_model": 16, "n_layer": 2}, {"embedding": fresh(0.5)})`: what `tiny()` makes.

    make: a module of a config. config: the words of that config, small. draws: how a parameter is drawn in whose name a pattern
    is found, the first that is; None leaves it as it starts.
    """

    name: str
    make: Callable[[dict[str, Any]], nn.Module]
    config: Mapping[str, Any]
    draws: Mapping[str, Draw | None] = field(default_factory=dict)

    def module(self, seed: int, sizes: Mapping[str, Any]) -> nn.Module:
        """`HookedMamba.small.module(0, {"n_layer": 3})`: the module, its parameters drawn."""
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self.make({**self.config, **sizes})
        with torch.no_grad():
            for name, p in module.named_parameters():
                drawn = self.draw(name, p)
                if drawn is not None:
                    p.copy_(drawn(p, torch.randn(p.shape, generator=generator)))
        return module.eval()

    def draw(self, name: str, parameter: Tensor) -> Draw | None:
        """`small.draw("backbone.norm_f.weight", weight)`: how a parameter is drawn, None for one that stays as it starts."""
        found = [drawn for pattern, drawn in self.draws.items() if re.search(pattern, name)]
        return found[0] if found else MATRIX if parameter.ndim > 1 else OTHER
