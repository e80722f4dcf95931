"""FlaMixer: what the mixers of flash-linear-attention have in common; what differs, its subclasses say, a paper each.

    q, k, x = proj(n), through short causal convs of their own, or none           u of x enters the scan
    out     = o_proj(RMSNorm(scan) SiLU(g_proj(n))), the norm head by head; without a gate o_proj(RMSNorm(scan))

b batch, l pos, d d_model, h head, v value (of a head), c channel = (head value), n state (numbers of a key).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.model.config import HookedConfig
from gatedlens.model.norm import eps_of
from gatedlens.model.path import PathMixer, Stage, Streams
from gatedlens.model.run import Run
from gatedlens.model.stages import Conv, Gate, GroupNorm, Named, Real, Scan, SiLU
from gatedlens.parts.activation import wide_silu

RMSNORM = "RMSNorm, arXiv 1910.07467"
UIA = "UIA, arXiv 2405.16504"
KEYS = "batch pos {keys} state"  # of what is shared by the heads of a group, where there are any
TAPS = "{0}_conv1d.weight[tap] * {1}[pos - (tap.size - 1) + tap], 0 from another document"


class FlaKind(NamedTuple):
    """`FlaKind("GLA", conv=False, gated=True)`: what a layer is; as text "GLA, gated". grouped: heads share their keys."""

    mixing: str
    conv: bool
    gated: bool
    grouped: bool = False

    def __str__(self) -> str:
        words = {"short conv": self.conv, "gated": self.gated, "keys shared": self.grouped}
        return ", ".join((self.mixing, *(word for word, holds in words.items() if holds)))


@dataclass(kw_only=True)
class FlaConfig(HookedConfig):
    """cfg of fla's models. `kinds`: what each layer is; n_heads heads of d_head values, n_groups of d_state numbers of a key.

    0 stands for the sizes of what a model has none of.
    """

    kinds: tuple[FlaKind, ...]
    n_groups: int
    d_state: int
    n_steps: int = 1  # that a token takes in a DeltaProduct
    d_conv: int = 0
    d_low: int = 0
    log_decay_divisor: float = 16.0  # GLA's
    least_log_decay: float | None = None  # GLA's
    n_attention_heads: int = (
        0  # of the layers of softmax attention, n_key_value_heads of them of keys, d_attention_head wide
    )
    n_key_value_heads: int = 0
    d_attention_head: int = 0
    window: int | None = None
    beta_max: float = 1.0  # 2 where the states of a delta rule may turn over
    tie_word_embeddings: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        heads = {"channel": self.n_heads * self.d_head, "head": self.n_heads, "value": self.d_head}
        keys = {
            "group": self.n_groups,
            "state": self.d_state,
            "tap": self.d_conv,
            "low": self.d_low,
            "step": self.n_steps,
        }
        attention = {
            "q_head": self.n_attention_heads,
            "kv_head": self.n_key_value_heads,
            "d_head": self.d_attention_head,
        }
        return {**super().sizes, **heads, **keys, **attention, "d_mlp": self.d_mlp or 0}


class FlaMixer(PathMixer):
    """out = o_proj(gated), every intermediate a point.

    A subclass says its paper, what it reads beside q, k and the content (`read_beside`, its `beside_rows`), what the terms are
    made of (`select`, its `select_rows`, in which {q} stands for how q enters), and the terms.
    """

    paper: ClassVar[str]
    projections: ClassVar[Mapping[str, str]] = {"q": "q", "k": "k", "x": "v"}  # of each stream, the content last
    norm_name: ClassVar[tuple[str, ...]] = ("g_norm_swish_gate", "g_norm")  # the one that a module has
    beside_rows: ClassVar[tuple[Point, ...]] = ()
    select_rows: ClassVar[tuple[Point, ...]] = ()
    written: ClassVar[str] = "u * k"
    read: ClassVar[str] = "sum over state of q * state / sqrt(state.size)"
    decay: ClassVar[str] = "exp(log_decay) * (1 - reset)"
    norms_heads: ClassVar[bool] = True  # head by head, or all channels together
    scan: ClassVar[Scan] = Scan()

    def __init__(self, weights: Any, rows: tuple[Point, ...], layer: int, cfg: FlaConfig):
        super().__init__(weights, rows, layer)
        self.cfg, self.kind = cfg, cfg.kinds[layer]
        self.norm = next(name for name in self.norm_name if name in weights._modules)

    # -- its rows ---------------------------------------------------------------------------------------------------

    @classmethod
    def entered(cls, stream: str, kind: FlaKind) -> str:
        """How a stream enters the scan, in words."""
        return f"SiLU({stream}_conv)" if kind.conv else f"{stream}_pre"

    @classmethod
    def rows(cls, kind: FlaKind) -> tuple[Point, ...]:
        """`GlaMixer.rows(FlaKind("GLA", False, True))`: the points of such a mixer, in firing order."""
        paper, (*keys, _) = cls.paper, cls.projections
        axes, content = KEYS.format(keys="group" if kind.grouped else "head"), cls.projections["x"]
        rows = [Point(f"hook_{s}_pre", axes, f"{cls.projections[s]}_proj(ln1.out)", paper) for s in keys]
        rows.append(Point("hook_x", "batch pos channel", f"{content}_proj(ln1.out)", paper))
        if kind.gated:
            rows.append(Point("hook_gate_pre", "batch pos channel", "g_proj(ln1.out)", paper))
        rows += cls.beside_rows
        if kind.conv:
            taps = [Point(f"hook_{s}_conv_taps", f"{axes} tap", TAPS.format(s, f"{s}_pre"), paper, True) for s in keys]
            taps.append(
                Point("hook_conv_taps", "batch pos channel tap", TAPS.format(content, "x"), f"{UIA}, eq. 9", True)
            )
            sums = [Point(f"hook_{s}_conv", axes, f"sum over tap of {s}_conv_taps", paper) for s in keys]
            rows += [*taps, *sums, Point("hook_conv", "batch pos channel", "sum over tap of conv_taps", paper)]
        u = cls.entered("x", kind).replace("x_conv", "conv").replace("x_pre", "x")
        rows.append(Point("hook_u", "batch pos channel", u, paper))
        words = {s: cls.entered(s, kind) for s in keys}
        for row in cls.select_rows:
            rows.append(
                replace(row, axes=axes if row.axes == KEYS else row.axes, equation=row.equation.format(**words))
            )
        return (*rows, *cls.scan_rows(), *cls.out_rows(kind))

    @classmethod
    def scan_rows(cls) -> tuple[Point, ...]:
        """The points of the recurrence."""
        whole, paper = "batch pos head value state", cls.paper
        begin = "state before the first position (zero without one)"
        return (
            Point("hook_reset", "batch pos one", "1 where a document begins (position 0 of position_ids), else 0", paper),
            Point("hook_state_start", "batch head value state", begin, paper, True),
            Point("hook_decay", whole, f"{cls.decay}, the same for each value", paper, True),
            Point("hook_write", whole, cls.written, paper, True),
            *cls.state_rows(),
            Point("hook_scan", "batch pos channel", cls.read, paper),
            Point("hook_y", "batch pos channel", "scan (no skip)", paper),
        )  # fmt: skip

    @classmethod
    def state_rows(cls) -> tuple[Point, ...]:
        """The state, behind what a delta rule has before it."""
        whole = "batch pos head value state"
        return (Point("hook_state", whole, "decay * state[pos - 1] + write", cls.paper, True),)

    @classmethod
    def out_rows(cls, kind: FlaKind) -> tuple[Point, ...]:
        """The points of the norm and of the gate."""
        one, over = ("head", "the head's channels") if cls.norms_heads else ("one", "channel")
        scale = Point("hook_scale", f"batch pos {one}", f"sqrt(mean over {over} of y^2 + eps)", RMSNORM)
        normed = f"w * y / scale, {'one w for all heads' if cls.norms_heads else 'w of the norm'}"
        if not kind.gated:
            return scale, Point("hook_gated", "batch pos channel", f"{normed} (no gate)", RMSNORM)
        return (
            scale,
            Point("hook_normed", "batch pos channel", normed, RMSNORM),
            Point("hook_gate", "batch pos channel", "SiLU(gate_pre)", cls.paper),
            Point("hook_gated", "batch pos channel", "normed * gate", cls.paper),
        )

    # -- its path ---------------------------------------------------------------------------------------------------

    @property
    def heads(self) -> int:
        return self.cfg.n_heads

    @property
    def sizes(self) -> Mapping[str, int]:  # type: ignore[override]
        """Of the streams that go through the convolutions."""
        return {s: getattr(self.weights, f"{p}_proj").weight.shape[0] for s, p in self.projections.items()}

    @property
    def entering(self) -> Stage:
        """How the content, and q and k beside it, enter the scan."""
        return SiLU(tuple(self.projections)[:-1]) if self.kind.conv else Real("u")

    @property
    def path(self) -> tuple[Stage, ...]:  # type: ignore[override]
        convs = tuple(f"{p}_conv1d" for p in self.projections.values())
        conv = (Conv(convs, tuple(self.projections)),) if self.kind.conv else ()
        eps = eps_of(getattr(self.weights, self.norm), self.cfg.eps)
        groups, out = (self.heads if self.norms_heads else 1), ("normed" if self.kind.gated else "gated")
        gate = (Gate(wide_silu),) if self.kind.gated else ()
        return (*conv, self.entering, self.scan, Named("y"), GroupNorm(groups, eps, name=self.norm, out=out), *gate)

    def project(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Streams:
        zero, streams = run.padding.zero, {}
        for stream, name in self.projections.items():
            given = self.laid_out(stream, zero(F.linear(n, getattr(self.weights, f"{name}_proj").weight)))
            streams[stream] = self.hook_x(given) if stream == "x" else zero(self.fire(f"{stream}_pre", given))
        if self.kind.gated:
            streams["gate_pre"] = self.hook_gate_pre(F.linear(n, self.weights.g_proj.weight))
        return {**streams, **self.read_beside(n, run)}

    def laid_out(self, stream: str, x: Float[Tensor, "batch pos *wide"]) -> Float[Tensor, "batch pos ..."]:
        """What a projection gives, with the axes that the stream has."""
        return x if stream == "x" else x.unflatten(-1, (-1, self.cfg.d_state))

    def read_beside(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Streams:
        """What a mixer reads off the stream beside q, k, x and the gate."""
        return {}

    def output_weights(self) -> tuple[Float[Tensor, "d_model channel"], Float[Tensor, " d_model"] | None]:
        return self.weights.o_proj.weight, None

    def named_weights(self) -> dict[str, Tensor]:
        words = {"in" if stream == "x" else stream.upper(): name for stream, name in self.projections.items()}
        words |= {"gate": "g"} if self.kind.gated else {}
        read = {f"W_{word}": getattr(self.weights, f"{name}_proj").weight.mT for word, name in words.items()}
        return {**read, **super().named_weights()}
