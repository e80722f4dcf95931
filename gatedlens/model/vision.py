"""HookedVisionModel: a HookedModel that reads images, patch by patch, and says a class.

    logits = model(images)                                     # [batch, class]; images as model.preprocess makes them, or PIL
    loss = model(images, return_type="loss", labels=[3])
    logits, cache = model.run_with_cache(images); model.grid.fold(cache["dt", 0].mean(-1))

An architecture says where the patches, the class tokens and the head are, and what its blocks are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatedlens.address.point import Point
from gatedlens.errors import InputError, did_you_mean
from gatedlens.model import placement
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Array, Batch, ForwardOutput, Input, Option, Output, check_return_type
from gatedlens.model.config import HookedConfig
from gatedlens.model.image import IMAGENET_MEAN, IMAGENET_STD, Grid, preprocess, preprocess_mask
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.recurrence.transforms import anywhere, plain

if TYPE_CHECKING:  # Pillow is imported where an image is read
    from PIL.Image import Image
else:
    Image = Any

SEQUENCE_OPTIONS = {
    "attention_mask": "every image has the same positions, so there is no padding",
    "padding_side": "every image has the same positions, so there is no padding",
    "state": "an image is read whole, from both ends, so there is no state to go on from",
    "return_state": "an image is read whole, from both ends, so there is no state to go on from",
    "position_ids": "the positions are those of the patches, `model.grid`",
    "prepend_bos": "it reads images, not text",
    "tokens": "it reads images, not text; a loss wants labels=...",
    "loss_per_token": "a loss belongs to an image, not to a token",
}


@dataclass(kw_only=True)
class VisionConfig(HookedConfig):
    """What the cfg of any vision model says. d_vocab is num_classes, n_ctx the number of positions, `cls` where the class token
    stands ("middle", "head", "tail", "double", "none") and `pool` what is read without one ("mean", or "none": the last).
    """

    num_classes: int
    cls: str = "middle"
    pool: str = "mean"
    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    stride: tuple[int, int] = (16, 16)
    n_channels: int = 3
    image_mean: tuple[float, ...] = IMAGENET_MEAN
    image_std: tuple[float, ...] = IMAGENET_STD

    @property
    def grid(self) -> Grid:
        """Where the patches and the class tokens are."""
        rows, columns = (
            (i - p) // s + 1 for i, p, s in zip(self.image_size, self.patch_size, self.stride, strict=True)
        )
        n = rows * columns
        cls = {"middle": (n // 2,), "head": (0,), "tail": (n,), "double": (0, n + 1), "none": ()}[self.cls]
        return Grid(rows, columns, cls, self.patch_size, self.stride)

    @property
    def sizes(self) -> dict[str, int]:
        grid = self.grid
        return {**super().sizes, "class": self.num_classes, "patch": grid.rows * grid.columns}


class HookedVisionModel(HookedModel):
    """What every vision model shares; an architecture adds its rows, its blocks and where its patches and its head are."""

    first_points = (
        Point("hook_patch_embed", "batch patch d_model", "patch_embedding(image), row by row", "the patch embedding"),
        Point(
            "hook_embed",
            "batch pos d_model",
            "patch_embed with the class token in its place + positions",
            "the embedding",
        ),
    )
    last_points = (
        Point("hook_features", "batch d_model", "ln_final.out at the class token, or pooled without one", "the head"),
        Point("hook_logits", "batch class", "head(features)", "the head"),
    )
    cfg: VisionConfig

    # -- what an architecture gives ------------------------------------------------------------------------------

    @property
    def patch_embedding(self) -> Any:
        """The nn.Conv2d that makes a patch of the image a vector."""
        raise NotImplementedError

    @property
    def stem(self) -> Any:
        """The module that it stands in, or itself."""
        return self.patch_embedding

    @property
    def unembedding(self) -> Any:
        """The nn.Linear that reads classes off the features."""
        raise NotImplementedError

    @property
    def position_embedding(self) -> Float[Tensor, "1 pos d_model"] | None:
        """What is added to the patches and class tokens; None without absolute positions. A parameter of `wrapped` itself."""
        return None

    def class_tokens(self) -> tuple[Float[Tensor, "1 1 d_model"], ...]:
        """`model.class_tokens()`: the parameters, of `wrapped` itself, that stand at `grid.cls`."""
        return ()

    def stream(self, embedded: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """`model.stream(embedded)`: the residual stream that an embedding starts (in another dtype, where the architecture
        has one).
        """
        return embedded

    def ends(self) -> dict[str, tuple[Any, type[nn.Module]]]:
        return {"patch embedding": (self.patch_embedding, nn.Conv2d), "head": (self.unembedding, nn.Linear)}

    @classmethod
    def snippet(cls) -> str:
        """`HookedVisionModel.snippet()`: code that reads one point of a vision model, for the catalogue."""
        return (
            "import torch\n\n"
            "logits, cache = model.run_with_cache(torch.zeros(1, *model.image_shape))\n"
            'resid = cache["blocks.0.hook_resid_post"]  # batch pos d_model\n'
            "print(model.grid.fold(resid.norm(dim=-1)))  # a map of the image: [batch, row, column]"
        )

    @property
    def grid(self) -> Grid:
        """Which position is which patch, and which is the class token."""
        return self.cfg.grid

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        return (self.cfg.n_channels, *self.cfg.image_size)

    def preprocess(self, image: Image) -> Float[Tensor, "channels height width"]:
        """`model.preprocess(Image.open(path))`: a PIL image as the official evaluation prepares it."""
        return preprocess(image, self.cfg.image_size, self.cfg.image_mean, self.cfg.image_std)

    def preprocess_mask(self, mask: Array) -> Int[Tensor, "height width"]:
        """`model.preprocess_mask(mask)`: what the model sees of an image's mask [height, width], cut as `preprocess` cuts."""
        return preprocess_mask(mask, self.cfg.image_size)

    # -- forward -------------------------------------------------------------------------------------------------

    def prepare(  # type: ignore[override]  # names the options that the base takes as **options
        self,
        input: Input,
        return_type: str | None = "logits",
        labels: int | Array | None = None,
        *,
        start_at_layer: int | None = None,
        **options: Option,
    ) -> tuple[Batch, dict[str, Any]]:
        """Images (or, with start_at_layer, a residual stream), and the options of `forward` still to be used."""
        self._refuse_sequence_options(options)
        rest = {"return_type": return_type, "labels": labels, "start_at_layer": start_at_layer, **options}
        if isinstance(input, Batch):
            return input, rest
        if start_at_layer is not None:
            return Batch(self._check_resid(input), is_resid=True), rest
        return Batch(self._check_images(input)), rest

    def _check_images(self, input: Input | None) -> Float[Tensor, "batch channels height width"]:
        if not isinstance(input, Tensor):
            images: list[Any] = list(input) if isinstance(input, Sequence) and not isinstance(input, str) else [input]
            if not images:
                raise InputError("There is no image in this batch: the list is empty.")
            input = torch.stack([self.preprocess(image) for image in images])
        if input.ndim == 3:
            input = input.unsqueeze(0)
        wanted = self.image_shape
        if not input.is_floating_point() or tuple(input.shape[1:]) != wanted:
            raise InputError(
                f"{self.cfg.model_name} reads float images [batch, {', '.join(map(str, wanted))}]; this is "
                f"{input.dtype} {list(input.shape)}. `model.preprocess(pil_image)` makes one."
            )
        if input.shape[0] == 0:
            raise InputError(f"There is no image in this batch: {list(input.shape)}.")
        return input.to(device=placement.device_of(self.stem), dtype=self.patch_embedding.weight.dtype)

    def _check_resid(self, resid: Any) -> Float[Tensor, "batch pos d_model"]:
        wanted = (self.cfg.n_ctx, self.cfg.d_model)
        if not isinstance(resid, Tensor) or not resid.is_floating_point() or tuple(resid.shape[1:]) != wanted:
            got = f"{resid.dtype} {list(resid.shape)}" if isinstance(resid, Tensor) else type(resid).__name__
            raise InputError(
                f"start_at_layer runs from a residual stream, floats of [batch, {wanted[0]}, {wanted[1]}]; this is "
                f"{got}."
            )
        return resid

    def positions(self, batch: Batch) -> int:
        return self.grid.length

    def reads_from(self, batch: Batch) -> Float[Tensor, "batch pos"]:
        """The class tokens, in equal parts; without one what the pool reads, as in `classify`."""
        shares = torch.zeros(len(batch.value), self.grid.length, device=batch.value.device, dtype=torch.float64)
        places = list(self.grid.cls) or ([-1] if self.cfg.pool != "mean" else list(range(self.grid.length)))
        shares[:, places] = 1 / len(places)
        return shares

    if TYPE_CHECKING:  # one signature for each kind of output

        @overload
        def forward(
            self,
            input: Input,
            return_type: Literal["logits", "loss"] = "logits",
            labels: int | Array | None = None,
            start_at_layer: int | None = None,
            stop_at_layer: int | None = None,
        ) -> Tensor: ...
        @overload
        def forward(
            self, input: Input, *, return_type: Literal["both"], labels: int | Array | None = None
        ) -> Output: ...
        @overload
        def forward(self, *args: Any, **options: Any) -> Any: ...

    def forward(
        self,
        input: Input,
        return_type: str | None = "logits",
        labels: int | Array | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        **unsupported: Option,
    ) -> ForwardOutput:
        """`logits = model(images)`, which is `model.forward(images)`: logits [batch, class], the loss, both (an Output)
        or None, by `return_type`.

        input: images [batch, channels, height, width], one PIL image or several; with `start_at_layer` the residual
        stream [batch, pos, d_model] that enters that block. labels [batch]: the classes, for a loss (mean cross
        entropy). stop_at_layer: stop before that block and return the residual stream.
        """
        check_return_type(return_type)
        batch, _ = self.prepare(input, return_type, labels, start_at_layer=start_at_layer, **unsupported)
        run = self.begin(batch, None, False)
        with self._carrying(run):
            resid = batch.value if batch.is_resid else self.embed(batch.value)
            resid = self.through_blocks(resid, run, start_at_layer if batch.is_resid else None, stop_at_layer)
            if stop_at_layer is not None:
                return resid
            normed = self.there(self.ln_final.weights, self.ln_final, resid)
            if return_type is None and self.hook_features.at_rest() and self.hook_logits.at_rest():
                return None
            logits = self.classify(normed)
        if return_type in ("logits", None):
            return None if return_type is None else logits
        loss = F.cross_entropy(logits, self._check_labels(labels, logits.shape[0]).to(logits.device))
        return loss if return_type == "loss" else Output(logits, loss)

    if TYPE_CHECKING:
        __call__ = forward  # type: ignore[assignment]  # by the same signatures, which take images alone

    def embed(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch pos d_model"]:
        """`model.embed(images)`: the residual stream that images start: patches, class tokens in their places, absolute
        positions.
        """
        patches = self.hook_patch_embed(self.there(self.stem, self._patches, images))
        return self.there([self.wrapped, self.patch_embedding], self._placed, patches)

    def _patches(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch patch d_model"]:
        proj = self.patch_embedding
        return F.conv2d(images, proj.weight, proj.bias, proj.stride).flatten(2).transpose(1, 2)

    def _placed(self, tokens: Float[Tensor, "batch patch d_model"]) -> Float[Tensor, "batch pos d_model"]:
        for at, token in zip(self.grid.cls, self.class_tokens(), strict=True):
            tokens = torch.cat([tokens[:, :at], token.expand(len(tokens), -1, -1), tokens[:, at:]], dim=1)
        places = self.position_embedding
        return self.stream(self.hook_embed(tokens if places is None else tokens + places))

    def classify(self, normed: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch class"]:
        """`model.classify(normed)`: logits, at least float32, of what the class token (or, without one, the pool) reads off."""
        if self.grid.cls:
            features = torch.stack([normed[:, place] for place in self.grid.cls], dim=1).mean(1)
        else:
            features = normed.mean(1) if self.cfg.pool == "mean" else normed[:, -1]
        return self.hook_logits(self.there(self.unembedding, self.unembed, self.hook_features(features)))

    def unembed(self, normed: Float[Tensor, "... d_model"]) -> Float[Tensor, "... class"]:
        """Logits, at least float32: what the head reads off the features, or off any position."""
        head = self.unembedding
        return at_least_float32(F.linear(normed.to(head.weight.dtype), head.weight, head.bias))

    def pooling(self) -> Float[Tensor, " pos"]:
        """As `classify` reads: the class token (the mean of two), without one the mean of all or the last."""
        weights = torch.zeros(self.grid.length, dtype=torch.float64, device=self.cfg.device)
        read = list(self.grid.cls) or (slice(None) if self.cfg.pool == "mean" else [-1])
        weights[read] = 1
        return weights / weights.sum()

    def _check_labels(self, labels: Any, rows: int) -> Int[Tensor, " batch"]:
        if labels is None:
            raise InputError("A loss needs labels=..., the class of each image.")
        labels = torch.as_tensor(labels).reshape(-1)
        if labels.is_floating_point() or labels.shape[0] != rows:
            raise InputError(
                f"labels are one class number an image, [{rows}]; these are {labels.dtype} {list(labels.shape)}."
            )
        if anywhere((labels < 0) | (labels >= self.cfg.num_classes)):
            given = plain(labels)
            raise InputError(
                f"labels run from {given.min()} to {given.max()}; the classes are 0 to {self.cfg.num_classes - 1}."
            )
        return labels.long()

    def generate(self, *args: object, **kwargs: object) -> NoReturn:
        """`model.generate()` is a language model's: InputError."""
        raise InputError(
            f"generate: {self.title} classifies images, it has no next token. `model(images)` gives logits."
        )

    # -- weights by TransformerLens's names ----------------------------------------------------------------------

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.unembedding.weight.T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        return self.unembedding.bias

    def tokens_to_residual_directions(self, tokens: int | Int[Tensor, ...]) -> Float[Tensor, "... d_model"]:
        """`model.tokens_to_residual_directions(3)`: the columns of W_U of some classes: what the class token (after
        ln_final) is read along.
        """
        return self.W_U.T[torch.as_tensor(tokens, device=self.W_U.device)]

    def _refuse_sequence_options(self, options: Mapping[str, Any]) -> None:
        """InputError for options that only language models have; None and False ask for nothing."""
        for name, value in options.items():
            if name in SEQUENCE_OPTIONS and value is not None and value is not False:
                raise InputError(f"{name} was given to a {self.title}: {SEQUENCE_OPTIONS[name]}.")
            if name not in SEQUENCE_OPTIONS and name != "stop_at_layer":
                known = ("return_type", "labels", "start_at_layer", "stop_at_layer")
                raise TypeError(f"A {self.title}'s forward has no option {name!r}.{did_you_mean(name, known)}")
