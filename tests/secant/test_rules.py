"""The rules one by one: against the difference of two runs, and against their equations word for word."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gatedlens as gl
from gatedlens.secant import RULES, Contrast, difference


def new(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def secants(function, *pairs, seed=9):
    """(the gradient at each input under the rules, what it is worth) of pairs (now, then), weighed at random; held to be
    complete."""
    live = [now.clone().requires_grad_() for now, _ in pairs]
    out = function(*(Contrast.of(x, (then,), RULES) for x, (_, then) in zip(live, pairs, strict=True)))
    values = function(*(then for _, then in pairs)), function(*(now for now, _ in pairs))
    assert all(torch.allclose(a, b, atol=1e-13, equal_nan=True) for a, b in zip(out.plain, values, strict=True))
    weight = new(*out.shape, seed=seed)
    grads = torch.autograd.grad(out, live, weight)
    found = sum(((now - then) * g).sum() for (now, then), g in zip(pairs, grads, strict=True))
    moved = ((values[1] - values[0]).nan_to_num(0.0) * weight).sum()
    assert abs(float(found - moved)) < 1e-11 * max(1, float(weight.abs().sum()))
    return grads, weight


def some_equal(now, then):
    """The same in both runs at every third place, nearly the same at every fifth."""
    then = then.clone()
    then.view(-1)[::3] = now.reshape(-1)[::3]
    then.view(-1)[1::5] = now.reshape(-1)[1::5] + 1e-7
    return now, then


ELEMENTWISE = {
    "exp": torch.exp,
    "exp2": torch.exp2,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": lambda z: F.gelu(z, approximate="tanh"),
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "logsigmoid": F.logsigmoid,
    "relu squared": lambda z: F.relu(z).square(),
    "expm1": torch.expm1,
    "sqrt": lambda z: z.abs().sqrt(),
    "rsqrt": lambda z: (z * z + 1).rsqrt(),
    "reciprocal": lambda z: 1 / (z + 20),
    "clamp": lambda z: z.clamp(min=-1, max=1.5),
    "pow": lambda z: z.pow(3) + z**2 + z**4,
    "multiplier": lambda z: (-torch.expm1(2 * -z.abs())).sqrt(),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_is_the_quotient(name):
    function = ELEMENTWISE[name]
    now, then = some_equal(new(60), new(60, seed=1))
    (grad,), weight = secants(function, (now, then))
    far = (now - then).abs() > 1e-3
    if name not in ("sqrt", "multiplier"):  # of |z|, which has a corner
        want = (function(now) - function(then)) / (now - then) * weight
        assert torch.allclose(grad[far], want[far], rtol=1e-9)
    x = now.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(function(x), x, weight)
    equal = now == then
    assert torch.allclose(grad[equal], derivative[equal], rtol=1e-9)


def test_saturated_and_far_apart_numbers_stay_finite():
    now, then = (
        torch.tensor([800.0, -800.0, 60.0, -745.0, 0.0]).double(),
        torch.tensor([-800.0, 800.0, 61.0, -746.0, 1e-300]).double(),
    )
    for function in (torch.sigmoid, F.silu, F.softplus, torch.tanh):
        (grad,), _ = secants(function, (now, then))
        assert grad.isfinite().all()
    (grad,), _ = secants(torch.exp, (now[3:], then[3:]))
    assert grad.isfinite().all()


def test_a_square_root_near_zero_keeps_its_difference():
    """Where the derivative halfway is no secant."""
    now, then = torch.tensor([1e-8, 4e-6, 1e-12]).double(), torch.tensor([4e-6, 1e-8, 0.0]).double()
    secants(torch.sqrt, (now, then))
    secants(lambda z: (z + 0.0).clamp(min=0) ** 0.5, (now, then))


def test_products_are_the_midpoint_rule():
    a, b = (new(3, 4), new(3, 4, seed=1)), (new(4, seed=2), new(4, seed=3))
    (of_a, of_b), weight = secants(lambda a, b: a * b, a, b)
    assert torch.allclose(of_a, weight * (b[0] + b[1]) / 2)
    assert torch.allclose(of_b, (weight * (a[0] + a[1]) / 2).sum(0))
    (of_a, of_b), weight = secants(lambda a, b: a / (b + 30), a, b)
    inverse = [1 / (x + 30) for x in b]
    assert torch.allclose(of_a, weight * (inverse[0] + inverse[1]) / 2)
    assert torch.allclose(of_b, (-weight * (a[0] + a[1]) / 2 * inverse[0] * inverse[1]).sum(0))
    q, k = (new(2, 3, 4), new(2, 3, 4, seed=1)), (new(2, 5, 4, seed=2), new(2, 5, 4, seed=3))
    for function in (
        lambda q, k: torch.einsum("bqd,bkd->bqk", q, k),
        lambda q, k: q @ k.mT,
        lambda q, k: (q.unsqueeze(2) * k.unsqueeze(1)).sum(-1),
    ):
        (of_q, of_k), weight = secants(function, q, k)
        assert torch.allclose(of_q, weight @ (k[0] + k[1]) / 2)
        assert torch.allclose(of_k, weight.mT @ (q[0] + q[1]) / 2)
    secants(lambda a, b: torch.lerp(a, b, torch.sigmoid(a)), a, (new(3, 4, seed=6), new(3, 4, seed=7)))
    secants(lambda q, k: torch.bmm(q, k.mT).addcmul(q.sum(-1, keepdim=True), k.sum(-1).unsqueeze(1)), q, k)
    secants(lambda a: F.normalize(a, dim=-1), a)


def test_softmax_and_the_logarithm_of_its_sum_are_by_the_logarithmic_mean():
    s = some_equal(new(4, 6), new(4, 6, seed=1))
    s[0][1, 2] = s[1][1, 2] = -torch.inf
    pairs = [x.softmax(-1) for x in s]
    apart = pairs[0].log() - pairs[1].log()
    q = torch.where(apart.abs() < 1e-12, pairs[0], (pairs[0] - pairs[1]) / apart).nan_to_num(0.0)
    live = s[0].clone().requires_grad_()
    weight = new(4, 6, seed=3)
    p = Contrast.of(live, (s[1],), RULES).softmax(-1)
    (grad,) = torch.autograd.grad(p, live, weight)
    want = q * (weight - (q * weight).sum(-1, keepdim=True) / q.sum(-1, keepdim=True))
    assert torch.allclose(grad, want, atol=1e-9)
    moved = (s[0] - s[1]).nan_to_num(0.0)
    assert torch.allclose((moved * grad).sum(-1), ((pairs[0] - pairs[1]) * weight).sum(-1), atol=1e-12)
    finite = new(4, 6), new(4, 6, seed=1)
    secants(lambda s: torch.logsumexp(s, -1), finite)
    secants(lambda s: torch.logaddexp(s, 0.3 * s.flip(-1) - 1), finite)
    secants(lambda s: s.log_softmax(-1), finite)
    secants(lambda s: F.softmax(s, dim=0, dtype=torch.float64), finite)


@pytest.mark.parametrize("centred", [False, True])
def test_a_norm_is_a_product_with_its_scale(centred):
    x = new(5, 8), new(5, 8, seed=1)
    eps = 1e-3

    def norm(x):
        c = x - x.mean(-1, keepdim=True) if centred else x
        return c / (c.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    (grad,), weight = secants(norm, x)
    c = [y - y.mean(-1, keepdim=True) if centred else y for y in x]
    s = [(y.pow(2).mean(-1, keepdim=True) + eps).sqrt() for y in c]
    of_c = weight * (1 / s[0] + 1 / s[1]) / 2
    of_scale = (weight * (c[0] + c[1]) / 2).sum(-1, keepdim=True) / (s[0] * s[1] * (s[0] + s[1]))
    of_c = of_c - of_scale * (c[0] + c[1]) / 8
    assert torch.allclose(grad, of_c - of_c.mean(-1, keepdim=True) if centred else of_c, atol=1e-12)


def test_a_plain_mlp_is_deeplift(recwarn):
    """captum's DeepLift (rescale) on linear maps and activations of one number."""
    captum = pytest.importorskip("captum.attr")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.Sigmoid(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2)
    ).double()
    x, reference = new(3, 6), new(3, 6, seed=1)
    want = captum.DeepLift(net).attribute(x, reference, target=1)
    live = x.clone().requires_grad_()
    (M,) = torch.autograd.grad(net(Contrast.of(live, (reference,), RULES))[:, 1].sum(), live)
    assert torch.allclose((x - reference) * M, want, atol=1e-10)


def test_what_is_written_in_place_and_taken_apart_is_followed():
    def function(x):
        y = x.clone()
        y[:, 0] = y[:, 1] * x[:, 2]
        y.mul_(2).add_(1)
        y[:, 3:].sigmoid_()
        first, rest = y.split([2, 4], dim=1)
        out = torch.cat([first.T.contiguous().T, rest.flip(1)], 1).masked_fill(torch.arange(6) == 4, 0.5)
        return out.index_add(0, torch.tensor([0, 0, 1]), out.exp()).unflatten(1, (2, 3)).movedim(2, 1)

    secants(function, (new(3, 6, scale=0.5), new(3, 6, seed=1, scale=0.5)))


def test_a_choice_is_that_of_the_input():
    now, then = new(4, 6), new(4, 6, seed=1)
    found = Contrast.of(now, (then,), RULES).topk(2, dim=-1)
    assert torch.equal(found.indices, now.topk(2, dim=-1).indices)
    assert torch.equal(found.values.plain[0], then.gather(-1, found.indices))


def test_several_steps_sum_to_the_whole():
    runs = [new(5, seed=i) for i in range(4)]
    live = [x.clone().requires_grad_() for x in runs[1:]]
    out = F.silu(Contrast.of(live[-1], (runs[0], *live[:-1]), RULES)) ** 2
    grads = torch.autograd.grad(list(out.runs[1:]), live, [torch.ones(5).double()] * 3)
    found = sum((b - a) * g for a, b, g in zip(runs[:-1], runs[1:], grads, strict=True))
    assert torch.allclose(found, F.silu(runs[-1]) ** 2 - F.silu(runs[0]) ** 2, atol=1e-12)
    assert torch.allclose(sum(difference(out)), F.silu(runs[-1]) ** 2 - F.silu(runs[0]) ** 2)


def test_what_has_no_rule_is_refused_by_name():
    x = Contrast.of(new(3, 3), (new(3, 3, seed=1),), RULES)
    with pytest.raises(gl.InputError, match=r"no rule for 'cummax'.*give the rules a line"):
        torch.cummax(x, 0)
    with pytest.raises(gl.InputError, match="writes into a tensor that is no part of the contrast"):
        torch.zeros(3, 3, dtype=torch.float64).copy_(x)
    with pytest.raises(gl.InputError, match=r"dropout differs between them: model.eval\(\)"):
        F.dropout(x, 0.5, training=True)
    own = Contrast.of(x.plain[1], x.plain[:1], {**RULES, "cummax": RULES["cumsum"]})
    assert isinstance(torch.cummax(own, 0), tuple)
