"""Whole models against transformers' own: 4 layers, pos 1024, batch 1, one thread, float32.

    python -m benchmarks.language griffin        also: rwkv; forward + backward, hidden 768
    python -m benchmarks.language qwen3_next     also: kimi_linear, minimax, bamba, falcon_h1, jamba; both, hidden 512

The vocabulary is small (512), so that the unembedding, the same for both, does not hide the recurrence.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from benchmarks.measure import medians


def griffin() -> Any:
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    sizes = {"hidden_size": 768, "lru_width": 768, "intermediate_size": 2304, "num_hidden_layers": 4, "vocab_size": 512}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 1, "w_init_variance_scale": 1.0}
    return RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**sizes, **heads)).eval()


def rwkv() -> Any:
    from transformers import RwkvConfig, RwkvForCausalLM

    return RwkvForCausalLM(RwkvConfig(hidden_size=768, num_hidden_layers=4, vocab_size=512)).eval()


def qwen3_next() -> Any:
    """Three gated delta nets and an attention, MLPs without experts: the products of experts are the same for both."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    delta = {
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    }
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "mlp_only_layers": [0, 1, 2, 3]}
    config = Qwen3NextConfig(**SIZES, intermediate_size=1024, **delta, **heads, pad_token_id=None)
    return Qwen3NextForCausalLM(config).eval()


def kimi_linear() -> Any:
    """Three Kimi delta nets and a latent attention."""
    from transformers import KimiLinearConfig, KimiLinearForCausalLM

    kinds = {"layer_types": ["linear_attention"] * 3 + ["full_attention"], "mlp_layer_types": ["dense"] * 4}
    delta = {"linear_num_heads": 8, "linear_head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 8}
    latent = {
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "pad_token_id": None,
    }
    return KimiLinearForCausalLM(KimiLinearConfig(**SIZES, intermediate_size=1024, **kinds, **delta, **latent)).eval()


def bamba() -> Any:
    """Three Mamba-2 and an attention, each with an MLP."""
    from transformers import BambaConfig, BambaForCausalLM

    sizes = {
        **SIZES,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "attn_layer_indices": [3],
    }
    config = BambaConfig(**sizes, mamba_n_heads=16, mamba_d_head=64, mamba_d_state=64, pad_token_id=None)
    return BambaForCausalLM(config).eval()


def falcon_h1() -> Any:
    """Four layers of Mamba-2 and attention side by side."""
    from transformers import FalconH1Config, FalconH1ForCausalLM

    sizes = {
        **SIZES,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "mamba_d_ssm": 1024,
    }
    config = FalconH1Config(**sizes, mamba_n_heads=16, mamba_d_head=64, mamba_d_state=64, pad_token_id=None)
    return FalconH1ForCausalLM(config).eval()


def jamba() -> Any:
    """Three Mamba and an attention, each with an MLP."""
    from transformers import JambaConfig, JambaForCausalLM

    sizes = {**SIZES, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2, "num_experts": 1}
    config = JambaConfig(
        **sizes, attn_layer_period=4, attn_layer_offset=3, use_mamba_kernels=False, num_experts_per_tok=1
    )
    return JambaForCausalLM(config).eval()


def minimax() -> Any:
    """Three lightning attentions and an attention; two experts, both chosen."""
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    sizes = {"intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    kinds = [*3 * ["linear_attention"], "full_attention"]
    experts = {"num_local_experts": 2, "num_experts_per_tok": 2}
    return MiniMaxForCausalLM(MiniMaxConfig(**SIZES, **sizes, **experts, layer_types=kinds)).eval()


SIZES = {"hidden_size": 512, "num_hidden_layers": 4, "vocab_size": 512}
AROUND_MAMBA = {"bamba": bamba, "falcon_h1": falcon_h1, "jamba": jamba}
BOTH_WAYS = {"griffin": griffin, "rwkv": rwkv}
HYBRIDS = {"qwen3_next": qwen3_next, "kimi_linear": kimi_linear, "minimax": minimax, **AROUND_MAMBA}


def hybrid(make: Any) -> dict[str, dict[str, float]]:
    """Forward, and forward + backward, of the whole model."""
    import gatedlens as gl

    torch.manual_seed(0)
    peer = make()
    ours = gl.wrap(peer)
    tokens = torch.randint(512, (1, 1024), generator=torch.Generator().manual_seed(0))

    def forward_ours() -> None:
        with torch.no_grad():
            ours(tokens)

    def forward_theirs() -> None:
        with torch.no_grad():
            peer(tokens, use_cache=False)

    def both_ours() -> None:
        ours(tokens)[:, -1].sum().backward()

    def both_theirs() -> None:
        peer(tokens, use_cache=False).logits[:, -1].sum().backward()

    runs = {"forward": (forward_ours, forward_theirs), "forward + backward": (both_ours, both_theirs)}
    if make is not jamba:
        return {what: medians({"ours": own, "theirs": its}, repeats=3) for what, (own, its) in runs.items()}
    # transformers' scan is a loop over positions there, which takes minutes with its backward: once will do.
    return {
        what: {**medians({"ours": own}, repeats=3), **medians({"theirs": its}, repeats=1, warmup=0)}
        for what, (own, its) in runs.items()
    }


def speed(make: Any) -> dict[str, float]:
    import gatedlens as gl

    torch.manual_seed(0)
    peer = make()
    ours = gl.wrap(peer)
    peer.requires_grad_(False)
    tokens = torch.randint(512, (1, 1024), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embedded = peer.get_input_embeddings()(tokens)

    def back_ours() -> None:
        x = embedded.clone().requires_grad_()
        ours(ours.stream(x), start_at_layer=0)[:, -1].sum().backward()

    def back_theirs() -> None:
        x = embedded.clone().requires_grad_()
        peer(inputs_embeds=x, use_cache=False).logits[:, -1].sum().backward()

    found = medians({"ours": back_ours}, repeats=3)
    return {**found, **medians({"theirs": back_theirs}, repeats=1, warmup=0)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    name = sys.argv[1]
    print(json.dumps(hybrid(HYBRIDS[name]) if name in HYBRIDS else speed(BOTH_WAYS[name])))
