"""Rules: how relevance goes back through what is not linear, as hooks that change gradients and no value.

    rules = Rules.of(model)
    with rules.on(model):                     # under it, gradient x activation is the activation's relevance
        logits = model(tokens)

    flows        a mixer's relevance goes back through its operator, o = A x + r, with A held as it is: from its output point to
                 what x is read from, and in equal parts to its gate where that has content. Nothing else inside gets any
    detached     weighs content and carries none: gets no relevance. Every norm's scale, a channel mixer's sigmoid, the shares
                 by which a mixer mixes what it reads (a sigmoid, or what is called a mix), and the weights of experts
    shared       the relevance of a point goes in equal parts to the points that it reads, as if it were linear in each

Norms, SiLU and the scan follow Jafari et al. 2024 (MambaLRP, arXiv 2406.07592). Of gates there are two kinds, so `gates` is a
choice. SiLU(z) and GELU(z) are content times a weight, 0 where z is: MambaLRP gives z half of the product. sigmoid(r) is a
weight alone, 1/2 where r is 0, so no share of the product is r's ("signal takes all", Arras et al. 2017, arXiv 1706.07206):

    gates="content"    half to a gate that has content, none to a sigmoid
    gates="half"       half to every gate; a sigmoid passes it on to r as if it were linear: lost where r is 0, and where r
                       is small its inputs get large shares of either sign, the biases among them
    gates="none"       none to any gate: all of it is the signal's

A gate may be linear in an activation, as RWKV-7's, sigmoid(xg g1) g2: its half goes back through that product to the activation.

Everything is read off what a mixer declares: `output_point`, `attention_points` and its `branches`, whatever their points are
called. Which of them a gate is read from is tried out, and whether that point has content its row's equation says:
"SiLU(gate_pre)", "sigmoid(gate_pre)". A channel mixer goes by the shared words for shared roles (pre, pre_linear, post, kv, gate,
gate_pre). What cannot be told is refused.

x = x.detach() + (f - f.detach()) has the value of x and the gradient of f: it is how a hook puts a rule in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gatedlens.attention.in_progress import underway, verify
from gatedlens.attention.layer import ImplicitAttention
from gatedlens.errors import InputError, did_you_mean
from gatedlens.model.base import HookedModel
from gatedlens.model.hookpoint import Capture
from gatedlens.model.mixer import TokenMixing
from gatedlens.recurrence.autocast import exact
from gatedlens.recurrence.scanning import at_least_float32

SIGMOID = "sigmoid("  # how the equation of a gate that only weighs begins
# The equation of a gate: an activation of one other point, or the point.
ACTIVATION = re.compile(r"(?:(\w+)\()?([\w.]+)\)?")
LINEAR = re.compile(r"(\w+) @ \w+")  # the equation of a gate: an activation's point times a matrix
HAS_CONTENT = ("identity", "silu", "swish", "gelu", "gelu_tanh", "relu", "elu", "mish", "hardswish", "tanh")  # 0 at 0
WEIGHS = ("sigmoid", "hardsigmoid", "softplus", "exp")  # not 0 at 0
GATES = ("content", "half", "none")
SCALE, GATE, ROUTING = ".hook_scale", ".hook_gate", ".hook_expert_weights"
NORMED, LOGITS = "ln_final.hook_out", "hook_logits"


@dataclass(frozen=True)
class Share:
    """`Share("hook_post", ("hook_pre",))`: the relevance of a point goes in equal parts to those that it reads."""

    point: str
    reads: tuple[str, ...]


# In each channel mixer, for each point the first row whose points are all there.
SHARES = (
    Share("hook_mlp_out", ("mlp.hook_kv", "mlp.hook_gate_pre")),  # kv * act(gate_pre)
    Share("hook_post", ("hook_pre", "hook_pre_linear")),  # act(pre) * pre_linear
    Share("hook_post", ("hook_pre",)),  # act(pre)
)


@dataclass(frozen=True)
class Gate:
    """What a mixer's point that may be a gate says of itself: whether it only weighs, and what it is an activation of."""

    weighs: bool
    reads: str | None  # None: its equation is no activation of one other point; itself: it is linear in one
    act: Share | None = None  # the activation that it is linear in, and what that is of


@dataclass(frozen=True)
class Flow:
    """The relevance of one mixer's output goes back through its operator: see the head of this file. All by full names."""

    layer: int
    place: str  # where the mixer stands in it
    output: str
    points: tuple[str, ...]  # what A is derived from, the output aside
    gates: Mapping[str, Gate]  # of those, the ones that may be gates

    @property
    def noted(self) -> tuple[str, ...]:
        """The points whose activations it needs."""
        return tuple(dict.fromkeys([*self.points, *(gate.reads for gate in self.gates.values() if gate.reads)]))


@dataclass(frozen=True)
class Rules:
    """The points of a model that are detached, the shares, and the flow of every mixer, by full names."""

    detached: tuple[str, ...]
    shares: tuple[Share, ...]
    flows: tuple[Flow, ...]
    gates: str = "content"

    @staticmethod
    def of(model: HookedModel, gates: str = "content") -> Rules:
        """`Rules.of(model)`: the rules of relevance for a model; `gates` as in `lrp`."""
        if gates not in GATES:
            raise InputError(f"gates={gates!r}: it is {', '.join(map(repr, GATES))}.{did_you_mean(str(gates), GATES)}")
        every = [mixer for block in model.blocks for mixer in block.mixers]
        mixers = tuple(f"blocks.{mixer.layer}.{mixer.place}." for mixer in every)
        outside = [name for name in model.names.points if not name.startswith(mixers)]
        scales = [name for name in model.names.points if name.endswith(SCALE) or _mixes(model, name, mixers)]
        weights = _weights(model, mixers, outside, gates)
        shares = tuple(_shares(model, mixers, set(weights)))
        _refuse_unknown(model, weights, shares)
        flows = tuple(_flow(model, mixer) for mixer in every)
        if gates == "half":
            shares += tuple(gate.act for flow in flows for gate in flow.gates.values() if gate.act is not None)
        return Rules(tuple(dict.fromkeys([*scales, *weights])), shares, flows, gates)

    def hooks(self, model: HookedModel) -> list[tuple[str, Callable[..., Any]]]:
        """`rules.hooks(model)`: [(name, hook)] for one forward at a time."""
        values: dict[str, Tensor] = {}
        pairs: list[tuple[str, Callable[..., Any]]] = [(name, _detach) for name in self.detached]
        for flow in self.flows:
            hook = FlowHook(flow, model, self.gates)
            pairs += [(name, hook.notes) for name in flow.noted]
            pairs.append((flow.output, hook))
        for share in self.shares:
            pairs += [(name, Capture(values)) for name in share.reads]
            pairs.append((share.point, _sharing(values, share.reads)))
        if "pos" in model.names.points[LOGITS].dims:  # a language model may cap its logits
            pairs += [(NORMED, Capture(values)), (LOGITS, _uncapped(values, model))]
        return pairs

    @contextmanager
    def on(self, model: HookedModel) -> Iterator[Any]:
        """`with rules.on(model): ...`: values stay as they are, gradients follow the rules."""
        with model.hooks(self.hooks(model)):
            yield model


def _mixes(model: HookedModel, name: str, mixers: tuple[str, ...]) -> bool:
    """Whether a point only weighs what a mixer reads, as RWKV-7's share of the values of layer 0, and what makes RWKV-6's
    shares of the position before."""
    if not name.startswith(mixers) or name.endswith(GATE):
        return False
    return model.names.points[name].equation.startswith(SIGMOID) or "mix" in name.rpartition(".")[2].split("_")


def _weights(model: HookedModel, mixers: tuple[str, ...], outside: list[str], gates: str) -> list[str]:
    """What gets no relevance in channel mixers: gates, by the choice, and always the weights of experts. "half" is of products
    that a row of SHARES knows.
    """
    every, routed = ([name for name in outside if name.endswith(end)] for end in (GATE, ROUTING))
    if gates == "content":
        every = [name for name in every if model.names.points[name].equation.startswith(SIGMOID)]
    elif gates == "half":
        known = {read for share in _shares(model, mixers, set()) for read in share.reads}
        every = [name for name in every if f"{name}_pre" not in known]
    return every + routed


def _shares(model: HookedModel, mixers: tuple[str, ...], weights: set[str]) -> Iterator[Share]:
    """The rows of SHARES that a model has, in each part outside its mixers, by full names; other tools' names count."""
    names: Mapping[str, str] = {**model.names.aliases, **{name: name for name in model.names.points}}
    done = set()
    for part in dict.fromkeys(name.rpartition(".")[0] for name in names):
        for row in SHARES:
            point, reads = (names.get(f"{part}.{row.point}"), [names.get(f"{part}.{name}") for name in row.reads])
            if point is None or None in reads or point in done or point.startswith(mixers):
                continue
            if weights & {str(name).removesuffix("_pre") for name in reads}:
                continue  # its gate only weighs: the product is linear in its other side
            done.add(point)
            yield Share(point, tuple(name for name in reads if name is not None))


def _refuse_unknown(model: HookedModel, weights: list[str], shares: tuple[Share, ...]) -> None:
    """InputError for a channel mixer that no rule knows: its gradient would be no relevance."""
    known = [*weights, *(share.point for share in shares)]
    for layer in range(len(model.blocks)):
        stem = f"blocks.{layer}."
        if f"{stem}hook_mlp_out" in model.names.points and not any(name.startswith(stem) for name in known):
            rows = "; ".join(f"{row.point} of {', '.join(row.reads)}" for row in SHARES)
            raise InputError(
                f"Relevance: no rule knows the channel mixer of layer {layer} of {model.title}, so what it passes on cannot be "
                f"told. Give its points the shared words, one of: {rows}."
            )


def _flow(model: HookedModel, mixer: TokenMixing) -> Flow:
    """What a mixer declares."""
    layer, stem = mixer.layer, f"blocks.{mixer.layer}.{mixer.place}."
    output = stem + mixer.output_point
    points = tuple(stem + name for name in mixer.attention_points if stem + name != output)
    if not points:
        raise InputError(
            f"Relevance goes through a mixer by its implicit attention, and that of layer {layer} of {model.title} declares "
            f"none: give {type(mixer).__name__} `attention_points`, `output_point` and `factors`."
        )
    return Flow(layer, mixer.place, output, points, {name: _gate(model, layer, name) for name in points})


def _gate(model: HookedModel, layer: int, name: str) -> Gate:
    """What a point says of itself by its equation: `SiLU(gate_pre)`, with names relative to its part or its block."""
    points, (own, _, _) = model.names.points, name.rpartition(".")
    linear = LINEAR.fullmatch(points[name].equation)
    if linear is not None and f"{own}.hook_{linear[1]}" in points:
        inner = _gate(model, layer, f"{own}.hook_{linear[1]}")
        share = None if inner.reads is None else Share(f"{own}.hook_{linear[1]}", (inner.reads,))
        return Gate(inner.weighs, None if share is None else name, share)
    found = ACTIVATION.fullmatch(points[name].equation)
    act = (found[1] or "identity").lower() if found else points[name].equation.partition("(")[0].lower()
    if found is None or act not in (*HAS_CONTENT, *WEIGHS):
        return Gate(act in WEIGHS, None)
    part, _, leaf = found[2].rpartition(".")
    word = ".".join(filter(None, (part, leaf if leaf.startswith("hook_") else f"hook_{leaf}")))
    known = (f"{stem}.{word}" for stem in (own, f"blocks.{layer}") if f"{stem}.{word}" in points)
    reads = next((read for read in known if points[read].axes == points[name].axes), None)
    return Gate(act in WEIGHS, reads)


# -- the hooks ------------------------------------------------------------------------------------------------------


def _detach(value: Tensor, hook: Any) -> Tensor:
    return value.detach()


def with_gradient_of(value: Tensor, flow: Tensor) -> Tensor:
    """`value`, bit by bit, with the gradient of `flow`."""
    return value.detach() + (flow - flow.detach()).to(value.dtype)


def ratio(value: Tensor, part: Tensor) -> Tensor:
    """value / part, held fixed; 0 where the part is 0 (it has no relevance to get)."""
    return torch.where(part == 0, 0, value.detach() / part.detach())


class FlowHook:
    """The hook at a mixer's output point: its value, with the gradient of A x, A held fixed, and of what its gates read."""

    def __init__(self, flow: Flow, model: HookedModel, gates: str):
        self.flow = flow
        self.model = model
        self.gates = gates
        self.values: dict[str, Tensor] = {}
        self.notes = Capture(self.values)

    def __call__(self, tensor: Tensor, hook: Any) -> Tensor:
        values = {**self.values, str(hook.name): tensor}
        self.values.clear()
        with exact(tensor):
            flow = self._flow_of(values, tensor)
        return with_gradient_of(tensor, flow.reshape(tensor.shape))

    def _flow_of(self, values: Mapping[str, Tensor], o: Tensor) -> Tensor:
        """A x + r; where a gate has content, half of it and half of what the gate reads, in proportion."""
        live = self._underway(values)
        fixed = self._underway({name: value.detach() for name, value in values.items()})
        read, total, plain = self._read(values), [], []
        # In `fixed` all that A is made of is detached; of `live` only x is taken, so x alone has a gradient.
        for own, source, gate in zip(fixed.branches, live.branches, read, strict=True):
            out = replace(fixed, branches=(replace(own, x=source.x),)).output()
            plain.append(out)
            if gate is not None:
                # out equals pre * (out / pre). With the ratio held fixed, that product passes all of out's relevance to pre;
                # so the mean of the two passes half of it each way.
                pre = at_least_float32(values[gate].flatten(2))
                pre = pre.repeat_interleave(out.shape[2] // pre.shape[2], dim=2)  # a gate may be one number a head
                out = (out + pre * ratio(out, pre)) / 2
            total.append(out)
        verify(fixed, torch.stack(plain).sum(0), o.detach(), "relevance")
        return torch.stack(total).sum(0)

    def _underway(self, values: Mapping[str, Tensor]) -> ImplicitAttention:
        return underway(self.model, self.flow.layer, values, self.flow.place)

    def _read(self, values: Mapping[str, Tensor]) -> list[str | None]:
        """For each branch the point that gets its gate's share; None where a gate gets none."""
        with torch.enable_grad():
            leaves = {name: values[name].detach().requires_grad_() for name in (*self.flow.points, self.flow.output)}
            gates = [factors.gate for factors in self._underway(leaves).branches]
            return [self._content(_depends(gate, leaves)) for gate in gates]

    def _content(self, names: list[str]) -> str | None:
        """What gets the share of a gate that is derived from these points."""
        if self.gates == "none" or not names:
            return None
        found = [self.flow.gates[name] for name in names]
        if self.gates == "content" and all(gate.weighs for gate in found):
            return None
        if len(found) > 1 or found[0].reads is None:
            rows = "; ".join(f"{name} = {self.model.names.points[name].equation}" for name in names)
            raise InputError(
                f"gates={self.gates!r}: what the gate of layer {self.flow.layer} is an activation of cannot be told from {rows}. "
                "A row such as hook_gate = SiLU(gate_pre) says it; gates='none' gives no gate any relevance."
            )
        return found[0].reads


def _depends(value: Tensor | None, leaves: Mapping[str, Tensor]) -> list[str]:
    """The names of those that a value is computed from."""
    if value is None or not value.requires_grad:
        return []
    # Branches may share what their gates are made of.
    found = torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True, retain_graph=True)
    named = [name for name, gradient in zip(leaves, found, strict=True) if gradient is not None]
    return [name for name in named if not name.endswith(SCALE)]  # a norm's scale is held, behind a gate too


def _sharing(values: Mapping[str, Tensor], reads: tuple[str, ...]) -> Callable[..., Tensor]:
    def share(value: Tensor, hook: Any) -> Tensor:
        parts = [values[name] for name in reads]
        flow = torch.stack([part * ratio(value, part) for part in parts]).mean(0)
        return with_gradient_of(value, flow)

    return share


def _uncapped(values: Mapping[str, Tensor], model: HookedModel) -> Callable[..., Tensor]:
    """The relevance of a logit goes to what it is before the model caps it."""

    def through(value: Tensor, hook: Any) -> Tensor:
        weight = model.W_U.T
        with exact(weight):
            raw = F.linear(values[NORMED].to(weight.dtype), weight, model.b_U).to(value.dtype)
        return with_gradient_of(value, raw * ratio(value, raw))

    return through
