"""Direct logit attribution: every number by its definition, and the sum is the logit, on every architecture."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens import lens
from gatedlens.hooks.vim import HookedViM
from tests.helpers import example, padded

RIGHT, WRONG = torch.tensor([1, 4]), 3
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def predicted(model, logits, pos=-1):
    """logit[right] - logit[wrong] of each row, before the soft cap."""
    logits = logits if logits.ndim == 2 else logits[:, pos]
    cap = model.cfg.logits_soft_cap
    logits = logits if cap is None else cap * torch.atanh(logits / cap)
    return logits[torch.arange(len(logits)), RIGHT] - logits[:, WRONG]


@torch.no_grad()
@pytest.mark.parametrize("by", [lens.logit_attribution, lens.token_attribution])
def test_the_parts_sum_to_the_logit(model, by):
    x = example(model)
    logits, cache = model.run_with_cache(x)
    difference, single = by(model, x, RIGHT, WRONG), by(model, cache, RIGHT)
    assert torch.allclose(difference.values.flatten(1).sum(1), predicted(model, logits), **CLOSE)
    both = by(model, cache, WRONG).values.flatten(1).sum(1)
    assert torch.allclose(single.values.flatten(1).sum(1) - both, predicted(model, logits), **CLOSE)
    with torch.inference_mode():
        assert torch.allclose(by(model, x, RIGHT, WRONG).values, difference.values, **CLOSE)
    assert difference.facts["error"] < 1e-10 and ("soft cap" in difference.value) == bool(model.cfg.logits_soft_cap)
    if model.pooling() is None:
        early = by(model, cache, RIGHT, WRONG, pos=[2, 3]).values.flatten(1).sum(1)
        assert torch.allclose(early, predicted(model, logits[[0, 1], [2, 3]]), **CLOSE)


def literal(model, cache, row, at, values):
    """`values` [..., d_model] at one position, through the final norm with its scale held, by the norm's equation."""
    scale = cache["ln_final.hook_scale"][row, at]
    if (
        model.ln_final.__class__.__name__ == "CopyRead"
    ):  # a mean over copies, each number of each by a gate that is held
        gate, weight = cache["ln_final.hook_gate"][row, at], 1 + model.ln_final.weights.weight
        parts = zip((values * gate * weight).split(model.cfg.d_hidden, dim=-1), scale, strict=True)
        return (
            sum(copy / s for copy, s in parts) / model.cfg.n_copies @ (model.W_U[:, RIGHT[row]] - model.W_U[:, WRONG])
        )
    if model.ln_final.__class__.__name__ != "GemmaNorm" and model.ln_final.centred:
        values = values - values.mean(-1, keepdim=True)
    weight = model.ln_final.weights.weight
    weight = 1 + weight if model.ln_final.__class__.__name__ == "GemmaNorm" else weight
    return values / scale * weight @ (model.W_U[:, RIGHT[row]] - model.W_U[:, WRONG])


def carrier(model, cache, name):
    """What a component is multiplied by on its way to the end, by the norms of the stream behind it with their scales held."""
    total = torch.ones_like(cache["resid_pre", 0])
    if model.cfg.architecture != "minimax":
        return total
    layer, _, leaf = name.partition("_")
    behind = [(i, one) for i in range(model.cfg.n_layers) for one in ("norm1", "norm2")]
    if name != "embed":  # one beside a norm is written behind it
        behind = behind[2 * int(layer) + 1 + (leaf == "mlp_out") :]
    for i, one in behind:
        norm = getattr(model.blocks[i], one)
        total = total * norm.kept * norm.weights.weight / cache[f"blocks.{i}.{one}.hook_scale"]
    return total


@torch.no_grad()
def test_each_part_by_its_definition(model):
    x = example(model)
    _, cache = model.run_with_cache(x)
    components, sources = (by(model, x, RIGHT, WRONG) for by in (lens.logit_attribution, lens.token_attribution))
    length = cache["resid_pre", 0].shape[1]
    assert sources["src"][-1] == "remainder" and len(sources["src"]) == length + 1
    assert sources["component"] == components["component"]
    assert torch.allclose(sources.values.sum(2), components.values, **CLOSE)
    at = model.grid.cls[0] if isinstance(model, HookedViM) else length - 1  # the one position that is read
    for name in components["component"]:
        if name.endswith("bias"):
            continue
        layer, _, leaf = name.partition("_")
        value = cache["resid_pre", 0] if name == "embed" else cache[leaf, int(layer)]
        carried = carrier(model, cache, name)
        for row in range(2):
            want = literal(model, cache, row, at, carried[row, at] * value[row, at])
            assert torch.allclose(components.at(batch=row, component=name).values, want, **CLOSE), name
            got = sources.at(batch=row, component=name).values
            if leaf == "mixer_out":
                given = gl.implicit_attention(cache, layer=int(layer)).contributions()
                vectors = torch.cat(list(given.blocks()), 1)
                assert torch.allclose(
                    got[:-1], literal(model, cache, row, at, carried[row, at] * vectors[row, at]), **CLOSE
                )
                rest = literal(model, cache, row, at, carried[row, at] * given.remainder()[row, at])
                assert torch.allclose(got[-1], rest, **CLOSE)
            else:
                assert torch.allclose(got[at], want, **CLOSE) and (got != 0).sum() == 1


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_as_alone(lm, side):
    rows = [example(lm, 1, n, seed=n)[0] for n in (7, 4)]
    batch, mask = padded(rows, side)
    both = lens.token_attribution(lm, (batch, mask), RIGHT, WRONG)
    for i, row in enumerate(rows):
        alone = lens.token_attribution(lm, row.unsqueeze(0), RIGHT[i : i + 1], WRONG)
        own = [*range(len(row)), -1]  # a row's positions and the remainder
        assert torch.allclose(both.values[i][:, own], alone.values[0], **CLOSE)
        assert (both.values[i][:, len(row) : -1] == 0).all()


@torch.no_grad()
def test_a_carried_state_is_in_the_remainder(lm):
    tokens = example(lm)
    whole, cut = lm(tokens), 4
    _, state = lm(tokens[:, :cut], return_state=True)
    _, cache = lm.run_with_cache(tokens[:, cut:], state=state)
    found = lens.token_attribution(lm, cache, RIGHT, WRONG)
    assert torch.allclose(found.values.flatten(1).sum(1), predicted(lm, whole), **CLOSE)
    assert found.at(src="remainder").values.abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"use_double_cls_token": True, "use_middle_cls_token": False},
        {"if_cls_token": False, "final_pool_type": "mean"},
        {"if_cls_token": False, "final_pool_type": "none"},
        {"rms_norm": False},
        {"bimamba_type": "v1", "if_divide_out": False},
    ],
    ids=["two class tokens", "mean of all", "the last", "LayerNorm", "v1"],
)
def test_every_way_to_read_an_image(options):
    model = HookedViM.tiny(dtype=torch.float64, **options)
    x = example(model)
    for by in (lens.logit_attribution, lens.token_attribution):
        assert torch.allclose(by(model, x, RIGHT, WRONG).values.flatten(1).sum(1), predicted(model, model(x)), **CLOSE)


@torch.no_grad()
def test_layer_norm_and_biases():
    model = gl.HookedMamba.tiny(dtype=torch.float64, rms_norm=False, ssm_cfg={"d_state": 4, "bias": True})
    model.wrapped.backbone.norm_f.bias.normal_(generator=torch.Generator().manual_seed(0))
    x = example(model)
    found = lens.logit_attribution(model, x, RIGHT, WRONG)
    assert "ln_final_bias" in found["component"] and "unembedding_bias" not in found["component"]
    assert torch.allclose(found.values.sum(1), predicted(model, model(x)), **CLOSE)
    found = lens.token_attribution(model, x, RIGHT, WRONG)
    assert torch.allclose(found.values.flatten(1).sum(1), predicted(model, model(x)), **CLOSE)


def test_the_answers_token_pays_on_a_trained_model(recall_model):
    batch = gl.tasks.recall(8, seed=1)
    wrong = [int(one) for one in gl.tasks.ids(gl.tasks.VALUES)[(batch.answers - gl.tasks.ids(("1",)) + 1) % 8]]
    found = lens.token_attribution(recall_model, batch.tokens, batch.answers, wrong)
    best = found.values.sum(1)[:, :-1].argmax(1)
    assert torch.equal(best, batch.answer_pos) and found.facts["error"] < 1e-3
    words = lens.logit_attribution(recall_model, batch.tokens[:1], "3", "4")
    assert words.facts["right"] == "3" and "wrong" in words.facts


def test_mistakes_about_the_logit_are_explained(model):
    x = example(model)
    for by in (lens.logit_attribution, lens.token_attribution):
        for ask, message in (
            (lambda by=by: by(model, x, 999), "right=999 is out of range"),
            (lambda by=by: by(model, x, [1, 2, 3]), "give one id for all 2 rows, or one a row"),
            (lambda by=by: by(model, x, 1, 0.5 * torch.ones(2)), "wrong="),
            (lambda by=by: by(model, x, 1, pos=99), "pos=.*(out of range|one output a row)"),
        ):
            with pytest.raises(gl.InputError, match=message):
                ask()
    assert not model.list_hooks()
