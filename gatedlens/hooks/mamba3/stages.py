"""The stages of Mamba-3's path: its scan, whose every step also writes the term of the step before; and, in MIMO, the ranks.

A step of rank R writes R outer products and reads its state R times. So there are R^2 ways of the content, from the write of a
rank to the read of a rank, each with factors of its own; `way.step` is its number, read * R + write. b batch, l pos, r rank,
h head, v value, c channel = (head value). The rest is in recurrence/two_terms.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from gatedlens.model.path import Content, Held, PathMixer, Stage, Streams
from gatedlens.model.run import Run
from gatedlens.parts.activation import wide_silu
from gatedlens.recurrence.folded_matrix import FoldedScan
from gatedlens.recurrence.scanning import at_least_float32, linear_scan
from gatedlens.recurrence.two_terms import TwoTerms, Wrote, following


def by_channel(given: Float[Tensor, "head rank value"]) -> Float[Tensor, "rank channel"]:
    """A parameter of the ranks: each rank's number of each channel."""
    return at_least_float32(given).transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class Spread(Stage):
    """u_r = mimo_x_r x: what each rank writes of the content."""

    name: str

    def forward(
        self, mixer: PathMixer, content: Content, streams: Streams, run: Run
    ) -> Float[Tensor, "batch pos rank wide"]:
        weight = by_channel(getattr(mixer.weights, self.name))
        return mixer.fire("u", run.padding.zero(weight * at_least_float32(content).unsqueeze(2)))

    def hold(self, mixer: PathMixer, held: Held) -> None:
        pass  # Mixed, who makes the ways, has said it


@dataclass(frozen=True)
class TwoTermScan(Stage):
    """scan_t = S_t read_t by the recurrence of `TwoTerms`, then y = scan + D u."""

    def reads(self, mixer: PathMixer) -> tuple[str, ...]:
        return (*mixer.selection, "reset")

    def forward(self, mixer: PathMixer, content: Content, streams: Streams, run: Run) -> Content:
        mixer.select(content, streams, run)
        pad, layer, wide = run.padding, mixer.layer, at_least_float32(content)
        fresh = mixer.resets(run, wide.flatten(2))
        terms: TwoTerms = mixer.terms_of(lambda name: at_least_float32(streams[name]))
        behind = following(pad.pack(terms.beta), None if fresh is None else pad.pack(fresh))
        terms = terms._replace(following=pad.spread(behind), fresh=fresh)
        u = wide.unflatten(-1, (mixer.heads, -1)).reshape(*terms.key.shape[:4], -1)
        own = {"u": u, "rot_B": terms.key}
        first = Wrote(*(self.tail(mixer, x, name, run) for name, x in own.items()))
        before = Wrote(*(mixer.shifted(x.flatten(2), run, name).view_as(x) for name, x in own.items()))
        start = run.start("scan", layer, (len(u), mixer.heads, u.shape[-1], terms.key.shape[-1]), u)
        scan, last = self.recur(mixer, terms, u, start, first, before, run)
        run.leave("scan", layer, last)
        scan = mixer.fire("scan", scan.flatten(-2).view_as(wide))
        return mixer.fire("y", scan + self.skip(mixer, wide) * wide)

    @staticmethod
    def tail(mixer: PathMixer, x: Tensor, name: str, run: Run) -> Tensor:
        """What the state brings of the step before the first: [batch, rank, head, ...]."""
        return run.start(name, mixer.layer, (len(x), 1, x[0, 0].numel()), x).view(len(x), *x.shape[2:])

    @staticmethod
    def recur(
        mixer: PathMixer,
        terms: TwoTerms,
        u: Float[Tensor, "batch pos rank head value"],
        start: Float[Tensor, "batch head value state"],
        first: Wrote,
        before: Wrote,
        run: Run,
    ) -> tuple[Float[Tensor, "batch pos rank head value"], Float[Tensor, "batch head value state"]]:
        """The recurrence with its lazy points, as `Mixer.recur_heads`: nothing inside is a tensor unless somebody listens.

        first: what the step in front of the first one wrote; before: what that in front of each did."""
        pad, own, decay, write = run.padding, Wrote(u, terms.key), None, None
        if mixer.hook_state_start.heard():
            start = mixer.hook_state_start(start)
        if mixer.hook_decay.heard():
            whole = terms.decays().unsqueeze(-1).expand(*u.shape[:2], *start.shape[1:])
            decay = pad.fill(mixer.hook_decay(whole), 1.0)
        if mixer.hook_write.heard():
            write = pad.zero(mixer.hook_write(terms.write(own, before)))
        heard = mixer.hook_state.heard()
        if decay is None and write is None and not heard:
            return terms.scan(u, terms._replace(beta=pad.pack(terms.beta)).begun(start, first))
        decay = terms.decays().unsqueeze(-1) if decay is None else decay
        write = terms.write(own, before) if write is None else write
        states = linear_scan(decay, write, start)
        return terms.readout(mixer.hook_state(states) if heard else states), states[:, -1]

    @staticmethod
    def skip(mixer: PathMixer, like: Content) -> Float[Tensor, " channel"]:
        """D of each channel."""
        D = at_least_float32(mixer.weights.D)
        return D.repeat_interleave(like.shape[-1] // len(D))

    def hold(self, mixer: PathMixer, held: Held) -> None:
        terms: TwoTerms = mixer.terms_of(lambda name: held.read(name, None))
        terms = terms._replace(following=following(terms.beta, held.fresh), fresh=held.fresh)
        batch, _, ranks, heads, width = terms.key.shape
        read, write = divmod(held.step, ranks)
        before = Wrote(*(held.x.new_zeros(batch, ranks, heads, n) for n in (held.x.shape[2] // heads, width)))
        if held.state is not None:
            tails = (held.state[name, mixer.layer].to(held.x) for name in ("u", "rot_B"))
            before = Wrote(*(tail.view_as(nothing) for tail, nothing in zip(tails, before, strict=True)))
            if write == 0:  # one way to each read brings what the state holds
                start = held.state["scan", mixer.layer].to(held.x)
                held.factors["start"] = terms.begun(start, before).flatten(1, 2)
        held.factors["scan"] = FoldedScan.of(terms, before, write, read)
        if read == write:
            held.factors["skip"] = self.skip(mixer, held.x).to(held.x)


@dataclass(frozen=True)
class RankGate(Stage):
    """product_r = y_r SiLU(mimo_z_r z)."""

    name: str

    def reads(self, mixer: PathMixer) -> tuple[str, ...]:
        return ("gate",)

    def forward(self, mixer: PathMixer, content: Content, streams: Streams, run: Run) -> Content:
        pre = by_channel(getattr(mixer.weights, self.name)) * at_least_float32(streams["gate_pre"]).unsqueeze(2)
        return mixer.fire("product", content * mixer.fire("gate", wide_silu(pre)))

    def hold(self, mixer: PathMixer, held: Held) -> None:
        ranks = getattr(mixer.weights, self.name).shape[1]
        held.times("gate", held.read("gate", None)[:, :, held.step // ranks])


@dataclass(frozen=True)
class Mixed(Stage):
    """gated = sum over rank of mimo_o_r product_r. The last stage, who makes the ways of the content, and says what each begins
    and ends with."""

    name: str
    spread: str

    def forward(
        self, mixer: PathMixer, content: Content, streams: Streams, run: Run
    ) -> Float[Tensor, "batch pos wide"]:
        mixed = (by_channel(getattr(mixer.weights, self.name)) * content).sum(2)
        return mixer.put_out("gated", mixed, streams)

    def hold(self, mixer: PathMixer, held: Held) -> None:
        out, into = (by_channel(getattr(mixer.weights, name)).to(held.x) for name in (self.name, self.spread))
        ways = (held, *(held.aside(number) for number in range(1, len(out) * len(into))))
        for way in ways:
            read, write = divmod(way.step, len(into))
            way.times("gate", out[read].expand_as(held.x))
            way.times("act", into[write].expand_as(held.x))
