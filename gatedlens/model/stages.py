"""The stages of a path: what the content passes on its way through a mixer, each once, for every architecture.

    path = (Conv("conv1d"), SiLU(), Skip(ChannelScan()), Gate(F.silu))          # Mamba's

`forward` runs and fires the stage's points; `hold` puts what the stage is, with its coefficients held, into the factors of the
implicit attention. path.py says how they are strung together. b batch, l pos, c channel = (head value).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.model.padding import Padding
from gatedlens.model.path import Content, Held, PathMixer, Stage, Streams
from gatedlens.model.run import Run
from gatedlens.model.weights import given
from gatedlens.recurrence.decay_matrix import DecayScan
from gatedlens.recurrence.factors import reach
from gatedlens.recurrence.head_matrix import HeadScan
from gatedlens.recurrence.matrix import ScanMatrix
from gatedlens.recurrence.micro_steps import StepScan, at_step
from gatedlens.recurrence.prior_matrix import PriorScan
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.recurrence.side_by_side import SideBySide
from gatedlens.recurrence.terms import Terms
from gatedlens.recurrence.transforms import anywhere


@dataclass(frozen=True)
class Conv(Stage):
    """c = causal depthwise conv of the streams side by side, with bias; the content is one of them."""

    name: (
        str | tuple[str, ...]
    )  # of the wrapped nn.Conv1d of all streams; or of each stream's own, all with a bias or none
    streams: tuple[str, ...] = ("x",)

    def filters(self, mixer: PathMixer) -> tuple[Float[Tensor, "channel 1 tap"], Float[Tensor, " channel"] | None]:
        """The taps and the bias of all channels."""
        names = (self.name,) if isinstance(self.name, str) else self.name
        convs = [getattr(mixer.weights, name) for name in names]
        if len(convs) == 1:
            return convs[0].weight, convs[0].bias
        bias = None if convs[0].bias is None else torch.cat([conv.bias for conv in convs])
        return torch.cat([conv.weight for conv in convs]), bias

    def named_weights(self, mixer: PathMixer) -> dict[str, Tensor]:
        if isinstance(self.name, tuple):
            each = [getattr(mixer.weights, name) for name in self.name]
            pairs = [(conv.weight, conv.bias) for conv in each]
        else:
            conv, sizes = (
                getattr(mixer.weights, self.name),
                [mixer.sizes[s] for s in self.streams if len(self.streams) > 1],
            )
            weights = conv.weight.split(sizes) if sizes else (conv.weight,)
            biases = conv.bias.split(sizes) if sizes and conv.bias is not None else [conv.bias] * len(weights)
            pairs = list(zip(weights, biases, strict=True))
        found: dict[str, Tensor] = {}
        for stream, (weight, bias) in zip(self.streams, pairs, strict=True):
            word = "conv" if stream == "x" else f"{stream.upper()}_conv"
            found |= given(**{f"W_{word}": weight.squeeze(1), f"b_{word}": bias})
        return found

    def content(self, mixer: PathMixer, step: int = 0) -> slice:
        """Which channels of the convolution the content of a step is."""
        if self.streams == ("x",):
            return slice(None)
        before = sum(mixer.sizes[name] for name in self.streams[: self.streams.index("x")])
        width = mixer.sizes["x"] // mixer.steps
        return slice(before + step * width, before + (step + 1) * width)

    def forward(self, mixer: PathMixer, content: Content, streams: Streams, run: Run) -> Content:
        names = {_conv_point(name): name for name in self.streams}
        together = {point: streams[name] for point, name in names.items()}
        for point, c in mixer.causal_convs(together, run, *self.filters(mixer)).items():
            streams[names[point]] = c
        for point, name in names.items():
            streams[name] = mixer.fire(point, streams[name])
        return streams["x"]

    def hold(self, mixer: PathMixer, held: Held) -> None:
        (weight, bias), some = self.filters(mixer), self.content(mixer, held.step)
        taps = weight.to(held.x.dtype).squeeze(1)[some]
        held.factors["taps"], documents = taps, held.documents
        if documents is not None and anywhere(documents != documents[:, :1]):
            held.factors["document"] = documents
        drift = torch.zeros_like(held.x)
        if bias is not None:
            drift = drift + bias[some].to(held.x.dtype) * held.padding.packed_mask(held.x)
        if held.state is not None:
            tail = reach(held.state["conv", mixer.layer][..., some], held.x, taps)
            drift = drift + (tail if documents is None else tail * (documents == 0).unsqueeze(-1))
        held.factors["drift"] = drift


def _conv_point(stream: str) -> str:
    """What the result of a stream's convolution is called: the content's is `conv`, that of B `B_conv`."""
    return "conv" if stream == "x" else f"{stream}_conv"


@dataclass(frozen=True)
class SiLU(Stage):
    """u = SiLU(c) = sigmoid(c) c, c the point `of`; of other streams that passed the convolution too."""

    streams: tuple[str, ...] = ()
    of: str = "conv"

    def reads(self, mixer: PathMixer) -> tuple[str, ...]:
        return (self.of,)

    def forward(self, mixer: PathMixer, content: Content, streams: Streams, run: Run) -> Content:
        u = mixer.fire("u", run.padding.zero(F.silu(content)))
        for name in self.streams:
            streams[name] = run.padding.zero(F.silu(streams[name]))
        return u

    def hold(self, mixer: PathMixer, held: Held) -> None:
        held.times("act", torch.sigmoid(held.cached(self.of)) * held.padding.packed_mask(held.x))


@dataclass(frozen=True)
class Named(Stage):
    """The content as it is, at a point of its own: `Named("y")` where there is no skip, say."""

    point: str

    def forward(self, mixer: PathMixer, content: Content, streams: Streams, run: Run) -> Content:
        return mixer.fire(self.point, content)

    def hold(self, mixer: PathMixer, held: Held) -> None:
        pass  # the identity


@dataclass(frozen=True)
class Real(Named):
    """The same, 0 at padding: what enters a scan where no activation does."""

    def forward(self, mixer: PathMixer, content: Content, streams: Streams, run: Run) -> Content:
        return mixer.fire(self.point, run.padding.zero(content))


@dataclass(frozen=True)
class Scan(Stage):
    """scan_t = S_t read_t, by the terms of the mixer, from nothing where a document begins. Its result stays at least float32."""

    def reads(self, mixer: PathMixer) -> tuple[str, ...]:
        return (*mixer.selection, "reset")

    def forward(
        self, mixer: PathMixer, content: Content, streams: Streams, run: Run
    ) -> Float[Tensor, "batch pos read"]:
        mixer.select(content, streams, run)
        terms = mixer.terms_of(lambda name: at_least_float32(streams[name]))
        u = at_least_float32(content).unflatten(-1, (mixer.heads, -1))
        terms = self.begun(mixer, terms, mixer.resets(run, u.flatten(2)))
        shape = (len(u), *u.shape[-2:], terms.key.shape[-1])
        scan, last = self.recur(mixer, terms, u, run.start("scan", mixer.layer, shape, u), run.padding)
        run.leave("scan", mixer.layer, last)
        return mixer.fire("scan", scan.flatten(2))

    def begun(self, mixer: PathMixer, terms: Terms, fresh: Float[Tensor, "batch pos one"] | None) -> Terms:
        """The terms, with where documents begin."""
        return terms._replace(fresh=fresh)

    def recur(
        self, mixer: PathMixer, terms: Terms, u: Tensor, start: Tensor, padding: Padding
    ) -> tuple[Tensor, Tensor]:
        """The recurrence: (scan, last state)."""
        return mixer.recur_heads(terms, u, start, padding)

    def matrix(self, terms: Terms, width: int) -> ScanMatrix:
        """The recurrence as a matrix, of heads that are `width` wide."""
        return HeadScan.of(terms, width)

    def hold(self, mixer: PathMixer, held: Held) -> None:
        terms = self.begun(mixer, mixer.terms_of(lambda name: held.read(name, None)), held.fresh)
        held.factors["scan"] = self.matrix(terms, held.x.shape[2] // mixer.heads)
        if held.state is not None:
            held.factors["start"] = held.centred(held.state["scan", mixer.layer].to(held.x).flatten(1, 2), 1)


@dataclass(frozen=True)
class ScanBefore(Scan):
    """The same where a position reads the state before its own step: scan_t = S_{t-1} read_t."""

    def recur(
        self, mixer: PathMixer, terms: Terms, u: Tensor, start: Tensor, padding: Padding
    ) -> tuple[Tensor, Tensor]:
        return mixer.recur_heads_before(terms, u, start, padding)

    def matrix(self, terms: Terms, width: int) -> ScanMatrix:
        return PriorScan.of(terms, width)


@dataclass(frozen=True)
class ScanSteps(Scan):
    """The same where a position takes several steps, each with a content of its own, and reads behind the last. The terms are
    those over (pos step): see `micro_steps.py`."""

    def begun(self, mixer: PathMixer, terms: Terms, fresh: Float[Tensor, "batch pos one"] | None) -> Terms:
        return terms._replace(fresh=None if fresh is None else at_step(fresh, 0, mixer.steps))

    def recur(
        self, mixer: PathMixer, terms: Terms, u: Tensor, start: Tensor, padding: Padding
    ) -> tuple[Tensor, Tensor]:
        return mixer.recur_steps(terms, u, start, padding)

    def hold(self, mixer: PathMixer, held: Held) -> None:
        for step in range(1, mixer.steps):  # before the first takes what the state brings
            held.aside(step)
        super().hold(mixer, held)
        long = held.factors["scan"]
        for way in (held, *held.beside):
            way.factors["scan"] = StepScan(long, mixer.steps, way.step)


@dataclass(frozen=True)
class ChannelScan(Stage):
    """The same where a head is a channel: scan_t[c] = sum over state of read_t state_t[c]; see `ChannelTerms`.

    A mixer whose terms are made of the reset as well has it in its `selection`, and fires hook_reset itself.
    """

    def reads(self, mixer: PathMixer) -> tuple[str, ...]:
        return mixer.selection if "reset" in mixer.selection else (*mixer.selection, "reset")

    def forward(self, mixer: PathMixer, content: Content, streams: Streams, run: Run) -> Content:
        mixer.select(content, streams, run)
        terms = mixer.terms_of(lambda name: at_least_float32(streams[name]))
        if "reset" not in mixer.selection:
            terms = terms._replace(fresh=mixer.resets(run, terms.log_decay))
        u = at_least_float32(content)
        start, kernel = run.start("scan", mixer.layer, terms.shape(), u), mixer.kernel(terms, u, run)
        step, sequences, constants = terms.steps(u)
        scan, last = mixer.recur(step, sequences, constants, start, run.padding, kernel)
        run.leave("scan", mixer.layer, last)
        return mixer.fire("scan", scan.to(content.dtype))

    def hold(self, mixer: PathMixer, held: Held) -> None:
        reset = held.fresh
        terms = mixer.terms_of(held.cached)._replace(fresh=reset)
        parts = terms.by_group()
        scans, sizes = [DecayScan.of(part) for part in parts], [part.log_decay.shape[2] for part in parts]
        held.factors["scan"] = scans[0] if len(scans) == 1 else SideBySide.of(scans, sizes, held.x.device)
        if held.state is not None:
            start = held.state["scan", mixer.layer].to(held.x)
            if reset is not None:  # the scan knows what resets leave of it, but for a whole one at the first position
                start = start.masked_fill((reset[:, 0] >= 1).view(-1, *[1] * (start.ndim - 1)), 0)
            held.factors["start"] = start.unsqueeze(-1) if terms.rate is None else start


@dataclass(frozen=True)
class Skip(Stage):
    """y = inner(u) + D u; D is a number a channel, or a head."""

    inner: Stage
    name: str = "D"

    def weight(self, mixer: PathMixer, like: Content) -> Float[Tensor, " channel"]:
        """D of each channel."""
        given = at_least_float32(getattr(mixer.weights, self.name)).flatten()
        return given.repeat_interleave(like.shape[-1] // len(given))

    def reads(self, mixer: PathMixer) -> tuple[str, ...]:
        return self.inner.reads(mixer)

    def forward(self, mixer: PathMixer, content: Content, streams: Streams, run: Run) -> Content:
        inner = self.inner.forward(mixer, content, streams, run)
        return mixer.fire("y", inner + self.weight(mixer, content) * content)

    def hold(self, mixer: PathMixer, held: Held) -> None:
        held.factors["skip"] = self.weight(mixer, held.x).to(held.x.dtype)
        self.inner.hold(mixer, held)

    def named_weights(self, mixer: PathMixer) -> dict[str, Tensor]:
        return {"D": getattr(mixer.weights, self.name), **self.inner.named_weights(mixer)}


@dataclass(frozen=True)
class Bonus(Stage):
    """y = inner(u) + bonus u: a number a head and position, the stream `name`, times the content as it is before `inner`.

    Beside a scan alone it is a skip. Beside a norm it is an operator of its own, because the norm may have centred the content.
    """

    inner: tuple[Stage, ...]
    name: str = "bonus"

    def spread(self, bonus: Float[Tensor, "batch pos head"], like: Content) -> Content:
        """The number of each channel's head."""
        return bonus.repeat_interleave(like.shape[-1] // bonus.shape[-1], dim=-1)

    def reads(self, mixer: PathMixer) -> tuple[str, ...]:
        return (*(name for stage in self.inner for name in stage.reads(mixer)), self.name)

    def forward(self, mixer: PathMixer, content: Content, streams: Streams, run: Run) -> Content:
        inner = content
        for stage in self.inner:
            inner = stage.forward(mixer, inner, streams, run)
        return mixer.fire("y", inner + self.spread(streams[self.name], content) * content)

    def hold(self, mixer: PathMixer, held: Held) -> None:
        skip = self.spread(held.cached(self.name), held.x)
        if len(self.inner) == 1:
            held.factors["skip"] = skip
        else:
            held.aside().factors.update(scan=None, skip=skip)
        for stage in reversed(self.inner):
            stage.hold(mixer, held)


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
    """out = weight * content / scale, scale = sqrt(mean over a group of channels of content^2 + eps). Its scale is held.

    centred: of the content less the group's mean, with a bias: out = weight * (content - mean) / scale + bias.
    """

    groups: int
    eps: float
    name: str = "norm"
    out: str = "gated"
    centred: bool = False

    def spread(self, scale: Float[Tensor, "batch pos group"], like: Content) -> Content:
        """The scale of each channel's group."""
        return scale.repeat_interleave(like.shape[-1] // self.groups, dim=-1)

    def weight(self, mixer: PathMixer, like: Content) -> Float[Tensor, " channel"]:
        """The gain of each channel; one that is as long as a group is every group's."""
        given = at_least_float32(getattr(mixer.weights, self.name).weight)
        return given.repeat(like.shape[-1] // len(given))

    def reads(self, mixer: PathMixer) -> tuple[str, ...]:
        return ("scale",)

    def forward(self, mixer: PathMixer, content: Content, streams: Streams, run: Run) -> Content:
        wide = at_least_float32(content).unflatten(-1, (self.groups, -1))
        if self.centred:
            wide = wide - wide.mean(-1, keepdim=True)
        scale = mixer.fire("scale", (wide.pow(2).mean(-1) + self.eps).sqrt())
        wide = wide.flatten(-2)
        out = self.weight(mixer, wide) * (wide / self.spread(scale, wide))
        return mixer.put_out(self.out, out + self.bias(mixer) if self.centred else out, streams)

    def bias(self, mixer: PathMixer) -> Float[Tensor, " channel"]:
        """What a centred norm adds to each channel."""
        return at_least_float32(getattr(mixer.weights, self.name).bias)

    def hold(self, mixer: PathMixer, held: Held) -> None:
        if self.centred:
            held.groups = self.groups
            behind = held.factors.get("gate", torch.ones_like(held.x))
            held.factors["rest"] = behind * self.bias(mixer).to(held.x.dtype) * held.padding.packed_mask(held.x)
        held.times("gate", self.weight(mixer, held.x).to(held.x.dtype) / self.spread(held.cached("scale"), held.x))
