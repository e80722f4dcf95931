"""The block: branches at the residual stream, one after the other or side by side, as data.

    Block(w, rows, Sub("mixer", mixer, ln1), Sub("mlp", mlp, ln2, ln="ln2"))

    resid_pre -> mixer_in -> ln1 -> mixer -> mixer_out -+-> resid_mid -> mlp_in -> ln2 -> mlp -> mlp_out -+-> resid_post
        `-----------------------------------------------'       `----------------------------------------'

Branches that stand in a tuple are parallel: they read the same stream, and all are added to it. `residual_rows` gives the rows
of such a block. b batch, l pos.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.errors import InputError
from gatedlens.model.behind import Behind
from gatedlens.model.hookpoint import EXPERTS, MLP, NORM, Part
from gatedlens.model.mixer import TokenMixing
from gatedlens.model.norm import Norm
from gatedlens.model.run import Run
from gatedlens.model.writing import Writing


class Sub(NamedTuple):
    """One branch at the residual stream: resid + scale * after(part(norm(resid))).

    `name` is in its points at the stream, hook_{name}_in and hook_{name}_out; `place` (None: the name) and `ln` are where part
    and norm stand in the block. A part is called with (x, run); norm and after may be None, the identity. What mixes tokens has
    no `scale` here: it multiplies its output itself, since its `output_weights` say what it gives; what is `after` it is
    `Behind`, and `Block.writing` says what is written.
    """

    name: str
    part: Part
    norm: Norm | None = None
    ln: str = "ln1"
    place: str | None = None
    after: Behind | None = None
    after_ln: str = "ln1_post"
    scale: float = 1.0


class Inner(NamedTuple):
    """`Inner("shared", "shared.attn", "shared.hook_attn_out", "mixer", (ATTENTION, MLP))`: a part of a block that mixes tokens
    for what one branch reads, and writes to no stream itself.

    It reads `{name}.hook_read`, a copy of the stream, and gives `{name}.hook_out`; what it reads of the embedding beside the
    stream is `{name}.hook_embed`. mixer: where in it tokens are mixed; out: the point behind that mixer's projection; reader:
    the branch that alone reads what it gives; kinds: what stands in it.
    """

    name: str
    mixer: str
    out: str
    reader: str
    kinds: tuple[str, ...]


class Way(NamedTuple):
    """A `Sub` by the names of what it passes: the modules themselves may be replaced by those of another wrapped model."""

    before: tuple[str, ...]
    place: str
    after: tuple[str, ...]
    out: str
    scale: float
    kept: str | None = None  # the norm whose normed stream the part behind reads, too

    @staticmethod
    def of(sub: Sub) -> Way:
        norm = () if sub.norm is None else (sub.ln,)
        after = () if sub.after is None else (sub.after_ln,)
        kept = sub.ln if sub.after is not None and sub.after.reads_norm else None
        before = (f"hook_{sub.name}_in", *norm)
        return Way(before, sub.place or sub.name, after, f"hook_{sub.name}_out", sub.scale, kept)


class Block(Part):
    """A layer: its branches in order; those in a tuple are parallel."""

    hook_out_is_single_residual_stream = True  # what TransformerLens's logit lens asks of a block

    def __init__(
        self, weights: Any, rows: tuple[Point, ...], *subs: Sub | tuple[Sub, ...], inner: tuple[Inner, ...] = ()
    ):
        super().__init__(weights, rows)
        self.inner = inner
        groups = [(sub,) if isinstance(sub, Sub) else sub for sub in subs]
        every = [sub for group in groups for sub in group]
        for sub in every:
            named = {sub.place or sub.name: sub.part, sub.ln: sub.norm, sub.after_ln: sub.after}
            for place, part in named.items():
                if part is not None:
                    self.add_module(place, part)
        self.groups = [tuple(Way.of(sub) for sub in group) for group in groups]
        self.stream = [f"hook_{point}" for point in stream_points(len(groups))[1:]]
        # RWKV's channel mixer looks at the token before, as a TokenMixing does; it is no mixer for that.
        mixing = [sub for sub in every if isinstance(sub.part, TokenMixing) and sub.name != "mlp"]
        self.mixing = {sub.name: sub.place or sub.name for sub in mixing}
        # What stands in it, as `gl.layers.where(kind=...)` asks for it.
        # What has no role stands beside them (n-gram embeddings).
        told, self.norming = (EXPERTS, NORM, ""), {s.name: s.place or s.name for s in every if s.part.role == NORM}
        own = {sub.part.role if sub in mixing or sub.part.role in told else MLP for sub in every} - {NORM, ""}
        self.kinds = frozenset(own.union(*(one.kinds for one in inner)))

    @property
    def mixers(self) -> tuple[TokenMixing, ...]:
        """What mixes tokens in this block, in the order in which it runs: none in a block of channel mixers alone."""
        inside = tuple(self.get_submodule(one.mixer) for one in self.inner)
        return (*inside, *self.writers)  # type: ignore[arg-type]

    @property
    def writers(self) -> tuple[TokenMixing, ...]:
        """Those of them that write to the residual stream."""
        return tuple(self._modules[place] for place in self.mixing.values())  # type: ignore[misc]

    @property
    def mixer(self) -> TokenMixing:
        """The first that writes to the stream; InputError for a block without."""
        if not self.mixing:
            block = self.hook_resid_pre.name.rpartition(".")[0] or "This block"
            raise InputError(f"{block} mixes no tokens: it has a channel mixer alone.")
        return self.writers[0]

    def written(self, place: str) -> str:
        """`block.written("attn")`: the point of what a mixer adds to the stream, or puts out inside a part: "hook_mixer_out"."""
        inside = {one.mixer: one.out for one in self.inner}
        return (
            inside[place]
            if place in inside
            else next(f"hook_{name}_out" for name, at in self.mixing.items() if at == place)
        )

    def behind(self, place: str) -> tuple[str, Behind] | None:
        """`block.behind("attn")`: what stands between a mixer and the stream, and where in the block; None: nothing."""
        way = next((way for group in self.groups for way in group if way.place == place), None)
        if way is None or not way.after:
            return None
        return way.after[0], self._modules[way.after[0]]  # type: ignore[return-value]

    def held(self, place: str) -> tuple[str, ...]:
        """`block.held("attn")`: the points, relative to the block, that `writing` reads."""
        found = self.behind(place)
        return () if found is None else tuple(f"{found[0]}.{name}" for name in found[1].held_points)

    def held_by(self, place: str, cached: Callable[[str], Tensor]) -> Float[Tensor, "*batch pos copy"] | None:
        """`block.held_by("attn", cached)`: by what each position's output of a mixer is multiplied behind its projection, its
        points read by `cached`, by their names relative to the block; None: by nothing."""
        found = self.behind(place)
        return None if found is None else found[1].held(lambda name: cached(f"{found[0]}.{name}"))

    def writing(self, place: str, by: Float[Tensor, "*batch pos copy"] | None) -> Writing:
        """`block.writing("attn", block.held_by("attn", cached))`: what a mixer writes to the stream."""
        (weight, bias), found = self.mixer_at(place).output_weights(), self.behind(place)
        gain = None if found is None else found[1].gain
        if gain is not None:
            weight, bias = gain.unsqueeze(1) * weight, None if bias is None else gain * bias
        return Writing(weight, bias, by)

    def mixer_at(self, place: str | None) -> TokenMixing:
        """`block.mixer_at("attn")`: what mixes tokens under this name (None: the first); InputError for a name that none has."""
        if place is None:
            return self.mixer
        known = [*(one.mixer for one in self.inner), *self.mixing.values()]
        if place not in known:
            said = ", ".join(map(repr, known))
            raise InputError(f"place={place!r}: layer {self.mixer.layer} mixes tokens at {said}.")
        return self.get_submodule(place)  # type: ignore[return-value]

    def forward(self, resid: Float[Tensor, "batch pos d_model"], run: Run) -> Float[Tensor, "batch pos d_model"]:
        resid = self.hook_resid_pre(resid)
        for point, group in zip(self.stream, self.groups, strict=True):
            after = resid
            for way in group:
                after = after + self.branch(way, resid, run)
            resid = getattr(self, point)(after)
        return resid

    def branch(
        self, way: Way, resid: Float[Tensor, "batch pos d_model"], run: Run
    ) -> Float[Tensor, "batch pos d_model"]:
        """What one branch adds to the stream."""
        x, kept = resid, ()
        for place in way.before:
            if place == way.kept:
                x, *kept = getattr(self, place).read(x)
            else:
                x = getattr(self, place)(x)
        x = getattr(self, way.place)(x, run)
        for place in way.after:
            x = getattr(self, place)(x, *kept)
        return getattr(self, way.out)(x if way.scale == 1 else x * way.scale)


def stream_points(groups: int) -> list[str]:
    """The points of the stream itself in a block of so many branches one after the other: resid_pre, resid_mid, resid_post."""
    inner = ["resid_mid"] if groups == 2 else [f"resid_mid{i}" for i in range(1, groups)]
    return ["resid_pre", *inner, "resid_post"]


class SubRows(NamedTuple):
    """The rows of a `Sub`: those of its part and its norms, where they stand in the block, and the equation of its output."""

    name: str
    part: tuple[Point, ...]
    out: str
    norm: tuple[Point, ...] = ()
    after: tuple[Point, ...] = ()


def residual_rows(*subs: SubRows | tuple[SubRows, ...]) -> tuple[Point, ...]:
    """`residual_rows(SubRows("mixer", MIXER_ROWS, "out_proj(gated)", norm_rows("ln1", "mixer_in", PAPER)))`: the rows of a
    `Block`, in firing order."""
    groups = [(sub,) if isinstance(sub, SubRows) else sub for sub in subs]
    names = stream_points(len(groups))
    source = "the residual stream (pre-norm block)"
    rows = [Point("hook_resid_pre", "batch pos d_model", "resid_post of the block before, or embed", source)]
    for before, after, group in zip(names, names[1:], groups, strict=False):
        for sub in group:
            who = "MLP" if sub.name == "mlp" else sub.name
            copied = f"{before} (a copy: edits reach the {who} only)"
            rows.append(Point(f"hook_{sub.name}_in", "batch pos d_model", copied, source))
            rows += (*sub.norm, *sub.part, *sub.after)
            rows.append(Point(f"hook_{sub.name}_out", "batch pos d_model", sub.out, source))
        total = " + ".join([before, *(f"{sub.name}_out" for sub in group)])
        rows.append(Point(f"hook_{after}", "batch pos d_model", total, source))
    return tuple(rows)
