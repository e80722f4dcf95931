"""Softmax attention in a hybrid: grouped heads, a window or none, rotary or none, norms of q and k, a gate of its output.

b batch, l pos, h head (of queries), k key position, W the window, d d_head:

    q, k, v = proj(n), normed head by head, then partly rotary
    pattern = softmax(q . k / sqrt(d)) over the last W tokens (all, without a window);   z = pattern v
    out     = o_proj(z sigmoid(gate))             the gate of each head stands behind its query in q_proj

Which of these a layer has, and whether a norm is of all heads together, is data, `AttentionKind`; numbers that
some models multiply in are `Multipliers`. Local attention: Griffin (arXiv 2402.19427), sec. 2.3; rotary embedding: arXiv
2104.09864; the gate: Qiu et al. 2025, arXiv 2505.06708.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.errors import CheckpointError
from gatedlens.model.hookpoint import ATTENTION
from gatedlens.model.memory import SMALL, afford, free
from gatedlens.model.mixer import TokenMixing, multiplied
from gatedlens.model.norm import Norm, norm_rows
from gatedlens.model.padding import Padding
from gatedlens.model.run import DocumentRun
from gatedlens.model.state import Carried, RecurrentState
from gatedlens.model.weights import given
from gatedlens.parts.unseen import attend, unheard
from gatedlens.recurrence.factors import Factors
from gatedlens.recurrence.pattern_matrix import PatternScan
from gatedlens.recurrence.scanning import at_least_float32

ROPE = "RoPE, arXiv 2104.09864"
RMSNORM = "RMSNorm, arXiv 1910.07467"
CARRIED_WINDOW = {  # what a layer of attention leaves for the next call
    "keys": Carried("window", "batch key_pos kv_head d_head"),
    "values": Carried("window", "batch key_pos kv_head d_head"),
    "key_positions": Carried("window", "batch key_pos"),
}

# Scores beyond which a call that nobody listens to takes torch's own attention: 16 MiB of float32. Below it a run has the same
# logits to the last bit whoever listens, above it to rounding.
MANY = 4 << 20


@dataclass(frozen=True)
class AttentionKind:
    """`AttentionKind(gated=True, normed="(1 + w) * normalized", head="q_head")`: what an attention does.

    windowed: keys W or more behind are not seen. rotary: q and k are turned by position, the first rotary_dim of d_head.
    normed: the equation of the norm of q and k, head by head; None: they have none. gated: z is multiplied by a sigmoid. head:
    what the axis of the query heads is called ("head", unless heads of a recurrence stand in the same model). scores, keys: what
    else scores and keys are multiplied by, in words, where `Multipliers` say so. together: q and k are normed over all heads at
    once. gate_of_heads: the gate is a number a head.
    """

    windowed: bool = False
    rotary: bool = True
    normed: str | None = None
    gated: bool = False
    head: str = "head"
    scores: str = ""
    keys: str = ""
    together: bool = False
    gate_of_heads: bool = False

    @property
    def inner(self) -> str:
        """What stands behind the pattern, without `hook_`."""
        return "gated" if self.gated else "z"

    @property
    def output(self) -> str:
        """The point that o_proj reads."""
        return f"hook_{self.inner}"

    def rows(self, source: str, reads: str = "ln1.out") -> tuple[Point, ...]:
        """`AttentionKind().rows(PAPER)`: the points of such an `Attention`, in firing order."""
        q, kv = f"batch pos {self.head} d_head", "batch pos kv_head d_head"
        half = ", the first half of each head" if self.gated else ""
        rows = [Point("hook_q", q, f"q_proj({reads}){half}", source)]
        if self.gated:
            rows.append(Point("hook_gate_pre", q, f"q_proj({reads}), the second half of each head", source))
        keys = f" * {self.keys}" if self.keys else ""
        rows += [Point("hook_k", kv, f"k_proj({reads}){keys}", source), Point("hook_v", kv, f"v_proj({reads})", source)]
        names = {"q": "q", "k": "k"}
        if self.normed is not None:
            for name, axes in (("q", q), ("k", kv)):
                heads = f"{axes.split()[2]} and d_head" if self.together else ""
                rows += norm_rows(f"{name}_norm", name, RMSNORM, self.normed, axes, heads)
                names[name] = f"{name}_norm.out"
        if self.rotary:
            for name, axes in (("q", q), ("k", kv)):
                turned = f"{names[name]}, its first rotary_dim turned by position"
                rows.append(Point(f"hook_rot_{name}", axes, turned, ROPE))
                names[name] = f"rot_{name}"
        rows += self.mixing_rows(source, q, names)
        return tuple(rows)

    def mixing_rows(self, source: str, q: str, names: Mapping[str, str], width: str = "d_head") -> list[Point]:
        """The points behind q, k and v: of which points the scores are (`names`), the axes of z (`q`), a key's width."""
        behind = ", W or more behind" if self.windowed else ""
        unseen = f"-inf if the key is ahead{behind}, padding or of another document"
        scaled = f"* {self.scores}" if self.scores else f"/ sqrt({width})"
        scores = f"{names['q']} . {names['k']} {scaled}; {unseen}"
        pairs = f"batch {self.head} pos key_pos"
        rows = [
            Point("hook_attn_scores", pairs, scores, source),
            Point("hook_pattern", pairs, "softmax over key_pos of attn_scores", source),
            Point("hook_z", q, "sum over key_pos of pattern * v", source),
        ]
        if self.gated:
            gate = f"batch pos {self.head}" if self.gate_of_heads else q
            rows += [Point("hook_gate", gate, "sigmoid(gate_pre)", source), Point("hook_gated", q, "z * gate", source)]
        return rows

    @property
    def out(self) -> str:
        """What such an attention puts out, in words."""
        return f"o_proj({self.inner})"

    @property
    def words(self) -> str:
        """The implicit attention of such a layer, for the catalogue."""
        gate = "gate[i, channel] * " if self.gated else ""
        out = self.output.removeprefix("hook_")
        return (
            f"x = v of each head, A[i, j] = {gate}pattern[i, j] of the channel's head, o = {out}; "
            "r = the pattern times the values that a state carried"
        )


class Multipliers(NamedTuple):
    """`Multipliers(scores=0.2, output=0.3)`: what an attention multiplies in: its input, its keys, its scores (None:
    1 / sqrt(d_head)) and what it puts out."""

    input: float = 1.0
    keys: float = 1.0
    scores: float | None = None
    output: float = 1.0


def check_rope(rotary: Any, model_name: str) -> None:
    """CheckpointError for a wrapped rotary embedding whose frequencies go by length; None has none."""
    rope = "default" if rotary is None else vars(rotary).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise CheckpointError(
            f"{model_name} has rope_type={rope!r}, frequencies that go by length: it is not supported."
        )


def rotate(
    x: Float[Tensor, "batch pos some d_head"],
    cos: Float[Tensor, "batch pos rotary"],
    sin: Float[Tensor, "batch pos rotary"],
) -> Float[Tensor, "batch pos some d_head"]:
    """The first `rotary` of d_head turned in pairs (j, j + rotary / 2); the rest as it is."""
    turning, still = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = turning.chunk(2, dim=-1)
    aside = torch.cat([-second, first], dim=-1)
    return torch.cat([turning * cos.unsqueeze(2) + aside * sin.unsqueeze(2), still], dim=-1)


def turns(
    positions: Int[Tensor, "batch pos"], frequency: Float[Tensor, " pair"]
) -> tuple[Float[Tensor, "batch pos rotary"], Float[Tensor, "batch pos rotary"]]:
    """cos and sin of position * frequency, twice side by side, for the pairs of `rotate`."""
    angle = (positions.unsqueeze(-1) * frequency.to(positions.device)).repeat(1, 1, 2)
    return angle.cos(), angle.sin()


class Attention(TokenMixing):
    """Causal attention over the last `window` tokens, the own one included, of the same document; None: over all of them.

    `rotary` is the module that holds `inv_freq` (and, if it scales cos and sin, `attention_scaling`); None where the kind turns
    nothing. `norms` are those of q and k, where it has them.

    The state carries the last window - 1 `keys` (as the scores read them) and `values`, oldest first, with `key_positions`, -1
    for an empty place; without a window all of them. A call that goes on from a state has them in front: key_pos = carried + pos.
    """

    place = "attn"
    role = ATTENTION
    last = "o_proj"  # what the wrapped module calls its output projection

    def __init__(
        self,
        weights: Any,
        rows: tuple[Point, ...],
        layer: int,
        kind: AttentionKind,
        d_head: int,
        window: int | None = None,
        rotary: Any = None,
        norms: tuple[Norm, Norm] | None = None,
        multipliers: Multipliers = Multipliers(),  # noqa: B008  # a constant
    ):
        super().__init__(weights, rows, layer)
        self.kind = kind
        self.multipliers = multipliers
        self.d_head = d_head
        self.window = window
        self.__dict__["rotary"] = rotary  # of the wrapped model, as `weights` is
        self.output_point = kind.output
        self.heads_axis = kind.head
        gates = ("hook_gate",) if kind.gated else ()
        self.attention_points = ("hook_v", "hook_pattern", *gates, kind.output)
        if norms is not None:
            self.q_norm, self.k_norm = norms

    def branches(
        self, cached: Callable[[str], Tensor], padding: Padding, state: RecurrentState | None
    ) -> tuple[Factors, ...]:
        """A is the pattern of each channel's head times the gate, x the values, and r what the carried values bring."""
        v, pattern, o = (at_least_float32(cached(name)) for name in ("hook_v", "hook_pattern", self.output_point))
        gate = at_least_float32(cached("hook_gate")) if self.kind.gated else None
        if gate is not None:
            gate = padding.pack((gate.unsqueeze(-1).expand(o.shape) if self.kind.gate_of_heads else gate).flatten(2))
        heads, length = pattern.shape[1], v.shape[1]
        groups, width = heads // v.shape[2], v.shape[3]

        def channels(values: Tensor) -> Tensor:
            return values.repeat_interleave(groups, dim=2).flatten(2)

        before, own = pattern[..., :-length], pattern[..., -length:]
        if padding.order is not None:
            rows = padding.order[:, None, :, None]
            before = before.gather(2, rows.expand(-1, heads, -1, before.shape[-1]))
            own = own.gather(2, rows.expand_as(own)).gather(3, rows.mT.expand_as(own))
        head = torch.arange(heads, device=v.device).repeat_interleave(width)
        start = None if state is None else channels(state["values", self.layer].to(v))
        x, o = padding.pack(channels(v)), padding.pack(o.flatten(2))
        return (Factors(x=x, o=o, scan=PatternScan(own, before, head), gate=gate, start=start),)

    def output_weights(self) -> tuple[Float[Tensor, "d_model channel"], Float[Tensor, " d_model"] | None]:
        out, by = self.o_proj, self.multipliers.output
        return multiplied(out.weight, by), None if out.bias is None else multiplied(out.bias, by)

    def named_weights(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for word in ("Q", "K", "V"):
            weight, bias = self.read_with(word.lower())
            gated = word == "Q" and self.kind.gated
            width = 2 * self.d_head if gated else self.d_head  # a head's gate lies behind its query
            each = weight.unflatten(0, (-1, width)).split(self.d_head, dim=1)
            own = (None, None) if bias is None else bias.unflatten(0, (-1, width)).split(self.d_head, dim=1)
            for name, one, offset in zip((word, "gate"), each, own, strict=False):
                found |= given(**{f"W_{name}": one.mT, f"b_{name}": offset})
        out, by = self.o_proj, self.multipliers.output
        bias = None if out.bias is None else multiplied(out.bias, by)
        by_head = multiplied(out.weight, by).unflatten(1, (-1, self.d_head)).permute(1, 2, 0)
        return {**found, **given(W_O=by_head, b_O=bias)}

    def read_with(self, name: str) -> tuple[Float[Tensor, "some d_read"], Float[Tensor, " some"] | None]:
        """(W, b) of q_proj, k_proj or v_proj."""
        projection = getattr(self.weights, f"{name}_proj")
        return projection.weight, projection.bias

    @property
    def o_proj(self) -> Any:
        """The wrapped output projection."""
        return getattr(self.weights, self.last)

    def project(self, n: Float[Tensor, "batch pos d_read"], name: str) -> Float[Tensor, "batch pos some d_head"]:
        """`projected` of "q", "k" or "v", by head."""
        return self.projected(n, name).unflatten(-1, (-1, self.d_head))

    def projected(self, n: Float[Tensor, "batch pos d_read"], name: str) -> Float[Tensor, "batch pos some"]:
        """What q_proj, k_proj or v_proj gives."""
        return F.linear(n, *self.read_with(name))

    def angles(self, positions: Int[Tensor, "batch pos"], like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of position * theta^(-2j / rotary_dim), scaled where the model scales them, in the dtype of `like`."""
        cos, sin = turns(positions, at_least_float32(self.rotary.inv_freq))
        scaling = vars(self.rotary).get("attention_scaling", 1.0)
        if scaling != 1:
            cos, sin = cos * scaling, sin * scaling
        return cos.to(like.dtype), sin.to(like.dtype)

    def turning(
        self, run: DocumentRun, like: Tensor
    ) -> tuple[Float[Tensor, "batch pos rotary"], Float[Tensor, "batch pos rotary"]]:
        """cos and sin of what the q and k of a call are turned by."""
        return self.angles(run.positions, like)

    def visible(self, carried: Int[Tensor, "batch carried"], run: DocumentRun) -> Bool[Tensor, "batch 1 pos key_pos"]:
        """Which keys each query sees, counted in real tokens; a position always sees itself, so no row is empty."""
        before = torch.arange(-carried.shape[1], 0, device=carried.device).expand_as(carried)
        behind = run.ranks.unsqueeze(2) - torch.cat([before, run.ranks], dim=1).unsqueeze(1)
        real = torch.cat([carried >= 0, run.real], dim=1).unsqueeze(1)
        seen = (behind >= 0) & real
        if self.window is not None:
            seen = seen & (behind < self.window)
        if run.documents is not None:
            of_keys = torch.cat([torch.zeros_like(carried), run.documents], dim=1)
            seen &= run.documents.unsqueeze(2) == of_keys.unsqueeze(1)
        return (seen | (behind == 0)).unsqueeze(1)

    def _afford(
        self, q: Float[Tensor, "batch pos head d_head"], keys: Float[Tensor, "batch key_pos some d_head"]
    ) -> None:
        """TooLargeError for scores and a pattern that the device does not hold."""
        batch, length, heads, _ = q.shape
        pairs = batch * length * keys.shape[1]
        size = pairs * (heads * (2 * q.element_size() + 8) + 10)  # scores twice, their float32 softmax; who sees whom
        if size < SMALL or torch.compiler.is_compiling():
            return
        before = "the positions before it" if self.window is None else self.window - 1
        afford(
            f"The attention of layer {self.layer}, {heads} heads over {length} x {keys.shape[1]} positions,",
            size,
            free(q.device),
            f"Run the text in parts: `_, state = model(first, return_state=True)`, then `model(rest, state=state)`; a part "
            f"of n positions takes n * (n + {before}).",
            f"the {{}} that are free on {q.device}",
        )

    def behind(
        self, name: str, own: Shaped[Tensor, "batch pos ..."], carried: Int[Tensor, "batch carried"], run: DocumentRun
    ) -> Shaped[Tensor, "batch key_pos ..."]:
        """What is kept of each key, by its name in the state: of those that the state carries, then of this call's."""
        shape = (len(own), carried.shape[1], *own.shape[2:])
        return torch.cat([run.start(name, self.layer, shape, own), own], dim=1)

    def seen(
        self,
        n: Float[Tensor, "batch pos d_read"],
        kept: Mapping[str, Shaped[Tensor, "batch key_pos ..."]],
        carried: Int[Tensor, "batch carried"],
        run: DocumentRun,
    ) -> Bool[Tensor, "batch 1 pos key_pos"] | None:
        """Which keys each query attends to: those that it may see; None: all that are not ahead of it. What is kept of the keys
        is left for the next call."""
        self.remember(kept, carried, run)
        alone = carried.shape[1] == 0 and self.window is None and run.documents is None and run.padding.mask is None
        return None if alone else self.visible(carried, run)

    def remember(
        self,
        kept: Mapping[str, Shaped[Tensor, "batch key_pos ..."]],
        carried: Int[Tensor, "batch carried"],
        run: DocumentRun,
    ) -> None:
        """Leave what is kept of each key, by its name in the state, of the real ones of each row, the last window - 1, without
        those of documents that have ended."""
        if run.left is None:
            return
        places = torch.cat([carried, run.positions.masked_fill(~run.real, -1)], dim=1)
        if run.documents is not None:
            of_keys = torch.cat([torch.zeros_like(carried), run.documents], dim=1)
            places = places.masked_fill(of_keys != run.last, -1)
        # Oldest first with the empty places in front: a stable sort keeps the order of the others.
        order = (places >= 0).to(torch.int8).argsort(dim=1, stable=True)
        if self.window is not None:
            order = order[:, max(0, order.shape[1] - (self.window - 1)) :]
        rows = torch.arange(len(order), device=order.device).unsqueeze(1)
        for name, value in {**kept, "key_positions": places}.items():
            run.leave(name, self.layer, value[rows, order])

    def read(
        self, n: Float[Tensor, "batch pos d_read"], run: DocumentRun
    ) -> tuple[
        Float[Tensor, "batch pos head d_qk"],
        Float[Tensor, "batch pos kv_head d_qk"],
        Float[Tensor, "batch pos kv_head d_v"],
        Float[Tensor, "batch pos head d_v"] | None,
    ]:
        """q and k as the scores read them, v, and what the gate is made of, their points fired."""
        gate_pre, n = None, multiplied(n, self.multipliers.input)
        q = self.project(n, "q")
        if self.kind.gated:  # a head of q_proj is its query, then its gate
            # In memory of their own: a copy that a hook gets has the same layout then, and so the same rounding behind it.
            q, gate_pre = (x.contiguous() for x in q.unflatten(2, (-1, 2)).unbind(3))
            q, gate_pre = self.hook_q(q), self.hook_gate_pre(gate_pre)
        else:
            q = self.hook_q(q)
        k = self.hook_k(multiplied(self.project(n, "k"), self.multipliers.keys))
        v = self.hook_v(self.project(n, "v"))
        if self.kind.normed is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.kind.rotary:
            cos, sin = self.turning(run, q)
            q, k = self.hook_rot_q(rotate(q, cos, sin)), self.hook_rot_k(rotate(k, cos, sin))
        return q, k, v, gate_pre

    def mix(
        self,
        q: Float[Tensor, "batch pos head d_qk"],
        keys: Float[Tensor, "batch key_pos kv_head d_qk"],
        values: Float[Tensor, "batch key_pos kv_head d_v"],
        seen: Bool[Tensor, "batch 1 pos key_pos"] | None,
    ) -> Float[Tensor, "batch pos head d_v"]:
        """softmax(q . k) v over the keys that each query sees: scores and pattern are points, and exist if somebody listens."""
        groups = q.shape[2] // keys.shape[2]  # so many heads share one key and value head
        keys, values = (x.repeat_interleave(groups, dim=2) for x in (keys, values))
        scale = q.shape[-1] ** -0.5 if self.multipliers.scores is None else self.multipliers.scores
        dropout = vars(self.weights).get("attention_dropout", 0.0) if self.training else 0.0
        many = len(q) * q.shape[2] * q.shape[1] * keys.shape[1] >= MANY
        if many and dropout == 0 and unheard(q, keys, values) and self._at_rest():
            return attend(q, keys, values, seen, scale)
        self._afford(q, keys)
        if seen is None:
            seen = torch.ones(q.shape[1], keys.shape[1], dtype=torch.bool, device=q.device).tril()
        scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * scale
        scores = self.hook_attn_scores(scores.masked_fill(~seen, -torch.inf))
        pattern = self.hook_pattern(at_least_float32(scores).softmax(-1).to(values.dtype))
        return torch.einsum("bhqk,bkhd->bqhd", F.dropout(pattern, dropout), values)

    def _at_rest(self) -> bool:
        """Whether nobody listens to scores and pattern."""
        return self.hook_attn_scores.at_rest() and self.hook_pattern.at_rest()

    def forward(self, n: Float[Tensor, "batch pos d_read"], run: DocumentRun) -> Float[Tensor, "batch pos d_model"]:
        q, k, v, gate_pre = self.read(n, run)
        v = run.padding.zero(v)  # 0 * NaN at a masked key would be NaN
        carried = run.start("key_positions", self.layer, (len(n), -1), run.positions)

        keys, values = self.behind("keys", k, carried, run), self.behind("values", v, carried, run)
        seen = self.seen(n, {"keys": keys, "values": values}, carried, run)
        out = self.hook_z(self.mix(q, keys, values, seen))
        if gate_pre is not None:
            gate = self.hook_gate(torch.sigmoid(gate_pre))
            out = self.hook_gated(out * (gate.unsqueeze(-1) if self.kind.gate_of_heads else gate))
        last = self.o_proj
        return multiplied(F.linear(out.flatten(2), last.weight, last.bias), self.multipliers.output)
