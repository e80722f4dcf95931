"""TokenMixing: what mixes tokens in a block; Mixer: one that does it by the recurrence, with its conv and its lazy points.

A mixer of today is a path of stages (path.py), which call what is here. b batch, l pos, c channel, n state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.model.hookpoint import RECURRENT, Part
from gatedlens.model.padding import Padding, windows
from gatedlens.model.run import Run
from gatedlens.model.state import RecurrentState
from gatedlens.model.weights import given
from gatedlens.recurrence.chunks import chunked
from gatedlens.recurrence.convolution import slide
from gatedlens.recurrence.delta_states import states_of_delta_rule
from gatedlens.recurrence.factors import Factors
from gatedlens.recurrence.micro_steps import at_step, net_write, step_chunked
from gatedlens.recurrence.prior_matrix import prior_chunked
from gatedlens.recurrence.scanning import StepTerms, linear_scan, readout, scan
from gatedlens.recurrence.terms import Terms

Kernel = Callable[[], tuple[Tensor, Tensor]]  # computes a recurrence: (scan, last state)


class TokenMixing(Part):
    """What mixes tokens in a block. Subclasses write `forward(n, run)` like the paper.

    `place` is its name in the block, `attention_points` what its implicit attention is derived from (relative to it), and
    `factors(cached, padding, state)` that derivation, where `cached(name)` reads a point. `output_point` holds what the
    implicit attention yields, the input of the output projection. `scans` names what runs side by side, in the order of
    `branches`: "fwd", "bwd"; one scan that has no name stands for itself.
    """

    place = "mixer"
    role = RECURRENT
    attention_points: tuple[str, ...] = ()
    output_point = "hook_gated"
    scans: tuple[str, ...] = ("",)
    steps: int = 1  # that a position takes in a recurrence, each with a content of its own
    heads_axis = "head"  # what its heads are called, where it has any

    def __init__(self, weights: Any, rows: tuple[Point, ...], layer: int):
        super().__init__(weights, rows)
        self.layer = layer  # the block it is in

    def factors(self, cached: Callable[[str], Tensor], padding: Padding, state: RecurrentState | None) -> Factors:
        """How the cached activations fill A x + r; see `factors.py`."""
        raise NotImplementedError

    def output_weights(self) -> tuple[Float[Tensor, "d_model channel"], Float[Tensor, " d_model"] | None]:
        """(W, b) of the output projection: the mixer's output is W o + b, o what the implicit attention yields.

        What the output is multiplied by is in both. What stands behind it in the block is not: see `Block.writing`.
        """
        raise NotImplementedError

    @property
    def output_name(self) -> str:
        """The full name of `output_point`: "blocks.0.mixer.hook_gated"."""
        return f"blocks.{self.layer}.{self.place}.{self.output_point}"

    def branches(
        self, cached: Callable[[str], Tensor], padding: Padding, state: RecurrentState | None
    ) -> tuple[Factors, ...]:
        """The summands of the implicit attention: one, unless the mixer runs several scans side by side, or what passes by
        its scan has factors of its own."""
        own = self.factors(cached, padding, state)
        return (replace(own, beside=()), *own.beside) if own.beside else (own,)

    def shifted(self, n: Float[Tensor, "batch pos d_model"], run: Run, tail: str) -> Float[Tensor, "batch pos d_model"]:
        """The token shift n[pos - 1]: across padding and calls, by the tail of this name; zero before the first token of a
        document."""
        before = run.start(tail, self.layer, (n.shape[0], 1, n.shape[2]), n)
        long, within = run.padding.behind(n, before), run.in_document(2)
        run.leave(tail, self.layer, run.padding.tail(run.of_last_document(long, 2), 2))
        shift = long[:, :-1]
        return run.padding.spread(shift if within is None else shift * within[..., 0])

    def state_of(self, state: RecurrentState) -> Tensor:
        """What `state` carries of the scan, in the form of hook_state at one position: [batch, channel] (state)."""
        return state["scan", self.layer]


def written(mixing: TokenMixing) -> dict[str, Tensor]:
    """`written(mixer)`: W_out and, where there is one, b_out, of its `output_weights`."""
    weight, bias = mixing.output_weights()
    return given(W_out=weight.mT, b_out=bias)


class Mixer(TokenMixing):
    """A token mixer by the one recurrence, `recur`."""

    def along(self, x: Tensor) -> Tensor:
        """`x` from token order to the order of the scan, or back: the identity, unless the mixer runs from the end."""
        return x

    def along_conv(self, x: Float[Tensor, "batch pos ..."]) -> Float[Tensor, "batch pos ..."]:
        """As `along`: the convolution runs the way the scan does, unless a mixer says otherwise."""
        return self.along(x)

    def causal_convs(
        self,
        streams: Mapping[str, Float[Tensor, "batch pos ..."]],
        run: Run,
        weight: Float[Tensor, "channel 1 tap"],
        bias: Float[Tensor, " channel"] | None,
    ) -> dict[str, Float[Tensor, "batch pos ..."]]:
        """The causal depthwise convolution by the weight and bias of an nn.Conv1d, across padding, calls and documents, of
        streams side by side: c[i] = sum over k of weight[K - 1 - k] x[i - k] + bias.

        Each stream has lazy taps of its own, the summands: `hook_conv_taps` of "conv", `hook_B_conv_taps` of "B_conv".
        """
        width = weight.shape[-1]
        flat = [stream.flatten(2) for stream in streams.values()]
        x = flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)
        tail = run.start("conv", self.layer, (x.shape[0], width - 1, x.shape[2]), x)
        long = run.padding.behind(self.along_conv(x), tail)
        run.leave("conv", self.layer, run.padding.tail(run.of_last_document(long, width), width))
        within = run.in_document(width)

        def summands(some: slice) -> Tensor:
            taps = windows(long[..., some], width) * weight.squeeze(1)[some]
            taps = taps if within is None else taps * within
            return self.along_conv(torch.stack([run.padding.spread(tap) for tap in taps.unbind(-1)], dim=-1))

        found, whole, place = {}, None, 0
        for name, stream in streams.items():
            some, point = slice(place, place + stream[0, 0].numel()), getattr(self, f"hook_{name}_taps")
            place = some.stop
            if point.heard():
                taps = point(summands(some).unflatten(2, stream.shape[2:]))
                c = taps.sum(-1).flatten(2)
            elif within is not None:
                c = summands(some).sum(-1)
            else:  # one convolution does all that nobody listens to, and adds its bias
                if whole is None:
                    whole = self.along_conv(run.padding.spread(slide(long, weight.squeeze(1), bias)))
                # In memory of its own: a copy that a hook gets has the same layout then, and so the same rounding behind it.
                found[name] = whole[..., some].unflatten(2, stream.shape[2:])
                if len(streams) > 1:
                    found[name] = found[name].contiguous()
                continue
            found[name] = (c if bias is None else c + bias[some]).unflatten(2, stream.shape[2:])
        return found

    def recur(
        self,
        terms: StepTerms,
        sequences: tuple[Tensor, ...],
        constants: tuple[Tensor, ...],
        initial: Tensor,
        padding: Padding,
        kernel: Kernel | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The recurrence with its four lazy points: (scan, last state).

        If nobody listens, nothing inside is materialised, and `kernel()`, if given, computes it, `along` the scan. Otherwise
        decay and write become tensors, so an edit of either re-runs the recurrence; an edit of hook_state changes what the
        readout reads and nothing later. A masked position keeps decay 1 and write 0 whatever a hook does there. Sequences,
        points and scan are in token order; in between all is `along` the scan.
        """
        sequences = tuple(self.along(s) for s in sequences)
        # Each point is asked right before it fires: an nnsight trace parks on one location at a time.
        if self.hook_state_start.heard():
            initial, kernel = self.hook_state_start(initial), None
        built: tuple[Tensor, Tensor, Tensor | None] | None = None
        # `terms` is computed anew at each point that is heard, unless an earlier one has built it: the tensors are large, and
        # most calls listen to none or one of them.
        if self.hook_decay.heard():
            decay, write, read = terms(*sequences, *constants)
            built = self.along(padding.fill(self.hook_decay(self.along(decay)), 1.0)), write, read
        if self.hook_write.heard():
            decay, write, read = built or terms(*sequences, *constants)
            built = decay, self.along(padding.zero(self.hook_write(self.along(write)))), read
        if not self.hook_state.heard():
            if built is None:
                out, last = scan(terms, sequences, constants, initial) if kernel is None else kernel()
            else:
                out, last = scan(_as_they_are, tuple(t for t in built if t is not None), (), initial)
            return self.along(out), last
        decay, write, read = built or terms(*sequences, *constants)
        states = linear_scan(decay, write, initial)
        heard = self.along(self.hook_state(self.along(states)))
        return self.along(readout(heard, read)), states[:, -1]

    def recur_heads(
        self,
        terms: Terms,
        u: Float[Tensor, "batch pos head value"],
        initial: Float[Tensor, "batch head value key"],
        padding: Padding,
    ) -> tuple[Float[Tensor, "batch pos head value"], Float[Tensor, "batch head value key"]]:
        """The recurrence of heads with matrix states, with its lazy points: (scan, last state).

        As `recur`: nothing inside is materialised unless somebody listens, and then an edit of any point is in all that
        follows. hook_decay, hook_write and, of a delta rule, hook_erase have the axes of the state, whatever they are shared by.
        A masked position keeps erase 0, too.
        """
        terms, initial, inside = self._heard(terms, u, initial, padding)
        if inside is None:
            return chunked(terms, u, initial)
        states, last = inside
        return _read(states, terms.of_heads(terms.read)), last

    def recur_heads_before(
        self,
        terms: Terms,
        u: Float[Tensor, "batch pos head value"],
        initial: Float[Tensor, "batch head value key"],
        padding: Padding,
    ) -> tuple[Float[Tensor, "batch pos head value"], Float[Tensor, "batch head value key"]]:
        """The same where a position reads the state before its own step: nothing of it where a document begins."""
        fresh = terms.fresh
        terms, initial, inside = self._heard(terms, u, initial, padding)
        if inside is None:
            return prior_chunked(terms, u, initial)
        states, last = inside
        read = terms.of_heads(terms.read)
        read = read if fresh is None else read * (1 - fresh).unsqueeze(-1)
        return _read(torch.cat([initial.unsqueeze(1), states[:, :-1]], dim=1), read), last

    def recur_steps(
        self,
        terms: Terms,
        u: Float[Tensor, "batch pos step head value"],
        initial: Float[Tensor, "batch head value key"],
        padding: Padding,
    ) -> tuple[Float[Tensor, "batch pos head value"], Float[Tensor, "batch head value key"]]:
        """The same under a delta rule whose positions take several steps; `terms` are those over (pos step).

        hook_decay and hook_state are a position's, hook_erase and hook_probe of each of its steps. hook_write is what the steps
        together write: what they erase of one another is in it, so the state is what is left of the one before, and that.
        """
        n = u.shape[2]
        if self.hook_state_start.heard():
            initial = self.hook_state_start(initial)
        decay = write = erase = None
        if self.hook_decay.heard():
            whole = terms.decays()[:, ::n].unsqueeze(-2).expand(*u[:, :, 0].shape, terms.key.shape[-1])
            decay = at_step(padding.fill(self.hook_decay(whole), 1.0), 0, n, otherwise=1.0)
        given = terms.erase
        assert given is not None
        by_step = given.unflatten(1, (-1, n)).unsqueeze(-2)
        if self.hook_erase.heard():
            by_step = padding.zero(self.hook_erase(by_step.expand(*u.shape, given.shape[-1])))
            erase = by_step.flatten(1, 2)
        if self.hook_probe.heard():
            probes = self.hook_probe(_there(terms.probes()).unflatten(1, (-1, n)))
            terms = terms.with_probe(padding.zero(probes).flatten(1, 2))
        probe = _there(terms.probes())
        if self.hook_write.heard():
            each = terms.write(u.flatten(1, 2)).unflatten(1, (-1, n))
            net = self.hook_write(net_write(each, by_step, probe.unflatten(1, (-1, n))))
            write = at_step(padding.zero(net), -1, n)
        heard = self.hook_state.heard()
        if decay is None and write is None and erase is None and not heard:
            return step_chunked(terms, u, initial)
        decay = terms.decays().unsqueeze(-2) if decay is None else decay
        write = terms.write(u.flatten(1, 2)) if write is None else write
        erase = given.unsqueeze(-2) if erase is None else erase
        states = states_of_delta_rule(decay, write, erase, probe, initial)[:, n - 1 :: n]
        return _read(self.hook_state(states) if heard else states, terms.of_heads(terms.read)[:, n - 1 :: n]), states[
            :, -1
        ]

    def _heard(
        self,
        terms: Terms,
        u: Float[Tensor, "batch pos head value"],
        initial: Float[Tensor, "batch head value key"],
        padding: Padding,
    ) -> tuple[
        Terms,
        Float[Tensor, "batch head value key"],
        tuple[Float[Tensor, "batch pos head value key"], Float[Tensor, "batch head value key"]] | None,
    ]:
        """Terms and start as hooks leave them, and (every state, the last one) if somebody listens inside."""
        if self.hook_state_start.heard():
            initial = self.hook_state_start(initial)
        decay = write = erase = None
        if self.hook_decay.heard():
            whole = terms.decays().unsqueeze(-2).expand(*u.shape, terms.key.shape[-1])
            decay = padding.fill(self.hook_decay(whole), 1.0)
        if self.hook_write.heard():
            write = padding.zero(self.hook_write(terms.write(u)))
        if terms.erase is not None:
            if self.hook_erase.heard():
                erase = padding.zero(self.hook_erase(terms.erase.unsqueeze(-2).expand(*u.shape, terms.key.shape[-1])))
            if self.hook_probe.heard():
                terms = terms.with_probe(padding.zero(self.hook_probe(terms.probes())))
        heard = self.hook_state.heard()
        if decay is None and write is None and erase is None and not heard:
            return terms, initial, None
        decay = terms.decays().unsqueeze(-2) if decay is None else decay
        write = terms.write(u) if write is None else write
        probe = terms.probes()
        if terms.erase is not None and probe is not None:
            erase = terms.erase.unsqueeze(-2) if erase is None else erase
            states = states_of_delta_rule(decay, write, erase, probe, initial)
        else:
            states = linear_scan(decay, write, initial)
        last = states[:, -1]
        return terms, initial, (self.hook_state(states) if heard else states, last)


def _there(probe: Tensor | None) -> Tensor:
    """The probe of a delta rule, which has one."""
    assert probe is not None
    return probe


def _read(
    states: Float[Tensor, "batch pos head value key"], read: Float[Tensor, "batch pos head key"]
) -> Float[Tensor, "batch pos head value"]:
    """What each position reads off its state."""
    return (states * read.unsqueeze(-2)).sum(-1)


def multiplied(x: Tensor, by: float) -> Tensor:
    """`multiplied(x, 0.3)`: x times a number of the config; x itself for 1, which most models have."""
    return x if by == 1 else x * by


def _as_they_are(decay: Tensor, write: Tensor, read: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    # `scan` may overwrite what its terms give; decay and write here are what the hooks returned, and may be kept elsewhere.
    return decay, write.clone(), read
