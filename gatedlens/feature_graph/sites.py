"""Sites: points whose value is put together anew from the nodes of a feature graph, and nothing passes by them.

    value[pos] = sum of activation * write + error + bias + W_skip^T x
    p = read . x[pos] + offset          activation = slope p + rest

What is written at a point, and how it is told:

    by a dictionary    its active features are nodes; what they and b_dec leave over is the error node of a position
    by a mixer         one node a position, along what it wrote, w: read = write = w / |w|, activation |w|, and no error
    by what no matrix stands for (an MLP, experts)          the error node of a position is all that it writes

x is what the run had at the point that is read, flat, [pos d_in]. With the scale of a norm in `read`, and what is on and what is
not in `slope` and `rest`, all of it is linear. n nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gatedlens.dictionaries import Dictionary
from gatedlens.errors import InputError
from gatedlens.feature_graph.node import FEATURE, MIXER
from gatedlens.recurrence.scanning import at_least_float32

BEFORE = " before"  # behind the name of a point that a site reads before it writes there


@dataclass(frozen=True)
class Reads:
    """What n targets read at a point (before its own site writes there, where its name says so): p = read . x[pos] + offset,
    and the p that the run had."""

    point: str
    pos: Int[Tensor, " n"]
    read: Float[Tensor, "n d_in"]
    offset: Float[Tensor, " n"]
    p: Float[Tensor, " n"]

    def of(self, x: Float[Tensor, "pos d_in"]) -> Float[Tensor, " n"]:
        """`reads.of(x)`: p for other activations."""
        return (x[self.pos] * self.read).sum(-1) + self.offset

    def some(self, chosen: Int[Tensor, " kept"]) -> Reads:
        """`reads.some(chosen)`: some of them, by their numbers."""
        return Reads(self.point, *(part[chosen] for part in (self.pos, self.read, self.offset, self.p)))


@dataclass(frozen=True)
class Nodes:
    """The n nodes that write at a site, the error nodes aside: what they read, and `write` [n d_out] of an activation of 1."""

    reads: Reads
    feature: Int[Tensor, " n"]
    activation: Float[Tensor, " n"]
    slope: Float[Tensor, " n"]
    write: Float[Tensor, "n d_out"]

    def __len__(self) -> int:
        return len(self.activation)

    def spread(self, amounts: Float[Tensor, " n"], length: int) -> Float[Tensor, "pos d_out"]:
        """`nodes.spread(amounts, length)`: what they write at each of `length` positions with these activations."""
        total = self.write.new_zeros(length, self.write.shape[1])
        return total.index_add(0, self.reads.pos, amounts.unsqueeze(-1) * self.write)

    def some(self, chosen: Int[Tensor, " kept"]) -> Nodes:
        """`nodes.some(chosen)`: some of them, by their numbers."""
        parts = (self.feature, self.activation, self.slope, self.write)
        return Nodes(self.reads.some(chosen), *(part[chosen] for part in parts))


@dataclass(frozen=True)
class Site:
    """A point where nodes write: see the head of this file. `leaf` [pos d_out] is what the run had there, W_skip's part aside."""

    point: str
    layer: int
    kind: str
    leaf: Float[Tensor, "pos d_out"]
    nodes: Nodes | None = None
    bias: Float[Tensor, "pos d_out"] | None = None
    skip: Float[Tensor, "d_in d_out"] | None = None
    dictionary: Dictionary | None = None
    parts: Int[Tensor, "part width"] | None = (
        None  # the numbers that a dictionary reads as one vector, in each of its parts
    )

    @property
    def names(self) -> int:
        """`site.names`: how many nodes it could have at a position: the features of all parts of a dictionary."""
        return 1 if self.dictionary is None or self.parts is None else self.dictionary.n_features * len(self.parts)

    @property
    def error(self) -> Float[Tensor, "pos d_out"] | None:
        """`site.error`: what its nodes and its bias leave over; None where nothing can be left."""
        if self.kind == MIXER:
            return None
        left = self.leaf if self.nodes is None else self.leaf - self.nodes.spread(self.nodes.activation, len(self.leaf))
        return left if self.bias is None else left - self.bias

    def now(self, x: Float[Tensor, "pos d_in"]) -> Float[Tensor, " n"]:
        """`site.now(x)`: the activations of its nodes for another x, each on or off as it is then."""
        assert self.nodes is not None
        if self.dictionary is None or self.parts is None:
            return self.nodes.reads.of(x)
        features = self.dictionary.encode(x[:, self.parts]).flatten(1)
        return features[self.nodes.reads.pos, self.nodes.feature].to(x)

    def some(self, chosen: Int[Tensor, " kept"]) -> Site:
        """`site.some(chosen)`: with some of its nodes; what the others write is in its error then."""
        return self if self.nodes is None else replace(self, nodes=self.nodes.some(chosen))


def of_dictionary(
    dictionary: Dictionary,
    point: str,
    out_point: str,
    layer: int,
    x: Float[Tensor, "pos d_in"],
    y: Float[Tensor, "pos d_out"],
    read: Int[Tensor, "part width"],
    written: Int[Tensor, "part out_width"],
) -> Site:
    """`of_dictionary(sae, "blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out", 1, x, y, read, written)`: its site.

    x, y: what the run had at the points that it reads and writes; read, written: which of these numbers make one vector, a part
    (one of all; of a dictionary of heads one a head). Its features are counted on from part to part.
    """
    x, y = at_least_float32(x), at_least_float32(y)
    ends = (("reads", dictionary.d_in, read, point), ("writes", dictionary.d_out, written, out_point))
    for what, width, of, where in ends:
        if width != of.shape[1]:
            raise InputError(f"The dictionary {what} {width} numbers at {where}, where the model has {of.shape[1]}.")
    W_enc, b_enc, W_dec, b_dec = (
        getattr(dictionary, name).detach().to(x) for name in ("W_enc", "b_enc", "W_dec", "b_dec")
    )
    n, _, scale = dictionary.normalised(x[:, read])
    centre = b_dec if dictionary.centred else n.new_zeros(dictionary.d_in)
    scale = scale.expand(*n.shape[:2], 1)
    back = scale if dictionary.kind == "sae" else torch.ones_like(scale)  # what is undone behind the decoder
    sums = (n - centre) @ W_enc + b_enc
    features, (slope, _) = dictionary.activation(sums), dictionary.activation.held(sums)
    at = features.nonzero(as_tuple=True)
    pos, part, feature = at
    directions = W_enc.T[feature]
    # of x less its mean is what the direction less its mean is of x
    own = directions - directions.mean(-1, keepdim=True) if dictionary.normalise == "layer_norm" else directions
    reads = Reads(
        point + BEFORE if point == out_point else point,
        pos,
        _laid(own / scale[pos, part], read[part], x.shape[1]),
        b_enc[feature] - directions @ centre,
        sums[at],
    )
    write = _laid(W_dec[feature] * back[pos, part], written[part], y.shape[1])
    number = part * dictionary.n_features + feature
    nodes = Nodes(reads, number, features[at], slope.expand_as(sums)[at], write)
    bias = _laid((b_dec * back).flatten(1), written.flatten().expand(len(y), -1), y.shape[1])
    skip = None if dictionary.W_skip is None else x.new_zeros(x.shape[1], y.shape[1])
    if skip is not None and dictionary.W_skip is not None:
        for rows, columns in zip(read, written, strict=True):
            skip[rows.unsqueeze(1), columns] = dictionary.W_skip.detach().to(x)
    leaf = y if skip is None else y - x @ skip
    return Site(out_point, layer, FEATURE, leaf, nodes, bias, skip, dictionary, read)


def _laid(
    values: Float[Tensor, "n width"], places: Int[Tensor, "n width"], width: int
) -> Float[Tensor, "n all_of_them"]:
    """Vectors with each number where it stands in all that a point holds, 0 elsewhere."""
    return values.new_zeros(len(values), width).scatter(1, places, values)


def of_mixer(point: str, layer: int, y: Float[Tensor, "pos d_model"]) -> Site:
    """`of_mixer("blocks.1.hook_mixer_out", 1, y)`: the site of a mixer whose writes y are nodes; a write of 0 is none."""
    y = at_least_float32(y)
    size = y.norm(dim=-1)
    pos = size.nonzero().squeeze(-1)
    along, size = y[pos] / size[pos].unsqueeze(-1), size[pos]
    reads = Reads(point + BEFORE, pos, along, torch.zeros_like(size), size)
    return Site(point, layer, MIXER, y, Nodes(reads, torch.zeros_like(pos), size, torch.ones_like(size), along))
