"""What changes in a wrapped model after it was wrapped: followed as a model wrapped afterwards would be, or refused by name."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import gatedlens as gl
from gatedlens.model.hookpoint import Part
from gatedlens.model.norm import Norm
from tests.helpers import example, relative


@pytest.fixture
def own(hooked):
    """A tiny model of the architecture that the test may change."""
    return hooked.tiny(seed=0, dtype=torch.float64)


def path_of(model, module) -> str:
    return next(path for path, other in model.wrapped.named_modules() if other is module)


def put(model, old, new) -> None:
    """`new` in the place of the wrapped model's module `old`."""
    parent, _, name = path_of(model, old).rpartition(".")
    model.wrapped.get_submodule(parent)._modules[name] = new


def other(module, seed: int = 1):
    """A module like this one with other weights."""
    new, generator = copy.deepcopy(module), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in new.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return new


def mixer_leaf(model):
    """The first module of block 1's mixer that holds a matrix."""
    return next(m for m in model.blocks[1].mixer.weights.modules() if isinstance(m, nn.Linear))


def replaced_mixer(model):
    put(model, old := model.blocks[1].mixer.weights, other(old))


def replaced_layer(model):
    put(model, old := model.blocks[1].weights, other(old))


def replaced_list(model):
    path = path_of(model, model.blocks[1].weights).rpartition(".")[0]
    layers = model.wrapped.get_submodule(path)
    put(model, layers, nn.ModuleList([other(layer) for layer in layers]))


def replaced_norm(model):
    put(model, old := model.blocks[0].ln1.weights, other(old))


def replaced_final_norm(model):
    put(model, old := model.ln_final.weights, other(old))


def replaced_leaf(model):
    put(model, old := mixer_leaf(model), other(old))


def replaced_ends(model):
    for module, _ in model.ends().values():
        put(model, module, other(module))


def edited_eps(model):
    for norm in [part.weights for part in model.modules() if isinstance(part, Norm)]:
        setattr(norm, "variance_epsilon" if "variance_epsilon" in vars(norm) else "eps", 0.3)


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrised(model):
    parametrize.register_parametrization(mixer_leaf(model), "weight", Double())


def parametrised_norm(model):
    parametrize.register_parametrization(model.ln_final.weights, "weight", Double())


def weight_normed(model):
    leaf = parametrizations.weight_norm(mixer_leaf(model))
    with torch.no_grad():
        leaf.parametrizations.weight.original0.mul_(1.5)


def pruned(model):
    prune.l1_unstructured(mixer_leaf(model), "weight", 0.5)


def pruned_and_trained(model):
    pruned(model)
    with torch.no_grad():
        mixer_leaf(model).weight_orig.mul_(1.5)  # as a step of an optimiser does; the mask goes on it at the next call


def old_weight_normed(model):
    with pytest.warns(FutureWarning):
        weight_norm(mixer_leaf(model))
    with torch.no_grad():
        mixer_leaf(model).weight_g.mul_(1.5)


def new_parameter(model):
    leaf = mixer_leaf(model)
    leaf.weight = nn.Parameter(leaf.weight.detach() * 1.5)


FOLLOWED = [
    replaced_mixer, replaced_layer, replaced_list, replaced_norm, replaced_final_norm, replaced_leaf, replaced_ends,
    edited_eps, parametrised, parametrised_norm, weight_normed, pruned, pruned_and_trained, old_weight_normed, new_parameter,
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("edit", FOLLOWED, ids=lambda edit: edit.__name__)
def test_a_change_is_followed_at_the_next_call(own, edit):
    inputs = example(own)
    before = own(inputs)
    edit(own)
    now = own(inputs)
    assert relative(now, before) > 1e-4, "the edit changes nothing"
    again = type(own)(own.wrapped)
    for part, fresh in zip(own.modules(), again.modules(), strict=True):
        if isinstance(part, Part) and isinstance(part.weights, nn.Module):
            assert part.weights is fresh.weights
    assert torch.equal(now, again(inputs))
    assert torch.equal(now, own.run_with_cache(inputs)[0])
    A, fresh = (gl.implicit_attention(m, inputs, layer=1) for m in (own, again))
    assert torch.equal(A.mean(), fresh.mean())


@torch.no_grad()
def test_hooks_stay_where_they_are_through_a_change(own):
    inputs, seen = example(own), []
    with own.hooks([("blocks.*.hook_mixer_out", lambda x, hook: seen.append(hook.name))]):
        own(inputs)
        replaced_layer(own)
        own(inputs)
    assert seen == 2 * [f"blocks.{layer}.hook_mixer_out" for layer in range(own.cfg.n_layers)]


class Adapter(nn.Module):
    """What peft puts in the place of a Linear."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.A, self.B = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x):
        return self.base_layer(x) + self.B(self.A(x))


class Quantised(nn.Linear):
    def forward(self, x):
        return super().forward(x).round()


class Unlike(nn.Module):
    """A module of another class with the same weights under the same names."""

    def __init__(self, old):
        super().__init__()
        self.__dict__.update(copy.copy(old.__dict__))

    def forward(self, *args, **kwargs):
        raise AssertionError("nobody calls it")


def adapted(model):
    put(model, old := mixer_leaf(model), Adapter(old))


def quantised(model):
    old = mixer_leaf(model)
    put(model, old, new := Quantised(old.in_features, old.out_features, old.bias is not None, dtype=torch.float64))
    new.weight = old.weight


def patched(model):
    leaf = mixer_leaf(model)
    leaf.forward = lambda x: x


def foreign_mixer(model):
    put(model, old := model.blocks[1].mixer.weights, Unlike(old))


def foreign_norm(model):
    put(model, old := model.ln_final.weights, Unlike(old))


def wrapped_leaf(model):
    put(model, old := mixer_leaf(model), nn.Sequential(old))


def fewer_layers(model):
    path = path_of(model, model.blocks[1].weights).rpartition(".")[0]
    put(model, layers := model.wrapped.get_submodule(path), layers[:1])


def more_layers(model):
    path = path_of(model, model.blocks[1].weights).rpartition(".")[0]
    layers = model.wrapped.get_submodule(path)
    layers.append(copy.deepcopy(layers[1]))


def sequential_head(model):
    *_, (head, _) = model.ends().values()
    put(model, head, nn.Sequential(head))


def no_head(model):
    *_, (head, _) = model.ends().values()
    put(model, head, nn.Identity())


REFUSED = [adapted, quantised, patched, foreign_mixer, foreign_norm, wrapped_leaf, fewer_layers, more_layers, sequential_head,
           no_head]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("edit", REFUSED, ids=lambda edit: edit.__name__)
def test_what_cannot_be_followed_is_refused_at_every_call_until_it_is_undone(own, edit):
    inputs, modules = example(own), {m: dict(m._modules) for m in own.wrapped.modules()}
    before, cfg = own(inputs), own.cfg.to_dict()
    edit(own)
    for call in (own, own.run_with_cache, own):
        with pytest.raises(gl.CheckpointError):
            call(inputs)
    assert own.cfg.to_dict() == cfg and not own.list_hooks()
    for module, children in modules.items():
        module._modules.clear()
        module._modules.update(children)
        module.__dict__.pop("forward", None)
    assert torch.equal(own(inputs), before)


@pytest.mark.parametrize(
    "edit", [adapted, quantised, patched, sequential_head, no_head], ids=lambda edit: edit.__name__
)
def test_what_cannot_be_followed_is_refused_when_it_is_wrapped(own, edit):
    edit(own)
    with pytest.raises(gl.CheckpointError):
        type(own)(own.wrapped)


def test_gradients_reach_the_parameters_behind_pruned_and_parametrised_weights(own):
    prune.l1_unstructured(mixer_leaf(own), "weight", 0.5)
    parametrised_norm(own)
    own(example(own)).sum().backward()
    assert mixer_leaf(own).weight_orig.grad is not None
    assert own.ln_final.weights.parametrizations.weight.original.grad is not None


@torch.no_grad()
def test_the_older_spectral_norm_is_computed_anew(own):
    leaf = spectral_norm(mixer_leaf(own)).eval()
    inputs = example(own)
    before = own(inputs)
    leaf.weight_orig.mul_(torch.linspace(0.5, 1.5, leaf.weight_orig.shape[0], dtype=torch.float64).unsqueeze(1))
    after = own(inputs)
    assert relative(after, before) > 1e-6 and torch.equal(after, type(own)(own.wrapped)(inputs))


@torch.no_grad()
def test_copies_are_watched_as_well(own):
    inputs = example(own)
    own(inputs)
    buffer = io.BytesIO()
    torch.save(own, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(own), torch.load(buffer, weights_only=False)):
        before = twin(inputs)
        replaced_layer(twin)
        assert relative(twin(inputs), before) > 1e-4
        foreign_mixer(twin)
        with pytest.raises(gl.CheckpointError):
            twin(inputs)
    assert torch.equal(own(inputs), before)


def test_a_change_of_precision_is_seen(own):
    own.wrapped.to(torch.float32)
    replaced_norm(own)
    inputs = example(own)
    own(inputs)
    assert own.cfg.dtype == torch.float32


# -- language models ------------------------------------------------------------------------------------------------


@pytest.fixture
def speaking(hooked):
    if not issubclass(hooked, gl.HookedLanguageModel):
        pytest.skip("a language model's")
    return hooked.tiny(seed=0, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("how", ["module", "parameter", "data"])
def test_new_words_are_known_once_the_embedding_has_them(speaking, how):
    known = speaking.cfg.d_vocab
    new = torch.tensor([[known + 3]])
    with pytest.raises(gl.InputError, match="out of range"):
        speaking(new)
    for module, kind in speaking.ends().values():
        width = module.weight.shape[1]
        wider = torch.randn(known + 10, width, dtype=torch.float64)
        if how == "module":
            linear = kind is nn.Linear
            size = (width, known + 10) if linear else (known + 10, width)
            fresh = kind(*size, **({"bias": False} if linear else {}), dtype=torch.float64)
            fresh.weight.copy_(wider)
            put(speaking, module, fresh)
        elif how == "parameter":
            module.weight = nn.Parameter(wider)
        else:
            module.weight.data = wider
    logits = speaking(new)
    assert logits.shape[-1] == speaking.cfg.d_vocab == speaking.cfg.d_vocab_out == known + 10
    assert torch.equal(logits, type(speaking)(speaking.wrapped)(new))


@torch.no_grad()
def test_a_head_of_other_outputs_gives_logits_and_no_loss_of_tokens(speaking):
    width = speaking.unembedding.weight.shape[1]
    put(speaking, speaking.unembedding, nn.Linear(width, 5, dtype=torch.float64))
    tokens = example(speaking)
    for model in (speaking, type(speaking)(speaking.wrapped)):
        logits, cache = model.run_with_cache(tokens)
        assert logits.shape[-1] == 5 == model.cfg.d_vocab_out and cache["hook_logits"].shape == logits.shape
        assert model.cfg.d_vocab == model.embedding.weight.shape[0]
        with pytest.raises(gl.InputError, match="5 outputs"):
            model(tokens, return_type="loss")


def test_the_padding_tokens_row_gets_no_gradient(speaking):
    speaking.embedding.padding_idx = 1
    tokens = torch.tensor([[3, 1, 5, 1, 4]])
    speaking(tokens, return_type="loss").backward()
    grad = speaking.embedding.weight.grad
    if speaking.unembedding.weight is speaking.embedding.weight:
        return  # the head's part of it is left
    assert not grad[1].any() and grad[3].any()
