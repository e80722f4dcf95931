"""RWKV-5's and RWKV-6's parameters by RWKV-LM's names (x052 and x060), as its .pth holds them.

    blocks.3.                        ln1, ln2; ln0 of block 0
    att.   both versions             receptance, key, value, gate, output; ln_x; time_faaaa [head, size]
           RWKV-5                    time_mix_{k, v, r, g} [1, 1, d]; time_decay [head, size]
           RWKV-6                    time_maa_{x, w, k, v, r, g} [1, 1, d]; time_maa_w1 [d, 5 rank], time_maa_w2 [5, rank, d];
                                     time_decay [1, 1, c], time_decay_w1 [d, rank], time_decay_w2 [rank, c]
    ffn.                             key, value, receptance; time_mix_{k, r} (RWKV-5) or time_maa_{k, r} [1, 1, d]

and emb, ln_out, head. The norm behind the scan adds 64e-5: RWKV-LM divides what enters it by 8 and adds 1e-5. The code beside
RWKV-6's checkpoints on the hub (RWKV/v6-Finch-1B6-HF) has other names for the same: rwkv.embeddings, rwkv.blocks.3.attention,
feed_forward, pre_ln.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatedlens.errors import CheckpointError
from gatedlens.model import fields
from gatedlens.model.checkpoint import depth, save_checkpoint, shape_of
from gatedlens.model.fields import EPS, POSITIVE, SIZE, TRANSFORMERS, layers_of, one_of
from gatedlens.model.layout import Layout
from gatedlens.model.tiny import Tiny, around, fresh

KINDS = ("rwkv5", "rwkv6")
FIELDS = {
    **TRANSFORMERS,
    "model_type": one_of(*KINDS),
    "vocab_size": SIZE,
    "n_embd": SIZE,
    "n_layer": layers_of(20),
    "head_size": SIZE,
    "dim_att": SIZE.or_null(),
    "dim_ffn": SIZE,
    "mix_rank": SIZE,
    "decay_rank": SIZE,
    "norm_eps": EPS,
    "ln_x_eps": EPS,
    # of the code on the hub
    "hidden_size": SIZE,
    "num_hidden_layers": layers_of(20),
    "attention_hidden_size": SIZE.or_null(),
    "intermediate_size": SIZE.or_null(),
    "layer_norm_epsilon": EPS,
    "head_size_divisor": POSITIVE,
}
NEEDED = ("model_type", "vocab_size", "n_embd", "n_layer", "head_size", "dim_ffn")
OFFICIAL_EPS = 64e-5  # of the norm behind the scan, whatever the size of a head
MIXES = {
    "rwkv5": "kvrg",
    "rwkv6": "wkvrg",
}  # what the time mix mixes with the position before, in the order of time_maa_w2


class Rwkv6Weights(nn.Module):
    """Parameters by RWKV-LM's names: `Rwkv6Weights(config).load_state_dict(torch.load("RWKV-x060-World-1B6.pth"))`.

    config: `model_type` ("rwkv5" or "rwkv6"), `vocab_size, n_embd, n_layer, head_size, dim_ffn`; of RWKV-6 the ranks `mix_rank,
    decay_rank`; optionally `dim_att` (n_embd), `norm_eps` 1e-5, `ln_x_eps` 64e-5, `tie_word_embeddings` False.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        ranks = ("mix_rank", "decay_rank") if config.get("model_type") == "rwkv6" else ()
        fields.check(config, FIELDS, "The config", required=(*NEEDED, *ranks))
        self.config = dict(config)
        d, eps = config["n_embd"], config.get("norm_eps", 1e-5)
        if (config.get("dim_att") or d) % config["head_size"]:
            raise CheckpointError(
                f"The config: {config.get('dim_att') or d} channels cannot be cut into heads of {config['head_size']} evenly."
            )
        self.emb, self.head = nn.Embedding(config["vocab_size"], d), nn.Linear(d, config["vocab_size"], bias=False)
        self.blocks = nn.ModuleList(_block(config, number) for number in range(config["n_layer"]))
        self.ln_out = nn.LayerNorm(d, eps=eps)
        if config.get("tie_word_embeddings", False):
            self.head.weight = self.emb.weight

    def save_pretrained(self, folder: str | Path) -> None:
        """`weights.save_pretrained("folder")`: config.json and model.safetensors, as `gl.from_pretrained` reads them."""
        save_checkpoint(folder, self.config, self)


def _block(config: Mapping[str, Any], number: int) -> nn.Module:
    d, eps, kind = config["n_embd"], config.get("norm_eps", 1e-5), config["model_type"]
    inner, size, wide = config.get("dim_att") or d, config["head_size"], config["dim_ffn"]
    block, att, ffn = nn.Module(), nn.Module(), nn.Module()
    if number == 0:
        block.ln0 = nn.LayerNorm(d, eps=eps)
    block.ln1, block.att, block.ln2, block.ffn = nn.LayerNorm(d, eps=eps), att, nn.LayerNorm(d, eps=eps), ffn
    word = "time_mix" if kind == "rwkv5" else "time_maa"
    for mix in MIXES[kind] if kind == "rwkv5" else "x" + MIXES[kind]:
        setattr(att, f"{word}_{mix}", nn.Parameter(torch.full((1, 1, d), 0.5)))
    if kind == "rwkv6":
        low, rank = config["mix_rank"], config["decay_rank"]
        att.time_maa_w1, att.time_maa_w2 = nn.Parameter(torch.zeros(d, 5 * low)), nn.Parameter(torch.zeros(5, low, d))
        att.time_decay = nn.Parameter(torch.full((1, 1, inner), -1.0))
        att.time_decay_w1, att.time_decay_w2 = (
            nn.Parameter(torch.zeros(d, rank)),
            nn.Parameter(torch.zeros(rank, inner)),
        )
    else:
        att.time_decay = nn.Parameter(torch.full((inner // size, size), -1.0))
    att.time_faaaa = nn.Parameter(torch.zeros(inner // size, size))
    for name in ("receptance", "key", "value", "gate"):
        setattr(att, name, nn.Linear(d, inner, bias=False))
    att.output = nn.Linear(inner, d, bias=False)
    att.ln_x = nn.GroupNorm(inner // size, inner, eps=config.get("ln_x_eps", OFFICIAL_EPS))
    for mix in "kr":
        setattr(ffn, f"{word}_{mix}", nn.Parameter(torch.full((1, 1, d), 0.5)))
    ffn.key, ffn.value = nn.Linear(d, wide, bias=False), nn.Linear(wide, d, bias=False)
    ffn.receptance = nn.Linear(d, d, bias=False)
    return block


HUB_NAMES = {"attention": "att", "feed_forward": "ffn", "pre_ln": "ln0", "embeddings": "emb"}


def hub_words(config: Mapping[str, Any]) -> dict[str, Any]:
    """`hub_words(config)`: the config of `Rwkv6Weights` for one of RWKV-6's code on the hub, whose ranks go by the width."""
    d, large = config["hidden_size"], config["hidden_size"] == 4096
    shared = {name: config[name] for name in (*TRANSFORMERS, "model_type", "vocab_size") if name in config}
    return {
        **shared,
        "n_embd": d,
        "n_layer": config["num_hidden_layers"],
        "head_size": config.get("head_size", 64),
        "dim_att": config.get("attention_hidden_size"),
        "dim_ffn": config.get("intermediate_size") or int(d * 3.5) // 32 * 32,
        "mix_rank": 64 if large else 32,
        "decay_rank": 128 if large else 64,
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "ln_x_eps": 1e-5 * config.get("head_size_divisor", 8) ** 2,
    }


class Rwkv6Layout(Layout):
    """`Rwkv6Layout()`: RWKV-LM's .pth alone, a folder with the config of `Rwkv6Weights`, or the hub's folder of RWKV-6."""

    fields = FIELDS

    def knows(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") in KINDS

    def config_of_file(
        self, state: Mapping[str, Tensor], told: Mapping[str, Any], variant: str | None
    ) -> dict[str, Any] | None:
        """The config behind an RWKV-5 or RWKV-6 .pth, read off its shapes; None if it is neither."""
        if "emb.weight" not in state or "blocks.0.att.time_faaaa" not in state:
            return None
        vocab_size, width = shape_of(state, "emb.weight", 2)
        heads, size = shape_of(state, "blocks.0.att.time_faaaa", 2)
        sixth = "blocks.0.att.time_maa_x" in state
        low = {
            "mix_rank": shape_of(state, "blocks.0.att.time_maa_w2", 3)[1],
            "decay_rank": shape_of(state, "blocks.0.att.time_decay_w2", 2)[0],
        } if sixth else {}  # fmt: skip
        return {
            "model_type": "rwkv6" if sixth else "rwkv5",
            "vocab_size": vocab_size,
            "n_embd": width,
            "n_layer": depth(state, "blocks."),
            "head_size": size,
            "dim_att": heads * size,
            "dim_ffn": shape_of(state, "blocks.0.ffn.key.weight", 2)[0],
            **low,
        }

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """`rwkv.blocks.0.attention.time_maa_x` is `blocks.0.att.time_maa_x`; RWKV-LM's names stay."""

        def own(name: str) -> str:
            return ".".join(HUB_NAMES.get(word, word) for word in name.removeprefix("rwkv.").split("."))

        return {own(name): tensor for name, tensor in state.items()}

    def empty(self, config: dict[str, Any]) -> nn.Module:
        """A module for RWKV-LM's names; CheckpointError for a config of another layout."""
        if config.get("model_type") == "rwkv6" and {"hidden_size", "num_hidden_layers", "head_size"} <= set(config):
            return Rwkv6Weights(hub_words(config))
        if "n_embd" not in config:
            raise CheckpointError(
                f"This is {config['model_type']} in another layout than RWKV-LM's; gatedlens reads RWKV-LM's .pth of it (give "
                "the path of the file), or a folder that `Rwkv6Weights(...).save_pretrained` wrote."
            )
        return Rwkv6Weights(config)


TINY = Tiny(
    "tiny-rwkv6",
    Rwkv6Weights,
    {
        "model_type": "rwkv6",
        "n_embd": 16,
        "n_layer": 2,
        "vocab_size": 40,
        "head_size": 4,
        "dim_ffn": 12,
        "mix_rank": 3,
        "decay_rank": 4,
        "norm_eps": 0.05,  # a norm of so few values is a cliff without
        "ln_x_eps": 0.05,
    },
    {
        r"time_(mix|maa)_[xwkvrg]$": lambda start, noise: torch.sigmoid(noise),
        "time_decay$": around(0.7),
        "time_faaaa": fresh(0.5),
        "emb": fresh(1.0),
    },
)
