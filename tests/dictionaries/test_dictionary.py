"""A Dictionary: its equations, written out; its files; what does not fit."""

from __future__ import annotations

import json

import pytest
import torch
from jaxtyping import TypeCheckError
from safetensors.torch import save_file

from gatedlens.dictionaries import BatchTopK, Dictionary, Gated, JumpReLU, ReLU, TopK
from gatedlens.errors import CheckpointError, InputError
from gatedlens.files import read_tensors
from tests.dictionaries.making import draw

D, F = 5, 9
POINT = "blocks.0.hook_resid_pre"


def activations():
    r = draw(1)
    return {
        "relu": ReLU(),
        "topk": TopK(3),
        "batchtopk": BatchTopK(3, 0.1),
        "jumprelu": JumpReLU(r(F).abs()),
        "gated": Gated(r(F).exp(), r(F)),
    }


def of(activation=None, **options):
    r = draw()
    return Dictionary(r(D, F), r(F, D), r(F), r(D), point=POINT, activation=activation, **options)


def feature(kind, p, j):
    """One feature of one position, word for word."""
    x, a = float(p[j]), activations()[kind]
    if kind == "relu":
        return max(x, 0.0)
    if kind == "topk":
        return max(x, 0.0) if sorted(p.tolist())[-a.k] <= x else 0.0
    if kind == "gated":
        return max(float(a.scale[j]) * x + float(a.shift[j]), 0.0) if x > 0 else 0.0
    return max(x, 0.0) if x > float(a.threshold if kind == "batchtopk" else a.threshold[j]) else 0.0


@pytest.mark.parametrize("kind", list(activations()))
def test_features_are_the_equation_of_each_activation(kind):
    d, x = of(activations()[kind], centred=True), draw(2)(2, 4, D)
    p = (x - d.b_dec) @ d.W_enc + d.b_enc
    expected = torch.tensor(
        [[feature(kind, one, j) for j in range(F)] for one in p.reshape(-1, F)], dtype=p.dtype
    ).view_as(p)
    torch.testing.assert_close(d.encode(x), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(d(x), expected @ d.W_dec + d.b_dec, atol=1e-12, rtol=0)
    slope, rest = d.activation.held(d.sums(x))
    torch.testing.assert_close(slope * d.sums(x) + rest, d.encode(x), atol=1e-12, rtol=0)
    assert torch.equal(d.activation.on(d.sums(x)), d.encode(x) > 0)


def test_a_batch_topk_in_training_keeps_so_many_on_average():
    a, p = BatchTopK(2).train(), draw(3)(7, F)
    f = a(p)
    assert int((f > 0).sum()) == 14 and torch.equal(f[f > 0].min(), p.flatten().topk(14).values[-1])


@pytest.mark.parametrize("normalise", ["layer_norm", "constant_norm"])
def test_what_is_normalised_is_undone(normalise):
    """With W_dec the inverse of W_enc and no activation in the way, the reconstruction is x itself."""
    r = draw()
    w = r(D, D)
    both = torch.cat([w, -w], 1), torch.cat([w.inverse(), -w.inverse()])
    d = Dictionary(*both, point=POINT, normalise=normalise)
    x = 3 * r(4, D) + 2
    torch.testing.assert_close(d(x), x, atol=1e-10, rtol=0)
    n = x / x.norm(dim=-1, keepdim=True) * D**0.5
    if normalise == "layer_norm":
        n = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(d.encode(x), torch.relu(n @ both[0]), atol=1e-10, rtol=0)


def test_a_skip_connection_reads_what_was_read():
    r = draw()
    d = Dictionary(r(D, F), r(F, 4), r(F), r(4), r(D, 4), point=POINT, out_point="blocks.0.hook_mixer_out")
    x = r(3, D)
    torch.testing.assert_close(d(x), d.encode(x) @ d.W_dec + d.b_dec + x @ d.W_skip, atol=1e-12, rtol=0)
    assert d.kind == "transcoder" and (d.d_in, d.n_features, d.d_out) == (D, F, 4)


@pytest.mark.parametrize("kind", list(activations()))
def test_saved_and_loaded_it_is_the_same(kind, tmp_path):
    d = of(activations()[kind], normalise="constant_norm", axes=("value",), index={"head": 2}, facts={"model": "m"})
    again = Dictionary.load(d.save(tmp_path / "d.safetensors"))
    x = draw(4)(3, D)
    assert torch.equal(again(x), d(x)) and repr(again) == repr(d)
    assert (again.facts, again.axes, again.index) == ({"model": "m"}, ("value",), {"head": 2})
    assert "Dictionary" in again._repr_html_() and not any(p.requires_grad for p in again.parameters())


def test_at_another_place_it_has_the_same_weights():
    d = of(facts={"model": "m", "seed": 3})
    other = d.at("blocks.1.hook_resid_pre", model="n")
    assert (other.point, other.out_point, other.facts) == (*["blocks.1.hook_resid_pre"] * 2, {"model": "n", "seed": 3})
    assert torch.equal(other.W_dec, d.W_dec) and d.at().facts == {"seed": 3}


def test_what_does_not_fit_is_named(tmp_path):
    r = draw()
    for W_dec, b_enc in ((r(8, 5), None), (r(9, 5), r(8))):  # the checks of the tests see it first; else an InputError
        with pytest.raises(TypeCheckError):
            Dictionary(r(5, 9), W_dec, b_enc, point=POINT)
    for said, make in {
        "k is at most 9": lambda: of(TopK(10)),
        "at least one feature": lambda: TopK(0),
        r"threshold has shape \[4\]": lambda: of(JumpReLU(torch.ones(4))),
        "TopK": lambda: of("topk"),
        "Did you mean .layer_norm": lambda: of(normalise="layernorm"),
        "2 points": lambda: Dictionary(r(5, 9), r(9, 5), point=[POINT, "b"], d_ins=[2, 2], d_outs=[2, 3]),
        "stands there twice": lambda: Dictionary(r(5, 9), r(9, 5), point=[POINT, POINT]),
        "name a hook point": lambda: Dictionary(r(5, 9), r(9, 5), point=[]),
        "not centred": lambda: Dictionary(r(5, 9), r(9, 4), point=POINT, out_point="b", centred=True),
        "6 wide": lambda: of().encode(r(2, 6)),
    }.items():
        with pytest.raises(InputError, match=said):
            make()
    save_file({"vector": r(3)}, tmp_path / "v.safetensors", {"gatedlens": "steering"})
    with pytest.raises(CheckpointError, match="no saved dictionary: it is a steering of gatedlens"):
        Dictionary.load(tmp_path / "v.safetensors")
    save_file({"W_enc": r(3, 4), "W_dec": r(4, 3)}, tmp_path / "w.safetensors", {"gatedlens": "dictionary"})
    with pytest.raises(CheckpointError, match="activation"):
        Dictionary.load(tmp_path / "w.safetensors")


def test_a_file_whose_header_tells_each_field_by_itself_is_read(tmp_path):
    """As dictionaries were saved first, the bundled one among them."""
    d, r = of(facts={"model": "m"}), draw()
    d.save(tmp_path / "new.safetensors")
    tensors, meta = read_tensors(tmp_path / "new.safetensors")
    said = json.loads(meta["said"])
    older = {name: one if isinstance(one, str) else json.dumps(one) for name, one in said.items()}
    save_file(tensors, tmp_path / "old.safetensors", {"gatedlens": "dictionary", **older})
    x = r(2, 5)
    for name in ("new", "old"):
        again = Dictionary.load(tmp_path / f"{name}.safetensors")
        assert torch.equal(again(x), d(x)) and (again.facts, again.points) == (d.facts, d.points)
