"""flash-linear-attention's language models: their config and parameters, without fla.

    config.json, model_type       a layer's `attn` holds, beside q_proj, o_proj and, with a gate, g_proj
    gla                           k_proj, v_proj, gk_proj.{0, 1}               g_norm_swish_gate or g_norm
    retnet                        k_proj, v_proj                               g_norm_swish_gate or g_norm
    hgrn2                         f_proj, i_proj                               g_norm over all heads; model.lower_bounds
    delta_net                     k_proj, v_proj, b_proj                       o_norm
    gated_deltanet                k_proj, v_proj, b_proj, a_proj, A_log, dt_bias   o_norm
    gated_deltaproduct            the same; without use_forget_gate no a_proj, A_log, dt_bias; k_proj, v_proj, b_proj of each
                                  of num_householder steps, one behind the other

    a layer of attention          k_proj, v_proj alone, and the module `rotary` without parameters

and {q, k, v}_conv1d ({q, f, i}_conv1d) where the config says use_short_conv. All have attn_norm, mlp_norm and mlp.{gate, up,
down}_proj beside it; and model.embeddings, model.layers, model.norm, lm_head.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gatedlens.errors import CheckpointError
from gatedlens.formats.qwen3_next import slow
from gatedlens.model import fields
from gatedlens.model.checkpoint import save_checkpoint
from gatedlens.model.fields import (
    COUNT,
    EPS,
    FLAG,
    NUMBER,
    POSITIVE,
    SIZE,
    THETA,
    TRANSFORMERS,
    Field,
    layers_of,
    listed,
    one_of,
    table,
)
from gatedlens.model.layout import Layout
from gatedlens.model.tiny import Tiny, fresh

# What fla takes where a config.json does not say it.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gla": {"num_heads": 4, "expand_k": 0.5, "expand_v": 1.0, "use_short_conv": False},
    "retnet": {"num_heads": 8, "expand_k": 1.0, "expand_v": 2.0, "hidden_ratio": 2, "use_short_conv": False},
    "hgrn2": {"expand_ratio": 128, "use_lower_bound": True, "use_short_conv": False},
    "delta_net": {"num_heads": 16, "expand_k": 1.0, "expand_v": 1.0, "use_gate": False},
    "gated_deltanet": {"num_heads": 6, "head_dim": 256, "expand_v": 2.0},
    "gated_deltaproduct": {
        "num_heads": 6,
        "head_dim": 256,
        "expand_v": 2.0,
        "use_forget_gate": False,
        "num_householder": 1,
    },
}
GATES = {  # fla's word for whether a mixer has a gate
    "gla": "use_output_gate",
    "retnet": "use_output_gate",
    "delta_net": "use_gate",
    "gated_deltanet": "use_gate",
    "gated_deltaproduct": "use_output_gate",
}
SHARED = {
    "hidden_size": 2048,
    "hidden_ratio": 4,
    "use_short_conv": True,
    "conv_size": 4,
    "use_output_gate": True,
    "use_gate": True,
    "fuse_norm": True,
    "norm_eps": 1e-6,
    "allow_neg_eigval": False,
    "gate_low_rank_dim": 16,
    "clamp_min": None,
}
KINDS = tuple(DEFAULTS)
FIELDS = {
    **TRANSFORMERS,
    "model_type": one_of(*KINDS),
    "layer_types": listed(one_of(*KINDS[:-1]), low=1),  # no word of fla's, where all layers are of model_type
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "num_hidden_layers": layers_of(9),
    "num_heads": SIZE.or_null(),
    "num_v_heads": SIZE.or_null(),
    "head_dim": SIZE,
    "expand_k": POSITIVE,
    "expand_v": POSITIVE,
    "expand_ratio": SIZE.or_null(),
    "hidden_ratio": POSITIVE.or_null(),
    "intermediate_size": SIZE.or_null(),
    "conv_size": SIZE,
    "gate_low_rank_dim": SIZE,
    **dict.fromkeys(("use_short_conv", "use_output_gate", "use_gate", "use_forget_gate"), FLAG),
    **dict.fromkeys(("use_lower_bound", "allow_neg_eigval", "fuse_norm"), FLAG),
    "num_householder": SIZE,
    "norm_eps": EPS,
    "clamp_min": NUMBER.or_null(),
    "hidden_act": one_of("swish", "silu"),
    "feature_map": one_of(None),
    "elementwise_affine": one_of(True, None),
    "use_beta": one_of(True),
    "qk_activation": one_of("silu"),
    "qk_norm": one_of("l2"),
    "attn": table(
        layers=listed(COUNT, low=1),
        num_heads=SIZE,
        num_kv_heads=SIZE.or_null(),
        qkv_bias=FLAG,
        window_size=SIZE.or_null(),
        rope_theta=THETA,
    ).or_null(),
    "attnres_block_size": Field("null: gatedlens opens no attention over earlier layers", lambda v: v is None),
}


class Sizes(NamedTuple):
    """Of one mixer: heads (of values), groups (heads of keys), the numbers of a key and of a value."""

    heads: int
    groups: int
    key: int
    value: int


class AttentionWords(NamedTuple):
    """What a config says of the layers of softmax attention among the others."""

    layers: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    qkv_bias: bool
    window_size: int | None
    rope_theta: float


def attention_of(config: Mapping[str, Any]) -> AttentionWords | None:
    """`attention_of(config)`: the layers of softmax attention; None where there are none."""
    told = config.get("attn")
    if not told:
        return None
    if "layers" not in told or "num_heads" not in told:
        raise CheckpointError(f"The config: attn is {told}; it needs layers and num_heads.")
    total = config.get("num_hidden_layers", 24)
    if max(told["layers"]) >= total:
        raise CheckpointError(f"The config: attn has layer {max(told['layers'])}; there are {total} layers, from 0.")
    return AttentionWords(
        tuple(told["layers"]),
        told["num_heads"],
        told.get("num_kv_heads") or told["num_heads"],
        told.get("qkv_bias", False),
        told.get("window_size"),
        told.get("rope_theta", 10000.0),
    )


def words(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """`words("gla", config)`: a config with what fla takes where it is silent."""
    return {**SHARED, **DEFAULTS[kind], **config}


def is_gated(kind: str, config: Mapping[str, Any]) -> bool:
    """`is_gated("gla", config)`: whether a mixer of this kind has a gate."""
    return kind in GATES and bool(words(kind, config)[GATES[kind]])


def sizes_of(kind: str, config: Mapping[str, Any]) -> Sizes:
    """`sizes_of("gla", config)`: the sizes of a mixer of this kind; CheckpointError where heads do not come out even."""
    given = words(kind, config)
    d = given["hidden_size"]
    if kind == "hgrn2":
        ratio, heads = given["expand_ratio"], given.get("num_heads")
        if ratio is None and heads is None:
            raise CheckpointError("The config says neither expand_ratio nor num_heads; one of them is needed.")
        heads = d // ratio if ratio is not None else heads
        groups, keys, values = heads, heads * (ratio or d // heads), d
    elif kind in ("gated_deltanet", "gated_deltaproduct"):
        groups = given["num_heads"]
        heads = given.get("num_v_heads") or groups
        keys, values = groups * given["head_dim"], heads * int(given["head_dim"] * given["expand_v"])
    else:
        heads = groups = given["num_heads"]
        keys, values = int(d * given["expand_k"]), int(d * given["expand_v"])
        if (given.get("num_kv_heads") or heads) != heads:
            raise CheckpointError(
                f"The config: num_kv_heads is {given['num_kv_heads']} and num_heads {heads}; gatedlens runs models whose heads "
                "have keys and values of their own."
            )
    if not heads or not groups or keys % groups or values % heads or heads % groups:
        raise CheckpointError(
            f"The config: {keys} numbers of keys in {groups} heads, and {values} of values in {heads}: neither comes out even."
        )
    return Sizes(heads, groups, keys // groups, values // heads)


class FlaWeights(nn.Module):
    """Parameters by fla's names, without fla: `FlaWeights(config.json).load_state_dict(...)`.

    config: `model_type, vocab_size, num_hidden_layers`, and fla's words for the rest. `layer_types`, if given, says the kind of
    each layer, in place of model_type.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        fields.check(config, FIELDS, "The config", required=("model_type", "vocab_size", "num_hidden_layers"))
        self.config = dict(config)
        d, layers = words(config["model_type"], config)["hidden_size"], config["num_hidden_layers"]
        kinds = config.get("layer_types") or [config["model_type"]] * layers
        if len(kinds) != layers:
            raise CheckpointError(f"The config: {len(kinds)} layer_types for {layers} layers.")
        eps = words(config["model_type"], config)["norm_eps"]
        self.model, self.lm_head = nn.Module(), nn.Linear(d, config["vocab_size"], bias=False)
        self.model.embeddings = nn.Embedding(config["vocab_size"], d)
        attention = attention_of(config)
        places = () if attention is None else attention.layers
        self.model.layers = nn.ModuleList(
            _layer(words(kind, config), _attention(d, attention) if i in places else _mixer(kind, words(kind, config)))
            for i, kind in enumerate(kinds)
        )
        self.model.norm = nn.RMSNorm(d, eps=eps)
        if "hgrn2" in kinds and words("hgrn2", config)["use_lower_bound"]:
            self.model.lower_bounds = nn.Parameter(torch.zeros(layers, d))
        if config.get("tie_word_embeddings", False):
            self.lm_head.weight = self.model.embeddings.weight

    def save_pretrained(self, folder: str | Path) -> None:
        """`weights.save_pretrained("folder")`: config.json and model.safetensors, as `gl.from_pretrained` and fla read them."""
        save_checkpoint(folder, self.config, self)


def _layer(config: Mapping[str, Any], mixer: nn.Module) -> nn.Module:
    d, eps, linear = config["hidden_size"], config["norm_eps"], partial(nn.Linear, bias=False)
    inner = config.get("intermediate_size")
    if inner is None:
        inner = 256 * -(-int(d * (config["hidden_ratio"] or 4) * 2 / 3) // 256)
    layer = nn.Module()
    layer.attn_norm, layer.attn = nn.RMSNorm(d, eps=eps), mixer
    layer.mlp_norm, layer.mlp = nn.RMSNorm(d, eps=eps), nn.Module()
    layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj = linear(d, inner), linear(d, inner), linear(inner, d)
    return layer


def _attention(d: int, told: AttentionWords | None) -> nn.Module:
    assert told is not None  # in a layer that it names
    if d % told.num_heads or told.num_heads % told.num_kv_heads:
        raise CheckpointError(
            f"The config: attn has {told.num_heads} heads, {told.num_kv_heads} of keys, of {d} numbers: neither comes out even."
        )
    keys, attention = told.num_kv_heads * (d // told.num_heads), nn.Module()
    for name, width in (("q", d), ("k", keys), ("v", keys)):
        setattr(attention, f"{name}_proj", nn.Linear(d, width, bias=told.qkv_bias))
    attention.o_proj = nn.Linear(d, d, bias=False)
    return attention


def _mixer(kind: str, config: Mapping[str, Any]) -> nn.Module:
    d, eps, linear = config["hidden_size"], config["norm_eps"], partial(nn.Linear, bias=False)
    heads, groups, key, value = sizes_of(kind, config)
    gated, mixer = is_gated(kind, config), nn.Module()
    steps = config["num_householder"] if kind == "gated_deltaproduct" else 1
    for name, width in zip(
        "qfi" if kind == "hgrn2" else "qkv", (groups * key, steps * groups * key, steps * heads * value), strict=True
    ):
        setattr(mixer, f"{name}_proj", linear(d, width))
        if config["use_short_conv"]:
            conv = nn.Conv1d(
                width, width, config["conv_size"], groups=width, padding=config["conv_size"] - 1, bias=False
            )
            setattr(mixer, f"{name}_conv1d", conv)
    if gated:
        mixer.g_proj = linear(d, heads * value)
    if kind == "gla":
        mixer.gk_proj = nn.Sequential(
            linear(d, config["gate_low_rank_dim"]), nn.Linear(config["gate_low_rank_dim"], groups * key)
        )
    if "delta" in kind:
        mixer.b_proj = linear(d, steps * heads)
    if kind == "gated_deltanet" or (kind == "gated_deltaproduct" and config["use_forget_gate"]):
        mixer.a_proj = linear(d, heads)
        mixer.A_log, mixer.dt_bias = nn.Parameter(torch.zeros(heads)), nn.Parameter(torch.zeros(heads))
    fused = kind in ("gla", "retnet") and gated and config["fuse_norm"]
    norm = "o_norm" if "delta" in kind else "g_norm_swish_gate" if fused else "g_norm"
    setattr(mixer, norm, nn.RMSNorm(d if kind == "hgrn2" else value, eps=eps))
    mixer.o_proj = linear(heads * value, d)
    return mixer


class FlaLayout(Layout):
    """`FlaLayout()`: fla's folder, of a model_type in `KINDS`."""

    fields = FIELDS

    def knows(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") in KINDS

    def empty(self, config: dict[str, Any]) -> nn.Module:
        return FlaWeights(config)


def forgetting(start: Tensor, noise: Tensor) -> Tensor:
    """Far below 0: a step keeps exp(logsigmoid(.) / 16) of the state, about 0.7."""
    return noise - 6


# Its logits change smoothly, as integrals and differences of them ask: eps is far above 0, and the norms' input far from it.
TINY = Tiny(
    "tiny-fla",
    FlaWeights,
    {
        "model_type": "gated_deltaproduct",
        "num_householder": 2,
        "use_forget_gate": True,
        "attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "rope_theta": 100.0},
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "vocab_size": 40,
        "num_heads": 4,
        "head_dim": 4,
        "expand_k": 1.0,
        "expand_v": 1.0,
        "expand_ratio": 4,
        "intermediate_size": 10,
        "conv_size": 3,
        "gate_low_rank_dim": 3,
        "norm_eps": 0.1,
    },
    {"embeddings": fresh(0.5), r"gk_proj\.1\.bias": forgetting, "lower_bounds": fresh(0.5), "A_log": slow},
)
