"""Mixers and scans that a third party may write: every view of the matrix is the operator's, relevance follows what a mixer
declares whatever its points are called, and what cannot be told is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import gatedlens as gl
from gatedlens.address.names import Point
from gatedlens.attention.layer import ImplicitAttention
from gatedlens.hooks import mamba
from gatedlens.model.block import Block, Sub, SubRows, residual_rows
from gatedlens.model.hookpoint import Part
from gatedlens.model.norm import Norm, norm_rows
from gatedlens.model.padding import Padding
from gatedlens.recurrence.decay_matrix import DecayScan
from gatedlens.recurrence.factors import Factors
from gatedlens.recurrence.matrix import ScanMatrix
from gatedlens.recurrence.operator import branch_of
from gatedlens.recurrence.pattern_matrix import PatternScan
from gatedlens.recurrence.scanning import scan
from gatedlens.recurrence.wkv_matrix import WkvScan
from tests.helpers import example, relative

BATCH, LENGTH, CHANNELS = 2, 7, 5
DOCUMENT = torch.tensor([[0, 0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 1]])


# -- scans ----------------------------------------------------------------------------------------------------------


class Plain(ScanMatrix):
    """A scan of which only what must be is written: a [channel, pos, pos] of numbers, the same in every row of the batch."""

    def __init__(self, S):
        self.S = S

    @property
    def length(self):
        return self.S.shape[-1]

    def select(self, channels):
        return Plain(self.S[channels])

    def apply(self, u, start=None):
        return torch.einsum("cij,bjc->bic", self.S, u)

    def apply_transposed(self, g):
        return torch.einsum("cij,bic->bjc", self.S, g)

    def seen(self, i):
        return self.S[:, i].permute(1, 2, 0)

    def dense(self):
        return self.S.expand(BATCH, *self.S.shape).clone()


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scan_of(kind, document):
    pattern = random(BATCH, 2, LENGTH, LENGTH).tril()
    if document is not None:
        pattern = pattern * (document.unsqueeze(2) == document.unsqueeze(1)).unsqueeze(1)
    if kind == "pattern":
        return PatternScan(pattern, pattern[..., :0], torch.tensor([0, 1, 1, 0, 1]))
    if kind == "decay":
        time, rate = random(BATCH, LENGTH, CHANNELS, seed=1).cumsum(1), -random(CHANNELS, 3, seed=2)
        read, key = random(BATCH, LENGTH, 3, seed=3) - 0.5, random(BATCH, LENGTH, 3, seed=4) - 0.5
        return DecayScan(time, rate, read, random(BATCH, LENGTH, CHANNELS, seed=5), key, document)
    if kind == "wkv":
        k, w, u = random(BATCH, LENGTH, CHANNELS), -random(CHANNELS, seed=1), random(CHANNELS, seed=2)
        return WkvScan(k, w, u, random(BATCH, CHANNELS, seed=3), random(BATCH, CHANNELS, seed=4))
    return Plain(random(CHANNELS, LENGTH, LENGTH, seed=6).tril())


def factors_of(kind, width, ahead=False, document=None, **changes):
    x, o = random(BATCH, LENGTH, CHANNELS, seed=7) - 0.5, torch.zeros(BATCH, LENGTH, CHANNELS, dtype=torch.float64)
    gate, act = random(BATCH, LENGTH, CHANNELS, seed=8) - 0.5, random(BATCH, LENGTH, CHANNELS, seed=9)
    skip, taps = random(CHANNELS, seed=10), random(CHANNELS, width, seed=11) - 0.5
    given = Factors(x, o, scan_of(kind, document), gate, skip, act, taps, None, ahead, document)
    given = replace(given, **changes)
    return replace(given, o=branch_of(given).output())


def attention_of(factors):
    return ImplicitAttention((factors,), Padding(), None, 0)


def literal(A):
    """[b, c, i, j] column by column, by `@`."""
    columns = []
    for j in range(LENGTH):
        basis = torch.zeros(A.shape, dtype=torch.float64)
        basis[:, j] = 1
        columns.append(A @ basis)
    return torch.stack(columns, -1).transpose(1, 2)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4, 9])
@pytest.mark.parametrize("kind", ["pattern", "decay", "wkv", "plain"])
def test_every_view_is_the_operator_whatever_the_scan_and_its_conv(kind, width, ahead):
    A = attention_of(factors_of(kind, width, ahead))
    wanted, weights = literal(A), random(CHANNELS, seed=12) - 0.5
    assert relative(A.dense(), wanted) < 1e-12
    assert relative(A.dense(channels=[3, 1]), wanted[:, [3, 1]]) < 1e-12
    assert relative(A.weighted(weights), torch.einsum("c,bcij->bij", weights, wanted)) < 1e-12
    assert relative(A.mean(), wanted.mean(1)) < 1e-12 and relative(A.abs_mean(), wanted.abs().mean(1)) < 1e-12
    assert relative(A.grouped([[0, 2], [4]])[:, 0], wanted[:, [0, 2]].mean(1)) < 1e-12
    assert relative(A.row(3), wanted[:, :, 3]) < 1e-12 and relative(A.column(2), wanted[..., 2]) < 1e-12
    g = random(*A.shape, seed=13)
    assert relative(A.T @ g, torch.einsum("bcij,bic->bjc", wanted, g)) < 1e-12
    assert A.check().relative < 1e-12 and A.check().absolute < 1e-12


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("kind", ["pattern", "decay"])
def test_documents_stay_apart_in_every_view(kind, ahead):
    A = attention_of(factors_of(kind, 3, ahead, DOCUMENT))
    wanted = literal(A)
    apart = DOCUMENT.unsqueeze(2) != DOCUMENT.unsqueeze(1)
    assert (wanted * apart.unsqueeze(1)).abs().max() == 0
    assert relative(A.dense(), wanted) < 1e-12 and relative(A.mean(), wanted.mean(1)) < 1e-12
    assert relative(A.row(4), wanted[:, :, 4]) < 1e-12 and A.check().relative < 1e-12


@pytest.mark.parametrize("method", ["dense", "contracted", "seen", "apply_transposed", "select", "folded", "summed"])
def test_check_notices_a_view_that_is_not_the_operator(method):
    class Wrong(PatternScan):
        """Right, but for one method."""

    def wrong(self, *given):
        out = getattr(PatternScan, method)(self, *given)
        return PatternScan(out.pattern, out.before, out.head * 0) if method == "select" else out * 1.01

    right = factors_of("pattern", 2)
    assert attention_of(right).check().relative < 1e-12
    setattr(Wrong, method, wrong)
    scan = Wrong(right.scan.pattern, right.scan.before, right.scan.head)
    found = attention_of(replace(right, scan=scan)).check()
    assert found.relative > 1e-3 and found.absolute > 1e-5


def test_check_notices_nan():
    factors = factors_of("plain", 1)
    S = factors.scan.S.clone()
    S[0, 5, 2] = torch.nan
    assert not attention_of(replace(factors, scan=Plain(S))).check().relative < 1e9


def test_a_tap_that_one_branch_has_not_brings_nothing():
    """Two branches, one with a conv of three taps and one with none: the taps sum to the whole."""
    one, two = factors_of("plain", 3), factors_of("decay", 1)
    model = mamba.HookedMamba.tiny(dtype=torch.float64, d_model=5)
    A = ImplicitAttention((one, two), Padding(), model, 0)
    W = random(4, CHANNELS)
    model.blocks[0].mixer.output_weights = lambda: (W, None)
    F = A.contributions()
    assert F.n_taps == 3
    assert relative(sum(F.tap(k).row(-1) for k in range(3)), F.row(-1)) < 1e-12
    assert relative(F.along(W[:, 0] * 0 + 1), sum(F.tap(k).along(W[:, 0] * 0 + 1) for k in range(3))) < 1e-12


# -- mixers ---------------------------------------------------------------------------------------------------------

NAMES = {"x": "in", "conv": "short", "u": "act", "gate_pre": "z", "gate": "weight", "gated": "o", "y": "mixed"}


def renamed(rows, gate="SiLU(z)"):
    """Rows under other names; an equation speaks of the same tensors by these."""
    found = []
    for row in rows:
        word = row.leaf.removeprefix("hook_")
        if row.part == "mixer" and word in NAMES:
            row = replace(row, name=f"mixer.hook_{NAMES[word]}", equation=gate if word == "gate" else row.equation)
        found.append(row)
    return tuple(found)


class Mixer(mamba.MambaMixer):
    """Mamba's, with other names for its points."""

    output_point = "hook_o"
    attention_points = ("hook_in", "hook_short", "hook_dt", "hook_B", "hook_C", "hook_reset", "hook_weight", "hook_o")

    def factors(self, cached, padding, state):
        def by_own_name(name):
            return cached(f"hook_{NAMES.get(name.removeprefix('hook_'), name.removeprefix('hook_'))}")

        return super().factors(by_own_name, padding, state)


for word, name in NAMES.items():
    setattr(Mixer, f"hook_{word}", property(lambda self, name=name: getattr(self, f"hook_{name}")))


def model_of(wrapped, rows, mixer, block=None):
    """A model of blocks with these rows around mixers of this class."""

    class Model(mamba.HookedMamba):
        block_points, aliases, views = rows, (), ()

        def make_block(self, layer):
            w = self.wrapped.backbone.layers[layer]
            norm = Norm(w.norm, mamba.rows_of("ln1", rows), self.cfg.eps)
            own = mixer(w.mixer, mamba.rows_of("mixer", rows), layer)
            return Block(w, rows, Sub("mixer", own, norm)) if block is None else block(w, rows, norm, own)

    return Model(wrapped)


@pytest.fixture(scope="module")
def good():
    return mamba.HookedMamba.tiny(dtype=torch.float64)


@pytest.mark.parametrize("gates", ["content", "half", "none"])
def test_relevance_goes_by_what_a_mixer_declares(good, gates):
    other = model_of(good.wrapped, renamed(mamba.BLOCK_ROWS), Mixer)
    tokens = example(good)
    wanted, found = (gl.attribution.lrp(m, tokens, target=5, gates=gates) for m in (good, other))
    assert relative(found.scores, wanted.scores) < 1e-12 and wanted.scores.abs().max() > 1e-3
    assert gl.implicit_attention(other, tokens).check().relative < 1e-12


def test_a_gate_that_only_weighs_is_known_by_its_row(good):
    """The same mixer that calls its gate a sigmoid: the signal takes all, as with gates="none"."""
    tokens = example(good)
    told = model_of(good.wrapped, renamed(mamba.BLOCK_ROWS, "sigmoid(z)"), Mixer)
    found, wanted = gl.attribution.lrp(told, tokens, target=5), gl.attribution.lrp(good, tokens, target=5, gates="none")
    assert relative(found.scores, wanted.scores) < 1e-12


@pytest.mark.parametrize("equation", ["SiLU(z) * 2", "some gate", "gate_proj(ln1.out)", "SiLU(nothing)"])
def test_a_gate_that_cannot_be_told_is_refused(good, equation):
    tokens, model = example(good), model_of(good.wrapped, renamed(mamba.BLOCK_ROWS, equation), Mixer)
    with pytest.raises(gl.InputError, match="gates='content': what the gate of layer 0 is an activation of"):
        gl.attribution.lrp(model, tokens, target=5)
    wanted = gl.attribution.lrp(good, tokens, target=5, gates="none")
    assert relative(gl.attribution.lrp(model, tokens, target=5, gates="none").scores, wanted.scores) < 1e-12


def test_a_mixer_that_declares_nothing_is_refused(good):
    class Silent(mamba.MambaMixer):
        attention_points = ()

    with pytest.raises(gl.InputError, match="layer 0 of Mamba declares none: give Silent `attention_points`"):
        gl.attribution.lrp(model_of(good.wrapped, mamba.BLOCK_ROWS, Silent), example(good), target=5)


def test_a_mixer_whose_factors_are_not_its_forwards_is_refused(good):
    class Doubled(mamba.MambaMixer):
        def factors(self, cached, padding, state):
            factors = super().factors(cached, padding, state)
            return replace(factors, gate=2 * factors.gate)

    model = model_of(good.wrapped, mamba.BLOCK_ROWS, Doubled)
    with pytest.raises(gl.InputError, match="Layer 0: .* its output is not A x . r .* and relevance would not"):
        gl.attribution.lrp(model, example(good), target=5)
    assert gl.implicit_attention(model, example(good)).check().relative > 0.1


def test_relevance_under_an_edit_inside_the_recurrence_is_refused(model):
    with (
        gl.ablation.no_scan(0).on(model),
        pytest.raises(gl.InputError, match="Layer 0: .*relevance would not be exact"),
    ):
        gl.attribution.lrp(model, example(model), target=3)
    assert not model.list_hooks()


def test_a_channel_mixer_that_no_rule_knows_is_refused(good):
    mlp = tuple(Point(f"mlp.hook_{word}", "batch pos d_model", word, "here") for word in ("in_here", "out_there"))
    own = tuple(row for row in mamba.BLOCK_ROWS if row.part == "mixer")
    rows = residual_rows(
        SubRows("mixer", own, "out_proj(gated)", norm_rows("ln1", "mixer_in", "here")),
        SubRows("mlp", mlp, "out_there", norm_rows("ln2", "mlp_in", "here")),
    )

    class Mlp(Part):
        def forward(self, m, run):
            return self.hook_out_there(torch.tanh(self.hook_in_here(m)))

    def block(w, rows, norm, mixer):
        ln2 = Norm(w.norm, mamba.rows_of("ln2", rows), norm.eps)
        return Block(w, rows, Sub("mixer", mixer, norm), Sub("mlp", Mlp(w, mamba.rows_of("mlp", rows)), ln2, ln="ln2"))

    model = model_of(good.wrapped, rows, mamba.MambaMixer, block)
    with pytest.raises(gl.InputError, match="no rule knows the channel mixer of layer 0"):
        gl.attribution.lrp(model, example(good), target=5)


@torch.no_grad()
def test_channels_are_ranked_along_their_declared_axis(good):
    """Decays that a third party lays out otherwise: the same ranking, or the axes that there are."""
    tokens = example(good)
    wanted = gl.ablation.slowest(good, 1 / 3, tokens, progress=False)

    class Quiet(mamba.MambaMixer):
        """Fires a decay of other axes beside the recurrence, which nobody hears."""

        turn = staticmethod(lambda decay: decay)

        def recur(self, terms, sequences, constants, initial, padding, kernel=None):
            if self.hook_decay.heard():
                self.hook_decay(self.turn(terms(*sequences, *constants)[0]))
            out, last = scan(terms, sequences, constants, initial)
            return out, last

    def fired(axes, turn):
        own = type("Own", (Quiet,), {"turn": staticmethod(turn)})
        rows = tuple(replace(r, axes=axes) if r.leaf == "hook_decay" else r for r in mamba.BLOCK_ROWS)
        return model_of(good.wrapped, rows, own)

    turned = fired("batch pos state channel", lambda decay: decay.mT)
    heads = fired("batch pos head channel", lambda decay: decay.mT)
    for model in (turned, heads):
        assert gl.ablation.slowest(model, 1 / 3, tokens, progress=False) == wanted
    lone = fired("batch pos head", lambda decay: decay.mean(-1))
    for rank in (gl.ablation.slowest, gl.ablation.fastest):
        with pytest.raises(gl.PointError, match="hook_decay has no axis 'channel'; its axes are: batch pos head"):
            rank(lone, 1 / 3, tokens, progress=False)
