"""A Dictionary: a sparse autoencoder, a transcoder or a crosscoder, of one point or several.

    n = normalised(x) [- b_dec, where it is centred]
    f = activation(n W_enc + b_enc)                      # dictionary.encode(x)              [..., feature]
    x_hat = f W_dec + b_dec                              # dictionary.decode(f)              [..., d_out]
    y_hat = unnormalised(x_hat) [+ x W_skip]              # dictionary.reconstruct(f, x), dictionary(x)

`point` is what it reads, `out_point` what it writes: the same (a sparse autoencoder), another (a transcoder), or several of each,
laid side by side in the order of their names (a crosscoder): x is [..., d_in], d_in the sum of their widths.

    sae = Dictionary(W_enc, W_dec, b_enc, b_dec, point="blocks.3.mixer.hook_gated", activation=TopK(32))
    features = sae.encode(cache["blocks.3.mixer.hook_gated"])
    sae.save("gated.safetensors"); Dictionary.load("gated.safetensors")

A point of more axes than one behind pos is read flat, all of it at once, or a part at a time: axes=("value",) is a dictionary of
one head's values, read at every head (features [batch pos head feature]), index={"head": 2} that of one head alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from jaxtyping import Float
from torch import Tensor, nn

from gatedlens.dictionaries.activation import ACTIVATIONS, Activation, ReLU
from gatedlens.errors import CheckpointError, InputError, did_you_mean
from gatedlens.files import in_json
from gatedlens.markup import card, table
from gatedlens.options import checked, is_many, is_whole
from gatedlens.runs.saved import check_tensors, read_saved, write_saved

__all__ = ["Dictionary"]

NORMALISE = ("none", "layer_norm", "constant_norm")
# For editors: what is none of these gets an error that says more.
if TYPE_CHECKING:
    Normalise: TypeAlias = Literal["none", "layer_norm", "constant_norm"]
    Function: TypeAlias = Activation | None
    Names: TypeAlias = str | Sequence[str]
else:
    Normalise = Function = Names = Any
EPS = 1e-5  # of layer_norm, as SAELens has it: added to the standard deviation
SAVED = "dictionary"
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip")


class Dictionary(nn.Module):
    """`Dictionary(W_enc, W_dec, b_enc, b_dec, point="blocks.3.hook_resid_pre", activation=TopK(32))`: features of activations.

    W_enc [d_in feature], b_enc [feature], W_dec [feature d_out], b_dec [d_out], W_skip [d_in d_out] or None; a bias that is left
    out is 0. point: the name that it reads, or several, with their widths in `d_ins`; out_point: what it writes, else `point`,
    with `d_outs`. centred: b_dec is taken off before it is read. normalise: "layer_norm" takes the mean off x and divides by the
    standard deviation, "constant_norm" scales x to the length sqrt(d_in); an autoencoder undoes either behind its decoder. axes,
    index: see above. facts: what a header tells of it, model and seed say.

    Its parameters ask for no gradient until it is trained. InputError for weights that do not fit one another.
    Source: Bricken et al. 2023 (Towards monosemanticity); transcoders: Dunefsky et al. 2024, arXiv 2406.11944; crosscoders:
    Lindsey et al. 2024.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    W_skip: nn.Parameter | None

    @checked
    def __init__(
        self,
        W_enc: Float[Tensor, "d_in feature"],
        W_dec: Float[Tensor, "feature d_out"],
        b_enc: Float[Tensor, " feature"] | None = None,
        b_dec: Float[Tensor, " d_out"] | None = None,
        W_skip: Float[Tensor, "d_in d_out"] | None = None,
        *,
        point: Names,
        out_point: Names | None = None,
        activation: Function = None,
        centred: bool = False,
        normalise: Normalise = "none",
        axes: Sequence[str] | None = None,
        index: Mapping[str, int] | None = None,
        d_ins: Sequence[int] | None = None,
        d_outs: Sequence[int] | None = None,
        facts: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        given = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "W_skip": W_skip}
        full = _fitting(given)
        for name, tensor in full.items():
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
        self.points = names_of("point", point)
        self.out_points = self.points if out_point is None else names_of("out_point", out_point)
        self.d_ins = _widths("d_ins", self.d_in, d_ins, self.points)
        self.d_outs = _widths("d_outs", self.d_out, d_outs, self.out_points)
        self.activation = ReLU() if activation is None else activation
        if not isinstance(self.activation, Activation):
            raise InputError(
                f"activation={activation!r:.80}: give an activation, gl.dictionaries.TopK(32) say; the kinds are "
                f"{', '.join(kind.__name__ for kind in ACTIVATIONS.values())}."
            )
        self.activation.check(self.n_features)
        if normalise not in NORMALISE:
            raise InputError(
                f"normalise={normalise!r}: it is one of {', '.join(NORMALISE)}.{did_you_mean(normalise, NORMALISE)}"
            )
        if centred and self.d_in != self.d_out:
            raise InputError(
                f"centred=True takes b_dec [{self.d_out}] off what is read, which is [{self.d_in}]: a transcoder of two widths "
                "is not centred."
            )
        if normalise != "none" and self.kind != "sae":
            raise InputError(
                f"normalise={normalise!r} is undone behind the decoder, which a {self.kind} cannot: 'none'."
            )
        self.centred, self.normalise = centred, normalise
        self.axes = None if axes is None else tuple(axes)
        self.index = dict(index or {})
        if not all(isinstance(axis, str) for axis in self.axes or ()) or self.axes == ():
            raise InputError(f"axes={axes!r:.80}: name axes of the point, ('value',) say; None: all of them.")
        if not all(isinstance(axis, str) and is_whole(at) for axis, at in self.index.items()):
            raise InputError(f"index={index!r:.80}: a number of an axis, {{'head': 2}} say.")
        self.facts = dict(facts or {})
        self.eval()

    # -- what it is ----------------------------------------------------------------------------------------------

    @property
    def d_in(self) -> int:
        """`dictionary.d_in`: how wide what it reads is, all its points together."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """`dictionary.d_out`: how wide what it writes is, all its points together."""
        return self.W_dec.shape[1]

    @property
    def n_features(self) -> int:
        """`dictionary.n_features`: how many features it has."""
        return self.W_enc.shape[1]

    @property
    def point(self) -> str:
        """`dictionary.point`: the point that it reads; of several the last, behind which its features stand."""
        return self.points[-1]

    @property
    def out_point(self) -> str:
        """`dictionary.out_point`: the point that it writes; of several the first."""
        return self.out_points[0]

    @property
    def kind(self) -> Literal["sae", "transcoder", "crosscoder"]:
        """`dictionary.kind`: "sae" writes what it reads, "transcoder" another point, "crosscoder" has several."""
        if len(self.points) > 1 or len(self.out_points) > 1:
            return "crosscoder"
        return "sae" if self.points == self.out_points else "transcoder"

    def __repr__(self) -> str:
        to = "" if self.points == self.out_points else f" -> {', '.join(self.out_points)}"
        widths = f"{self.d_in} -> {self.n_features} -> {self.d_out}"
        return f"Dictionary({self.kind} {', '.join(self.points)}{to}, {widths}, {self.activation!r})"

    def _repr_html_(self) -> str:
        facts = {"features": self.n_features, "reads": ", ".join(self.points), "writes": ", ".join(self.out_points)}
        rows = [(name, said) for name, said in {"activation": repr(self.activation), **self.facts}.items()]
        return card(f"Dictionary: {self.kind}", facts, table(["", ""], rows))

    # -- what it does --------------------------------------------------------------------------------------------

    def encode(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... feature"]:
        """`dictionary.encode(x)`: the features of activations, [..., feature], in the dictionary's dtype.

        InputError for activations of another width.
        """
        return self.activation(self.sums(x))

    def sums(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... feature"]:
        """`dictionary.sums(x)`: p = n W_enc + b_enc, what the activation makes features of, [..., feature]."""
        if x.shape[-1] != self.d_in:
            raise InputError(
                f"These activations are {x.shape[-1]} wide; the dictionary of {', '.join(self.points)} reads {self.d_in}."
            )
        n = self.normalised(x.to(self.W_enc.dtype))[0]
        if self.centred:
            n = n - self.b_dec
        return n @ self.W_enc + self.b_enc

    def decode(self, features: Float[Tensor, "... feature"]) -> Float[Tensor, "... d_out"]:
        """`dictionary.decode(features)`: f W_dec + b_dec, [..., d_out].

        That is the reconstruction where nothing is normalised and there is no W_skip; `reconstruct` minds both.
        """
        return features @ self.W_dec + self.b_dec

    def reconstruct(
        self, features: Float[Tensor, "... feature"], x: Float[Tensor, "... d_in"]
    ) -> Float[Tensor, "... d_out"]:
        """`dictionary.reconstruct(features, x)`: what stands for `x` (or for what follows from it) with these features.

        x: what was read, whose mean and length are put back, and which W_skip reads.
        """
        out = self.decode(features)
        x = x.to(self.W_enc.dtype)
        if self.normalise != "none" and self.kind == "sae":  # a transcoder's output has a mean and a length of its own
            _, mean, scale = self.normalised(x)
            out = out * scale + mean
        return out if self.W_skip is None else out + x @ self.W_skip

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """`dictionary.forward(x)`, `dictionary(x)`: the reconstruction, [..., d_out]."""
        return self.reconstruct(self.encode(x), x)

    def normalised(self, x: Float[Tensor, "... d_in"]) -> tuple[Tensor, Tensor, Tensor]:
        """`n, mean, scale = dictionary.normalised(x)`: what is encoded, with x = n * scale + mean."""
        zero, one = x.new_zeros(()), x.new_ones(())
        if self.normalise == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            scale = (x - mean).std(-1, keepdim=True) + EPS
            return (x - mean) / scale, mean, scale
        if self.normalise == "constant_norm":
            scale = x.norm(dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
            return x / scale, zero, scale
        return x, zero, one

    def written(self, change: Float[Tensor, "... feature"], x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """`dictionary.written(f_new - f, x)`: the change of the reconstruction with the features; exactly 0 where they do not."""
        out = change @ self.W_dec
        if self.normalise != "none" and self.kind == "sae":
            out = out * self.normalised(x.to(self.W_enc.dtype))[2]
        return out

    @checked
    def at(
        self,
        point: Names | None = None,
        out_point: Names | None = None,
        model: str | None = None,
    ) -> Dictionary:
        """`dictionary.at("blocks.5.hook_resid_pre", model="mine")`: the same weights, said to be of another point or model.

        What is None stays; an autoencoder stays one. Without model the new one is said to be of none.
        """
        reads = self.points if point is None else point
        writes = (None if self.kind == "sae" else self.out_points) if out_point is None else out_point
        facts = {name: said for name, said in self.facts.items() if name != "model"}
        return Dictionary(
            self.W_enc,
            self.W_dec,
            self.b_enc,
            self.b_dec,
            self.W_skip,
            point=reads,
            out_point=writes,
            activation=copy.deepcopy(self.activation),
            centred=self.centred,
            normalise=self.normalise,
            axes=self.axes,
            index=self.index,
            d_ins=self.d_ins,
            d_outs=self.d_outs,
            facts=facts if model is None else {**facts, "model": model},
        )

    # -- on disk -------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """`dictionary.save("gated.safetensors")`: weights as safetensors, with a header that says all else; returns the path."""
        said = {
            "points": self.points,
            "out_points": self.out_points,
            "d_ins": self.d_ins,
            "d_outs": self.d_outs,
            "activation": self.activation.said(),
            "centred": self.centred,
            "normalise": self.normalise,
            "axes": self.axes,
            "index": self.index,
            "facts": self.facts,
        }
        return write_saved(path, SAVED, self.state_dict(), in_json(said))

    @staticmethod
    def load(path: str | Path) -> Dictionary:
        """`Dictionary.load("gated.safetensors")`: what `save` wrote. CheckpointError for a file that holds none.

        `gl.dictionaries.load` reads other tools' folders.
        """
        tensors, fields = read_saved(path, SAVED, {"W_enc": "d_in feature", "W_dec": "feature d_out"})
        said = dict(fields.fields("activation"))
        kind: Callable[..., Activation] | None = ACTIVATIONS.get(str(said.pop("kind", "")))
        held = {name.partition(".")[2]: t for name, t in tensors.items() if name.startswith("activation.")}
        try:
            if kind is None:
                raise fields.wrong("activation", f"one of {', '.join(ACTIVATIONS)}")
            axes = fields.get("axes", "a list of axes or null", lambda v: v is None or isinstance(v, list))
            found = Dictionary(
                **{name: tensors[name] for name in WEIGHTS if name in tensors},
                point=fields.words("points"),
                out_point=fields.words("out_points"),
                activation=kind(**said, **held),
                centred=fields.get("centred", "true or false", lambda v: isinstance(v, bool)),
                normalise=fields.get("normalise", "a word", lambda v: isinstance(v, str)),
                axes=axes,
                index=fields.fields("index"),
                d_ins=fields.sizes("d_ins"),
                d_outs=fields.sizes("d_outs"),
                facts=fields.fields("facts"),
            )
        except (InputError, TypeError) as error:
            raise CheckpointError(f"{path} is no saved {SAVED}: {error}") from error
        check_tensors(path, SAVED, tensors, found.state_dict())
        return found


def names_of(option: str, given: Names) -> tuple[str, ...]:
    """`names_of("point", "hook_embed")`: one name or several, as a tuple; InputError for what is none."""
    names: tuple[Any, ...] = (given,) if isinstance(given, str) or not is_many(given) else tuple(given)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise InputError(f"{option}={given!r:.80}: name a hook point, 'blocks.3.hook_resid_pre' say, or several.")
    if len(set(names)) < len(names):
        raise InputError(f"{option}={list(names)}: a point stands there twice.")
    return names


def _widths(option: str, whole: int, given: Sequence[int] | None, points: tuple[str, ...]) -> tuple[int, ...]:
    """How wide each point is; together as wide as the weights."""
    widths = (whole,) if given is None and len(points) == 1 else tuple(int(width) for width in given or ())
    if len(widths) != len(points) or sum(widths) != whole:
        raise InputError(
            f"{option}={list(widths) if given is not None else None}: the weights are {whole} wide for {len(points)} points, so "
            f"give {len(points)} widths that sum to {whole}."
        )
    return widths


def _fitting(given: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The weights with zeros for biases that were left out; InputError for those that do not fit."""
    W_enc, W_dec = given["W_enc"], given["W_dec"]
    for name, tensor in given.items():
        if tensor is not None and (not isinstance(tensor, Tensor) or not tensor.is_floating_point()):
            raise InputError(f"{name} is {tensor!r:.60}; a weight is a tensor of floats.")
    assert W_enc is not None and W_dec is not None
    if W_enc.ndim != 2 or W_dec.ndim != 2 or W_enc.shape[1] != W_dec.shape[0]:
        raise InputError(
            f"W_enc is {list(W_enc.shape)} and W_dec {list(W_dec.shape)}; they are [d_in, feature] and [feature, d_out]."
        )
    (d_in, feature), d_out = W_enc.shape, W_dec.shape[1]
    shapes = {"b_enc": (feature,), "b_dec": (d_out,), "W_skip": (d_in, d_out)}
    full = dict(given)
    for name, shape in shapes.items():
        tensor = given[name]
        if tensor is None:
            full[name] = None if name == "W_skip" else W_enc.new_zeros(shape)
        elif tensor.shape != shape:
            raise InputError(f"{name} is {list(tensor.shape)}; with W_enc {list(W_enc.shape)} it is {list(shape)}.")
    return {name: tensor if tensor is None else tensor.detach().to(W_enc) for name, tensor in full.items()}
