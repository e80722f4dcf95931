"""The secant of recurrences: against the rule word for word, a position at a time, and against the difference of two runs."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from gatedlens.recurrence import Terms, chunked
from gatedlens.recurrence.channels import ChannelTerms, vectors
from gatedlens.recurrence.literal import literal_scan
from gatedlens.recurrence.prior_matrix import prior_chunked
from gatedlens.recurrence.scanning import linear_scan, readout, scan
from gatedlens.secant import RULES, Contrast, scans

BATCH, LENGTH, HEADS, VALUE, KEY = 2, 21, 4, 3, 5


def mean(pair):
    return (pair[0] + pair[1]) / 2


def literal_secant(decay, write, erase, probe, read, start, dscan, dlast, prior=False):
    """What each tensor gets of a rule that is written down: forward both runs, backward the means. Every one is a pair of
    runs."""
    states = [[s] for s in start]
    for run in range(2):
        for t in range(write[run].shape[1]):
            state = states[run][-1]
            found = (state * probe[run][:, t].unsqueeze(-2)).sum(-1, keepdim=True)
            states[run].append(decay[run][:, t] * state - found * erase[run][:, t].unsqueeze(-2) + write[run][:, t])
    S = [torch.stack(some, 1) for some in states]  # one longer, the start in front
    length = write[0].shape[1]
    grads = {
        name: torch.zeros_like(pair[0])
        for name, pair in {"decay": decay, "write": write, "erase": erase, "probe": probe, "read": read}.items()
    }
    worth = dlast.clone()
    for t in reversed(range(length)):
        before, after = mean([s[:, t] for s in S]), mean([s[:, t + 1] for s in S])
        q, p, e, a = (mean(pair)[:, t] for pair in (read, probe, erase, decay))
        found = mean([(s[:, t] * x[:, t].unsqueeze(-2)).sum(-1) for s, x in zip(S, probe, strict=True)])
        grads["read"][:, t] = ((before if prior else after) * dscan[:, t].unsqueeze(-1)).sum(-2)
        here = dscan[:, t].unsqueeze(-1) * q.unsqueeze(-2)
        worth = worth if prior else worth + here
        grads["write"][:, t] = worth
        grads["decay"][:, t] = (worth * before).sum_to_size(decay[0][:, t].shape)
        grads["erase"][:, t] = -(worth * found.unsqueeze(-1)).sum(-2)
        of_found = -(worth * e.unsqueeze(-2)).sum(-1)
        grads["probe"][:, t] = (before * of_found.unsqueeze(-1)).sum(-2)
        worth = worth * a + of_found.unsqueeze(-1) * p.unsqueeze(-2) + (here if prior else 0)
    return grads, worth


def drawn(seed, by_key, delta, share, amount, close=None):
    """Terms and content of a run, or of one near `close`."""
    g = torch.Generator().manual_seed(seed)

    def new(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    groups = HEADS // share
    log = -new(BATCH, LENGTH, HEADS, KEY if by_key else 1).abs()
    terms = {"log_decay": log, "key": new(BATCH, LENGTH, groups, KEY), "read": new(BATCH, LENGTH, groups, KEY)}
    if amount:
        terms["amount"] = new(BATCH, LENGTH, HEADS)
    if delta:
        terms |= {name: 0.4 * new(BATCH, LENGTH, HEADS, KEY) for name in ("erase", "probe")}
    return {**terms, "u": new(BATCH, LENGTH, HEADS, VALUE), "initial": new(BATCH, HEADS, VALUE, KEY)}


def contrasts(now, then):
    live = {name: x.clone().requires_grad_() for name, x in now.items()}
    return live, {name: Contrast.of(x, (then[name],), RULES) for name, x in live.items()}


def run(of, fields, function):
    terms = Terms(**{name: x for name, x in fields.items() if name not in ("u", "initial")})
    return (
        function(terms, fields["u"], fields["initial"])
        if of is None
        else of(function(terms, fields["u"], fields["initial"]))
    )


CASES = [*product((False, True), (False, True), (1, 2), (False, True))]


@pytest.mark.parametrize(("by_key", "delta", "share", "amount"), CASES)
@pytest.mark.parametrize("size", [4, 7, 64])
def test_heads_by_chunks_are_the_rule_word_for_word(by_key, delta, share, amount, size, monkeypatch):
    """By the operations of `literal_scan`, each with its rule, and by chunks."""
    monkeypatch.setattr("gatedlens.secant.scans.chunk_size", lambda terms: size)
    now, then = drawn(1, by_key, delta, share, amount), drawn(2, by_key, delta, share, amount)
    same = slice(3, 6)  # where both runs hold the same
    for name in ("log_decay", "key", "read", "u"):
        then[name][:, same] = now[name][:, same]
    weight = torch.randn(BATCH, LENGTH, HEADS, VALUE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    last = torch.randn(BATCH, HEADS, VALUE, KEY, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    found = []
    for function in (literal_scan, chunked):
        live, given = contrasts(now, then)
        out, end = run(None, given, function)
        plain = [run(None, fields, function) for fields in (then, now)]
        assert torch.allclose(out.plain[0], plain[0][0], atol=1e-12) and torch.allclose(
            out.plain[1], plain[1][0], atol=1e-12
        )
        moved = sum(((b - a) * w).sum() for a, b, w in zip(*plain, (weight, last), strict=True))
        grads = torch.autograd.grad([out, end], list(live.values()), [weight, last])
        total = sum(((now[name] - then[name]) * g).sum() for name, g in zip(live, grads, strict=True))
        assert abs(float(total - moved)) < 1e-10 * max(1, abs(float(moved)))
        found.append(dict(zip(live, grads, strict=True)))
    for name in now:
        assert torch.allclose(found[0][name], found[1][name], atol=1e-10), name


@pytest.mark.parametrize("prior", [False, True])
def test_the_literal_rule_is_what_the_operations_give(prior):
    """`literal_secant`, a loop with the rule written out, and torch's operations with a rule each."""
    now, then = drawn(1, True, True, 1, False), drawn(2, True, True, 1, False)
    live, given = contrasts(now, then)
    weight = torch.randn(BATCH, LENGTH, HEADS, VALUE, dtype=torch.float64)
    last = torch.randn(BATCH, HEADS, VALUE, KEY, dtype=torch.float64)
    out, end = run(None, given, prior_chunked if prior else chunked)
    grads = dict(zip(live, torch.autograd.grad([out, end], list(live.values()), [weight, last]), strict=True))
    pairs = {name: (now[name], then[name]) for name in now}
    decay = tuple(x.exp().unsqueeze(-2) for x in pairs["log_decay"])
    write = tuple(u.unsqueeze(-1) * k.unsqueeze(-2) for u, k in zip(pairs["u"], pairs["key"], strict=True))
    want, start = literal_secant(
        decay, write, pairs["erase"], pairs["probe"], pairs["read"], pairs["initial"], weight, last, prior
    )
    slope = (decay[0] - decay[1]) / (now["log_decay"] - then["log_decay"]).unsqueeze(-2)
    assert torch.allclose(grads["log_decay"], (want["decay"] * slope).squeeze(-2), atol=1e-10)
    assert torch.allclose(grads["u"], (want["write"] * mean(pairs["key"]).unsqueeze(-2)).sum(-1), atol=1e-10)
    assert torch.allclose(grads["key"], (want["write"] * mean(pairs["u"]).unsqueeze(-1)).sum(-2), atol=1e-10)
    for name in ("erase", "probe", "read"):
        assert torch.allclose(grads[name], want[name], atol=1e-10), name
    assert torch.allclose(grads["initial"], start, atol=1e-10)


def test_where_a_document_begins_nothing_of_the_state_before_passes():
    now, then = (drawn(seed, False, True, 1, True) for seed in (1, 2))
    fresh = torch.zeros(BATCH, LENGTH, 1, dtype=torch.float64)
    fresh[:, [0, 9]] = 1
    live, given = contrasts(now, then)
    terms = Terms(**{name: x for name, x in given.items() if name not in ("u", "initial")}, fresh=fresh)
    out, _ = chunked(terms, given["u"], given["initial"])
    (grad,) = torch.autograd.grad(out[:, 12].sum(), live["u"])
    assert not grad[:, :9].any() and grad[:, 9:13].any()


@pytest.mark.parametrize("vectors", [False, True])
def test_channels_are_the_rule_word_for_word(vectors, monkeypatch):
    """Blocks of a few positions against every state at once."""
    g = torch.Generator().manual_seed(0)

    def new(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def fields():
        some = {"log_decay": new(BATCH, LENGTH, 6).abs(), "amount": new(BATCH, LENGTH, 6), "u": new(BATCH, LENGTH, 6)}
        return some | ({name: new(BATCH, LENGTH, KEY) for name in ("key", "read")} if vectors else {})

    rate = -new(6, KEY).abs() if vectors else None
    now, then = fields(), fields()
    if not vectors:
        now["log_decay"], then["log_decay"] = -now["log_decay"], -then["log_decay"]
    then["u"][:, 4], then["log_decay"][:, 5] = now["u"][:, 4], now["log_decay"][:, 5]
    start = [new(BATCH, 6, KEY) if vectors else new(BATCH, 6) for _ in range(2)]
    weight = new(BATCH, LENGTH, 6)

    def value(given, initial, block):
        monkeypatch.setattr("gatedlens.secant.scans.BLOCK", block)
        terms = ChannelTerms(**{name: x for name, x in given.items() if name != "u"}, rate=rate)
        return scan(*terms.steps(given["u"]), initial)[0]

    found = []
    for block in (1, 1 << 18):
        live, given = contrasts(now, then)
        initial = start[0].clone().requires_grad_()
        out = value(given, Contrast.of(initial, (start[1],), RULES), block)
        moved = ((value(now, start[0], block) - value(then, start[1], block)) * weight).sum()
        grads = torch.autograd.grad(out, [*live.values(), initial], weight)
        pairs = [*((now[name], then[name]) for name in live), start]
        total = sum(((a - b) * g).sum() for (a, b), g in zip(pairs, grads, strict=True))
        assert abs(float(total - moved)) < 1e-11
        found.append(grads)
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(*found, strict=True))
    # The rule in words, on states that stand whole.
    decay = [
        torch.exp(x["log_decay"].unsqueeze(-1) * rate if vectors else x["log_decay"].unsqueeze(-1)) for x in (now, then)
    ]
    value_ = [x["amount"] * x["u"] for x in (now, then)]
    one = torch.ones(BATCH, LENGTH, 1, dtype=torch.float64)
    key, read = ([x[name] if vectors else one for x in (now, then)] for name in ("key", "read"))
    write = [v.unsqueeze(-1) * k.unsqueeze(-2) for v, k in zip(value_, key, strict=True)]
    states = [linear_scan(a, w, s if vectors else s.unsqueeze(-1)) for a, w, s in zip(decay, write, start, strict=True)]
    ahead = torch.cat([mean(decay)[:, 1:], torch.ones_like(decay[0][:, :1])], 1)
    worth = linear_scan(ahead.flip(1), (weight.unsqueeze(-1) * mean(read).unsqueeze(-2)).flip(1)).flip(1)
    of_value = (worth * mean(key).unsqueeze(-2)).sum(-1)
    grads = dict(zip(now, found[0], strict=False))
    assert torch.allclose(grads["u"], of_value * mean([x["amount"] for x in (now, then)]), atol=1e-11)
    assert torch.allclose(grads["amount"], of_value * mean([x["u"] for x in (now, then)]), atol=1e-11)
    if vectors:
        assert torch.allclose(grads["read"], (mean(states) * weight.unsqueeze(-1)).sum(-2), atol=1e-11)
        assert torch.allclose(grads["key"], (worth * mean(value_).unsqueeze(-1)).sum(-2), atol=1e-11)
    before = mean(
        [
            torch.cat([(s if vectors else s.unsqueeze(-1)).unsqueeze(1), x[:, :-1]], 1)
            for s, x in zip(start, states, strict=True)
        ]
    )
    gap = (now["log_decay"] - then["log_decay"]).unsqueeze(-1)
    slope = torch.where(
        gap == 0, decay[0] * (rate if vectors else 1), (decay[0] - decay[1]) / torch.where(gap == 0, 1.0, gap)
    )
    assert torch.allclose(grads["log_decay"], (worth * before * slope).sum(-1), atol=1e-10)


@pytest.mark.parametrize("near", [0.0, 1e-9, 1e-5, 1.0], ids="apart by {}".format)
@pytest.mark.parametrize("moving", ["log value key read", "log", "value read"])
def test_by_hand_a_block_of_channels_is_what_the_rules_of_operations_make_it(moving, near):
    """With a document that begins in it, and a worth of the last state."""
    g = torch.Generator().manual_seed(7)

    def new(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    names, channels, states = ["log", "value", "key", "read"], 3, 5
    rate = -new(channels, states).abs()
    now = [new(BATCH, LENGTH, channels).abs(), new(BATCH, LENGTH, channels), new(BATCH, LENGTH, states)]
    now = [*now, new(BATCH, LENGTH, states), (torch.arange(LENGTH) == 4).double().expand(BATCH, -1).unsqueeze(-1)]
    before = [
        x * (1 + near * new(*x.shape).abs()) if name in moving else None for name, x in zip(names, now, strict=False)
    ]
    before.append(None)
    starts = tuple(new(BATCH, channels, states) for _ in range(2))
    worths = new(BATCH, LENGTH, channels), new(BATCH, channels, states)

    def body(given, state):
        decay, write, read = vectors(*given, rate)
        every = linear_scan(decay, write, state)
        return readout(every, read), every[:, -1]

    want = scans.by_rules(body, RULES)(now, before, starts, *worths)
    of_start, found = scans.by_hand(rate)(now, before, starts, *worths)
    assert torch.allclose(of_start, want[0], rtol=1e-12, atol=1e-13)
    for name, one, other in zip(names, found, want[1], strict=False):
        if name in moving.split():
            assert torch.allclose(one, other, rtol=1e-9, atol=1e-10), name
