"""The implicit attention by head: every view with `heads=` against the dense matrices of the channels, cut into heads."""

from __future__ import annotations

import pytest
import torch

import gatedlens as gl
from gatedlens.result.labelled_tensor import label_of
from tests.helpers import at_real, example, padded

ALL = slice(None)


def mamba2():
    return gl.HookedMamba2.tiny(dtype=torch.float64), 0


def griffin():
    return gl.HookedGriffin.tiny(dtype=torch.float64), 2  # its layer of attention


@pytest.fixture(params=[mamba2, griffin])
def case(request):
    """(model, A of a layer with heads of a padded batch, its dense matrices [batch head value dst src])."""
    model, layer = request.param()
    tokens, mask = padded([example(model, 1, 9)[0], example(model, 1, 6, seed=1)[0]], "left")
    A = gl.implicit_attention(model, tokens, layer=layer, attention_mask=mask)
    with torch.no_grad():
        return model, A, A.dense().unflatten(1, (model.cfg.n_heads, -1))


def close(got, want):
    return got.shape == want.shape and torch.allclose(got, want, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("heads", [ALL, 1, -1, [1, 0], slice(0, 1), "mask"])
@pytest.mark.parametrize("turned", [False, True])
def test_every_view_by_head(case, heads, turned):
    model, A, dense = case
    if turned:
        A, dense = A.T, dense.mT
    if heads == "mask":
        heads = torch.arange(model.cfg.n_heads) % 2 == 0
    chosen = [heads % model.cfg.n_heads] if isinstance(heads, int) else heads
    some = dense[:, chosen]
    weights = torch.randn(A.shape[2], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert close(A.mean(heads=heads), some.mean(2))
    assert close(A.abs_mean(heads=heads), some.abs().mean(2))
    own = weights.unflatten(0, (model.cfg.n_heads, -1))[chosen]
    assert close(A.weighted(weights, heads=heads), torch.einsum("bhvij,hv->bhij", some, own))
    assert close(A.dense(heads=heads), some.flatten(1, 2))
    assert A.select(heads=heads).check().relative < 1e-12
    for i in (0, -1):
        assert close(A.row(i, heads), at_real(some.flatten(1, 2), A.padding.mask, i, 2))
        assert close(A.column(i, heads), at_real(some.flatten(1, 2), A.padding.mask, i, 3))
    assert A.channels_of(heads) == torch.arange(A.shape[2]).unflatten(0, (A.n_heads, -1))[chosen].flatten().tolist()
    groups = [A.channels_of(heads), A.channels_of(0)]
    assert close(A.grouped(groups), torch.stack([some.mean((1, 2)), dense[:, 0].mean(1)], dim=1))


@torch.no_grad()
def test_the_heads_of_the_contributions_sum_to_them(case):
    model, A, dense = case
    F, every = A.contributions(), [A.contributions(heads=head) for head in range(A.n_heads)]
    weight, bias = model.blocks[A.layer].mixer.output_weights()
    (x,) = [x for _, x in F._branches()]
    parts = zip(
        every, weight.unflatten(1, (A.n_heads, -1)).unbind(1), x.unflatten(2, (A.n_heads, -1)).unbind(2), strict=True
    )
    for head, (one, own, content) in enumerate(parts):
        pairs = torch.einsum("bvij,bjv,dv->bijd", dense[:, head], content, own)  # the literal F[i, j] of this head
        assert close(one.row(-1), at_real(pairs, A.padding.mask, -1, 1))
        assert close(one.column(0), at_real(pairs, A.padding.mask, 0, 2))
        assert close(one.norms(), pairs.norm(dim=-1))
        direction = torch.linspace(-1, 1, len(weight), dtype=torch.float64)
        assert close(one.along(direction), pairs @ direction)
    assert close(sum(one.row(-1) for one in every), F.row(-1))
    rest = 0 if bias is None else bias
    assert close(sum(one.output() for one in every) + rest, F.output())


@torch.no_grad()
def test_profiles_of_heads_are_those_of_their_mean_matrices(case):
    _, A, dense = case
    found = gl.profiles.of_heads(A)
    tokens = A.tokens
    induced = gl.profiles.induction_of_heads(A, tokens=tokens)
    for head in range(A.n_heads):
        alone = A.select(heads=head)
        for got, want in zip(found, gl.profiles.of_layer(alone), strict=True):
            assert close(got[:, head], want)
        for got, want in zip(induced, gl.profiles.induction(alone, tokens), strict=True):
            assert close(got[:, head], want)
    p = gl.profiles.shares(dense.abs().mean(2))
    assert close(found.distance[0, :, 0], p[0].diagonal(dim1=-2, dim2=-1).mean(-1))  # the first row has no padding
    assert close(gl.profiles.of_heads(A, [1]).half_life, found.half_life[:, [1]])


@torch.no_grad()
def test_a_stack_by_head():
    model, _ = mamba2()
    stack, quiet = gl.implicit_attention(model, example(model)), {"progress": False}
    for view in ("mean", "abs_mean"):
        got = getattr(stack, view)(heads=[2, 0], **quiet)
        assert close(got, torch.stack([getattr(A, view)(heads=[2, 0]) for A in stack]))
        assert "of a head" in label_of(got) and "of a head" not in label_of(getattr(stack, view)(**quiet))
    assert close(
        stack.profiles(heads=ALL, **quiet).half_life, torch.stack([gl.profiles.of_heads(A).half_life for A in stack])
    )
    assert stack.induction(heads=1, **quiet).shape == (2, 2, 1)
    with pytest.raises(gl.TooLargeError, match="mean"):
        stack.mean(heads=ALL, max_bytes=100, **quiet)


def test_what_heads_cannot_be_is_explained():
    model, _ = mamba2()
    A = gl.implicit_attention(model, example(model), layer=0)
    with pytest.raises(gl.InputError, match="heads=4 is out of range: Layer 0 of tiny-mamba2 has 4"):
        A.mean(heads=4)
    with pytest.raises(gl.InputError, match="names no entry"):
        A.dense(heads=[])
    with pytest.raises(gl.InputError, match="channels=3 and heads=0 overlap"):
        A.dense(3, heads=0)
    with pytest.raises(gl.InputError, match="is of some channels: ask for heads of the layer's whole operator"):
        A.select([0, 1]).mean(heads=0)
    griffin_model, _ = griffin()
    stack = gl.implicit_attention(griffin_model, example(griffin_model))
    with pytest.raises(gl.PointError, match="blocks.0.mixer.hook_gated has no axis 'head'.*blocks.2.attn.hook_q"):
        stack.mean(heads=0, progress=False)
