"""Heads with matrix states: the chunked form against the literal recurrence, every way to differentiate it, its extremes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.autograd.functional import jacobian
from torch.utils.checkpoint import checkpoint

from gatedlens.errors import InputError
from gatedlens.recurrence import chunks
from gatedlens.recurrence.chunks import chunk_size, chunked
from gatedlens.recurrence.head_matrix import HeadScan
from gatedlens.recurrence.literal import literal_matrix, literal_scan
from gatedlens.recurrence.terms import Terms

KINDS = ("head", "key", "head, delta", "key, delta", "head, delta, own erase", "key, delta, own erase")
B, L, H, K, V, G = 2, 21, 4, 6, 5, 2


def draw(kind, length=L, dtype=torch.float64, groups=G, fresh=False, batch=B, steep=1.0):
    """(terms, content, state before): decays by head or by key; a delta rule erases with its key, or with a vector of its own."""
    generator = torch.Generator().manual_seed(len(kind))

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    log = -steep * torch.exp(1.5 * random(batch, length, H, K if "key" in kind else 1))
    groups = H if "delta" in kind else groups
    key, read, erase, probe = random(batch, length, groups, K), random(batch, length, groups, K), None, None
    if "delta" in kind:
        key = key / key.norm(dim=-1, keepdim=True)
        probe = log.exp() * key
        key = torch.sigmoid(random(batch, length, H, 1)) * key
        erase = 0.3 * random(batch, length, H, K) if "own" in kind else key
    amount = 0.5 + torch.rand(batch, length, H, generator=generator, dtype=torch.float64)
    begins = None
    if fresh:
        begins = torch.zeros(batch, length, 1, dtype=torch.float64)
        begins[0, 10], begins[-1, 3], begins[-1, 4] = 1, 1, 1
    u, state = random(batch, length, H, V), random(batch, H, V, K)
    terms = Terms(log, key, read, amount, erase, probe, fresh=begins)
    same = erase is key
    terms = Terms(*(None if x is None else x.to(dtype) for x in terms))
    return (terms._replace(erase=terms.key) if same else terms), u.to(dtype), state.to(dtype)


def leaves_of(terms, u, state):
    """(tensors to differentiate by, a function that puts them back together)."""
    same = terms.erase is terms.key
    names = [
        name for name in ("log_decay", "key", "read", "amount", "erase", "probe") if getattr(terms, name) is not None
    ]
    names = [name for name in names if not (same and name == "erase")]
    leaves = [x.detach().clone().requires_grad_() for x in (*(getattr(terms, name) for name in names), u, state)]

    def rebuilt(*leaves):
        new = terms._replace(**dict(zip(names, leaves[:-2], strict=True)))
        return (new._replace(erase=new.key) if same else new), leaves[-2], leaves[-1]

    return leaves, rebuilt


def weighed(out, last):
    generator = torch.Generator().manual_seed(1)
    weights = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (out, last))
    return sum((x * w).sum() for x, w in zip((out, last), weights, strict=True))


def close(got, want, tolerance=1e-10):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("at_once", [1, 3, 100], ids=lambda n: f"{n} at once")
@pytest.mark.parametrize("fresh", [False, True], ids=["one document", "several documents"])
@pytest.mark.parametrize("chunk", [1, 5, 16, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_literal_recurrence(kind, chunk, fresh, at_once):
    leaves, rebuilt = leaves_of(*draw(kind, fresh=fresh))
    want, got = literal_scan(*rebuilt(*leaves)), chunked(*rebuilt(*leaves), chunk=chunk, at_once=at_once)
    with torch.no_grad():
        free = chunked(*rebuilt(*leaves), chunk=chunk, at_once=at_once)
    for a, b in zip((*got, *free), (*want, *want), strict=True):
        close(a, b)
    for a, b in zip(
        torch.autograd.grad(weighed(*got), leaves), torch.autograd.grad(weighed(*want), leaves), strict=True
    ):
        close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_splits_anywhere_give_the_whole(kind):
    terms, u, state = draw(kind)
    want, last = chunked(terms, u, state, chunk=8)
    for cut in (1, 7, 8, 13, L - 1):

        def part(some, given=terms):
            cut_terms = given._replace(
                **{n: getattr(given, n)[:, some] for n in ("log_decay", "key", "read", "amount")}
            )
            if given.probe is not None:
                cut_terms = cut_terms._replace(
                    probe=given.probe[:, some],
                    erase=cut_terms.key if given.erase is given.key else given.erase[:, some],
                )
            return cut_terms

        first, middle = chunked(part(slice(0, cut)), u[:, :cut], state, chunk=8)
        second, end = chunked(part(slice(cut, None)), u[:, cut:], middle, chunk=8)
        close(torch.cat([first, second], 1), want)
        close(end, last)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind):
    leaves, rebuilt = leaves_of(*draw(kind, length=7))

    def norm_of_gradients(run):
        grads = torch.autograd.grad(weighed(*run(*rebuilt(*leaves))), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in grads), leaves)

    want = norm_of_gradients(literal_scan)
    for a, b in zip(norm_of_gradients(lambda *given: chunked(*given, chunk=4)), want, strict=True):
        close(a, b)


@pytest.mark.parametrize("kind", ("head", "key, delta", "head, delta, own erase"))
def test_second_derivatives_where_terms_depend_on_one_another(kind):
    terms, u, state = draw(kind, length=6)
    x = u.detach().clone().requires_grad_()

    def found(run):
        read = terms.read * x.mean((2, 3), keepdim=True)
        out = run(terms._replace(read=read, amount=x.square().mean(-1)), x, state)
        (grad,) = torch.autograd.grad(weighed(*out), x, create_graph=True)
        return torch.autograd.grad(grad.pow(2).sum(), x)[0]

    close(found(lambda *given: chunked(*given, chunk=4)), found(literal_scan))


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_and_vmap(kind):
    leaves, rebuilt = leaves_of(*draw(kind, length=7))
    leaves = [x.detach() for x in leaves]
    generator = torch.Generator().manual_seed(2)
    tangents = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in leaves]

    def run(*given, by=lambda *a: chunked(*a, chunk=4)):
        return by(*rebuilt(*given))[0]

    want = torch.func.jvp(lambda *g: run(*g, by=literal_scan), tuple(leaves), tuple(tangents))[1]
    close(torch.func.jvp(run, tuple(leaves), tuple(tangents))[1], want)
    batched = torch.func.vmap(lambda u: run(*leaves[:-2], u, leaves[-1]))(torch.stack([leaves[-2], 2 * leaves[-2]]))
    close(batched[1], run(*leaves[:-2], 2 * leaves[-2], leaves[-1]))

    def loss(*given):
        return run(*given).square().sum()

    whole = torch.func.grad(loss, argnums=tuple(range(len(leaves))))(*leaves)
    live = [x.clone().requires_grad_() for x in leaves]
    for a, b in zip(whole, torch.autograd.grad(loss(*live), live), strict=True):
        close(a, b)
    scales = torch.func.vmap(torch.func.grad(lambda s: loss(*leaves[:-2], s * leaves[-2], leaves[-1])))(
        torch.tensor([1.0, 2.0], dtype=torch.float64)
    )
    one = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    close(scales[1], torch.autograd.grad(loss(*leaves[:-2], one * leaves[-2], leaves[-1]), one)[0])


@pytest.mark.parametrize("kind", ("head", "key, delta"))
def test_autograds_own_vmap_and_checkpointing(kind):
    leaves, rebuilt = leaves_of(*draw(kind, length=6))

    def run(u):
        return chunked(*rebuilt(*leaves[:-2], u, leaves[-1]), chunk=4)[0].sum((0, 2, 3))

    u = leaves[-2]
    close(jacobian(run, u, vectorize=True), jacobian(run, u))
    close(
        torch.autograd.grad(checkpoint(run, u, use_reentrant=False).square().sum(), u)[0],
        torch.autograd.grad(run(u).square().sum(), u)[0],
    )


@pytest.mark.parametrize("kind", ("head", "key", "head, delta", "key, delta, own erase"))
def test_the_gradient_of_a_tiny_decay_is_right_relatively(kind):
    # Decays below e^-10: what crosses them is tiny beside the rest, and a difference of sums would lose it altogether.
    terms, u, state = draw(kind, length=40, groups=H)
    log = terms.log_decay.clone()
    log[:, ::3] = log[:, ::3] * 0 - 14 - torch.arange(K if "key" in kind else 1) * 0.5
    terms = terms._replace(log_decay=log)
    if terms.probe is not None:
        terms = terms._replace(probe=terms.probe.detach())
    found = []
    for dtype, run in ((torch.float64, literal_scan), (torch.float32, chunked)):
        cast = Terms(*(None if x is None else x.to(dtype) for x in terms))
        if terms.erase is terms.key:
            cast = cast._replace(erase=cast.key)
        live = cast.log_decay.clone().requires_grad_()
        loss = weighed(*run(cast._replace(log_decay=live), u.to(dtype), state.to(dtype)))
        found.append(torch.autograd.grad(loss, live)[0].double()[:, ::3])
    want, got = found
    assert ((got - want).abs() / want.abs()).median() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_decays_of_zero_and_float32(kind):
    terms, u, state = draw(kind)
    log = terms.log_decay.clone()
    log[:, 5], log[:, 11] = -torch.inf, -3000.0
    terms = terms._replace(log_decay=log)
    leaves, rebuilt = leaves_of(terms, u, state)
    out = chunked(*rebuilt(*leaves), chunk=16)
    close(out[0], literal_scan(terms, u, state)[0])
    assert all(g.isfinite().all() for g in torch.autograd.grad(weighed(*out), leaves))
    narrow, v, start = draw(kind, dtype=torch.float32)
    close(chunked(narrow, v, start)[0].double(), literal_scan(*draw(kind))[0], 2e-6)


def test_torch_compile_sees_one_operator_of_any_length():
    # In a process of its own: the checks of shapes that run in tests are no code that torch.compile can read.
    done = subprocess.run(
        [sys.executable, "-m", "tests.recurrence.compiled"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["head", "key", "delta"]


def test_backward_keeps_the_state_of_each_chunk_and_no_more():
    terms, u, state = draw("head", length=64)
    leaves, rebuilt = leaves_of(terms, u, state)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        chunked(*rebuilt(*leaves), chunk=16)
    # [pos, head, value, key] would be 15 times what the chunk starts are.
    assert 64 // 16 * state.numel() in kept
    assert max(kept) == u.numel()


def test_heads_that_cannot_share_groups_are_named():
    terms, u, state = draw("key", groups=1)
    with pytest.raises(InputError, match="4 heads cannot share the keys of 3 groups"):
        chunked(terms._replace(key=terms.key.expand(-1, -1, 3, -1)), u, state)


def test_delta_rules_with_wide_keys_take_shorter_chunks():
    terms, _, _ = draw("key, delta")
    assert chunk_size(terms) == chunks.CHUNK
    wide = terms._replace(key=terms.key.repeat(1, 1, 1, 20))
    assert chunk_size(wide) == chunks.WIDE_CHUNK


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [(H, G), (G, H), (1, G)], ids=str)
def test_key_and_read_may_be_shared_by_different_groups(kind, groups):
    """As in Qwen3-Next, whose keys are each head's own after the write strength, and whose queries are shared."""
    terms, u, state = draw(kind, length=20, groups=H)
    key, read = (x[:, :, :number] for x, number in zip((terms.key, terms.read), groups, strict=True))
    wide = [x.repeat_interleave(H // x.shape[2], dim=2) for x in (key, read)]
    shared, apart = terms._replace(key=key, read=read), terms._replace(key=wide[0], read=wide[1])
    if terms.erase is terms.key:
        shared, apart = shared._replace(erase=wide[0]), apart._replace(erase=wide[0])
    for at_once in (1, 3):
        for got, want in zip(
            chunked(shared, u, state, chunk=4, at_once=at_once), literal_scan(apart, u, state), strict=True
        ):
            close(got, want, 1e-12)
    close(HeadScan.of(shared, 1).by_head(list(range(H))), literal_matrix(apart), 1e-12)
