"""Nemotron-H: one part a layer behind one norm: a Mamba-2, an attention without positions, an MLP, or experts.

    mlp      down(relu(up(x))^2)
    experts  s = sigmoid(gate(x)); the k largest of s + e_score_correction_bias in the best groups; weights: s / sum of s, scaled
             sum of weights * down_e(relu(up_e(x))^2) + shared_experts(x)
             between fc1_latent_proj and fc2_latent_proj, the shared ones aside, where experts have a latent

The time step is at least time_step_min and has no upper limit, whatever time_step_limit says: so it is in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.hooks.mamba2 import mixer_rows
from gatedlens.hooks.mamba2_hybrid.bamba import mamba
from gatedlens.model.hookpoint import rows_of
from gatedlens.parts.activation import ACTIVATIONS
from gatedlens.parts.attention import Attention, AttentionKind
from gatedlens.parts.experts import EXPERTS_OUT_UNGATED, PlainExperts, plain_experts_rows, sigmoid_top
from gatedlens.parts.glu import Mlp, mlp_rows
from gatedlens.parts.hybrid import Branch, Family, Site

PAPER = "Nemotron-H, arXiv 2504.03624"
ATTENDS = AttentionKind(head="q_head", rotary=False)
ACT = ACTIVATIONS["relu2"]
WEIGHTS = (
    "sigmoid(router) of the k experts in which sigmoid(router) + e_score_correction_bias is largest within the best groups, "
    "divided by their sum (if the config says so), times routed_scaling_factor"
)


def attention(site: Site) -> Attention:
    return Attention(site.weights, site.rows, site.layer, ATTENDS, site.weights.head_dim)


def mlp(site: Site) -> Mlp:
    return Mlp(site.weights, site.rows, ACT)


class LatentExperts(PlainExperts):
    """Experts between two projections, to a latent and back."""

    def routed(
        self, m: Float[Tensor, "batch pos d_model"], weights: Float[Tensor, "batch pos expert"]
    ) -> Float[Tensor, "batch pos d_model"]:
        narrow, wide = self.weights.fc1_latent_proj, self.weights.fc2_latent_proj
        latent = self.hook_latent(F.linear(m, narrow.weight, narrow.bias))
        return F.linear(super().routed(latent, weights), wide.weight, wide.bias)


def experts(site: Site) -> PlainExperts:
    w, config = site.weights, site.config
    groups = (config.n_group, config.topk_group)
    routing = sigmoid_top(
        config.num_experts_per_tok, w.gate, *groups, config.norm_topk_prob, float(config.routed_scaling_factor)
    )
    shared = Mlp(w.shared_experts, rows_of("shared", site.rows), ACT)
    kind = PlainExperts if config.moe_latent_size is None else LatentExperts
    return kind(w, site.rows, ACT, routing, shared=shared)


def kind_of(layer: Any, config: Any) -> str:
    kinds = {"linear_attention": "Mamba-2", "full_attention": "attention", "mlp": "MLP", "moe": "experts"}
    kind = kinds[layer.block_type]
    return "experts of latents" if kind == "experts" and config.moe_latent_size is not None else kind


def told(config: Any) -> Mapping[str, Any]:
    experts = {
        "n_experts": config.n_routed_experts,
        "n_experts_per_token": config.num_experts_per_tok,
        "d_expert": config.moe_intermediate_size,
        "d_shared": config.moe_shared_expert_intermediate_size,
        "d_latent": config.moe_latent_size or 0,
    }
    return {
        "d_mlp": config.intermediate_size if "mlp" in config.layers_block_type else None,
        "act_fn": config.mlp_hidden_act,
        "positional_embedding_type": "none",
        **(experts if "moe" in config.layers_block_type else {}),
    }


SHARED = mlp_rows(ACT.word, PAPER, width="d_shared")
LATENT = Point("hook_latent", "batch pos latent", "fc1_latent_proj(ln2.out)", PAPER)
OF_LATENTS = "fc2_latent_proj(sum over expert of expert_weights * experts) + shared_experts.down_proj(shared.post)"
EXPERTS = plain_experts_rows(ACT.word, WEIGHTS, shared=SHARED)
_ROUTER, _CHOSEN, *_INSIDE = plain_experts_rows(ACT.word, WEIGHTS, reads="latent", out="latent", shared=SHARED)
LATENT_EXPERTS = (_ROUTER, _CHOSEN, LATENT, *_INSIDE)
NEMOTRON_H = Family(
    "Nemotron-H",
    "NemotronHForCausalLM",
    {
        "Mamba-2": (Branch("mixer", mixer_rows(), "out_proj(gated)", mamba, "mixer", "norm"),),
        "attention": (Branch("mixer", ATTENDS.rows(PAPER), "o_proj(z)", attention, "mixer", "norm", place="attn"),),
        "MLP": (Branch("mlp", mlp_rows(ACT.word, PAPER), "down_proj(post)", mlp, "mixer", "norm", "ln2"),),
        "experts": (Branch("mlp", EXPERTS, EXPERTS_OUT_UNGATED, experts, "mixer", "norm", "ln2"),),
        "experts of latents": (Branch("mlp", LATENT_EXPERTS, OF_LATENTS, experts, "mixer", "norm", "ln2"),),
    },
    kind_of,
    told,
    embedding="embeddings",
    final_norm="norm_f",
    eps="layer_norm_epsilon",
)
