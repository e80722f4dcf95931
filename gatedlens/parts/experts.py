"""Experts: a mixture of experts, each a gated MLP (or a plain one), and a shared expert that every token passes.

    weights = routing(router(m))                  [batch pos expert], 0 for an expert that is not chosen
    out     = sum over experts e of weights_e down_e(act(gate_e(m)) up_e(m))  +  shared(m)

b batch, l pos, d d_model, e expert, m the width of an expert; the gate's rows stand first in gate_up_proj [e, 2 m, d]. How
experts are chosen is a `Routing`: `softmax_top` (Qwen's), `sigmoid_top` (DeepSeek-V3's). The shared expert is a part: gated
(`SharedExpert`, sigmoid(shared_expert_gate(m)) mlp(m)), an MLP without a gate, or there is none.
Shazeer et al. 2017, arXiv 1701.06538; the shared expert: Qwen1.5-MoE, and without a gate DeepSeekMoE, arXiv 2401.06066.

Only the chosen experts are computed, unless somebody asks for each one's output (lazy points), or for the gradient of a weight
that is 0: then all of them are. The numbers are the same but for the order of a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point, block_rows
from gatedlens.model.hookpoint import EXPERTS, Part, rows_of
from gatedlens.model.run import Run
from gatedlens.parts.activation import Activation
from gatedlens.parts.glu import GatedMlp, gated_mlp_rows
from gatedlens.recurrence.scanning import at_least_float32
from gatedlens.recurrence.transforms import transformed

MOE = "mixture of experts, arXiv 1701.06538"
Routing = Callable[[Tensor], Tensor]  # router logits [..., expert] -> weights [..., expert], 0 where not chosen


def softmax_top(k: int, normalised: bool) -> Routing:
    """`softmax_top(10, True)`: the k largest of the softmax over all experts; `normalised`: divided by their sum."""
    return partial(_softmax_top, k=k, normalised=normalised)


def _softmax_top(logits: Float[Tensor, "... expert"], k: int, normalised: bool) -> Float[Tensor, "... expert"]:
    shares = at_least_float32(logits).softmax(-1)
    top, which = shares.topk(k, dim=-1)
    if normalised:
        top = top / top.sum(-1, keepdim=True)
    return torch.zeros_like(shares).scatter(-1, which, top).to(logits.dtype)


def sigmoid_top(
    k: int,
    router: Any = None,
    groups: int = 1,
    top_groups: int = 1,
    normalised: bool = True,
    scale: float = 1.0,
    bias: str = "e_score_correction_bias",
    eps: float = 1e-20,
) -> Routing:
    """`sigmoid_top(8, mlp.gate, scale=2.446)`: the k largest of sigmoid(logits) + the router's e_score_correction_bias.

    bias: what the router calls it. eps: what is added to the sum. They are looked for in the `top_groups` of the `groups` that
    experts stand in whose two largest sum highest. The bias counts for the choice alone: weights are sigmoid(logits), divided
    by their sum if `normalised`, times `scale`. DeepSeek-V3, arXiv 2412.19437, eq. 13 to 16.
    """

    return partial(
        _sigmoid_top,
        k=k,
        router=router,
        groups=groups,
        top_groups=top_groups,
        normalised=normalised,
        scale=scale,
        bias=bias,
        eps=eps,
    )


def _sigmoid_top(
    logits: Float[Tensor, "... expert"],
    k: int,
    router: Any,
    groups: int,
    top_groups: int,
    normalised: bool,
    scale: float,
    bias: str,
    eps: float,
) -> Float[Tensor, "... expert"]:
    shares = torch.sigmoid(at_least_float32(logits))
    choice = shares if router is None else shares + getattr(router, bias).to(shares)
    if top_groups < groups:
        by_group = choice.unflatten(-1, (groups, -1))
        worth = by_group.topk(2, dim=-1).values.sum(-1)
        kept = torch.zeros_like(worth).scatter(-1, worth.topk(top_groups, dim=-1).indices, 1.0)
        choice = by_group.masked_fill(kept.unsqueeze(-1) == 0, -torch.inf).flatten(-2)
    which = choice.topk(k, dim=-1).indices
    top = shares.gather(-1, which)
    if normalised:
        top = top / (top.sum(-1, keepdim=True) + eps)
    return torch.zeros_like(shares).scatter(-1, which, top * scale).to(logits.dtype)


def shared_expert_rows(act: str, source: str = MOE, reads: str = "ln2.out") -> tuple[Point, ...]:
    """`shared_expert_rows("SiLU")`: the points of a `SharedExpert`."""
    return (
        *gated_mlp_rows(act, source, reads, "d_shared"),
        Point("hook_gate_pre", "batch pos one", f"shared_expert_gate({reads})", source),
        Point("hook_gate", "batch pos one", "sigmoid(gate_pre)", source),
    )


def experts_rows(
    act: str,
    weights: str,
    source: str = MOE,
    reads: str = "ln2.out",
    router: str = "gate",
    shared: tuple[Point, ...] = (),
    out: str = "d_model",
) -> tuple[Point, ...]:
    """`experts_rows("SiLU", "softmax over expert of router, the k largest, divided by their sum")`: the points of `Experts`
    whose routing is `weights` in words; shared: those of the shared expert, if there is one; out: the axis of what each expert
    puts out."""
    each = "batch pos expert d_expert"
    return (
        Point("hook_router", "batch pos expert", f"{router}({reads})", source),
        Point("hook_expert_weights", "batch pos expert", f"{weights}; 0 for the others", source),
        Point("experts.hook_pre", each, f"gate_up_proj[expert]({reads}), the first half", source, True),
        Point("experts.hook_pre_linear", each, f"gate_up_proj[expert]({reads}), the second half", source, True),
        Point("experts.hook_post", each, f"{act}(pre) * pre_linear", source, True),
        Point("hook_experts", f"batch pos expert {out}", "down_proj[expert](experts.post)", source, True),
        *block_rows("shared", shared),
    )


def plain_experts_rows(
    act: str,
    weights: str,
    source: str = MOE,
    reads: str = "ln2.out",
    out: str = "d_model",
    shared: tuple[Point, ...] = (),
) -> tuple[Point, ...]:
    """`plain_experts_rows("relu_squared", WEIGHTS)`: the points of `PlainExperts`. reads, out: what the experts read, and the
    axis of what each puts out, where that is not the model's width."""
    each = "batch pos expert d_expert"
    router, chosen, *_ = experts_rows(act, weights, source)
    return (
        router,
        chosen,
        Point("experts.hook_pre", each, f"up_proj[expert]({reads})", source, True),
        Point("experts.hook_post", each, f"{act}(pre)", source, True),
        Point("hook_experts", f"batch pos expert {out}", "down_proj[expert](experts.post)", source, True),
        *block_rows("shared", shared),
    )


EXPERTS_ALONE = "sum over expert of expert_weights * experts"
EXPERTS_OUT = f"{EXPERTS_ALONE}, + shared.gate * shared_expert.down_proj(shared.post)"
EXPERTS_OUT_UNGATED = f"{EXPERTS_ALONE}, + shared_experts.down_proj(shared.post)"


class Experts(Part):
    """out = sum over experts of weight * expert(m) + shared(m).

    weights: the wrapped module that holds `experts`; router: its module with the router's weight; shared: the shared expert.
    """

    role = EXPERTS

    def __init__(
        self,
        weights: Any,
        rows: tuple[Point, ...],
        act: Activation,
        routing: Routing,
        router: str = "gate",
        shared: Part | None = None,
    ):
        super().__init__(weights, rows)
        self.routing = routing
        self.router = router
        self.act = act.function
        self.experts = Part(weights.experts, rows_of("experts", rows))
        self.shared = shared

    def forward(self, m: Float[Tensor, "batch pos d_model"], run: Run) -> Float[Tensor, "batch pos d_model"]:
        gate = getattr(self.weights, self.router).weight  # which may be wider than the model
        router = self.hook_router(F.linear(m.to(gate.dtype), gate))
        weights = self.hook_expert_weights(self.routing(router))
        out = self.routed(m, weights)
        return out if self.shared is None else out + self.shared(m, run)

    def named_weights(self) -> dict[str, Tensor]:
        return {"W_router": getattr(self.weights, self.router).weight.mT}

    def routed(
        self, m: Float[Tensor, "batch pos d_model"], weights: Float[Tensor, "batch pos expert"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The sum over experts, of as many as somebody wants to see."""
        post = self.heard_inside(m)
        heard = self.hook_experts.heard()
        if not heard and post is None and not self._all(weights):
            return self._chosen_alone(m, weights)
        post = self.hidden(m) if post is None else post
        each = torch.einsum("blem,edm->bled", post, self.experts.weights.down_proj)
        each = self.hook_experts(each) if heard else each
        return torch.einsum("ble,bled->bld", weights, each.to(weights.dtype)).to(m.dtype)

    def projected(
        self, m: Float[Tensor, "batch pos d_model"], some: slice
    ) -> Float[Tensor, "batch pos expert d_expert"]:
        """`some` of the rows of gate_up_proj, of all experts."""
        return torch.einsum("bld,emd->blem", m, self.experts.weights.gate_up_proj[:, some])

    def halves(self) -> tuple[slice, slice]:
        """The rows of gate_up_proj that are the gate's, and the others."""
        width = self.experts.weights.gate_up_proj.shape[1] // 2
        return slice(width), slice(width, None)

    def hidden(self, m: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos expert d_expert"]:
        """What each expert's down_proj reads."""
        gate, up = self.halves()
        return self.act(self.projected(m, gate)) * self.projected(m, up)

    def of_one(self, m: Float[Tensor, "some d_model"], expert: int) -> Float[Tensor, "some d_expert"]:
        """The same of one expert, at some positions."""
        pre, linear = F.linear(m, self.experts.weights.gate_up_proj[expert]).chunk(2, dim=-1)
        return self.act(pre) * linear

    def heard_inside(self, m: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos expert d_expert"] | None:
        """`hidden` with its points fired, where somebody listens to one of them."""
        points, (gate, up) = self.experts, self.halves()
        # Each point is asked right before it fires: an nnsight trace parks on one location at a time.
        pre = points.hook_pre(self.projected(m, gate)) if points.hook_pre.heard() else None
        linear = points.hook_pre_linear(self.projected(m, up)) if points.hook_pre_linear.heard() else None
        heard = points.hook_post.heard()
        if not heard and pre is None and linear is None:
            return None
        pre = self.projected(m, gate) if pre is None else pre
        linear = self.projected(m, up) if linear is None else linear
        post = self.act(pre) * linear
        return points.hook_post(post) if heard else post

    def _all(self, weights: Tensor) -> bool:
        """Whether all experts must be computed: where no shape may depend on values, and where a hook may ask for the gradient
        of a weight, which is that expert's output also where the weight is 0."""
        if torch.compiler.is_compiling() or transformed():
            return True
        return weights.requires_grad and torch.is_grad_enabled() and not self.hook_expert_weights.at_rest()

    def _chosen_alone(
        self, m: Float[Tensor, "batch pos d_model"], weights: Float[Tensor, "batch pos expert"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The same, each expert on the positions alone that have chosen it."""
        flat, shares = m.flatten(0, 1), weights.flatten(0, 1)
        out, w = torch.zeros_like(flat), self.experts.weights
        for expert in (shares != 0).any(0).nonzero().flatten().tolist():
            places = shares[:, expert].nonzero().flatten()
            each = F.linear(self.of_one(flat[places], expert), w.down_proj[expert])
            out = out.index_add(0, places, (each * shares[places, expert, None]).to(out.dtype))
        return out.view_as(m)


class PlainExperts(Experts):
    """The same of experts without gates: expert(m) = down_proj(act(up_proj(m)))."""

    def hidden(self, m: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos expert d_expert"]:
        return self.act(self.up(m))

    def up(self, m: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos expert d_expert"]:
        """up_proj of all experts."""
        return torch.einsum("bld,emd->blem", m, self.experts.weights.up_proj)

    def of_one(self, m: Float[Tensor, "some d_model"], expert: int) -> Float[Tensor, "some d_expert"]:
        return self.act(F.linear(m, self.experts.weights.up_proj[expert]))

    def heard_inside(self, m: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos expert d_expert"] | None:
        points = self.experts
        pre = points.hook_pre(self.up(m)) if points.hook_pre.heard() else None
        heard = points.hook_post.heard()
        if not heard and pre is None:
            return None
        post = self.act(self.up(m) if pre is None else pre)
        return points.hook_post(post) if heard else post


class SharedExpert(GatedMlp):
    """out = sigmoid(gate(m)) * mlp(m); the gate is a number a position."""

    def __init__(self, weights: Any, rows: tuple[Point, ...], act: Activation, gate: Any):
        super().__init__(weights, rows, act)
        self.__dict__["gate"] = gate  # of the wrapped model, as `weights` is

    def forward(self, m: Float[Tensor, "batch pos d_model"], run: Run) -> Float[Tensor, "batch pos d_model"]:
        out = super().forward(m, run)
        gate_pre = self.hook_gate_pre(F.linear(m, self.gate.weight))
        return out * self.hook_gate(torch.sigmoid(gate_pre))
