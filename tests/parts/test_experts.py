"""The mixture of experts against its equation in loops: the chosen alone, all of them, edits, gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from gatedlens.model.hookpoint import HookPoint, rows_of
from gatedlens.model.run import Run
from gatedlens.parts.activation import SILU
from gatedlens.parts.experts import Experts, SharedExpert, experts_rows, shared_expert_rows, sigmoid_top, softmax_top
from gatedlens.parts.glu import GatedMlp, gated_mlp_rows

D, E, M, S, K = 6, 5, 4, 3, 2


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, width, bias=False), nn.Linear(D, width, bias=False)
        self.down_proj = nn.Linear(width, D, bias=False)


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(D, E, bias=False), nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.randn(E, 2 * M, D))
        self.experts.down_proj = nn.Parameter(torch.randn(E, D, M))
        self.shared_expert, self.shared_expert_gate = Mlp(S), nn.Linear(D, 1, bias=False)


@pytest.fixture
def mixture():
    torch.manual_seed(0)
    weights = Weights().double()
    rows = experts_rows("SiLU", "the largest", shared=shared_expert_rows("SiLU"))
    shared = SharedExpert(weights.shared_expert, rows_of("shared", rows), SILU, weights.shared_expert_gate)
    part = Experts(weights, rows, SILU, softmax_top(K, True), shared=shared)
    for name, point in part.named_modules():
        if isinstance(point, HookPoint):
            point.name = name
    return part, torch.randn(2, 3, D, dtype=torch.float64)


def literal(w, m, weights=None):
    """(out, the weights), a position and an expert at a time."""
    out, chosen = torch.zeros_like(m), torch.zeros(*m.shape[:2], E, dtype=m.dtype)
    for b in range(m.shape[0]):
        for t in range(m.shape[1]):
            x = m[b, t]
            shares = (w.gate.weight @ x).softmax(0)
            top = sorted(range(E), key=lambda e: -shares[e])[:K]
            own = [shares[e] / sum(shares[i] for i in top) if e in top else 0 * shares[e] for e in range(E)]
            chosen[b, t] = torch.stack(own).detach()
            given = own if weights is None else weights[b, t]
            for e in range(E):
                pre, linear = w.experts.gate_up_proj[e, :M] @ x, w.experts.gate_up_proj[e, M:] @ x
                out[b, t] = out[b, t] + given[e] * (w.experts.down_proj[e] @ (pre * torch.sigmoid(pre) * linear))
            one = w.shared_expert
            hidden = F.silu(one.gate_proj.weight @ x) * (one.up_proj.weight @ x)
            out[b, t] = out[b, t] + torch.sigmoid(w.shared_expert_gate.weight @ x) * (one.down_proj.weight @ hidden)
    return out, chosen


def test_the_chosen_alone_and_all_of_them_are_the_equation(mixture):
    part, m = mixture
    want, chosen = literal(part.weights, m)
    run, seen = Run(torch.arange(3).expand(2, 3)), {}
    torch.testing.assert_close(part(m, run), want, atol=1e-12, rtol=0)
    weights = part.routing(F.linear(m, part.weights.gate.weight))
    torch.testing.assert_close(weights, chosen, atol=1e-12, rtol=0)
    assert ((weights != 0).sum(-1) == K).all()
    for point in ("experts.hook_pre", "experts.hook_pre_linear", "experts.hook_post", "hook_experts"):
        hook = part.get_submodule(point)
        hook.add_hook(lambda x, hook: seen.update({hook.name: x}))
        torch.testing.assert_close(part(m, run), want, atol=1e-12, rtol=0)
        hook.remove_hooks()
    assert seen["hook_experts"].shape == (2, 3, E, D) and seen["experts.hook_post"].shape == (2, 3, E, M)


def test_gradients_are_the_same_whoever_listens(mixture):
    part, m = mixture
    run, parameters = Run(torch.arange(3).expand(2, 3)), list(part.weights.parameters())
    want = torch.autograd.grad(literal(part.weights, m)[0].pow(2).sum(), parameters)
    for listened in (None, "hook_experts", "hook_expert_weights"):
        if listened:
            part.get_submodule(listened).add_hook(lambda x, hook: None)
        for a, b in zip(torch.autograd.grad(part(m, run).pow(2).sum(), parameters), want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_an_edit_of_the_weights_calls_experts_that_were_not_chosen(mixture):
    part, m = mixture
    run, given = Run(torch.arange(3).expand(2, 3)), torch.rand(2, 3, E, dtype=torch.float64)
    part.hook_expert_weights.add_hook(lambda x, hook: given)
    with torch.no_grad():
        torch.testing.assert_close(part(m, run), literal(part.weights, m, given)[0], atol=1e-12, rtol=0)


def test_the_gradient_of_a_weight_that_is_0_is_its_experts_output(mixture):
    part, m = mixture
    run, found = Run(torch.arange(3).expand(2, 3)), {}
    part.hook_expert_weights.add_hook(lambda grad, hook: found.update(weights=grad.clone()), dir="bwd")
    out = part(m, run)
    out.sum().backward()
    part.hook_expert_weights.remove_hooks("bwd")
    part.hook_experts.add_hook(lambda x, hook: found.update(experts=x))
    part(m, run)
    part.hook_experts.remove_hooks()
    torch.testing.assert_close(found["weights"], found["experts"].sum(-1), atol=1e-12, rtol=0)


def test_a_shared_expert_without_a_gate_and_a_router_wider_than_the_model():
    torch.manual_seed(0)
    w = Weights()
    rows = experts_rows("SiLU", "the largest", shared=gated_mlp_rows("SiLU", width="d_shared"))
    w = w.bfloat16()
    shared = GatedMlp(w.shared_expert, rows_of("shared", rows), SILU)
    part = Experts(w, rows, SILU, softmax_top(K, True), shared=shared)
    w.gate.float()
    m, run = torch.randn(2, 3, D, dtype=torch.bfloat16), Run(torch.arange(3).expand(2, 3))
    with torch.no_grad():
        out, seen = part(m, run), {}
        part.hook_router.add_hook(lambda x, hook: seen.update(router=x))
        part.hook_experts.add_hook(lambda x, hook: None)
        every = part(m, run)
    assert out.dtype == every.dtype == torch.bfloat16 and seen["router"].dtype == torch.float32
    wide = Weights().double()
    wide.load_state_dict({name: p.double() for name, p in w.state_dict().items()})
    m = m.double()
    want = literal(wide, m)[0]
    shared = wide.shared_expert
    hidden = F.silu(shared.gate_proj(m)) * shared.up_proj(m)
    want = want + (1 - torch.sigmoid(wide.shared_expert_gate(m))) * shared.down_proj(hidden)
    for got in (out, every):
        assert (got.double() - want).norm() < 0.02 * want.norm()  # bfloat16


def test_routing_by_groups_is_its_equation():
    torch.manual_seed(0)
    logits, bias = torch.randn(5, 12, dtype=torch.float64), torch.randn(12, dtype=torch.float64) / 2
    got = sigmoid_top(3, SimpleNamespace(e_score_correction_bias=bias), groups=4, top_groups=2, scale=2.5)(logits)
    for row, (x, weights) in enumerate(zip(logits, got, strict=True)):
        shares = torch.sigmoid(x)
        choice = shares + bias
        worth = [sum(sorted(choice[3 * g : 3 * g + 3], reverse=True)[:2]) for g in range(4)]
        kept = sorted(range(4), key=lambda g: -worth[g])[:2]
        chosen = sorted((e for e in range(12) if e // 3 in kept), key=lambda e: -choice[e])[:3]
        want = [2.5 * shares[e] / sum(shares[i] for i in chosen) if e in chosen else 0.0 * shares[e] for e in range(12)]
        torch.testing.assert_close(weights, torch.stack(want), atol=1e-12, rtol=0, msg=str(row))
    plain = sigmoid_top(3, normalised=False)(logits)
    assert ((plain != 0).sum(-1) == 3).all()
    torch.testing.assert_close(plain[plain != 0], torch.sigmoid(logits)[plain != 0], atol=0, rtol=0)


def test_routing_by_groups_is_what_transformers_does():
    torch.manual_seed(0)
    config = DeepseekV3Config(
        hidden_size=D, n_routed_experts=12, num_experts_per_tok=3, n_group=4, topk_group=2, routed_scaling_factor=2.5
    )
    router, m = DeepseekV3TopkRouter(config), torch.randn(4, D)
    with torch.no_grad():
        router.weight.copy_(torch.randn(12, D))
        router.e_score_correction_bias.copy_(torch.randn(12) / 2)
        told = router(m)
        if not isinstance(told, tuple):
            pytest.skip("this version's router gives logits alone")
        ours = sigmoid_top(3, router, 4, 2, True, 2.5)(F.linear(m, router.weight))
    torch.testing.assert_close(ours, torch.zeros(4, 12).scatter(-1, told[2], told[1]), atol=1e-6, rtol=0)
