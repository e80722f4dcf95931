"""HGRN (Qin, Yang and Zhong 2023, arXiv 2311.04823): a forget gate with a floor that rises from layer to layer.

b batch, l pos, d d_model, c channel (expand_ratio * d_model), f d_mlp; n and m the norms' outputs.

    x, f, z  = i_proj(n), f_proj(n), g_proj(n)                        u = SiLU(x)
    decay    = bound + (1 - bound) sigmoid(f)                         bound: 0 in the first layer, below 1 in the last
    state_t  = decay_t state_{t-1} + (1 - decay_t) u_t                scan_t = state_t
    out      = out_proj(scan SiLU(z))
    channel mix  down_proj(SiLU(gate_proj(m)) up_proj(m))

This is the real recurrence (the paper also turns each state by a fixed angle), with SiLU for the gates as in the
flash-linear-attention library, and without that library's norm before `out_proj`.

An architecture that gatedlens does not ship, in one file: `test_fifth.py` runs every general test on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatedlens.address import Alias, Point, block_rows
from gatedlens.model import (
    Block,
    ChannelScan,
    Gate,
    HookedConfig,
    HookedLanguageModel,
    Layout,
    Named,
    Norm,
    Part,
    PathMixer,
    Run,
    SiLU,
    Streams,
    Sub,
    SubRows,
    Tiny,
    fresh,
    norm_rows,
    residual_rows,
    rows_of,
)
from gatedlens.recurrence import ChannelTerms, at_least_float32

# -- rows -----------------------------------------------------------------------------------------------------------

PAPER = "HGRN, arXiv 2311.04823"
GATES = f"{PAPER}, the recurrent unit's gates"
HGRU = f"{PAPER}, the gated linear recurrence"
GLU = f"{PAPER}, the channel mixer (GLU)"
RMSNORM = "RMSNorm, arXiv 1910.07467"

MIXER_ROWS = (
    Point("hook_x", "batch pos channel", "i_proj(ln1.out)", HGRU),
    Point("hook_forget_pre", "batch pos channel", "f_proj(ln1.out)", GATES),
    Point("hook_gate_pre", "batch pos channel", "g_proj(ln1.out)", GATES),
    Point("hook_u", "batch pos channel", "SiLU(x)", HGRU),
    Point("hook_log_decay", "batch pos channel", "log(bound + (1 - bound) * sigmoid(forget_pre))", GATES),
    Point("hook_reset", "batch pos one", "1 where a document begins (position 0 of position_ids), else 0", HGRU),
    Point("hook_state_start", "batch channel", "state before the first position (zero without one)", HGRU, True),
    Point("hook_decay", "batch pos channel", "exp(log_decay) * (1 - reset)", HGRU, True),
    Point("hook_write", "batch pos channel", "(1 - exp(log_decay)) * u", HGRU, True),
    Point("hook_state", "batch pos channel", "decay * state[pos - 1] + write", HGRU, True),
    Point("hook_scan", "batch pos channel", "state", HGRU),
    Point("hook_y", "batch pos channel", "scan (no skip)", HGRU),
    Point("hook_gate", "batch pos channel", "SiLU(gate_pre)", GATES),
    Point("hook_gated", "batch pos channel", "y * gate", GATES),
)
MLP_ROWS = (
    Point("hook_pre", "batch pos d_mlp", "gate_proj(ln2.out)", GLU),
    Point("hook_pre_linear", "batch pos d_mlp", "up_proj(ln2.out)", GLU),
    Point("hook_post", "batch pos d_mlp", "SiLU(pre) * pre_linear", GLU),
)
BLOCK_ROWS = residual_rows(
    SubRows("mixer", block_rows("mixer", MIXER_ROWS), "out_proj(gated)", norm_rows("ln1", "mixer_in", RMSNORM)),
    SubRows("mlp", block_rows("mlp", MLP_ROWS), "down_proj(post)", norm_rows("ln2", "mlp_in", RMSNORM)),
)


# -- the open forward -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LowerBound:
    """The floor of one layer's forget gate: it belongs to the whole model, and is read from it at every call."""

    model: Any
    layer: int

    def log_decay(self, f: Float[Tensor, "batch pos channel"]) -> Float[Tensor, "batch pos channel"]:
        """log(bound + (1 - bound) sigmoid(f)) = log(sigmoid(f) + bound sigmoid(-f)); the bound is the share that a
        softmax over layers gives to layers 1 to this one, so the first layer has none."""
        if self.layer == 0:
            return F.logsigmoid(f)
        bound = at_least_float32(self.model.lower_bounds).log_softmax(0)[1 : self.layer + 1].logsumexp(0)
        return torch.logaddexp(F.logsigmoid(f), bound + F.logsigmoid(-f))


class HgrnMixer(PathMixer):
    """out = out_proj(scan * SiLU(z)), every intermediate a point."""

    path = (SiLU(of="x"), ChannelScan(), Named("y"), Gate(F.silu))
    selection = ("log_decay",)

    def __init__(self, weights: Any, rows: tuple[Point, ...], layer: int, bound: LowerBound):
        super().__init__(weights, rows, layer)
        self.bound = bound

    def project(self, n: Float[Tensor, "batch pos d_model"], run: Run) -> Streams:
        w, pad = self.weights, run.padding
        x = self.hook_x(pad.zero(w.i_proj(n)))
        f = self.hook_forget_pre(w.f_proj(n))
        return {"x": x, "forget_pre": f, "gate_pre": self.hook_gate_pre(w.g_proj(n))}

    def select(self, u: Float[Tensor, "batch pos channel"], streams: Streams, run: Run) -> None:
        # log decay 0 at a masked position, whatever a hook does there: decay is 1 and write 0, the state passes unchanged
        log_decay = run.padding.zero(self.bound.log_decay(at_least_float32(streams["forget_pre"])))
        streams["log_decay"] = run.padding.zero(self.hook_log_decay(log_decay))

    def terms(self, log_decay: Float[Tensor, "batch pos channel"]) -> ChannelTerms:  # type: ignore[override]
        """decay, write = (1 - decay) u, read = 1 (the state itself)."""
        return ChannelTerms(log_decay, amount=-torch.expm1(log_decay))

    def output_weights(self) -> tuple[Float[Tensor, "d_model channel"], Float[Tensor, " d_model"] | None]:
        return self.weights.out_proj.weight, None


class Glu(Part):
    """out = down_proj(SiLU(gate_proj(m)) * up_proj(m))."""

    def forward(self, m: Float[Tensor, "batch pos d_model"], run: Run) -> Float[Tensor, "batch pos d_model"]:
        w = self.weights
        pre = self.hook_pre(w.gate_proj(m))
        pre_linear = self.hook_pre_linear(w.up_proj(m))
        return w.down_proj(self.hook_post(F.silu(pre) * pre_linear))


# -- the model ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class HgrnConfig(HookedConfig):
    """cfg of HGRN."""

    d_inner: int

    @property
    def sizes(self) -> dict[str, int]:
        return {**super().sizes, "channel": self.d_inner, "d_mlp": self.d_mlp or 0}


class Folder(Layout):
    """A folder that `gl.from_pretrained` then loads: a config.json that `HGRN` takes, and its parameters."""

    def knows(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "hgrn"

    def empty(self, config: dict[str, Any]) -> nn.Module:
        return HGRN(config)


class HookedHGRN(HookedLanguageModel):
    """`HookedHGRN(HGRN(config))`, or `gl.wrap(...)`: HGRN with every intermediate a hook point."""

    title = "HGRN"
    paper = (
        "Qin, Yang and Zhong, Hierarchically Gated Recurrent Neural Network for Sequence Modeling (arXiv 2311.04823)"
    )
    reference = ("a model of 12 layers", {"d_model": 768, "channel": 768, "d_mlp": 2048})
    recurrence: ClassVar = {
        "decay": "bound + (1 - bound) * sigmoid(forget_pre), [channel]; bound rises with the layer",
        "write": "(1 - decay) * u, [channel]",
        "read": "1: the state has no axis of its own",
        "skip": "none",
        "conv": "none",
        "activation before the scan": "SiLU: u = sigmoid(x) * x",
        "gate": "SiLU(gate_pre)",
    }
    attention_words: ClassVar = {
        "x": "x",
        "o": "gated",
        "gate": "gate",
        "scan": "S[i, j] = exp(log_decay[j + 1] + ... + log_decay[i]) * (1 - exp(log_decay[j])), j <= i",
        "skip": "none",
        "act": "sigmoid(x): u = act * x",
        "conv": "none",
        "r": "0; with a carried state what it brings",
    }
    wraps = ("HGRN",)
    layout = Folder()
    small = Tiny(
        "tiny-hgrn",
        lambda config: HGRN(config),
        {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40, "intermediate_size": 48, "expand_ratio": 1.5},
        {"bound": fresh(1.0)},
    )
    block_points = BLOCK_ROWS
    has_positions = True
    aliases = (Alias("blocks.{l}.hook_attn_out", "blocks.{l}.hook_mixer_out", "TransformerLens"),)
    cfg: HgrnConfig

    @classmethod
    def describe(cls, wrapped: Any, model_name: str) -> HgrnConfig:
        weight, first = wrapped.embedding.weight, wrapped.layers[0]
        return HgrnConfig(
            model_name=model_name,
            architecture="hgrn",
            n_layers=len(wrapped.layers),
            d_model=weight.shape[1],
            d_vocab=weight.shape[0],
            d_inner=first.mixer.i_proj.out_features,
            d_mlp=first.mlp.up_proj.out_features,
            attn_only=False,
            eps=wrapped.norm.eps,
            dtype=weight.dtype,
            device=str(weight.device),
            original_architecture=type(wrapped).__name__,
        )

    def make_block(self, layer: int) -> Block:
        w, eps = self.wrapped.layers[layer], self.cfg.eps
        ln1, ln2 = (Norm(w[part], rows_of(part, BLOCK_ROWS), eps) for part in ("ln1", "ln2"))
        mixer = HgrnMixer(w.mixer, rows_of("mixer", BLOCK_ROWS), layer, LowerBound(self.wrapped, layer))
        mlp = Glu(w.mlp, rows_of("mlp", BLOCK_ROWS))
        return Block(w, BLOCK_ROWS, Sub("mixer", mixer, ln1), Sub("mlp", mlp, ln2, ln="ln2"))

    def make_final_norm(self, rows: tuple[Point, ...]) -> Norm:
        return Norm(self.wrapped.norm, rows, self.cfg.eps)

    @property
    def embedding(self) -> Any:
        return self.wrapped.embedding

    @property
    def unembedding(self) -> Any:
        return self.wrapped.head


EPS = 1e-6


class HGRN(nn.Module):
    """The parameters of an HGRN language model, as yours may be: gatedlens runs its own forward over them.

    config: `hidden_size, num_hidden_layers, vocab_size, intermediate_size`, and optionally `expand_ratio` 1.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        d, layers = config["hidden_size"], config["num_hidden_layers"]
        inner = int(d * config.get("expand_ratio", 1))
        self.config = dict(config)
        self.embedding = nn.Embedding(config["vocab_size"], d)
        self.lower_bounds = nn.Parameter(torch.zeros(layers, inner))
        self.layers = nn.ModuleList(_layer(d, inner, config["intermediate_size"]) for _ in range(layers))
        self.norm = nn.RMSNorm(d, eps=EPS)
        self.head = nn.Linear(d, config["vocab_size"], bias=False)


def _layer(d: int, inner: int, mlp: int) -> nn.ModuleDict:
    def linear(**sizes: tuple[int, int]) -> nn.ModuleDict:
        return nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})

    mixer = linear(i_proj=(d, inner), f_proj=(d, inner), g_proj=(d, inner), out_proj=(inner, d))
    glu = linear(gate_proj=(d, mlp), up_proj=(d, mlp), down_proj=(mlp, d))
    return nn.ModuleDict({"ln1": nn.RMSNorm(d, EPS), "mixer": mixer, "ln2": nn.RMSNorm(d, EPS), "mlp": glu})
