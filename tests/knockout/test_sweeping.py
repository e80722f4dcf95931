"""Knockout: exactly the matrix with those entries zeroed, in every layer of every architecture; what composes; mistakes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import gatedlens as gl
from gatedlens import ablation, knockout
from gatedlens.hooks import architectures
from gatedlens.hooks.rwkv import rates
from gatedlens.model.batch import Batch
from tests.helpers import earlier, example, kept, padded

LENGTH = 9
CASES = ["plain", "state", "left", "right"]
EDGES = [(1, 5), (1, 6), (2, 5), (2, 6)]  # (source, target), counted among a row's real positions
SRC, DST = [1, 2], [5, 6]


def given(model, case: str):
    """(input, options) of a run of the kind `case`."""
    tokens, options = example(model, 2, LENGTH), {}
    if not isinstance(model, gl.HookedLanguageModel):
        if case != "plain":
            pytest.skip("images have neither states nor padding")
        return tokens, options
    if case == "state":
        _, options["state"] = model(example(model, 2, 4, 1), return_state=True)
    if case in ("left", "right"):
        tokens, options["attention_mask"] = padded([tokens[0], tokens[1, :8]], case)
    return tokens, options


def out_point(model, layer):
    mixer = model.blocks[layer].mixer
    return f"blocks.{layer}.{mixer.place}.{mixer.output_point}"


def run(model, intervention, input, options=None, names=None):
    with torch.no_grad(), intervention.on(model):
        return model.run_with_cache(input, names_filter=names, **(options or {}))[1]


def held_norms(model, layer, clean):
    """The scale of the norm inside a mixer (if it has one) as it was in a clean run: a cut holds it, an edit would move it."""
    name = f"blocks.{layer}.mixer.hook_scale"
    if name not in model.names.points:
        return ablation.Intervention(())
    return ablation.edit(name, lambda x, point: clean[name])


def o_of(cache, model, layer):
    """What a layer's token mixing put out: batch pos channel."""
    return cache[out_point(model, layer)].flatten(2)


def same(a, b):
    return torch.allclose(a, b, rtol=1e-10, atol=1e-10)


def close_on_real(a, b, cache):
    """Equal at the real positions: padding's outputs mean nothing."""
    real = slice(None) if cache.mask is None else cache.mask
    return same(a[real], b[real])


def places(mask, like):
    """Row by row, where in the input its real positions are."""
    return [
        list(range(like.shape[-1])) if mask is None else mask[i].nonzero().flatten().tolist() for i in range(len(like))
    ]


def by_matrix(cache, layer, edges, channels=slice(None)):
    """A' x + r with those entries of the dense matrix zeroed; edges as (source, target)."""
    A = gl.implicit_attention(cache, layer=layer)
    total = A.bias
    for branch in A.branches:  # each with its own x
        dense, turned = replace(A, branches=(branch,)).dense().clone(), branch.x.flip(1) if branch.reverse else branch.x
        for row, where in zip(dense, places(cache.mask, dense), strict=True):
            for src, dst in edges:
                row[channels, where[dst], where[src]] = 0
        total = total + torch.einsum("bcij,bjc->bic", dense, A.padding.spread(turned))
    return total


@pytest.fixture(params=CASES)
def kind(request):
    return request.param


# -- exactness ------------------------------------------------------------------------------------------------------


def test_cut_is_the_matrix_with_those_entries_zeroed(model, kind):
    input, options = given(model, kind)
    clean = run(model, ablation.Intervention(()), input, options)
    for layer in range(model.cfg.n_layers):
        cache = run(model, knockout.cut(SRC, DST, layers=layer), input, options)
        o = o_of(cache, model, layer)
        assert close_on_real(o, by_matrix(clean, layer, EDGES), clean)
        changed = (o - o_of(clean, model, layer)).abs().amax(2)
        for row, where in zip(changed, places(cache.mask, changed), strict=True):
            targets = [where[dst] for dst in DST]
            assert row[targets].min() > 1e-6
            untouched = [i for i in range(o.shape[1]) if i not in targets]
            assert row[untouched].max() == 0, "another target was changed"


def test_in_several_layers_each_sees_what_the_cuts_before_it_left(model):
    input, _ = given(model, "plain")
    cache = run(model, knockout.cut(SRC, DST), input)
    edited = run(model, knockout.cut(SRC, DST), input, names=lambda name: True)
    assert same(cache["hook_logits"], edited["hook_logits"])
    for layer in range(model.cfg.n_layers):  # the cached factors are those of the edited run
        assert same(o_of(cache, model, layer), by_matrix(cache, layer, EDGES))


def literal_scan(model, cache, layer, scan, src, dst):
    """prod(transition) write_src for src before dst, or at it, in the scan's order: the change of hook_state at dst.

    A transition is the decay, less what a delta rule erases. Of Mamba-3 what src brings is in two writes, its own and the next.
    """
    stem = f"blocks.{layer}.mixer.{scan}"
    step = 1 if src <= dst else -1
    left, later = cache[f"{stem}hook_write"][:, src].clone(), 0
    if model.cfg.architecture == "mamba3":
        u, gamma, beta = (cache[f"{stem}hook_{name}"] for name in ("u", "gamma", "beta"))
        wrote = u[:, src].unflatten(-1, left.shape[1:3]).unsqueeze(-1) * cache[f"{stem}hook_rot_B"][:, src].unsqueeze(
            -2
        )
        left, later = gamma[:, src, :, None, None] * wrote, beta[:, src + 1, :, None, None] * wrote
    for k in range(src + step, dst + step, step):
        left = kept(cache, stem, left + (later if k == src + 1 else 0), k)
    return left


def test_cut_scan_is_what_the_state_carries_from_write_to_readout(model):
    """Against an edit of hook_state itself, which changes one position's readout only."""
    input, _ = given(model, "plain")
    clean = run(model, ablation.Intervention(()), input, names=lambda name: True)
    rwkv = model.cfg.architecture == "rwkv"  # its readout is of the numerator
    before = model.cfg.architecture in ("rwkv", "rwkv6")  # the readout at i is of the state at i - 1
    for layer in range(model.cfg.n_layers):
        mixer = model.blocks[layer].mixer
        if f"blocks.{layer}.{mixer.place}.{mixer.scans[0] + '.' if mixer.scans[0] else ''}hook_state" not in clean:
            continue
        for scan in mixer.scans:
            stem = f"{scan}." if scan else ""
            src, dst = (5, 2) if scan == "bwd" else (2, 5)
            read_at = dst - 1 if before else dst
            lost = literal_scan(model, clean, layer, stem, src, read_at)
            if rwkv:
                lost[..., 1] = 0

            def lose(state, point, read_at=read_at, lost=lost):
                state = state.clone()
                state[:, read_at] -= lost
                return state

            edit = ablation.edit(f"blocks.{layer}.mixer.{stem}hook_state", lose)
            want = run(model, edit + held_norms(model, layer, clean), input)
            cut = knockout.cut_scan(src, dst, layers=layer, scan=scan or None)
            got = run(model, cut, input)
            assert same(o_of(got, model, layer), o_of(want, model, layer))
            assert same(got["hook_logits"], want["hook_logits"])
            assert not same(o_of(got, model, layer), o_of(clean, model, layer))


def test_a_readout_of_its_own_write_alone_loses_the_scan(model):
    """Every source cut from every target through the scan is what no_scan leaves: the skip (RWKV: nothing)."""
    input, _ = given(model, "plain")
    everything = slice(None)
    for layer in range(model.cfg.n_layers):
        if model.blocks[layer].mixer.place != "mixer":
            continue
        clean = run(model, ablation.Intervention(()), input)
        got = run(model, knockout.cut_scan(everything, everything, layers=layer), input)
        want = run(model, ablation.no_scan(str(layer)) + held_norms(model, layer, clean), input)
        assert same(o_of(got, model, layer), o_of(want, model, layer))


def test_cut_renormalised_in_attention_is_scores_of_minus_infinity():
    model = architectures()["griffin"].tiny(dtype=torch.float64)
    for case in CASES:
        input, options = given(model, case)
        layer = model.cfg.layer_types.index("attention")

        mask = options.get("attention_mask")

        def block(scores, point, mask=mask):
            scores, carried = scores.clone(), scores.shape[-1] - scores.shape[-2]
            for row, where in zip(scores, places(mask, scores[..., carried:]), strict=True):
                for src, dst in EDGES:
                    row[:, where[dst], carried + where[src]] = -torch.inf
            return scores

        want = run(model, ablation.edit(f"blocks.{layer}.attn.hook_attn_scores", block), input, options)
        got = run(model, knockout.cut_renormalised(SRC, DST, layers=layer), input, options)
        assert close_on_real(o_of(got, model, layer), o_of(want, model, layer), got)
        one = run(model, knockout.cut_renormalised(SRC, DST, layers=layer, head=1), input, options)
        z, clean = f"blocks.{layer}.attn.hook_z", run(model, ablation.Intervention(()), input, options)
        real = slice(None) if got.mask is None else got.mask
        assert same(one[z][real][:, 1], want[z][real][:, 1]) and torch.equal(one[z][:, :, 0], clean[z][:, :, 0])


@pytest.mark.parametrize("case", ["plain", "state"])
def test_cut_renormalised_in_rwkv_takes_numerator_and_denominator(case):
    """Against the sums of the paper's eq. 16 over the sources that are left, with the carried state in both."""
    model = architectures()["rwkv"].tiny(dtype=torch.float64)
    input, options = given(model, case)
    layer = 1
    clean = run(model, ablation.Intervention(()), input, options)
    k, v, gate = (clean[name, layer] for name in ("k", "x", "gate"))
    w, u = rates(model.blocks[layer].mixer.weights)
    N0 = D0 = torch.zeros_like(k[:, 0])
    if options:
        N0, D0 = model.blocks[layer].mixer.state_of(options["state"]).unbind(-1)
    want = clean[out_point(model, layer)].clone()
    for i in DST:
        num, den = N0 * torch.exp(w * i), D0 * torch.exp(w * i)
        for j in range(i + 1):
            if (j, i) not in EDGES:
                weight = torch.exp(k[:, j] + (u if j == i else w * (i - j - 1)))
                num, den = num + weight * v[:, j], den + weight
        want[:, i] = gate[:, i] * num / den
    got = run(model, knockout.cut_renormalised(SRC, DST, layers=layer), input, options)
    assert same(o_of(got, model, layer), want)


# -- which rows, channels, edges ------------------------------------------------------------------------------------


def test_sources_and_targets_by_row(model):
    input, _ = given(model, "plain")
    clean = run(model, ablation.Intervention(()), input)
    cut = knockout.cut(torch.tensor([1, 3]), torch.tensor([[4, 6], [4, 5]]), layers=0)
    got = o_of(run(model, cut, input), model, 0)
    for row, edges in enumerate([[(1, 4), (1, 6)], [(3, 4), (3, 5)]]):
        assert same(got[row], by_matrix(clean, 0, edges)[row])


def test_channels_by_index_and_only_they(model):
    input, _ = given(model, "plain")
    clean = run(model, ablation.Intervention(()), input)
    some = [0, 3, -1]
    got = o_of(run(model, knockout.cut(SRC, DST, layers=0, channel=some), input), model, 0)
    assert same(got, by_matrix(clean, 0, EDGES, some))
    others = [c for c in range(got.shape[2]) if c not in (0, 3, got.shape[2] - 1)]
    assert torch.equal(got[..., others], o_of(clean, model, 0)[..., others])


def test_pairs_cut_only_these_edges(model):
    input, _ = given(model, "plain")
    clean = run(model, ablation.Intervention(()), input)
    edges = [(1, 3), (2, 4), (1, 4), (5, 5)]
    assert same(o_of(run(model, knockout.pairs(edges, layers=0), input), model, 0), by_matrix(clean, 0, edges))
    some = [0, 2]
    scan = knockout.pairs([(1, 3), (2, 3)], knockout.cut_scan, layers=0, channel=some)
    assert same(
        o_of(run(model, scan, input), model, 0),
        o_of(run(model, knockout.cut_scan([1, 2], 3, layers=0, channel=some), input), model, 0),
    )


def test_cuts_act_together_and_as_sets(model):
    input, _ = given(model, "plain")
    clean = run(model, ablation.Intervention(()), input)
    want = by_matrix(clean, 0, [(1, 4), (2, 4), (1, 5)])
    together = knockout.cut([1, 2], 4, layers=0) + knockout.cut(1, [4, 5], layers=0)
    assert same(o_of(run(model, together, input), model, 0), want)
    with knockout.cut(1, [4, 5], layers=0).on(model):
        assert same(o_of(run(model, knockout.cut([1, 2], 4, layers=0), input), model, 0), want)
    half = knockout.cut(1, 4, layers=0, channel=slice(0, 8)) + knockout.cut(2, 4, layers=0, channel=slice(4, None))
    dense = by_matrix(clean, 0, [(1, 4)], slice(0, 8)) + by_matrix(clean, 0, [(2, 4)], slice(4, None))
    assert same(o_of(run(model, half, input), model, 0), dense - o_of(clean, model, 0))


def test_directions_of_vision_mamba():
    model = architectures()["vim"].tiny(dtype=torch.float64)
    input, _ = given(model, "plain")
    clean = run(model, ablation.Intervention(()), input)
    whole = o_of(clean, model, 0)

    def delta(scan, src=2, dst=5):
        return o_of(run(model, knockout.cut(src, dst, layers=0, scan=scan), input), model, 0) - whole

    assert same(delta(None), delta("fwd")) and delta("fwd").abs().max() > 1e-6
    assert same(delta(None, 5, 2), delta("bwd", 5, 2)) and delta("bwd", 5, 2).abs().max() > 1e-6
    assert same(delta(None, 4, 4), delta("fwd", 4, 4) + delta("bwd", 4, 4))
    with pytest.raises(gl.InputError, match="There is nothing to cut"):
        delta("fwd", 5, 2)
    with pytest.raises(gl.InputError, match="There is nothing to cut"):
        delta("bwd", 2, 5)
    with pytest.raises(gl.InputError, match="scan='up': layer 0 has the scans fwd, bwd"):
        delta("up")


# -- with the rest of the package -----------------------------------------------------------------------------------


def test_with_ablations_upstream_the_matrix_is_that_of_the_edited_run(model):
    input, _ = given(model, "plain")
    edit = ablation.open_gate() + ablation.scale("blocks.0.hook_mixer_in", 1.5)
    want = by_matrix(run(model, edit, input), 0, EDGES)
    for both in (edit + knockout.cut(SRC, DST, layers=0), knockout.cut(SRC, DST, layers=0) + edit):
        assert same(o_of(run(model, both, input), model, 0), want)


def test_an_edit_inside_the_recurrence_is_refused_and_one_behind_the_cut_stands(model):
    input, _ = given(model, "plain")
    with pytest.raises(gl.InputError, match="so its output is not A x \\+ r"):
        run(model, ablation.no_scan("0") + knockout.cut(SRC, DST, layers=0), input)
    assert not model.list_hooks() and model.running is None
    point = out_point(model, 0)
    both = knockout.cut(SRC, DST, layers=0) + ablation.zero(point, pos=3)
    clean = run(model, ablation.Intervention(()), input)
    want = by_matrix(clean, 0, EDGES)
    want[:, 3] = 0
    assert same(o_of(run(model, both, input), model, 0), want)


def test_different_kinds_do_not_meet_at_one_target(model):
    input, _ = given(model, "plain")
    apart = knockout.cut(1, 4, layers=0) + knockout.cut_scan(1, 5, layers=0)
    parts = [
        o_of(run(model, one, input), model, 0)
        for one in (knockout.cut(1, 4, layers=0), knockout.cut_scan(1, 5, layers=0))
    ]
    whole = o_of(run(model, ablation.Intervention(()), input), model, 0)
    assert same(o_of(run(model, apart, input), model, 0), parts[0] + parts[1] - whole)
    with pytest.raises(gl.InputError, match=r"different kinds \(token and write\) meet"):
        run(model, knockout.cut(1, 4, layers=0) + knockout.cut_scan(2, 4, layers=0), input)


def test_gradients_flow_through_what_is_left(model):
    torch.manual_seed(0)
    input, _ = given(model, "plain")
    with torch.no_grad():
        resid = model(input, stop_at_layer=0)
    step = torch.randn_like(resid)

    def loss(resid):
        return model(resid, start_at_layer=0).sin().sum()

    for cut in (knockout.cut(SRC, DST), knockout.cut_scan(SRC, DST, layers=0)):
        with cut.on(model):
            live = resid.clone().requires_grad_()
            (grad,) = torch.autograd.grad(loss(live), live)
            with torch.no_grad():
                ahead, behind = loss(resid + 1e-6 * step), loss(resid - 1e-6 * step)
        assert abs((grad * step).sum() - (ahead - behind) / 2e-6) < 1e-5 * (grad * step).abs().sum()


def test_as_hooks_with_start_at_layer_and_while_generating(lm):
    tokens = example(lm, 2, LENGTH)
    cut = knockout.cut(SRC, DST, layers=1)
    with torch.no_grad():
        want = run(lm, cut, tokens)["hook_logits"]
        assert same(lm.run_with_hooks(tokens, fwd_hooks=cut.hooks(lm)), want)
        resid = lm(tokens, stop_at_layer=1)
        beside = earlier(lm, tokens)
        assert same(lm.run_with_hooks(resid, start_at_layer=1, fwd_hooks=cut.hooks(lm), **beside), want)
        with pytest.raises(gl.PointError, match="never ran"):
            lm.run_with_hooks(tokens, stop_at_layer=1, return_type=None, fwd_hooks=cut.hooks(lm))
        with knockout.cut(0, 0, layers=1).on(lm):  # each step is a call of its own
            assert lm.generate(tokens, max_new_tokens=2, temperature=0, return_type="tokens").shape[1] == LENGTH + 2


def test_a_cut_in_half_precision_to_rounding(lm):
    half = copy.deepcopy(lm).to(torch.bfloat16)
    tokens = example(lm, 2, LENGTH)
    want, got = (run(m, knockout.cut(SRC, DST, layers=0), tokens) for m in (lm, half))
    assert got[out_point(lm, 0)].dtype == torch.bfloat16
    error = (o_of(got, half, 0).double() - o_of(want, lm, 0)).abs().max() / o_of(want, lm, 0).abs().max()
    assert error < 0.05


# -- mistakes -------------------------------------------------------------------------------------------------------


def test_a_block_called_by_itself_is_refused(lm):
    resid = lm(example(lm), stop_at_layer=0).detach()
    with knockout.cut(1, 4, layers=0).on(lm), pytest.raises(gl.InputError, match="call the model, not a block"):
        run_of = lm.begin(Batch(resid, is_resid=True), None, False)
        lm.blocks[0](resid, run_of)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: knockout.cut(99, 1), gl.InputError, "src=99 is out of range"),
        (lambda: knockout.cut(1, 99), gl.InputError, "dst=99 is out of range"),
        (lambda: knockout.cut(torch.tensor([1, 2, 3]), 5), gl.InputError, "has 3 rows; the batch has 2"),
        (lambda: knockout.cut(1, 4, layers=7), gl.InputError, "layers=7 does not exist"),
        (lambda: knockout.cut(1, 4, layers="x"), gl.InputError, "layers=.x. names no layer"),
        (lambda: knockout.cut(1, 4, layers=[]), gl.InputError, "names no layer"),
        (lambda: knockout.cut(1, 4, layers=0, state=0), gl.PointError, "has no axis 'state'; its axes are: batch pos channel"),
        (lambda: knockout.cut(1, 4, layers=0, channel=999), gl.InputError, "channel=999 is out of range"),
        (lambda: knockout.cut(1, 4, pos=3), gl.InputError, "said by src and dst"),
    ],
)  # fmt: skip
def test_mistakes_in_cuts_are_explained_and_leave_nothing_behind(model, make, error, message):
    with pytest.raises(error, match=message), make().on(model):
        model(example(model, 2, LENGTH))
    assert not model.list_hooks() and model.running is None


def test_what_cannot_be_seen_or_is_padding_is_said(lm):
    tokens, mask = padded([torch.arange(1, 10), torch.arange(1, 7)], "left")
    for src, dst, message in [
        (5, 3, "src=5 has no edge in row 0: it stands after the target 3"),
        ([1, 6], [4, 5], "src=6 is out of range: row 1 has 6 positions"),
        ([4, 5], [1, 5], "dst=1 has no edge in row 0: it stands before the sources 4, 5"),
        (1, 8, "dst=8 is out of range: row 1 has 6 positions"),
        (
            torch.tensor([[True] + [False] * 8, [True] + [False] * 8]),
            -1,
            "src: the mask marks nothing but padding in row 1",
        ),
    ]:
        with pytest.raises(gl.InputError, match=message), knockout.cut(src, dst, layers=0).on(lm):
            lm(tokens, attention_mask=mask)
    with knockout.cut([[1], [4]], -1, layers=0).on(lm):
        lm(tokens, attention_mask=mask)
    with pytest.raises(gl.InputError, match="has one scan: leave `scan` out"):
        knockout.cut(1, 4, scan="fwd").hooks(lm)
    if lm.cfg.architecture in ("rwkv", "griffin"):
        layer = -1
        with (
            pytest.raises(gl.InputError, match="nothing is left"),
            knockout.cut_renormalised(0, 0, layers=layer).on(lm),
        ):
            lm(tokens[:1])
    else:
        with pytest.raises(gl.InputError, match="no softmax"), knockout.cut_renormalised(1, 4, layers=0).on(lm):
            lm(tokens[:1])


# -- sweeps ---------------------------------------------------------------------------------------------------------


def logit_sum(logits):
    return logits.flatten(1)[:, ::7].sum(1)


def test_a_sweep_is_its_cells_one_by_one(model):
    input, _ = given(model, "plain")
    src = {"a": 1, "both": [2, 3], "by row": torch.tensor([1, 4])}
    with torch.no_grad():
        clean = logit_sum(model(input)).mean()
    for window, rows in ((1, 2), (2, 64)):
        result = knockout.sweep(model, input, logit_sum, dst=5, src=src, window=window, max_rows=rows, progress=False)
        assert result.axes == ("layer", "src") and result["src"] == list(src)
        assert result["layer"] == list(range(model.cfg.n_layers))
        for layer in range(model.cfg.n_layers):
            layers = range(max(0, layer - window // 2), layer + (window + 1) // 2)
            for name, places in src.items():
                with torch.no_grad(), knockout.cut(places, 5, layers=layers).on(model):
                    want = (logit_sum(model(input)).mean() - clean) / clean.abs()
                assert abs(result.at(layer=layer, src=name).values - want) < 1e-9


@torch.no_grad()
def test_a_sweep_under_hooks_of_the_users_own(model):
    input, _ = given(model, "plain")
    for own in (gl.ablation.resample("blocks.0.hook_mixer_in"), gl.ablation.zero("blocks.1.hook_mixer_in", pos=5)):
        with own.on(model):
            found = knockout.sweep(model, input, logit_sum, dst=5, src=[1, 3], progress=False)
            clean = logit_sum(model(input)).mean()
            for layer in range(model.cfg.n_layers):
                with knockout.cut(3, 5, layers=layer).on(model):
                    want = (logit_sum(model(input)).mean() - clean) / clean.abs()
                assert abs(found[layer, 1] - want) < 1e-9


def test_a_sweep_over_positions_under_padding(lm):
    metric = gl.metrics.log_probability(3)
    for side in ("left", "right"):
        tokens, options = given(lm, side)
        result = knockout.sweep(
            lm, tokens, metric, dst=-1, layers=[0], how=knockout.cut_scan, progress=False, **options
        )
        assert result.shape == (1, LENGTH) and result.values.isfinite().all() and result.facts["dst"] == [[8], [7]]
        rows = [tokens[i, mask].unsqueeze(0) for i, mask in enumerate(options["attention_mask"])]
        with torch.no_grad():
            clean = torch.stack([metric(lm(row))[0] for row in rows]).mean()
            alone = []
            for row in rows:
                with knockout.cut_scan(2, -1, layers=0).on(lm):
                    alone.append(metric(lm(row))[0])
        assert abs(result[0, 2] - (torch.stack(alone).mean() - clean) / clean.abs()) < 1e-9


@torch.no_grad()
def test_a_sweep_over_one_prompt_is_labelled_by_its_tokens(recall_model):
    batch = gl.tasks.recall(1, seed=2)
    metric = gl.metrics.probability(batch.answers)
    result = knockout.sweep(recall_model, batch.tokens, metric, dst=-1, progress=False)
    assert result["src"] == recall_model.to_str_tokens(batch.tokens)
    best = result.top(1)[0]
    assert best["layer"] == 1 and best["src"] == int(batch.answer_pos) and best["value"] < -0.5
    lists = knockout.sweep(recall_model, batch.tokens, metric, dst=-1, src=[3, [4, 5]], progress=False)
    assert lists["src"] == [3, "[4, 5]"] and torch.equal(lists[:, 0], result[:, 3])


def test_mistakes_in_sweeps(lm):
    tokens = example(lm, 2, LENGTH)
    for options, message in [
        ({"window": 0}, "window=0: give 1 to"),
        ({"window": 99}, "window=99: give 1 to"),
        ({"src": {}}, "src is empty: give positions"),
        ({"src": {"x": 99}}, "src 'x'=99 is out of range"),
    ]:
        with pytest.raises(gl.InputError, match=message):
            knockout.sweep(lm, tokens, logit_sum, dst=-1, progress=False, **options)
    with pytest.raises(gl.InputError, match="without a cut: a change cannot be put in relation"):
        knockout.sweep(lm, tokens, lambda logits: 0 * logit_sum(logits), dst=-1, progress=False)
    assert not lm.list_hooks()


# -- what is known --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba", "griffin", "rwkv"])
def test_on_recall_only_the_edges_from_the_answer_matter(name):
    """Mamba reads it in one layer, at the end; in the others it is handed on, so all later targets must lose it. Griffin
    knows half of it without these edges: its conv has told the gates of the next positions."""
    model = gl.from_pretrained(f"gatedlens/{name}-recall", device="cpu")
    batch = gl.tasks.recall(64, seed=1)
    other = torch.where(batch.pair_pos[:, 0] == batch.answer_pos, batch.pair_pos[:, 1], batch.pair_pos[:, 0])
    places = torch.arange(batch.tokens.shape[1])

    def accuracy(src):
        later = places > src.unsqueeze(1)
        cut = knockout.cut(src, -1, layers=1) if name == "mamba" else knockout.cut(src, later)
        with cut.on(model):
            return (model(batch.tokens)[:, -1].argmax(-1) == batch.answers).float().mean().item()

    assert accuracy(other) > 0.95
    assert accuracy(batch.answer_pos) < (0.6 if name == "griffin" else 0.25)  # one of eight values by chance


def test_packed_documents(lm):
    if not lm.has_positions:
        pytest.skip("knows no documents")
    tokens, packed = example(lm, 1), {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])}
    metric = gl.metrics.log_probability(3)
    found = knockout.sweep(lm, tokens, metric, dst=-1, src=[1, 4], progress=False, **packed)
    with torch.no_grad():
        clean = float(metric(lm(tokens, **packed)).mean())
        for layer in range(lm.cfg.n_layers):
            for column, src in enumerate((1, 4)):
                with knockout.cut(src, -1, layers=layer).on(lm):
                    got = float(metric(lm(tokens, **packed)).mean())
                want = (got - clean) / abs(clean)
                assert float(found.values[layer, column]) == pytest.approx(want, abs=1e-10)
    assert not bool(found.at(src=1).values.any()), "a cut in another document changed something"
