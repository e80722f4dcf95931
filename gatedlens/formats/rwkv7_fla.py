"""RWKV-7's parameters by flash-linear-attention's names; RWKV-LM's .pth is renamed to them.

    RWKV-LM, blocks.3.                                 here (and in fla), model.layers.3.
    ln1, ln2; ln0 of block 0                           attn_norm, ffn_norm; pre_norm
    att.{receptance, key, value, output}.weight        attn.{r, k, v, o}_proj.weight
    att.{x_r, x_w, x_k, x_v, x_a, x_g}, att.r_k        attn. the same
    att.{k_k, k_a} [1, 1, d]                           attn. the same, [d]
    att.{w, a, v, g}1, 2 [d, rank], [rank, d]          attn.{w, a, v, g}_lora.lora.{0, 2}.weight, transposed
    att.{w, a, v}0 [1, 1, d]                           attn.{w, a, v}_lora.lora.2.bias, [d]
    att.ln_x                                           attn.g_norm
    ffn.{x_k, key, value}                              ffn. the same

and emb, ln_out, head are model.embeddings, model.norm, lm_head. Layer 0 has no v_lora: what a file holds there is read by nobody.
The norm behind the scan adds 64e-5 in RWKV-LM and head_dim * norm_eps in fla: the same for heads of 64.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatedlens.errors import CheckpointError
from gatedlens.model import fields
from gatedlens.model.checkpoint import depth, save_checkpoint, shape_of
from gatedlens.model.fields import EPS, NONE, SIZE, TRANSFORMERS, layers_of, one_of
from gatedlens.model.layout import Layout
from gatedlens.model.tiny import Tiny, around, fresh

KINDS = ("rwkv7", "rwkv7_fla")  # model_type in fla's config.json, and in that of its first releases
RANKS = {"w": "decay_low_rank_dim", "a": "a_low_rank_dim", "v": "v_low_rank_dim", "g": "gate_low_rank_dim"}
FIELDS = {
    **TRANSFORMERS,
    "model_type": one_of(*KINDS),
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "num_hidden_layers": layers_of(25),
    "head_dim": SIZE,
    "num_heads": SIZE.or_null(),
    "intermediate_size": SIZE.or_null(),
    **dict.fromkeys(RANKS.values(), SIZE),
    "hidden_act": one_of("sqrelu"),
    "norm_first": one_of(True),
    "norm_bias": one_of(True),
    "norm_eps": EPS,
    "group_norm_eps": EPS,  # no word of fla's, where it is head_dim * norm_eps
    "attn": NONE,
}
NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim", *RANKS.values())
OFFICIAL_EPS = 64e-5  # of RWKV-LM's norm behind the scan, whatever the size of a head


class Rwkv7Weights(nn.Module):
    """Parameters by fla's names, without fla: `Rwkv7Weights(config.json).load_state_dict(...)`.

    config: `vocab_size, hidden_size, num_hidden_layers, head_dim`, the ranks `decay_low_rank_dim, a_low_rank_dim, v_low_rank_dim,
    gate_low_rank_dim`, and optionally `intermediate_size` (4 hidden_size), `norm_eps` 1e-5, `group_norm_eps` head_dim * norm_eps,
    `tie_word_embeddings` False.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        fields.check(config, FIELDS, "The config", required=NEEDED)
        self.config = dict(config)
        d, size, eps = config["hidden_size"], config["head_dim"], config.get("norm_eps", 1e-5)
        if d % size:
            raise CheckpointError(f"The config: {d} channels cannot be cut into heads of {size} evenly.")
        self.model, self.lm_head = nn.Module(), nn.Linear(d, config["vocab_size"], bias=False)
        self.model.embeddings = nn.Embedding(config["vocab_size"], d)
        self.model.layers = nn.ModuleList(_layer(config, number) for number in range(config["num_hidden_layers"]))
        self.model.norm = nn.LayerNorm(d, eps=eps)
        if config.get("tie_word_embeddings", False):
            self.lm_head.weight = self.model.embeddings.weight

    def save_pretrained(self, folder: str | Path) -> None:
        """`weights.save_pretrained("folder")`: config.json and model.safetensors, as `gl.from_pretrained` and fla read them."""
        save_checkpoint(folder, {"model_type": KINDS[0], **self.config}, self)


def _layer(config: Mapping[str, Any], number: int) -> nn.Module:
    d, size, eps = config["hidden_size"], config["head_dim"], config.get("norm_eps", 1e-5)
    inner = config.get("intermediate_size") or 4 * d
    layer, attn, ffn = nn.Module(), nn.Module(), nn.Module()
    if number == 0:
        layer.pre_norm = nn.LayerNorm(d, eps=eps)
    layer.attn_norm, layer.attn = nn.LayerNorm(d, eps=eps), attn
    layer.ffn_norm, layer.ffn = nn.LayerNorm(d, eps=eps), ffn
    for m in "rwkvag":
        setattr(attn, f"x_{m}", nn.Parameter(torch.full((1, 1, d), 0.5)))
    attn.k_k, attn.k_a = nn.Parameter(torch.full((d,), 0.85)), nn.Parameter(torch.ones(d))
    attn.r_k = nn.Parameter(torch.zeros(d // size, size))
    for m in "rkvo":
        setattr(attn, f"{m}_proj", nn.Linear(d, d, bias=False))
    for m, rank in RANKS.items():
        if m != "v" or number > 0:
            setattr(attn, f"{m}_lora", _low_rank(d, config[rank], bias=m != "g"))
    attn.g_norm = nn.GroupNorm(d // size, d, eps=config.get("group_norm_eps", size * eps))
    ffn.x_k = nn.Parameter(torch.full((1, 1, d), 0.5))
    ffn.key, ffn.value = nn.Linear(d, inner, bias=False), nn.Linear(inner, d, bias=False)
    return layer


def _low_rank(d: int, rank: int, bias: bool) -> nn.Module:
    """fla's LoRA: two linear layers, and the place between them for an activation."""
    low = nn.Module()
    last = nn.Linear(rank, d, bias=bias)
    low.lora = nn.Sequential(nn.Linear(d, rank, bias=False), nn.Identity(), last)
    if bias:
        nn.init.zeros_(last.bias)
    return low


WORDS = {
    "emb": "model.embeddings",
    "ln_out": "model.norm",
    "head": "lm_head",
    "ln0": "pre_norm",
    "ln1": "attn_norm",
    "ln2": "ffn_norm",
    "att": "attn",
    "receptance": "r_proj",
    "output": "o_proj",
    "ln_x": "g_norm",
}
ATT_WORDS = {"key": "k_proj", "value": "v_proj"}  # those of ffn keep their names
LOW_RANK = re.compile(r"(blocks\.\d+\.att)\.([wavg])([012])")


def renamed_key(name: str) -> str:
    """`renamed_key("blocks.3.att.w1")`: "model.layers.3.attn.w_lora.lora.0.weight"."""
    low = LOW_RANK.fullmatch(name)
    if low is not None:
        stem, m, number = low.groups()
        last = {"0": "2.bias", "1": "0.weight", "2": "2.weight"}[number]
        return f"{renamed_key(stem)}.{m}_lora.lora.{last}"
    known = {**WORDS, **ATT_WORDS} if ".att." in name else WORDS
    return ".".join(known.get(word, word) for word in name.replace("blocks.", "model.layers.").split("."))


def _renamed(name: str, tensor: Tensor) -> Tensor:
    """A tensor of RWKV-LM's as fla has it."""
    low = LOW_RANK.fullmatch(name)
    if low is not None:
        return tensor.reshape(-1) if low[3] == "0" else tensor.mT.contiguous()
    return tensor.reshape(-1) if name.endswith((".att.k_k", ".att.k_a")) else tensor


class Rwkv7Layout(Layout):
    """`Rwkv7Layout()`: RWKV-LM's .pth alone, or fla's folder (model_type "rwkv7")."""

    fields = FIELDS

    def knows(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") in KINDS

    def config_of_file(
        self, state: Mapping[str, Tensor], told: Mapping[str, Any], variant: str | None
    ) -> dict[str, Any] | None:
        """The config behind an RWKV-7 .pth, read off its shapes; None if it is not one."""
        if "emb.weight" not in state or "blocks.0.att.r_k" not in state:
            return None
        vocab_size, width = shape_of(state, "emb.weight", 2)
        layers = depth(state, "blocks.")
        later = "blocks.1.att.v1" if layers > 1 else "blocks.0.att.w1"  # a single layer has none, and needs none
        ranks = {RANKS[m]: shape_of(state, f"blocks.0.att.{m}1", 2)[1] for m in "wag"}
        return {
            "model_type": KINDS[0],
            "vocab_size": vocab_size,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "head_dim": shape_of(state, "blocks.0.att.r_k", 2)[1],
            "intermediate_size": shape_of(state, "blocks.0.ffn.key.weight", 2)[0],
            "group_norm_eps": OFFICIAL_EPS,
            **ranks,
            RANKS["v"]: shape_of(state, later, 2)[1],
        }

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """`blocks.3.att.w1` is `model.layers.3.attn.w_lora.lora.0.weight`, transposed; fla's names stay."""
        unread = re.compile(r"blocks\.0\.att\.v[012]|model\.layers\.0\.attn\.v_lora\..*")
        out: dict[str, Tensor] = {}
        for name, tensor in state.items():
            if unread.fullmatch(name):
                continue
            if renamed_key(name) in out:
                raise CheckpointError(f"{name} is one of two tensors that are {renamed_key(name)} here.")
            out[renamed_key(name)] = _renamed(name, tensor)
        return out

    def empty(self, config: dict[str, Any]) -> nn.Module:
        return Rwkv7Weights(config)


TINY = Tiny(
    "tiny-rwkv7",
    Rwkv7Weights,
    {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "vocab_size": 40,
        "head_dim": 4,
        "intermediate_size": 24,
        "group_norm_eps": 0.05,  # a norm of so few values is a cliff without
        **dict.fromkeys(RANKS.values(), 4),
    },
    {
        r"\.x_": lambda start, noise: torch.sigmoid(noise),
        "r_k": fresh(0.3),
        "embeddings": fresh(1.0),
        r"w_lora\.lora\.2\.bias": around(1.5),
    },
)
