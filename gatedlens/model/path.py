"""A mixer as a path: the way of the content from x to o, stage by stage. An architecture says the stages; the rest is derived.

    class Mamba2Mixer(PathMixer):
        path = (Conv("conv1d", ("x", "B", "C")), SiLU(("B", "C")), Skip(Scan()), Gate(F.silu), GroupNorm())
        def project(self, n, run): ...     # the named streams: x (the content), gate_pre, B, C, dt_pre
        def terms(self, dt, B, C): ...     # -> Terms

A stage runs and fires its points; and it says what it is with its coefficients held. The forward is the stages in order. The
implicit attention o = A x + r is the same stages, held, from the last to the first: no architecture writes its factors.
b batch, l pos, c channel = (head value).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.model.block import Mixer, Run
from gatedlens.model.padding import Padding
from gatedlens.model.state import RecurrentState
from gatedlens.recurrence.factors import Factors, reach
from gatedlens.recurrence.head_matrix import HeadScan
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.recurrence.terms import Terms
from gatedlens.recurrence.transforms import anywhere

if TYPE_CHECKING:
    Streams = dict[str, Float[Tensor, "batch pos ..."]]
else:
    Streams = dict

Content = Float[Tensor, "batch pos channel"]


@dataclass
class Held:
    """What a path is with its coefficients held, filled by its stages: the factors of o = gate (S + skip) act (M x + drift)."""

    cached: Callable[[str], Tensor]  # a point's activation, positions packed, at least float32
    padding: Padding
    state: RecurrentState | None
    x: Content
    factors: dict[str, Any]

    def times(self, name: str, factor: Tensor) -> None:
        """Multiply a factor into one that may be there already."""
        self.factors[name] = self.factors[name] * factor if name in self.factors else factor


class Stage(ABC):
    """One step of the content. `reads(mixer)` names the points that `hold` looks at, without `hook_`."""

    def reads(self, mixer: PathMixer) -> tuple[str, ...]:
        return ()

    @abstractmethod
    def forward(self, mixer: PathMixer, content: Content, streams: Streams, run: Run) -> Content:
        """Run, and fire the stage's points."""

    @abstractmethod
    def hold(self, mixer: PathMixer, held: Held) -> None:
        """Put what the stage is into the factors."""


class PathMixer(Mixer):
    """out = W o + b, o at the end of the path. Subclasses give `path`, `project`, `terms`, `selection` and `heads`."""

    path: tuple[Stage, ...] = ()
    selection: ClassVar[tuple[str, ...]] = ()  # the streams that the terms of the recurrence are made of
    sizes: Mapping[str, int]  # the channels of each stream that goes through the convolution

    def project(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Streams:
        """The streams that the input projection gives, their points fired: "x", the content, among them."""
        raise NotImplementedError

    def select(self, u: Content, streams: Streams, run: Run) -> None:
        """Put into `streams` what the terms are made of where it depends on u, or is not ready yet."""

    def terms(self, **selection: Tensor) -> Terms:
        """The recurrence, of the streams in `selection`; the same in the forward and in the implicit attention."""
        raise NotImplementedError

    @property
    def heads(self) -> int:
        """How many heads the channels are cut into."""
        raise NotImplementedError

    def fire(self, name: str, value: Tensor) -> Tensor:
        """The value of a point as hooks leave it."""
        return getattr(self, f"hook_{name}")(value)

    def put_out(self, name: str, value: Tensor, streams: Streams) -> Tensor:
        """The same at the end of a stage; at the end of the path in the dtype that the content came in."""
        return self.fire(name, value.to(streams["x"].dtype) if f"hook_{name}" == self.output_point else value)

    @property
    def attention_points(self) -> tuple[str, ...]:  # type: ignore[override]
        """x, what the stages are held by, and what comes out."""
        inside = (f"hook_{name}" for stage in self.path for name in stage.reads(self))
        return ("hook_x", *inside, self.output_point)

    def forward(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Float[Tensor, "batch pos d_model"]:
        streams = self.project(n, run)
        content = streams["x"]
        for stage in self.path:
            content = stage.forward(self, content, streams, run)
        return F.linear(content, *self.output_weights())

    def factors(self, cached: Callable[[str], Tensor], padding: Padding, state: RecurrentState | None) -> Factors:
        """The factors of the implicit attention: the stages held, from the last to the first."""

        def packed(name: str) -> Tensor:
            return padding.pack(at_least_float32(cached(f"hook_{name}")))

        x = packed("x")
        held = Held(packed, padding, state, x, {})
        for stage in reversed(self.path):
            stage.hold(self, held)
        return Factors(x=x, o=packed(self.output_point.removeprefix("hook_")), **held.factors)


# -- stages --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conv(Stage):
    """c = causal depthwise conv of the streams side by side, with bias; the content is one of them."""

    name: str  # of the wrapped nn.Conv1d
    streams: tuple[str, ...] = ("x",)

    def content(self, mixer: PathMixer) -> slice:
        """Which channels of the convolution the content is."""
        before = sum(mixer.sizes[name] for name in self.streams[: self.streams.index("x")])
        return slice(before, before + mixer.sizes["x"])

    def forward(self, mixer: PathMixer, content: Content, streams: Streams, run: Run) -> Content:
        names = {_conv_point(name): name for name in self.streams}
        together = {point: streams[name] for point, name in names.items()}
        for point, c in mixer.causal_convs(together, run, getattr(mixer.weights, self.name)).items():
            streams[names[point]] = c
        for point, name in names.items():
            streams[name] = mixer.fire(point, streams[name])
        return streams["x"]

    def hold(self, mixer: PathMixer, held: Held) -> None:
        conv, some = getattr(mixer.weights, self.name), self.content(mixer)
        taps = conv.weight.to(held.x.dtype).squeeze(1)[some]
        held.factors["taps"] = taps
        drift = torch.zeros_like(held.x)
        if conv.bias is not None:
            drift = drift + conv.bias[some].to(held.x.dtype) * held.padding.packed_mask(held.x)
        if held.state is not None:
            tail = reach(held.state["conv", mixer.layer][..., some], held.x, taps)
            documents = held.factors.get("document")  # the first is the one that a state goes on with
            drift = drift + (tail if documents is None else tail * (documents == 0).unsqueeze(-1))
        held.factors["drift"] = drift


def _conv_point(stream: str) -> str:
    """What the result of a stream's convolution is called: the content's is `conv`, that of B `B_conv`."""
    return "conv" if stream == "x" else f"{stream}_conv"


@dataclass(frozen=True)
class SiLU(Stage):
    """u = SiLU(c) = sigmoid(c) c; of other streams that passed the convolution too."""

    streams: tuple[str, ...] = ()

    def reads(self, mixer: PathMixer) -> tuple[str, ...]:
        return ("conv",)

    def forward(self, mixer: PathMixer, content: Content, streams: Streams, run: Run) -> Content:
        u = mixer.fire("u", run.padding.zero(F.silu(content)))
        for name in self.streams:
            streams[name] = run.padding.zero(F.silu(streams[name]))
        return u

    def hold(self, mixer: PathMixer, held: Held) -> None:
        held.times("act", torch.sigmoid(held.cached("conv")) * held.padding.packed_mask(held.x))


@dataclass(frozen=True)
class Scan(Stage):
    """scan_t = S_t read_t, by the terms of the mixer, from nothing where a document begins. Its result stays at least float32."""

    def reads(self, mixer: PathMixer) -> tuple[str, ...]:
        return (*mixer.selection, "reset")

    def forward(self, mixer: PathMixer, content: Content, streams: Streams, run: Run) -> Content:
        mixer.select(content, streams, run)
        terms = mixer.terms(**{name: at_least_float32(streams[name]) for name in mixer.selection})
        resets = run.resets(terms.log_decay)
        if resets is not None or not mixer.hook_reset.at_rest():
            none = torch.zeros_like(terms.log_decay[:, :, :1, 0])
            terms = terms._replace(fresh=run.padding.zero(mixer.fire("reset", none if resets is None else resets)))
        u = at_least_float32(content).unflatten(2, (mixer.heads, -1))
        shape = (len(u), *u.shape[2:], terms.key.shape[-1])
        scan, last = mixer.recur_heads(terms, u, run.start("scan", mixer.layer, shape, u), run.padding)
        run.leave("scan", mixer.layer, last)
        return mixer.fire("scan", scan.flatten(2))

    def hold(self, mixer: PathMixer, held: Held) -> None:
        terms, reset = mixer.terms(**{name: held.cached(name) for name in mixer.selection}), held.cached("reset")
        if anywhere(reset != 0):
            terms = terms._replace(fresh=reset)
            held.factors["document"] = (reset.squeeze(-1) == 1).long().cumsum(1)
        held.factors["scan"] = HeadScan.of(terms, held.x.shape[2] // mixer.heads)
        if held.state is not None:
            held.factors["start"] = held.state["scan", mixer.layer].to(held.x).flatten(1, 2)


@dataclass(frozen=True)
class Skip(Stage):
    """y = inner(u) + D u; D is a number a channel, or a head."""

    inner: Stage
    name: str = "D"

    def weight(self, mixer: PathMixer, like: Content) -> Float[Tensor, " channel"]:
        """D of each channel."""
        given = at_least_float32(getattr(mixer.weights, self.name))
        return given.repeat_interleave(like.shape[-1] // len(given))

    def reads(self, mixer: PathMixer) -> tuple[str, ...]:
        return self.inner.reads(mixer)

    def forward(self, mixer: PathMixer, content: Content, streams: Streams, run: Run) -> Content:
        inner = self.inner.forward(mixer, content, streams, run)
        return mixer.fire("y", inner + self.weight(mixer, content) * content)

    def hold(self, mixer: PathMixer, held: Held) -> None:
        held.factors["skip"] = self.weight(mixer, held.x).to(held.x.dtype)
        self.inner.hold(mixer, held)


@dataclass(frozen=True)
class Gate(Stage):
    """out = content * act(gate_pre)."""

    act: Callable[[Tensor], Tensor]
    out: str = "gated"

    def reads(self, mixer: PathMixer) -> tuple[str, ...]:
        return ("gate",)

    def forward(self, mixer: PathMixer, content: Content, streams: Streams, run: Run) -> Content:
        gate = mixer.fire("gate", self.act(streams["gate_pre"]))
        return mixer.put_out(self.out, content * gate, streams)

    def hold(self, mixer: PathMixer, held: Held) -> None:
        held.times("gate", held.cached("gate"))


@dataclass(frozen=True)
class GroupNorm(Stage):
    """out = weight * content / scale, scale = sqrt(mean over a group of channels of content^2 + eps). Its scale is held."""

    groups: int
    eps: float
    name: str = "norm"
    out: str = "gated"

    def spread(self, scale: Float[Tensor, "batch pos group"], like: Content) -> Content:
        """The scale of each channel's group."""
        return scale.repeat_interleave(like.shape[-1] // self.groups, dim=-1)

    def weight(self, mixer: PathMixer) -> Float[Tensor, " channel"]:
        """The gain of each channel."""
        return at_least_float32(getattr(mixer.weights, self.name).weight)

    def reads(self, mixer: PathMixer) -> tuple[str, ...]:
        return ("scale",)

    def forward(self, mixer: PathMixer, content: Content, streams: Streams, run: Run) -> Content:
        wide = at_least_float32(content)
        squares = wide.unflatten(-1, (self.groups, -1)).pow(2).mean(-1)
        scale = mixer.fire("scale", (squares + self.eps).sqrt())
        return mixer.put_out(self.out, self.weight(mixer) * (wide / self.spread(scale, wide)), streams)

    def hold(self, mixer: PathMixer, held: Held) -> None:
        held.times("gate", self.weight(mixer).to(held.x.dtype) / self.spread(held.cached("scale"), held.x))
