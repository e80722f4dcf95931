"""Attribution by implicit attention against the formulas, and the papers' code, written out with whole matrices."""

from __future__ import annotations

import warnings

import pytest
import torch

import gatedlens as gl
from gatedlens import attribution
from gatedlens.attribution import official_code
from gatedlens.hooks.mamba import HookedMamba
from gatedlens.hooks.vim import HookedViM
from gatedlens.recurrence.decay_matrix import DecayScan
from gatedlens.recurrence.folded_matrix import FoldedScan
from gatedlens.recurrence.head_matrix import HeadScan
from gatedlens.recurrence.micro_steps import StepScan
from gatedlens.recurrence.side_by_side import SideBySide
from tests.helpers import example, padded


def case(model):
    """(input, mask): rows of 7, 4 and 1 tokens; images, which have no padding."""
    if not isinstance(model, gl.HookedLanguageModel):
        return example(model), None
    return padded([example(model, 1, n, seed=n)[0] for n in (7, 4, 1)], "left")


def options(mask):
    return {} if mask is None else {"attention_mask": mask}


def places(model, input, mask):
    """The position that each row's prediction is read from."""
    if not isinstance(model, gl.HookedLanguageModel):
        return [model.grid.cls[0]] * len(input)
    real = torch.ones_like(input, dtype=torch.bool) if mask is None else mask
    return [int(row.nonzero().max()) for row in real]


def shaped(model, rows):
    """Rows of positions as the scores are: maps, for images."""
    stacked = torch.stack(rows)
    return stacked if model.grid is None else model.grid.fold(stacked)


def dense(model, input, mask, factors="unified"):
    """Each layer's matrices [batch, channel, dst, src]."""
    with torch.no_grad():
        stack = gl.implicit_attention(model, input, **options(mask))
        return [(A if factors == "all" else A.paper(factors)).dense() for A in stack]


def output_gradients(model, input, mask, target=3):
    """d logit[target] at the position that is read / d output of each mixer, by backward hooks."""
    found = {}

    def save(grad, hook):
        found[hook.layer()] = grad.clone()

    places_ = places(model, input, mask)
    with model.hooks(bwd_hooks=[("blocks.*.hook_mixer_out", save)]):
        logits = model(input, **options(mask))
        chosen = logits if logits.ndim == 2 else torch.stack([row[i] for row, i in zip(logits, places_, strict=True)])
        chosen[:, target].sum().backward()
    for p in model.wrapped.parameters():
        p.grad = None
    return [found[layer] for layer in range(model.cfg.n_layers)]


REDUCED = {
    ("mean", "signed"): lambda A: A.mean(1),
    ("mean", "abs"): lambda A: A.abs().mean(1),
    ("mean", "clamp"): lambda A: A.relu().mean(1),
    ("max", "signed"): lambda A: A.amax(1),
    ("min", "abs"): lambda A: A.abs().amin(1),
    ("product", "abs"): lambda A: A.abs().prod(1) ** (1 / A.shape[1]),
    ("product", "signed"): lambda A: A.prod(1).sign() * A.abs().prod(1) ** (1 / A.shape[1]),
}


@pytest.mark.parametrize("factors", ["unified", "hidden", "all"])
def test_raw_and_rollout_are_the_formulas(model, factors):
    input, mask = case(model)
    at, given = places(model, input, mask), dense(model, input, mask, factors)
    for (channels, sign), reduce in REDUCED.items() if factors == "unified" else list(REDUCED.items())[:1]:
        choice = {"factors": factors, "channels": channels, "sign": sign, **options(mask)}
        matrices = [reduce(A) for A in given]
        raw = [sum(A[b, i] for A in matrices) / len(matrices) for b, i in enumerate(at)]
        got = attribution.raw_attention(model, input, **choice)
        assert torch.allclose(got.scores, shaped(model, raw), atol=1e-12)
        product = torch.eye(given[0].shape[-1], dtype=torch.float64).expand(len(input), -1, -1)
        for A in matrices:
            product = (torch.eye(A.shape[-1], dtype=torch.float64) + A) @ product
        rows = [product[b, i] for b, i in enumerate(at)]
        if (channels, sign) == ("mean", "signed"):
            got = attribution.rollout(model, input, own=True, **choice)
            assert torch.allclose(got, shaped(model, rows), atol=1e-11)
        for b, i in enumerate(at):
            rows[b] = rows[b].clone()
            rows[b][i] = 0
        assert torch.allclose(attribution.rollout(model, input, **choice), shaped(model, rows), atol=1e-11)


@pytest.mark.parametrize("weighted", ["dst", "src"])
def test_gradient_attention_is_the_papers_formula(model, weighted):
    input, mask = case(model)
    gradients = output_gradients(model, input, mask)
    at, product = places(model, input, mask), None
    for A, g in zip(dense(model, input, mask), gradients, strict=True):
        g = g.mean(-1)
        g = g[:, :, None] if weighted == "dst" else g[:, None, :]
        step = torch.eye(A.shape[-1], dtype=torch.float64) + (g * A.mean(1)).relu()
        product = step if product is None else step @ product
    rows = [product[b, i].clone() for b, i in enumerate(at)]
    for b, i in enumerate(at):
        rows[b][i] = 0
    got = attribution.gradient_attention(model, input, 3, weighted=weighted, **options(mask))
    assert torch.allclose(got.scores, shaped(model, rows), atol=1e-12)
    assert bool(got.scores.any()) == (
        model.cfg.normalization_type != "LN"
    )  # under LayerNorms all weights are exactly 0


# -- the papers' code -----------------------------------------------------------------------------------------------


def class_row(model, layer, input, mask, b, i, factors):
    """[channel, src]: the row of position i as the papers' code assembles it from its directions, neither halved.

    unified: their sum. hidden: theirs stops before position i, and has no decay of its own step.
    """
    with torch.no_grad():
        A = gl.implicit_attention(model, input, layer=layer, **options(mask)).paper(factors)
    if factors == "unified":
        return A.dense()[b, :, i] / A.branches[0].scale
    row = torch.zeros(A.shape[2], A.shape[1], dtype=torch.float64)
    kept = torch.arange(A.shape[1]) if mask is None else mask[b].nonzero()[:, 0]
    for branch in A.branches:
        places = kept.flip(0) if branch.reverse else kept
        at = places.tolist().index(i)
        if branch.scan is not None:
            row[:, places[:at]] += undecayed_row(branch.scan, b, at)[:, :at]
    return row


def undecayed_row(scan, b, at):
    """[channel, src]: row `at` of a scan, the decay of step `at` left out; state by state."""
    if isinstance(scan, FoldedScan):  # which differs on the diagonal alone
        scan = scan.whole
    if isinstance(scan, HeadScan | StepScan):
        steps, step, scan = (scan.steps, scan.step, scan.long) if isinstance(scan, StepScan) else (1, 0, scan)
        terms, out = scan.terms, torch.zeros(scan.terms.heads, scan.length // steps, dtype=torch.float64)
        key, read, decay = terms.of_heads(terms.key)[b], terms.of_heads(terms.read)[b], terms.log_decays()[b].exp()
        for j in range(at):
            left = key[j * steps + step]
            for t in range(j * steps + step + 1, at * steps):
                erased = 0 if terms.erase is None else (terms.probes()[b, t] * left).sum(-1, True) * terms.erase[b, t]
                left = decay[t] * left - erased
            out[:, j] = (read[at * steps + steps - 1] * left).sum(-1) * (
                1 if terms.amount is None else terms.amount[b, j]
            )
        return out[scan.heads]
    if isinstance(scan, SideBySide):
        return torch.cat([undecayed_row(part, b, at) for part in scan.parts])[scan.order]
    if not isinstance(scan, DecayScan):
        return scan.dense()[b, :, at]  # RWKV's own step has no decay, an attention layer none at all
    out = torch.zeros(scan.channels, scan.length, dtype=torch.float64)
    for j in range(at):
        decay = torch.exp((scan.time[b, at - 1] - scan.time[b, j])[:, None] * scan.rate)
        out[:, j] = (decay * scan.read[b, at] * scan.key[b, j]).sum(-1) * scan.amount[b, j]
    return out


@torch.no_grad()
@pytest.mark.parametrize("bimamba_type", ["v1", "v2"])
def test_the_rows_of_the_papers_code_step_by_step(bimamba_type):
    """Vision Mamba from dt, A, B, C and nothing else: HA's row stops before the class token and never decays by its step;
    UIA's is the whole row of both directions, the conv included."""
    model = HookedViM.tiny(bimamba_type=bimamba_type, dtype=torch.float64)
    images = example(model)
    (cls,) = model.grid.cls
    _, cache = model.run_with_cache(images, names_filter=lambda name: True)
    stack = gl.implicit_attention(cache)
    read = model.reads_from(model.prepare(images)[0]).double()
    for layer, A in enumerate(stack):
        length = A.shape[1]
        hidden = torch.zeros(*A.shape, dtype=torch.float64)
        for name, factors in zip(("fwd", "bwd"), A.branches, strict=True):
            dt, B, C = (cache[f"blocks.{layer}.mixer.{name}.hook_{part}"] for part in ("dt", "B", "C"))
            order = list(range(length))[:: -1 if factors.reverse else 1]
            at = order.index(cls)
            for j in range(at):
                decay = torch.ones(*dt.shape[::2], factors.scan.rate.shape[1], dtype=torch.float64)
                for k in range(j + 1, at):
                    decay = decay * torch.exp(dt[:, order[k], :, None] * factors.scan.rate)
                step = dt[:, order[j], :, None] * B[:, order[j], None]
                hidden[:, order[j]] += (decay * step * C[:, cls, None]).sum(-1)
        got = official_code.official_rows(A.paper("hidden"), read, read > 0, official_code.HIDDEN)
        assert torch.allclose(got, hidden, atol=1e-13)
        unified = A.paper("unified").row(cls).mT / A.branches[0].scale
        got = official_code.official_rows(A.paper("unified"), read, read > 0, official_code.UNIFIED)
        assert torch.allclose(got, unified, atol=1e-13)


def test_a_scan_without_its_own_decay_is_the_scan_elsewhere(model):
    """Only the rows that are named change, and only if there is such a decay."""
    input, _ = case(model)
    with torch.no_grad():
        for A in gl.implicit_attention(model, input):
            for branch in (branch for branch in A.branches if branch.scan is not None):
                own = torch.zeros(A.shape[:2], dtype=torch.bool)
                own[:, -1] = True
                before, after = branch.scan.dense(), branch.scan.undecayed(own).dense()
                assert torch.allclose(before[:, :, :-1], after[:, :, :-1], atol=1e-14)
                assert isinstance(
                    branch.scan, DecayScan | FoldedScan | HeadScan | StepScan | SideBySide
                ) != torch.allclose(before, after, atol=1e-14)


def stretched(x):
    """To 0..1; a constant map, for which their code divides 0 by 0, becomes 0."""
    return (x - x.min()) / (x.max() - x.min()) if x.max() > x.min() else torch.zeros_like(x)


def theirs(rows, gradients, i, factors):
    """The rollout's row: rows [channel, src] and gradients [pos, d_model] (None: unweighted) of each layer, one sample."""
    joint = None
    for row, gradient in zip(rows, gradients, strict=True):
        if gradient is None:
            vector = row.mean(0)
        else:
            s = gradient.clamp(min=0).max(dim=1)[0]
            s = stretched(s)
            row = row.clamp(min=0)
            if factors == "hidden":
                row = stretched(row)
            vector = row.mean(0) * s
            if factors == "unified":
                vector = stretched(vector)
        augmented = torch.eye(len(vector), dtype=torch.float64) + vector[None, :]  # the row is added to every row
        augmented = augmented / augmented.sum(-1, keepdim=True)
        joint = augmented if joint is None else augmented @ joint
    out = joint[i].clamp(min=0)
    out[i] = 0
    return out


@pytest.mark.parametrize("factors", ["unified", "hidden"])
def test_official_is_what_the_papers_code_does(model, factors):
    """Row by row and without padding, with whole matrices."""
    input, mask = case(model)
    gradients, at, start = output_gradients(model, input, mask), places(model, input, mask), 0
    layers = range(start, model.cfg.n_layers)
    weighted, plain, raw = [], [], []
    for b, i in enumerate(at):
        real = torch.ones(gradients[0].shape[1], dtype=torch.bool) if mask is None else mask[b]
        here = i if mask is None else int(mask[b].sum()) - 1
        rows = [class_row(model, layer, input, mask, b, i, factors)[:, real] for layer in layers]
        gs = [gradients[layer][b, real] for layer in layers]
        full = torch.zeros(3, gradients[0].shape[1], dtype=torch.float64)
        if rows[0].shape[1] > 1:  # of a single token nothing but the own column is left, and that is dropped
            full[0, real] = theirs(rows, gs, here, factors)
            full[1, real] = theirs(rows, [None] * len(rows), here, factors)
            normal = [(row - row.min()) / (row.max() - row.min()) for row in rows]
            mean = torch.stack([row.mean(0) for row in normal]).mean(0).clamp(min=0)
            mean[here] = 0
            full[2, real] = mean
        for out, row in zip((weighted, plain, raw), full, strict=True):
            out.append(row)
    given = {"factors": factors, "mode": "official", "start_layer": start, **options(mask)}
    assert torch.allclose(attribution.gradient_attention(model, input, 3, **given), shaped(model, weighted), atol=1e-12)
    assert torch.allclose(attribution.rollout(model, input, **given), shaped(model, plain), atol=1e-12)
    assert torch.allclose(attribution.raw_attention(model, input, **given), shaped(model, raw), atol=1e-12)
    assert max(row.max() for row in weighted) > 0


def test_the_rollout_of_a_broadcast_row_has_a_closed_form():
    rows = torch.rand(5, 2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    joint = torch.eye(9, dtype=torch.float64).expand(2, -1, -1)
    for v in rows:
        step = torch.eye(9, dtype=torch.float64) + v.unsqueeze(1)
        joint = step / step.sum(-1, keepdim=True) @ joint
    q = official_code.broadcast_rollout(list(rows))
    left = 1 / (1 + rows.sum(-1)).prod(0)  # what I leaves on the diagonal
    for i in range(9):
        want = q + left.unsqueeze(1) * torch.eye(9, dtype=torch.float64)[i]
        assert torch.allclose(joint[:, i], want, atol=1e-14)


def test_constant_maps_and_padding_do_not_divide_by_zero():
    x = torch.tensor([[2.0, 2.0, 2.0], [1.0, 3.0, 9.0]])
    assert official_code.minmax(x, None).tolist()[0] == [0, 0, 0]
    real = torch.tensor([[True, True, True], [True, True, False]])
    assert official_code.minmax(x, real)[1].tolist() == [0, 1, 0]
    channels = official_code.minmax(x.unsqueeze(-1).expand(-1, -1, 4), real)
    assert channels.shape == (2, 3, 4) and torch.isfinite(channels).all()


def test_official_layers_begin_at_15_of_24():
    assert [official_code.start(n) for n in (24, 2, 3, 12)] == [15, 1, 1, 7]
    model = HookedViM.tiny(depth=5, dtype=torch.float64)
    found = attribution.gradient_attention(model, example(model), mode="official")
    assert found.layers == (3, 4)


# -- options --------------------------------------------------------------------------------------------------------


def test_layers_and_factors_are_what_was_asked_for(model):
    input, n = example(model), model.cfg.n_layers
    last = attribution.raw_attention(model, input, layers=[n - 1], factors=("scan", "gate"))
    assert last.layers == (n - 1,) and last.facts["factors"] == ["scan", "gate"]
    with torch.no_grad():
        A = gl.implicit_attention(model, input, layer=-1).only("scan", "gate").mean()
    want = [A[b, i] for b, i in enumerate(places(model, input, None))]
    assert torch.allclose(last.scores, shaped(model, want), atol=1e-13)
    for method in (attribution.raw_attention, attribution.rollout, attribution.gradient_attention):
        assert torch.equal(method(model, input, layers=slice(1, None)), method(model, input, start_layer=1))
        assert method(model, input).layers == tuple(range(n))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"factors": "unifed"}, "factors='unifed'.*Did you mean 'unified'"),
        ({"factors": "scan"}, r"One alone: \('scan',\)"),
        ({"factors": ("scan", "gat")}, "'gat' is no factor.*Did you mean 'gate'"),
        ({"factors": ()}, "'unified', 'hidden', 'all'"),
        ({"channels": "men"}, "channels='men'.*Did you mean 'mean'"),
        ({"sign": "absolute"}, "sign='absolute': it is 'signed', 'abs', 'clamp'"),
        ({"mode": "offical"}, "mode='offical'.*Did you mean 'official'"),
        ({"mode": "official", "sign": "abs"}, "sign='abs' would be ignored"),
        ({"mode": "official", "own": True, "channels": "max"}, "own=True and channels='max' would be ignored"),
        ({"layers": [0], "start_layer": 1}, "give one of them"),
        ({"start_layer": 9}, "start_layer=9: .* has layers 0 to"),
        ({"layers": [0, 17]}, "layers=17"),
        ({"layers": slice(9, None)}, "names no layer"),
    ],
)
def test_mistakes_in_options_are_explained(choice, message):
    model = HookedMamba.tiny()
    for method in (attribution.raw_attention, attribution.rollout, attribution.gradient_attention):
        with pytest.raises(gl.InputError, match=message):
            method(model, example(model), **choice)


def test_the_gradient_stands_at_one_end(lm):
    with pytest.raises(gl.InputError, match="'dst' or 'src'"):
        attribution.gradient_attention(lm, example(lm), weighted="both")
    with pytest.raises(gl.InputError, match="weighted='dst' would be ignored"):
        attribution.gradient_attention(lm, example(lm), weighted="dst", mode="official")
    assert attribution.gradient_attention(lm, example(lm), mode="official").facts["weighted"] == "src"


def test_the_mean_gradient_under_layernorms_is_rounding_and_said_to_be():
    model = gl.HookedRWKV.tiny(dtype=torch.float64)
    input = example(model)
    for g in output_gradients(model, input, None):
        assert g.mean(-1).abs().max() < 1e-14 * g.abs().max() * g.shape[-1]
    for given in ({}, {"weighted": "src"}, {"sign": "abs"}, {"channels": "max"}):
        with pytest.warns(UserWarning, match="LayerNorms.*rounding errors"):
            found = attribution.gradient_attention(model, input, **given)
        assert not found.scores.any(), "rounding is no score"
        assert found.order(0).tolist() == list(range(7)), "and ranks nothing"
    quiet = [(model, {"mode": "official"}), (gl.HookedMamba.tiny(dtype=torch.float64), {})]
    for other, given in quiet:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attribution.gradient_attention(other, input, **given)


def test_a_map_of_zeros_is_said_to_be_one(recall_model):
    """The gradient of the last of two layers stands at the last position alone: the official product is empty."""
    with pytest.warns(UserWarning, match=r"rows \[0\] are 0.*Only layers \[1\] of 2 took part: start_layer=0"):
        found = attribution.gradient_attention(recall_model, "B 4 F 1 gnu ? F", mode="official")
    assert (found.scores == 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attribution.rollout(recall_model, [[1]])  # one token: there is nothing else to score


def test_numbers_that_are_no_whole_numbers_are_explained(model):
    input = example(model)
    with pytest.raises(gl.InputError, match=r"start_layer=0.5: a whole number"):
        attribution.rollout(model, input, start_layer=0.5)
    with pytest.raises(gl.InputError, match=r"n_steps=2.5: a whole number"):
        attribution.integrated_gradients(model, input, n_steps=2.5)
    with pytest.raises(gl.InputError, match=r"n_samples=2.5: a whole number"):
        attribution.smoothgrad(model, input, n_samples=2.5)


@pytest.mark.parametrize("method", ["raw_attention", "rollout", "gradient_attention"])
@pytest.mark.parametrize("mode", ["paper", "official"])
def test_some_heads_are_the_method_on_their_channels(method, mode):
    """Of all heads it is the method itself; of some, what it makes of the other channels' being none."""
    model = gl.HookedMamba2.tiny(seed=0, dtype=torch.float64)
    input, mask = case(model)
    run = getattr(attribution, method)
    common = {"target": 3, "mode": mode, "start_layer": 0, **options(mask)}
    whole = run(model, input, **common)
    every = run(model, input, heads=slice(None), **common)
    torch.testing.assert_close(every.scores, whole.scores, rtol=1e-12, atol=1e-14)
    some = run(model, input, heads=[0, -1], **common)
    total = model.cfg.sizes["head"]
    assert some.facts["heads"] == [0, total - 1] and "heads" not in whole.facts
    width = model.cfg.sizes["value"]
    chosen = [*range(width), *range((total - 1) * width, total * width)]
    if mode == "paper" and method != "gradient_attention":
        matrices = [A[:, chosen].mean(1) for A in dense(model, input, mask)]
        rows = []
        for row, i in enumerate(places(model, input, mask)):
            if method == "raw_attention":
                rows.append(torch.stack([A[row, i] for A in matrices]).mean(0))
                continue
            product = torch.eye(input.shape[1], dtype=torch.float64)
            for A in matrices:
                product = (torch.eye(input.shape[1]) + A[row]) @ product
            rows.append(product[i].masked_fill(torch.arange(input.shape[1]) == i, 0))
        torch.testing.assert_close(some.scores, torch.stack(rows), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(some.scores, whole.scores)


def test_heads_of_a_layer_without_heads_are_refused():
    with pytest.raises(gl.PointError, match="head"):
        attribution.raw_attention(gl.HookedMamba.tiny(), [[1, 2, 3]], heads=0)
    with pytest.raises(gl.InputError, match="out of range"):
        attribution.rollout(gl.HookedMamba2.tiny(), [[1, 2, 3]], heads=99)
