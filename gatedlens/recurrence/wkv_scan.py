"""The WKV recurrence of RWKV-4 (arXiv 2305.13048): an exponentially weighted mean as a recurrence. It knows no model.

    N_t = e^w N_{t-1} + e^{k_t} v_t        D_t = e^w D_{t-1} + e^{k_t}
    scan_t = (N_{t-1} + e^{u + k_t} v_t) / (D_{t-1} + e^{u + k_t})

b batch, l pos, c channel; k, v keys and values [b, l, c]; w = -exp(time_decay) and u = time_first [c].

e^{k} leaves float32 at |k| = 88, so the state is carried relative to a running maximum, num = N e^{-max} and
den = D e^{-max} with max_t = max(max_{t-1} + w, k_t). The maximum is a gauge: scan does not depend on it, and gradients
may hold it fixed. There are two implementations of the same numbers:

    wkv      where no hook is inside the scan: segments, forward and backward, with factors that all lie in [0, 1]
    OpenWkv  where one is: N and D themselves, as one state of two, in float64, which holds e^{k} up to |k| = 700

A masked position (mask False) passes the state on as it is. At a position where a document begins (fresh 1) the state before is
forgotten: what is left of it, 1 - fresh, stands as a logarithm, `kept`, beside w wherever N_{t-1} and D_{t-1} are read.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.autograd.function import Function
from torch.overrides import handle_torch_function

from gatedlens.errors import InputError
from gatedlens.recurrence import doubling
from gatedlens.recurrence.scanning import SEGMENT_ELEMENTS, SEGMENT_ELEMENTS_GRAD, _segments, budget, linear_scan
from gatedlens.recurrence.transforms import anywhere, gradients, has_old_axis, overridden, transformed

# The maximum of an empty past. Not -inf: a first position that is masked would give -inf - (-inf), which is NaN.
NOTHING = -1e38
LARGEST_KEY = 700.0  # e^700 is still a float64
TINY = 1e-304  # e^-700


def log_kept(fresh: Float[Tensor, "batch pos one"], gone: float = NOTHING) -> Float[Tensor, "batch pos one"]:
    """log(1 - fresh), and `gone` where nothing is left: finite, as `NOTHING` is."""
    whole = fresh >= 1
    return torch.log1p(-fresh.masked_fill(whole, 0)).masked_fill(whole, gone)  # no gradient of log(0)


class Carry(NamedTuple):
    """What one position hands to the next: num, den and max, [b, c] each."""

    num: Tensor
    den: Tensor
    max: Tensor


def _running_max(log_decay: Tensor, key: Tensor, start: Tensor) -> Tensor:
    """max_t = max(max_{t-1} + log_decay_t, key_t), at every position."""
    return (
        _running_max_operator(log_decay, key, start)
        if torch.compiler.is_compiling()
        else _running_max_loop(log_decay, key, start)
    )


def _running_max_loop(log_decay: Tensor, key: Tensor, start: Tensor) -> Tensor:
    if doubling.pays(key):
        return doubling.running_max(log_decay, key, start)
    maxima = []
    for w, k in zip(log_decay.unbind(1), key.unbind(1), strict=True):
        start = torch.maximum(start + w, k)
        maxima.append(start)
    return torch.stack(maxima, dim=1)


@torch.library.custom_op(
    "gatedlens::running_max", mutates_args=(), schema="(Tensor log_decay, Tensor key, Tensor start) -> Tensor"
)
def _running_max_operator(log_decay: Tensor, key: Tensor, start: Tensor) -> Tensor:
    """For torch.compile: one node of its graph, whatever the length."""
    return _running_max_loop(log_decay, key, start)


@_running_max_operator.register_fake
def _(log_decay: Tensor, key: Tensor, start: Tensor) -> Tensor:
    return torch.empty_like(key, memory_format=torch.contiguous_format)


def _before_each(start: Tensor, steps: Tensor) -> Tensor:
    """What each position finds: `start`, then the steps before it."""
    return torch.cat([start.unsqueeze(1), steps[:, :-1]], dim=1)


class _Segment(NamedTuple):
    """A segment's intermediates, [b, l, c]; `past_state` [b, l, 2, c] is the (num, den) that each position finds."""

    decay: Tensor  # e^{max_{t-1} + w - max_t}
    weight: Tensor  # e^{k_t - max_t}
    past: Tensor  # e^{max_{t-1} - q_t}, with q_t the larger of max_{t-1} and u + k_t
    present: Tensor  # e^{u + k_t - q_t}
    past_state: Tensor
    total: Tensor  # past den_{t-1} + present
    scan: Tensor
    carry: tuple[Tensor, Tensor, Tensor]


def _segment(
    mask: Tensor | None,
    kept: Tensor | None,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    num: Tensor,
    den: Tensor,
    top: Tensor,
) -> _Segment:
    """The recurrence over some positions after the carry; differentiable, with every maximum held fixed."""
    writes, log_decay = k, w.expand_as(k)
    # A masked position decays by e^0 and writes e^-inf: what it finds is what it hands on.
    if mask is not None:
        writes, log_decay = k.masked_fill(~mask.unsqueeze(-1), -torch.inf), w * mask.unsqueeze(-1)
    if kept is not None:
        log_decay = log_decay + kept
    # Detached: num and den are scaled by e^-max and the scan divides it out again, so max has no gradient to give.
    maxima = _running_max(log_decay.detach(), writes.detach(), top.detach())
    # `top` itself is not detached: the carry's maximum scales the num and den that came with it, so it has a gradient.
    before = _before_each(top, maxima)
    # max_t is the larger of both exponents, so decay and weight are at most 1, and one of them is 1: nothing overflows.
    # den is 0 only before anything was written; then `present` keeps the total above 0.
    decay = torch.exp(before + log_decay - maxima)
    weight = torch.exp(writes - maxima)
    start = torch.stack([num, den], dim=1)
    # Numerator and denominator are one recurrence with a state of two: the same decay, the writes (weight v, weight).
    states = linear_scan(decay.unsqueeze(2).expand(-1, -1, 2, -1), torch.stack([weight * v, weight], dim=2), start)
    past_state = _before_each(start, states)
    # The position's own key counts with the bonus u, which is no part of the state: past and present are brought to a
    # maximum of their own, the larger of max_{t-1} and u + k_t.
    past, present = _exponentials(before if kept is None else before + kept, u + k)
    total = past * past_state[:, :, 1] + present
    scan = (past * past_state[:, :, 0] + present * v) / total
    num, den = states[:, -1].unbind(1)
    return _Segment(decay, weight, past, present, past_state, total, scan, (num, den, maxima[:, -1]))


def _exponentials(top: Tensor, bonus: Tensor) -> tuple[Tensor, Tensor]:
    """e^top and e^bonus, relative to the larger."""
    largest = torch.maximum(top.detach(), bonus.detach())
    return torch.exp(top - largest), torch.exp(bonus - largest)


def _backward(p: _Segment, v: Tensor, grad_scan: Tensor, grad_state: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a segment by hand, maxima held fixed: of v, of u + k, of k as written, of w (all [b, l, c]), of the
    state before [b, 2, c] and of the maximum before [b, c]; `grad_state` [b, 2, c] is that of the state after.

    scan = (past num + present v) / total, and from the end g_t = d scan_{t+1} / d state_t + decay_{t+1} g_{t+1}.
    """
    # scan = numerator / total: d scan / d num = past / total, d scan / d den = -past scan / total, and likewise for present.
    per_total = grad_scan / p.total
    bonus = p.present * per_total
    read = p.past * per_total
    reads = torch.stack([read, -read * p.scan], dim=2)
    flows, onward = _flows(p.decay.unsqueeze(2), reads, grad_state)
    # weight = e^{k - max} and decay = e^{... - max}: with max held, d weight / d k = weight and d decay / d w = decay.
    num_flow, den_flow = flows.unbind(2)
    grad_decay = (p.past_state * flows).sum(2).mul_(p.decay)
    # The carry's maximum is in the decay and in the past of the first position; the later maxima are held fixed.
    grad_top = grad_decay[:, 0] + (p.past_state[:, 0] * reads[:, 0]).sum(1)
    grad_written = torch.addcmul(den_flow, num_flow, v).mul_(p.weight)
    return torch.addcmul(bonus, p.weight, num_flow), bonus * (v - p.scan), grad_written, grad_decay, onward, grad_top


def _flows(decay: Tensor, reads: Tensor, grad_state: Tensor) -> tuple[Tensor, Tensor]:
    """The adjoint recurrence: what the state after t is worth is what its next reader and its next state make of it. (Of the
    states after each position, of the one before the first.)"""
    if doubling.pays(reads):
        back = doubling.doubled(decay.flip(1).expand_as(reads), reads.flip(1), grad_state).flip(1)
        return torch.cat([back[:, 1:], grad_state.unsqueeze(1)], dim=1), back[:, 0]
    flows = torch.empty_like(reads)
    flows[:, -1] = grad_state
    steps = list(zip(flows.unbind(1), decay.unbind(1), reads.unbind(1), strict=True))
    for t in range(len(steps) - 1, 0, -1):
        flow, step, grad = steps[t]
        torch.addcmul(grad, step, flow, out=steps[t - 1][0])
    flow, step, grad = steps[0]
    return flows, torch.addcmul(grad, step, flow)


class SegmentedWkv(Function):
    """scan, num, den, max = SegmentedWkv.apply(mask, kept, k, v, w, u, num, den, max).

    Forward keeps the carry at each segment's start; backward rebuilds one segment at a time from there.
    """

    @staticmethod
    def forward(ctx: Any, mask: Tensor | None, kept: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        k, v, w, u, *carry = tensors
        slices = _segments(k.shape[1], k[:, 0].numel(), budget(k, SEGMENT_ELEMENTS_GRAD))
        scan, starts = torch.empty_like(k), []
        for part in slices:
            starts += carry
            segment = _segment(_part(mask, part), _part(kept, part), k[:, part], v[:, part], w, u, *carry)
            scan[:, part] = segment.scan
            carry = [t.clone() for t in segment.carry]  # a view would keep the segment's states alive
        ctx.slices = slices
        ctx.save_for_backward(mask, kept, k, v, w, u, *starts)
        ctx.mark_non_differentiable(carry[2])
        return scan, *carry

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        whole, kept, k, v, w, u, *starts = ctx.saved_tensors
        if torch.is_grad_enabled() or transformed() or has_old_axis(*grads):
            # The loop below writes into buffers, which no second derivative passes, and which lack an axis that a transform or
            # a batch of gradients hides. These go through the whole sequence in one segment of differentiable operations.

            def run(*given: Tensor) -> tuple[Tensor, ...]:
                segment = _segment(whole, kept, *given)
                return segment.scan, *segment.carry[:2]

            return None, None, *gradients(run, (k, v, w, u, *starts[:3]), grads[:3])
        grad_scan, grad_num, grad_den, _ = grads
        grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
        grad_w, grad_u = torch.zeros_like(w), torch.zeros_like(u)
        grad_state, grad_top = torch.stack([grad_num, grad_den], dim=1), None
        for i in reversed(range(len(ctx.slices))):
            part = ctx.slices[i]
            mask, k_part, v_part = _part(whole, part), k[:, part], v[:, part]
            segment = _segment(mask, _part(kept, part), k_part, v_part, w, u, *starts[3 * i : 3 * i + 3])
            # The gradient of an inner maximum is dropped: it is held fixed. That of the first one is the carry's.
            grad_v[:, part], bonus, written, decay, grad_state, grad_top = _backward(
                segment, v_part, grad_scan[:, part], grad_state
            )
            grad_k[:, part] = bonus + written
            grad_u += bonus.sum((0, 1))
            grad_w += (decay if mask is None else decay * mask.unsqueeze(-1)).sum((0, 1))
        return None, None, grad_k, grad_v, grad_w, grad_u, *grad_state.unbind(1), grad_top


def _part(x: Shaped[Tensor, "batch pos *rest"] | None, part: slice) -> Shaped[Tensor, "batch some *rest"] | None:
    return None if x is None else x[:, part]


def wkv(
    k: Float[Tensor, "batch pos channel"],
    v: Float[Tensor, "batch pos channel"],
    w: Float[Tensor, " channel"],
    u: Float[Tensor, " channel"],
    mask: Bool[Tensor, "batch pos"] | None,
    carry: Carry,
    fresh: Float[Tensor, "batch pos one"] | None = None,
) -> tuple[Float[Tensor, "batch pos channel"], Carry]:
    """`scan, carry = wkv(k, v, w, u, mask, carry)`; O(b c) memory beyond inputs and output without gradients.

    fresh: 1 where a document begins and the state before is forgotten, 0 elsewhere; None: nowhere.
    """
    if overridden(k, v, w, u, fresh, *carry):
        given = k, v, w, u, mask, carry, fresh
        return handle_torch_function(wkv, (k, v, w, u, fresh, *carry), *given)
    kept = None if fresh is None else log_kept(fresh)
    compiling, grad = torch.compiler.is_compiling(), torch.is_grad_enabled()
    # Four ways to the same numbers. Inside torch.compile a Function cannot stand, so with gradients the segment is written in
    # operations that the compiler differentiates; under torch.func too, which a Function's buffers would not survive.
    followed = grad and any(t.requires_grad for t in (k, v, w, u, *carry))
    # The gradient of a reset is nobody's but an edit's, and has no place in the backward by hand.
    of_resets = grad and kept is not None and kept.requires_grad
    one_segment = (followed or of_resets) if compiling else (transformed() or of_resets)
    if one_segment:
        segment = _segment(mask, kept, k, v, w, u, *carry)
        return segment.scan, Carry(*(t.clone() for t in segment.carry))
    if compiling:
        scan, *rest = _wkv_operator(k, v, w, u, mask, kept, *carry)
        return scan, Carry(*rest)
    if followed:
        scan, *rest = SegmentedWkv.apply(mask, kept, k, v, w, u, *carry)
        return scan, Carry(*rest)
    return _segmented(k, v, w, u, mask, kept, carry)


def _segmented(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, mask: Tensor | None, kept: Tensor | None, carry: Carry
) -> tuple[Tensor, Carry]:
    """Without gradients: one segment at a time."""
    scan = torch.empty_like(v)
    for part in _segments(k.shape[1], k[:, 0].numel(), budget(k, SEGMENT_ELEMENTS)):
        segment = _segment(_part(mask, part), _part(kept, part), k[:, part], v[:, part], w, u, *carry)
        scan[:, part], carry = segment.scan, Carry(*segment.carry)
    return scan, carry


@torch.library.custom_op(
    "gatedlens::wkv",
    mutates_args=(),
    schema="(Tensor k, Tensor v, Tensor w, Tensor u, Tensor? mask, Tensor? kept, Tensor num, Tensor den, Tensor top)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _wkv_operator(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    mask: Tensor | None,
    kept: Tensor | None,
    num: Tensor,
    den: Tensor,
    top: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For torch.compile: one node of its graph, whatever the length."""
    scan, carry = _segmented(k, v, w, u, mask, kept, Carry(num, den, top))
    return scan, *(t.clone() for t in carry)  # type: ignore[return-value]


@_wkv_operator.register_fake
def _(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    mask: Tensor | None,
    kept: Tensor | None,
    num: Tensor,
    den: Tensor,
    top: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(v), torch.empty_like(num), torch.empty_like(den), torch.empty_like(top)


class OpenWkv:
    """The recurrence laid open: every attribute is built when it is first read, from those above it, edited or not.

        state_start [b, c, 2]                    (N, D) before the first position
        decay, write, state [b, l, c, 2]         state_t = decay_t state_{t-1} + write_t, with state = (N, D)
        num, den, max [b, l, c]                  state_t = (num_t, den_t) e^{max_t}
        scan [b, l, c], last                     the readout, and the carry that an edit of state, num, den, max spares

    decay and write are the true e^w and e^k (v, 1): a state can be moved from one run to another as it is.
    """

    def __init__(
        self,
        k: Float[Tensor, "batch pos channel"],
        v: Float[Tensor, "batch pos channel"],
        w: Float[Tensor, " channel"],
        u: Float[Tensor, " channel"],
        mask: Bool[Tensor, "batch pos"] | None,
        carry: Carry,
        fresh: Float[Tensor, "batch pos one"] | None = None,
    ):
        if overridden(k, v):  # none has a rule for numerator and denominator apart
            handle_torch_function(OpenWkv, (k, v), k, v, w, u, mask, carry)
        self.out_dtype = v.dtype
        self.k, self.v, self.w, self.u, self.num0, self.den0, top = (t.double() for t in (k, v, w, u, *carry))
        # NOTHING, and whatever else is below, is an empty past: e^-700 is still a normal float64, so e^-top below is finite.
        self.top = top.clamp(min=-LARGEST_KEY)
        self.mask = mask
        self.kept = None if fresh is None else 1 - fresh.double()

    def _exp_in_range(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """e^x, or an error where float64 does not hold it."""
        if anywhere(x > LARGEST_KEY):
            raise InputError(
                f"A key is {float(x.detach().max()):.4g}; the points inside the scan (hook_write, hook_state, ...) need exp(key)"
                f" in float64, up to exp({LARGEST_KEY:g}). hook_k, hook_u and hook_scan have no limit: hook those."
            )
        return x.exp()

    @cached_property
    def given_start(self) -> Float[Tensor, "batch channel two"]:
        return torch.stack([self.num0, self.den0], dim=-1) * self._exp_in_range(self.top).unsqueeze(-1)

    @cached_property
    def state_start(self) -> Float[Tensor, "batch channel two"]:
        return self.given_start

    @cached_property
    def decay(self) -> Float[Tensor, "batch pos channel two"]:
        # e^w, not e^{max + w - max}: hooks see the paper's decay, which float64 holds whatever the maximum is.
        constant = self.w.exp().reshape(1, 1, -1, 1).expand(*self.k.shape, 2)
        if self.kept is not None:
            constant = constant * self.kept.unsqueeze(-1)
        return constant if self.mask is None else torch.where(self.mask[:, :, None, None], constant, 1.0)

    @cached_property
    def write(self) -> Float[Tensor, "batch pos channel two"]:
        weight = self._exp_in_range(self.k)
        write = torch.stack([weight * self.v, weight], dim=-1)
        return write if self.mask is None else write * self.mask[:, :, None, None]

    @cached_property
    def states(self) -> Float[Tensor, "batch pos channel two"]:
        return linear_scan(self.decay, self.write, self.state_start)

    # A hook edits `state`; `states` is what the recurrence gave. `last` is made of `states`: an edit does not reach the carry.
    @cached_property
    def state(self) -> Float[Tensor, "batch pos channel two"]:
        return self.states

    @cached_property
    def top_start(self) -> Float[Tensor, "batch channel"]:
        """The maximum that came with the carry; a start that was edited brings its own."""
        den, given = self.state_start[..., 1], self.given_start[..., 1]
        # Where nobody edited the denominator the carried maximum goes on, so that an unhooked run is met to the bit.
        return torch.where(den == given, self.top, den.abs().clamp(min=TINY).log())

    @cached_property
    def running_max(self) -> Float[Tensor, "batch pos channel"]:
        """max_t = max(max_{t-1} + log decay_t, log of the denominator's write_t, which is k_t unless it was edited)."""
        log_decay = self.decay[..., 1].abs().clamp(min=TINY).log()
        top = _running_max(log_decay, self.write[..., 1].abs().clamp(min=TINY).log(), self.top_start)
        return top.to(self.out_dtype).double()  # rounded before num and den are taken relative to it, not after

    @cached_property
    def num(self) -> Float[Tensor, "batch pos channel"]:
        return (self.state[..., 0] * torch.exp(-self.running_max)).to(self.out_dtype)

    @cached_property
    def den(self) -> Float[Tensor, "batch pos channel"]:
        return (self.state[..., 1] * torch.exp(-self.running_max)).to(self.out_dtype)

    @cached_property
    def max(self) -> Float[Tensor, "batch pos channel"]:
        return self.running_max.to(self.out_dtype)

    @cached_property
    def scan(self) -> Float[Tensor, "batch pos channel"]:
        # From num, den and max, not from state: these are made of it, so an edit of any of the four reaches the readout.
        num, den = (self.state_start * torch.exp(-self.top_start).unsqueeze(-1)).unbind(-1)
        num, den = _before_each(num, self.num.double()), _before_each(den, self.den.double())
        past, present = _exponentials(_before_each(self.top_start, self.max.double()), self.u + self.k)
        past = past if self.kept is None else past * self.kept
        return ((past * num + present * self.v) / (past * den + present)).to(self.out_dtype)

    @cached_property
    def last(self) -> Carry:
        top = self.running_max[:, -1]
        num, den = (self.states[:, -1] * torch.exp(-top).unsqueeze(-1)).unbind(-1)
        return Carry(*(t.to(self.out_dtype) for t in (num, den, top)))
