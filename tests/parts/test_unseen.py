"""Attention whose scores nobody sees: the numbers of the one that holds them, its gradients too, and nothing of their size."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens.parts import attention
from gatedlens.parts.unseen import attend
from tests.helpers import padded, relative
from tests.hooks.hybrids import HYBRIDS, hybrid

B, L, CARRIED, H, D = 2, 5, 3, 2, 4


def drawn(carried=0, v=3):
    generator = torch.Generator().manual_seed(0)
    sizes = ((L, D), (L + carried, D), (L + carried, v))
    return [
        torch.randn(B, length, H, width, generator=generator, dtype=torch.float64, requires_grad=True)
        for length, width in sizes
    ]


def literal(q, keys, values, seen, scale):
    if seen is None:
        seen = torch.ones(L, L, dtype=torch.bool).tril()
    scores = (torch.einsum("bqhd,bkhd->bhqk", q, keys) * scale).masked_fill(~seen, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)


def some(carried):
    """Who sees whom, by row; each query sees its own key."""
    generator = torch.Generator().manual_seed(1)
    own = torch.cat([torch.zeros(L, carried, dtype=torch.bool), torch.eye(L, dtype=torch.bool)], dim=1)
    return (torch.rand(B, 1, L, L + carried, generator=generator) > 0.5) | own


CASES = {"all before": (0, None), "a mask": (0, some(0)), "a mask, carried keys": (CARRIED, some(CARRIED))}


@pytest.mark.parametrize("v", [3, 4, 6], ids="values of {} to keys of 4".format)
@pytest.mark.parametrize("carried, seen", CASES.values(), ids=CASES)
def test_values_and_gradients_are_the_literal_ones(carried, seen, v):
    given = drawn(carried, v)
    got, want = attend(*given, seen, 0.3), literal(*given, seen, 0.3)
    weights = torch.randn_like(want)
    first = [torch.autograd.grad((out * weights).sum(), given, create_graph=True) for out in (got, want)]
    once = torch.autograd.grad((attend(*given, seen, 0.3) * weights).sum(), given)
    second = [torch.autograd.grad(sum(g.square().sum() for g in grads), given) for grads in first]
    for x, y in zip((got, *first[0], *once, *second[0]), (want, *first[1], *first[1], *second[1]), strict=True):
        assert torch.allclose(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("carried, seen", CASES.values(), ids=CASES)
def test_torchs_own_checks(carried, seen):
    def run(*given):
        return attend(*given, seen, 0.3)

    assert torch.autograd.gradcheck(run, drawn(carried), check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, drawn(carried), fast_mode=True)


@pytest.fixture
def always(monkeypatch):
    """Scores of any size are not made; how often that was so."""
    seen = []
    monkeypatch.setattr(attention, "MANY", 0)
    monkeypatch.setattr(attention, "attend", lambda *given: (seen.append(1), attend(*given))[1])
    return seen


@torch.no_grad()
@pytest.mark.parametrize("name", list(HYBRIDS))
def test_a_model_that_nobody_listens_to_has_the_logits_of_one_that_all_listen_to(name, always):
    model = hybrid(name)
    tokens = torch.randint(0, model.cfg.d_vocab, (2, 11), generator=torch.Generator().manual_seed(0))
    rows, mask = padded([tokens[0], tokens[1, :6]], "left")
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6], [0, 1, 0, 1, 2, 3, 4, 5, 0, 1, 2]])
    for given, options in ((tokens, {}), (rows, {"attention_mask": mask}), (tokens, {"position_ids": packed})):
        heard, _ = model.run_with_cache(given, names_filter=lambda name: "hook_pattern" in name, **options)
        assert not always
        plain = model(given, **options)
        real = options.get("attention_mask", torch.ones_like(given)).bool()
        assert always and relative(plain[real], heard[real]) < 1e-12
        always.clear()
    _, state = model(tokens[:, :4], return_state=True)
    assert relative(model(tokens[:, 4:], state=state), model(tokens)[:, 4:]) < 1e-12


@pytest.mark.parametrize("name", ["Griffin", "Kimi Linear", "Qwen3-Next"])
def test_gradients_through_a_model_are_the_same(name, always, monkeypatch):
    model = hybrid(name)
    resid = torch.randn(2, 9, model.cfg.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def gradient():
        x = resid.clone().requires_grad_()
        return torch.autograd.grad(model(x, start_at_layer=0).square().sum(), x)[0]

    unseen = gradient()
    assert always
    monkeypatch.setattr(attention, "MANY", 1 << 60)
    assert relative(unseen, gradient()) < 1e-12


@torch.no_grad()
def test_a_text_whose_scores_no_memory_holds_is_read_all_the_same(monkeypatch):
    """Whoever asks for the pattern gets the error; a plain run needs none."""
    model = hybrid("Qwen3-Next")
    tokens = torch.zeros(1, 32, dtype=torch.long)
    monkeypatch.setattr(attention, "MANY", 0)
    monkeypatch.setattr(attention, "SMALL", 0)
    monkeypatch.setattr(attention, "free", lambda device: 1)
    assert model(tokens).isfinite().all()
    with pytest.raises(gl.TooLargeError, match="Run the text in parts"):
        model.run_with_cache(tokens, names_filter=lambda name: "hook_pattern" in name)


@torch.no_grad()
@pytest.mark.parametrize("v", [8, 16])
def test_no_scores_are_held_on_a_processor(v):
    """Nor where keys are wider than values, as in latent attention."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor))
            return out

    q, keys, values = torch.randn(1, 64, 2, 16), torch.randn(1, 64, 2, 16), torch.randn(1, 64, 2, v)
    with Watch():
        attend(q, keys, values, None, 0.25)
    assert max(sizes) < 2 * 64 * 64
