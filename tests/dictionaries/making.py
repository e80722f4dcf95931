"""Random dictionaries at the points of a model, float64."""

from __future__ import annotations

import torch

from gatedlens.dictionaries import Dictionary
from gatedlens.dictionaries.reading import Reading


def draw(seed: int = 0):
    """`r(3, 4)`: random numbers of a seed, float64."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def made(model, points, outs=None, *, n=11, activation=None, axes=None, index=None, skip=False, seed=0, **options):
    """A random dictionary that fits `model` at `points`."""
    r, points = draw(seed), [points] if isinstance(points, str) else list(points)
    ins = [Reading.of(model, p, axes, index or {}).width for p in points]
    d_outs = ins if outs is None else [Reading.of(model, p, axes, index or {}).width for p in outs]
    return Dictionary(
        r(sum(ins), n) / sum(ins) ** 0.5,
        r(n, sum(d_outs)),
        r(n),
        r(sum(d_outs)),
        r(sum(ins), sum(d_outs)) if skip else None,
        point=points,
        out_point=outs,
        d_ins=ins,
        d_outs=d_outs,
        activation=activation,
        axes=axes,
        index=index,
        **options,
    )


def recurrent_layer(model) -> int:
    """The last layer that has a state."""
    return max(int(name.split(".")[1]) for name in model.names if name.endswith("mixer.hook_state"))
