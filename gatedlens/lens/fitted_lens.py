"""FittedLens: what carries a layer's residual stream on to the last layer, a matrix (and a bias) a layer, as it was fitted.

    lens = gl.lens.jacobian_lens(model, texts)                # or relevance_lens, tuned_lens
    lens.read(model, "The cat sat").plot()                    # a LogitLens of the streams it carried on
    lens.save("j.safetensors"); gl.lens.FittedLens.load("j.safetensors")

    lens_l(h) = W_l h + b_l ,   logits_l = unembed(ln_final(lens_l(resid_post_l)))

The logit lens is W = 1 and b = 0, which every lens is at the last layer. A lens is of one model, which its header names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.layers import layers_of
from gatedlens.errors import InputError
from gatedlens.lens.early_logits import EMBED, LogitLens, logit_lens
from gatedlens.markup import card, table
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.model.cache import ActivationCache
from gatedlens.options import checked
from gatedlens.recurrence.autocast import exact
from gatedlens.runs.fitting import check_model, model_said
from gatedlens.runs.saved import check_tensors, read_saved, write_saved

Depth = int | str
SAVED = "lens"
KINDS = ("J-lens", "R-lens", "tuned lens")


def depths_of(model: HookedModel, layers: Any) -> list[Depth]:
    """The depths that a lens is fitted at: None for all below the last layer, whose own lens is the identity."""
    last = model.cfg.n_layers - 1
    if layers is None:
        return [EMBED, *range(last)]
    given = list(layers) if isinstance(layers, list | tuple) else [layers]
    rest = [one for one in given if not (isinstance(one, str) and one == EMBED)]
    found: list[Depth] = [EMBED] if len(rest) < len(given) else []
    found += layers_of(model, rest) if rest else []
    if last in found:
        raise InputError(
            f"layers={layers!r}: {last} is the last layer of {model.cfg.model_name}, whose lens is the identity; it needs no fit."
        )
    if not found:
        raise InputError(f"layers={layers!r} names no layer.")
    return found


def stream_at(depth: Depth) -> str:
    """The point of the residual stream that a depth is."""
    return "blocks.0.hook_resid_pre" if depth == EMBED else f"blocks.{depth}.hook_resid_post"


@dataclass(frozen=True, eq=False, repr=False)
class FittedLens:
    """kind: "J-lens", "R-lens" or "tuned lens". weights: [d_model, d_model] by depth ("embed", or a layer's number); biases:
    [d_model] likewise, none of a lens that is linear. facts: which model, and how it was fitted.
    """

    kind: str
    weights: Mapping[Depth, Float[Tensor, "d_model d_model"]]
    biases: Mapping[Depth, Float[Tensor, " d_model"]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> list[Depth]:
        """The depths that it was fitted at."""
        return list(self.weights)

    def __repr__(self) -> str:
        first, last = self.layers[0], self.layers[-1]
        return f"FittedLens({self.kind} of {self.facts.get('model')}, depths {first} to {last} ({len(self.layers)}))"

    def _repr_html_(self) -> str:
        eye = {depth: torch.eye(len(one), dtype=one.dtype) for depth, one in self.weights.items()}
        off = [(depth, float((one.cpu() - eye[depth]).norm())) for depth, one in self.weights.items()]
        told = {name: said for name, said in self.facts.items() if isinstance(said, str | int | float)}
        return card(f"{self.kind}: {self.facts.get('model')}", told, table(["layer", "|W - 1|"], off))

    @checked
    @torch.no_grad()
    def read(self, model: HookedModel, input: Input | ActivationCache) -> LogitLens:
        """`lens.read(model, text)`: a LogitLens of what the lens makes of each depth, and of the last layer as it is.

        input: text, ids, a pair (ids, mask), images, or a cache with the residual streams. InputError for another model than
        the one that it was fitted to (`carried_over` says that another is meant).
        """
        self._check(model)
        plain = logit_lens(model, input)
        streams = dict(zip(plain.layers, plain.resid, strict=True))
        last = model.cfg.n_layers - 1
        resid = (*(self.carry(streams[depth], depth) for depth in self.layers), streams[last])
        return LogitLens(model, plain.batch, resid, (*self.layers, last), self.kind)

    @checked
    def carry(self, resid: Float[Tensor, "*any d_model"], layer: int | str) -> Float[Tensor, "*any d_model"]:
        """`lens.carry(resid, 3)`: W_3 resid + b_3, in the stream's own dtype."""
        weight = self._at(layer).to(resid.device)
        if resid.shape[-1:] != weight.shape[1:]:
            raise InputError(f"This stream is {list(resid.shape)}; the {self.kind} carries vectors of {len(weight)}.")
        with exact(resid):
            out = resid.to(weight.dtype) @ weight.T
        bias = self.biases.get(layer)
        return (out if bias is None else out + bias.to(out)).to(resid.dtype)

    @checked
    @torch.no_grad()
    def direction(self, model: HookedModel, token: int | str, layer: int | str) -> Float[Tensor, " d_model"]:
        """`lens.direction(model, " whale", 3)`: W_3^T W_U[:, token], along which the stream after layer 3 says the token.

        TransformerLens calls it a lens vector. It is a direction to steer by, and to ablate: `gl.steering.SteeringVector` at
        `blocks.3.hook_resid_post` takes it. The final norm's weight is left out, as there.
        """
        self._check(model)
        chosen = model.to_single_token(token) if isinstance(token, str) else token
        size = model.cfg.d_vocab_out
        if not 0 <= chosen < size:
            raise InputError(f"token={token!r} is out of range: the logits have {size} entries (0 to {size - 1}).")
        weight = self._at(layer)
        return weight.T @ model.W_U[:, chosen].to(weight)

    @checked
    def carried_over(self, model: HookedModel) -> FittedLens:
        """`lens.carried_over(finetuned)`: the same numbers as a lens of another model of the same sizes.

        Its facts keep whose they were. InputError for a model of other sizes.
        """
        here = model_said(model)
        for name in ("layers", "d_model", "outputs"):
            if here[name] != self.facts.get(name):
                raise InputError(
                    f"This {self.kind} is of a model with {self.facts.get(name)} {name}; {here['model']} has {here[name]}."
                )
        whose = self.facts.get("fitted to", self.facts.get("model"))
        return replace(self, facts={**self.facts, **here, "fitted to": whose})

    def _check(self, model: HookedModel) -> None:
        check_model(
            model, self.facts, self.kind, " `lens.carried_over(model)` takes its numbers for another of the same sizes."
        )

    def _at(self, layer: Depth) -> Tensor:
        if layer not in self.weights:
            raise InputError(f"layer={layer!r}: this {self.kind} was fitted at {', '.join(map(str, self.layers))}.")
        return self.weights[layer]

    # -- on disk -----------------------------------------------------------------------------------------------------

    @checked
    def save(self, path: str | Path) -> Path:
        """`lens.save("j.safetensors")`: matrices and biases, with a header that names the model; returns the path."""
        tensors = {f"{depth}.weight": one for depth, one in self.weights.items()}
        tensors |= {f"{depth}.bias": one for depth, one in self.biases.items()}
        return write_saved(path, SAVED, tensors, {"kind": self.kind, "depths": self.layers, "facts": dict(self.facts)})

    @staticmethod
    @checked
    def load(path: str | Path) -> FittedLens:
        """`FittedLens.load("j.safetensors")`: what `save` wrote; CheckpointError for any other file."""
        tensors, fields = read_saved(path, SAVED)
        kind = fields.get("kind", " or ".join(KINDS), lambda value: value in KINDS)
        depths = fields.get("depths", "layers' numbers, or 'embed'", _are_depths)
        affine = kind == "tuned lens"
        wanted = {f"{depth}.weight": "d_model d_model" for depth in depths}
        check_tensors(path, SAVED, tensors, wanted | ({f"{d}.bias": "d_model" for d in depths} if affine else {}))
        weights = {depth: tensors[f"{depth}.weight"] for depth in depths}
        biases = {depth: tensors[f"{depth}.bias"] for depth in depths} if affine else {}
        return FittedLens(kind, weights, biases, dict(fields.fields("facts")))


def _are_depths(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(one == EMBED or type(one) is int for one in value)
