"""Elementwise: the secant of a function of one number, Dg = (g(z) - g(z')) / (z - z') Dz.

Where z and z' nearly meet, the quotient is rounding; there the derivative halfway stands for it, which is as exact: the error of
either is some cube root of the dtype's rounding, squared. Where a closed form knows better it is used (exp: the logarithmic
mean).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.secant.contrast import Call, Contrast, Sloped

Values = Float[Tensor, "*shape"]
Slope = Callable[[Values, Values, Values, Values], Values]  # of g(z), g(z'), z, z'


def logarithmic_mean(p: Values, q: Values, apart: Values) -> Values:
    """(p - q) / (log p - log q), `apart` the difference of the logarithms: (p + q) / 2 where that is 0; 0 where it is not
    finite."""
    half = apart / 2
    ratio = torch.tanh(half).div_(half).masked_fill_(half == 0, 1.0)
    return ratio.nan_to_num_(0.0, 0.0, 0.0).mul_(p + q).div_(2)


def of_exp(g: Values, g0: Values, z: Values, z0: Values) -> Values:
    """The slope of exp: the logarithmic mean of its values."""
    return logarithmic_mean(g, g0, z - z0)


def of_exp2(g: Values, g0: Values, z: Values, z0: Values) -> Values:
    """The slope of 2^z."""
    return logarithmic_mean(g, g0, (z - z0) * math.log(2)) * math.log(2)


def of_square(g: Values, g0: Values, z: Values, z0: Values) -> Values:
    """The slope of z^2."""
    return z + z0


def of_sqrt(g: Values, g0: Values, z: Values, z0: Values) -> Values:
    """The slope of sqrt."""
    return 1 / (g + g0)


def of_reciprocal(g: Values, g0: Values, z: Values, z0: Values) -> Values:
    """The slope of 1 / z."""
    return -g * g0


def of_rsqrt(g: Values, g0: Values, z: Values, z0: Values) -> Values:
    """The slope of 1 / sqrt(z)."""
    return -g * g0 / (1 / g + 1 / g0)


def of_relu(g: Values, g0: Values, z: Values, z0: Values) -> Values:
    """The slope of relu; between equal ones its derivative."""
    apart = z - z0
    return torch.where(apart == 0, (z > 0).to(z), (g - g0) / apart)


def quotient(call: Call, g: Values, g0: Values, z: Values, z0: Values) -> Values:
    """The slope of any function: the quotient; where that is rounding the derivative halfway."""
    eps = torch.finfo(z.dtype).eps
    apart = z - z0
    slope = (g - g0).to(z.dtype) / apart
    near = (apart.abs() <= eps ** (1 / 3) * (1 + z.abs())).flatten().nonzero().squeeze(1)
    if len(near):
        args, kwargs = call.given(0)
        apart, high, low, at, before = (x.reshape(-1)[near] for x in (apart, g, g0, z, z0))
        with torch.enable_grad():
            middle = ((at + before) / 2).requires_grad_()
            (found,) = torch.autograd.grad(call.func(middle, *args[1:], **kwargs).sum(), middle)
        # Where the two differ by more than rounding, the function is steep or bent there (a square root near 0): the quotient.
        agree = (found * apart - (high - low)).abs() <= 4 * eps * torch.maximum(high.abs(), low.abs())
        slope = slope.contiguous()
        flat = slope.view(-1)
        flat[near] = torch.where(agree | (apart == 0), found, flat[near])
    return slope


def elementwise(slope: Slope | None = None) -> Callable[[Call], Contrast]:
    """`elementwise(of_exp)`: the rule of a function of one tensor, by its slope; None: by the quotient."""

    def rule(call: Call) -> Contrast:
        inputs, values = [call.given(run)[0][0] for run in range(call.number)], call.values()
        outs = [values[0]]
        for run in range(1, call.number):
            given = values[run], values[run - 1], inputs[run].detach(), inputs[run - 1].detach()
            with torch.no_grad():
                found = quotient(call, *given) if slope is None else slope(*given)
            outs.append(Sloped.apply(inputs[run], found, values[run]))
        return call.together(outs)

    return rule


def power(call: Call) -> Contrast:
    """z ** n: for a number n."""
    exponent = call.leaves[1]
    known = {2: of_square, 0.5: of_sqrt, -0.5: of_rsqrt, -1: of_reciprocal}
    return elementwise(known.get(exponent))(call)
