"""The view of a model: the vendor's own modules, one weight of which is read otherwise; what holds for every reader."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

import gatedlens as gl
from gatedlens.weights import AsRead, bare, reader_of
from tests.helpers import example, relative


class Doubled(nn.Linear):
    """Half of what is meant: the reader of the test doubles it."""


class Reads:
    """A reader of `Doubled`, which counts."""

    def __init__(self, monkeypatch):
        from gatedlens.weights import readers
        from gatedlens.weights.reader import Reader

        outer = self
        self.count = 0

        class Double(Reader):
            def fits(self, module):
                return type(module) is Doubled

            def weight(self, module, weight_of):
                outer.count += 1
                return 2 * module._parameters["weight"]

            def told(self, module):
                return "halves"

        monkeypatch.setattr(readers, "READERS", (Double(), *readers.READERS))


@pytest.fixture
def reads(monkeypatch):
    return Reads(monkeypatch)


def halved(model: nn.Module) -> nn.Module:
    """The same model, each of its Linears holding half of its weight; a weight that stands in several places does so still."""
    made = {}
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if type(child) is nn.Linear and "head" not in name:
                half = Doubled(child.in_features, child.out_features, child.bias is not None, dtype=child.weight.dtype)
                half.weight = made.setdefault(id(child.weight), nn.Parameter(child.weight.detach() / 2))
                half.bias = child.bias
                module._modules[name] = half
    return model


def test_a_plain_model_is_its_own_view(hooked):
    wrapped = hooked.tiny().wrapped
    assert AsRead(wrapped).whole is wrapped and bare(wrapped) is wrapped and hooked(wrapped).wrapped is wrapped
    assert AsRead(wrapped).told() == "" and not any(reader_of(module) for module in wrapped.modules())


def test_every_architecture_reads_through_a_view(hooked, reads):
    """The forward, its points, its gradients and the implicit attention are those of the weights as they are read."""
    whole, ours = hooked.tiny(dtype=torch.float64), gl.wrap(halved(hooked.tiny(dtype=torch.float64).wrapped))
    assert "halves" in ours.as_read.told() and bare(ours.wrapped) is not ours.wrapped
    input = example(whole)
    with torch.no_grad():
        wanted, cache = whole.run_with_cache(input, names_filter=lambda name: True)
        got, found = ours.run_with_cache(input, names_filter=lambda name: True)
        assert torch.equal(got, wanted) and all(torch.equal(found[name], cache[name]) for name in cache)
        layer = max(whole.mixers)
        assert torch.equal(
            gl.implicit_attention(found, layer=layer).mean(), gl.implicit_attention(cache, layer=layer).mean()
        )
        assert gl.implicit_attention(found, layer=layer).check().relative < 1e-9
    for model in (whole, ours):
        model(input).pow(2).mean().backward()
    theirs = dict(whole.wrapped.named_parameters(remove_duplicate=False))
    for path, module in bare(ours.wrapped).named_modules():
        if type(module) is Doubled and theirs[f"{path}.weight"].grad is not None:
            assert relative(module.weight.grad, 2 * theirs[f"{path}.weight"].grad) < 1e-9


def test_a_weight_is_made_once_a_block(reads):
    model = gl.wrap(halved(gl.HookedMamba.tiny(n_layer=1).wrapped))
    tokens = example(model)
    model(tokens)
    reads.count = 0
    model(tokens)
    assert reads.count == 4, "in_proj, x_proj, dt_proj and out_proj, though shapes are looked at, too"
    with pytest.raises(RuntimeError, match="stop"):
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.mixer.hook_y", lambda y, hook: stop())])
    assert not model.as_read._held, "nothing is kept behind a block, also after an exception"
    read = model.blocks[0].mixer.weights.in_proj
    assert read.weight is not read.weight
    with model.as_read.held():
        with torch.no_grad():
            alone = read.weight
        assert read.weight is read.weight and read.weight is not alone and read.weight.requires_grad


def stop():
    raise RuntimeError("stop")


def test_threads_hold_weights_of_their_own(reads):
    model = gl.wrap(halved(gl.HookedMamba.tiny().wrapped))
    tokens, seen = example(model), []
    wanted = model(tokens)
    threads = [threading.Thread(target=lambda: seen.append(model(tokens))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 4 and all(torch.equal(one, wanted) for one in seen)


def test_a_view_has_the_attributes_of_what_it_shows(reads):
    wrapped = halved(gl.HookedMamba.tiny().wrapped)
    ours = gl.wrap(wrapped)
    view, own = ours.wrapped.backbone.layers[0].mixer, wrapped.backbone.layers[0].mixer
    assert view is not own and type(view).__name__ == type(own).__name__ and isinstance(view, type(own))
    assert (
        view.A_log is own.A_log
        and isinstance(view.in_proj, nn.Linear)
        and view is ours.wrapped.backbone.layers[0].mixer
    )
    ours.wrapped.train()
    assert own.training and own.in_proj.training
    ours.wrapped.eval()
    assert [n for n, _ in ours.wrapped.named_parameters()] == [n for n, _ in wrapped.named_parameters()]
    assert "read from Doubled" in repr(ours.wrapped)
    with pytest.raises(AttributeError, match="has no attribute 'nowhere'"):
        _ = view.nowhere
    own.in_proj = nn.Linear(own.in_proj.in_features, own.in_proj.out_features, bias=False)
    tokens = example(ours)
    assert torch.equal(ours(tokens), type(ours)(wrapped)(tokens)), "a module that takes another's place is followed"


@torch.no_grad()
def test_copies_and_other_precisions(reads):
    ours = gl.wrap(halved(gl.HookedMamba.tiny(dtype=torch.float64).wrapped))
    tokens = example(ours)
    wanted = ours(tokens)
    twin = copy.deepcopy(ours)
    assert torch.equal(twin(tokens), wanted) and bare(twin.wrapped) is not bare(ours.wrapped)
    assert twin.blocks[0].mixer.weights is twin.wrapped.backbone.layers[0].mixer
    assert relative(twin.float()(tokens), wanted) < 1e-5 and torch.equal(ours(tokens), wanted)
    nnsight = pytest.importorskip("nnsight")
    assert nnsight
    traced = ours.nnsight()
    with traced.trace(tokens):
        seen = traced.blocks[1].hook_resid_post.output.save()
    name = "blocks.1.hook_resid_post"
    assert torch.equal(seen, ours.run_with_cache(tokens, names_filter=name)[1][name])
    assert torch.equal(copy.deepcopy(ours)(tokens), wanted)


def test_verify_holds_of_a_view(reads):
    report = gl.verify(gl.wrap(halved(gl.HookedMamba.tiny(dtype=torch.float64).wrapped)))
    assert all(claim.passed for claim in report.claims), str(report)
