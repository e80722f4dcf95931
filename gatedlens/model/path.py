"""A mixer as a path: the way of the content from x to o, stage by stage. An architecture says the stages; the rest is derived.

    class Mamba2Mixer(PathMixer):
        path = (Conv("conv1d", ("x", "B", "C")), SiLU(("B", "C")), Skip(Scan()), Gate(F.silu), GroupNorm())
        def project(self, n, run): ...     # the named streams: x (the content), gate_pre, B, C, dt_pre
        def terms(self, dt, B, C): ...     # -> Terms

A stage (stages.py) runs and fires its points; and it says what it is with its coefficients held. The forward is the stages in
order. The implicit attention o = A x + r is the same stages, held, from the last to the first: no architecture writes its
factors. b batch, l pos, c channel = (head value).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.model.mixer import Kernel, Mixer, written
from gatedlens.model.padding import Padding
from gatedlens.model.run import Run
from gatedlens.model.state import RecurrentState
from gatedlens.recurrence.factors import Factors
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.recurrence.transforms import anywhere

if TYPE_CHECKING:
    Streams = dict[str, Float[Tensor, "batch pos ..."]]
else:
    Streams = dict

Content = Float[Tensor, "batch pos *channel"]  # (step channel) before a scan whose positions take several steps


@dataclass
class Held:
    """What a path is with its coefficients held, filled by its stages: the factors of o = gate (S + skip) act (M x + drift)."""

    read: Callable[
        [str, int | None], Tensor
    ]  # a point's activation, packed, at least float32; of a step, or of all (None)
    padding: Padding
    state: RecurrentState | None
    factors: dict[str, Any]
    groups: int | None = None  # of channels, whose mean a norm takes from what enters it; None: none does
    step: int = 0  # whose content goes this way, where a position takes several steps
    beside: list[Held] = field(default_factory=list)  # other ways of the content, each with its own factors

    def cached(self, name: str) -> Tensor:
        """A point's activation, without `hook_`, positions packed, at least float32; of the step whose content goes this way."""
        return self.read(name, self.step)

    @cached_property
    def x(self) -> Float[Tensor, "batch pos channel"]:
        """The content that goes this way."""
        return self.cached("x")

    @property
    def documents(self) -> Int[Tensor, "batch pos"] | None:
        """How many documents have begun, positions packed (0: the state's goes on); None: each row is one."""
        number = self.padding.documents
        return None if number is None else self.padding.pack(number)

    @property
    def fresh(self) -> Float[Tensor, "batch pos one"] | None:
        """How much of the state each position forgets, hook_reset; None where nothing is, and no gradient asks what if."""
        reset = self.cached("reset")
        if anywhere((reset < 0) | (reset > 1)):
            raise InputError("hook_reset is below 0 or above 1 somewhere: the implicit attention knows no such reset.")
        return reset if reset.requires_grad or anywhere(reset != 0) else None

    def aside(self, step: int = 0) -> Held:
        """A way beside this one, with the factors of what comes behind both."""
        self.beside.append(Held(self.read, self.padding, self.state, dict(self.factors), step=step))
        return self.beside[-1]

    def centred(self, x: Tensor, axis: int) -> Tensor:
        """A content less its mean over each group of channels, where a norm behind takes it away.

        A scan that is the same for all channels of a group passes the mean on by itself, so that it can be taken at once.
        """
        if self.groups is None:
            return x
        each = x.unflatten(axis, (self.groups, -1))
        return (each - each.mean(axis + 1, keepdim=True)).flatten(axis, axis + 1)

    def made(self, o: Content) -> Factors:
        """The factors."""
        if self.groups is not None and not self.factors.keys().isdisjoint(("taps", "act")):
            raise InputError(
                "A norm that centres its groups of channels stands behind a convolution or an activation, which differ from "
                "channel to channel: with them it mixes channels, and no matrix a channel says that."
            )
        beside = tuple(one.made(torch.zeros_like(o)) for one in self.beside)
        return Factors(x=self.centred(self.x, 2), o=o, beside=beside, groups=self.groups, **self.factors)

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

    def named_weights(self, mixer: PathMixer) -> dict[str, Tensor]:
        """The stage's weights, by the words of weights.py."""
        return {}


class PathMixer(Mixer):
    """out = W o + b, o at the end of the path. Subclasses give `path`, `project`, `terms`, `selection`, and `heads` where a head
    is more than a channel."""

    path: tuple[Stage, ...] = ()
    selection: ClassVar[tuple[str, ...]] = ()  # the streams that the terms of the recurrence are made of
    sizes: Mapping[str, int]  # the channels of each stream that goes through the convolution

    def project(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Streams:
        """The streams that the input projection gives, their points fired: "x", the content, among them."""
        raise NotImplementedError

    def select(self, u: Content, streams: Streams, run: Run) -> None:
        """Put into `streams` what the terms are made of where it depends on u, or is not ready yet."""

    def terms(self, **selection: Tensor) -> Any:
        """The recurrence: `Terms` of heads, `ChannelTerms` where each channel is one.

        It is made of the streams in `selection`, by name, and is the same in the forward and in the implicit attention.
        """
        raise NotImplementedError

    def terms_of(self, stream: Callable[[str], Tensor]) -> Any:
        """The recurrence, of what `stream` gives for each name in `selection`."""
        return self.terms(**{name: stream(name) for name in self.selection})

    def named_weights(self) -> dict[str, Tensor]:
        """What the stages and the output projection have; a mixer puts what it projects with in front."""
        of_stages = (stage.named_weights(self) for stage in self.path)
        return {word: weight for found in (*of_stages, written(self)) for word, weight in found.items()}

    @property
    def heads(self) -> int:
        """How many heads the channels are cut into."""
        raise NotImplementedError

    def kernel(self, terms: Any, u: Content, run: Run) -> Kernel | None:
        """What computes the scan of the content `u` faster than gatedlens does; None: nothing."""
        return None

    def resets(self, run: Run, like: Tensor) -> Float[Tensor, "batch pos one"] | None:
        """hook_reset: 1 where a document begins; None where nothing is forgotten and nobody can want to know.

        A reset that no hook has set is no part of the recurrence: it would be multiplied with every decay.
        """
        begun = run.resets(like)
        if begun is None and self.hook_reset.at_rest():
            return None
        reset = torch.zeros_like(like[:, :, :1]) if begun is None else begun
        reset = run.padding.zero(self.fire("reset", reset))
        return reset if begun is not None or reset.requires_grad or anywhere(reset != 0) else None

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
        return tuple(dict.fromkeys(("hook_x", *inside, self.output_point)))

    def forward(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Float[Tensor, "batch pos d_model"]:
        return F.linear(self.walk(self.project(n, run), run), *self.output_weights())

    def walk(self, streams: Streams, run: Run) -> Content:
        """The content at the end of the path."""
        content = streams["x"]
        for stage in self.path:
            content = stage.forward(self, content, streams, run)
        return content

    def factors(self, cached: Callable[[str], Tensor], padding: Padding, state: RecurrentState | None) -> Factors:
        """The factors of the implicit attention: the stages held, from the last to the first; all in the order of the scan."""

        def packed(name: str, step: int | None = None) -> Tensor:
            whole = self.along(padding.pack(at_least_float32(cached(f"hook_{name}"))))
            stepped = step is not None and "step" in getattr(self, f"hook_{name}").point.dims
            return whole[:, :, step] if stepped else whole

        held = Held(packed, padding, state, {})
        for stage in reversed(self.path):
            for way in (held, *held.beside):
                stage.hold(self, way)
        return held.made(packed(self.output_point.removeprefix("hook_")))
