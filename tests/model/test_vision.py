"""HookedVisionModel by itself: images in, classes out, for a model that is no Vision Mamba: no class token, one direction."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gatedlens as gl
from gatedlens.formats.mamba_ssm import layer_parameters
from gatedlens.hooks import mamba
from gatedlens.model import Block, HookedVisionModel, Norm, Sub, VisionConfig, rows_of
from tests.helpers import relative


class Patches(nn.Module):
    """12 x 8 images in patches of 4, one Mamba layer, 5 classes, read off the mean (or the last) position."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.places = nn.Parameter(torch.randn(1, 6, 16))
        self.layers = nn.ModuleList([layer_parameters(16, nn.RMSNorm, d_state=4)])
        self.norm, self.head = nn.RMSNorm(16), nn.Linear(16, 5)


class PatchesConfig(VisionConfig):
    @property
    def sizes(self):
        return {**super().sizes, "channel": 32, "state": 4, "tap": 4, "dt_rank": 1}


class HookedPatches(HookedVisionModel):
    title = "Patches"
    block_points = mamba.BLOCK_ROWS

    @classmethod
    def describe(cls, wrapped, model_name):
        return PatchesConfig(
            model_name=model_name, architecture="patches", n_layers=1, d_model=16, d_vocab=5, n_ctx=6, num_classes=5,
            dtype=wrapped.head.weight.dtype, cls="none", pool="mean", image_size=(12, 8), patch_size=(4, 4), stride=(4, 4),
        )  # fmt: skip

    def make_block(self, layer):
        w, rows = self.wrapped.layers[layer], self.block_points
        mixer = mamba.MambaMixer(w.mixer, rows_of("mixer", rows), layer)
        return Block(w, rows, Sub("mixer", mixer, Norm(w.norm, rows_of("ln1", rows), 1e-5)))

    def make_final_norm(self, rows):
        return Norm(self.wrapped.norm, rows, 1e-5)

    @property
    def patch_embedding(self):
        return self.wrapped.patches

    @property
    def unembedding(self):
        return self.wrapped.head

    @property
    def position_embedding(self):
        return self.wrapped.places


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return HookedPatches(Patches().double().eval(), model_name="patches")


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 12, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_forward_by_hand(model, images):
    w = model.wrapped
    logits, cache = model.run_with_cache(images, names_filter=lambda name: True)
    patches = torch.stack(
        [F.linear(images[:, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].flatten(1), w.patches.weight.flatten(1), w.patches.bias)
         for r in range(3) for c in range(2)], dim=1
    )  # fmt: skip
    assert relative(cache["hook_patch_embed"], patches) < 1e-12
    assert relative(cache["hook_embed"], patches + w.places) < 1e-12
    resid = cache["hook_embed"] + cache["blocks.0.hook_mixer_out"]
    features = w.norm(resid).mean(1)
    assert relative(cache["hook_features"], features) < 1e-12
    assert relative(logits, w.head(features)) < 1e-12
    assert gl.implicit_attention(cache, layer=0).check().relative < 1e-12


def test_grid_labels_and_reading(model, images):
    assert (model.grid.rows, model.grid.columns, model.grid.length, model.grid.cls) == (3, 2, 6, ())
    assert model.image_shape == (3, 12, 8) and model.pooling().tolist() == [1 / 6] * 6
    loss = model(images, return_type="loss", labels=[1, 4])
    assert relative(loss, F.cross_entropy(model(images), torch.tensor([1, 4]))) < 1e-12
    resid = model(images, stop_at_layer=0)
    assert relative(model(resid, start_at_layer=0), model(images)) < 1e-12
    assert model.cfg.sizes["patch"] == 6 and model.cfg.sizes["class"] == 5
    assert isinstance(model, gl.HookedVisionModel) and not isinstance(model, gl.HookedLanguageModel)


def test_what_images_are_not_is_refused_by_its_own_name(model, images):
    with pytest.raises(
        gl.InputError, match="attention_mask was given to a Patches: every image has the same positions"
    ):
        model(images, attention_mask=torch.ones(2, 6))
    with pytest.raises(TypeError, match=r"A Patches's forward has no option 'label'\. Did you mean 'labels'"):
        model(images, label=1)
    with pytest.raises(gl.InputError, match=r"reads float images \[batch, 3, 12, 8\]"):
        model(images.mT)
    with pytest.raises(gl.InputError, match="Patches classifies images"):
        model.generate("Call me")
    with pytest.raises(gl.InputError, match="HookedPatches has no tiny model"):
        HookedPatches.tiny()


def test_an_axis_without_a_size_is_named(images):
    class Forgotten(HookedPatches):
        @classmethod
        def describe(cls, wrapped, model_name):
            cfg = super().describe(wrapped, model_name)
            return VisionConfig(**cfg.to_dict())

    forgotten = Forgotten(Patches().double())
    with pytest.raises(
        gl.PointError, match=r"hook_x has the axis 'channel', and nothing says its size; .* the `sizes` of"
    ):
        forgotten.run_with_cache(images, names_filter="blocks.0.mixer.hook_x")
