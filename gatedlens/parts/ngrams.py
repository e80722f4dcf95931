"""N-gram embeddings: a branch that adds hashed embeddings of the last tokens to every copy of the stream (Qwen4's PLE).

b batch, l pos, k copy, d hidden, d_model = (copy hidden), N the longest n-gram, K the taps of the conv, e (n-gram head):

    embed    = table[hash of the last 2 ... N tokens], several hashes of each length side by side
    gate_k   = sigmoid(root(key_k . query_k / sqrt(d)))              root(x) = sign(x) sqrt(max(|x|, 1e-6))
    key      = RMSNorm(key_proj(embed)),  query = RMSNorm(resid), both copy by copy;  value = value_proj(embed)
    gated_k  = gate_k value                                          out = gated + SiLU(conv(RMSNorm(gated)))

The conv is causal, depthwise, and dilated by N. An n-gram begins behind an end of text and within its document: what is missing
counts as the token of the end. The tokens themselves are read beside the stream, so a run from a stream takes `tokens=...` or
`earlier=cache`. With the gate held, what it adds hangs on no stream. Qwen4's Per-Layer Embedding, in transformers
Qwen4ExpTextPLELayer; hashed n-grams: Engram, arXiv 2601.07372.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.errors import InputError
from gatedlens.model.hookpoint import Part
from gatedlens.model.padding import windows
from gatedlens.model.run import Run
from gatedlens.model.state import Carried
from gatedlens.recurrence.scanning import at_least_float32

PLE = "Per-Layer Embedding of Qwen4; hashed n-grams, arXiv 2601.07372"
RMSNORM = "RMSNorm, arXiv 1910.07467"
SMALLEST = 1e-6  # of what is under the root
CARRIED_NGRAMS = {  # what the branch leaves for the next call
    "ngram_tokens": Carried("ngrams", "batch ngram_tail one"),  # the ids plus 1; 0: none
    "ngram_conv": Carried("ngrams", "batch ngram_conv_tail d_model"),
}


def ngram_rows(reads: str) -> tuple[Point, ...]:
    """`ngram_rows("ple_in")`: the points of `NGrams`, which reads the row `reads`."""
    wide, copies = "batch pos d_model", "batch pos copy"
    return (
        Point("hook_embed", "batch pos d_ngram", "ngram_embedding[hashes of the last tokens], side by side", PLE),
        Point("hook_value", "batch pos hidden", "value_proj(embed)", PLE),
        Point("hook_key", wide, "(1 + w) * RMSNorm(key_proj(embed)), copy by copy", RMSNORM),
        Point("hook_query", wide, f"(1 + w) * RMSNorm({reads}), copy by copy", RMSNORM),
        Point(
            "hook_gate_pre", copies, f"sign(s) * sqrt(max(|s|, {SMALLEST})), s = key . query / sqrt(hidden.size)", PLE
        ),
        Point("hook_gate", copies, "sigmoid(gate_pre)", PLE),
        Point("hook_gated", wide, "gate * value, copy by copy", PLE),
        Point("hook_normed", wide, "(1 + w) * RMSNorm(gated), copy by copy", RMSNORM),
        Point(
            "hook_conv", wide, "sum over tap of conv1d.weight[tap] * normed[pos - dilation * (tap.size - 1 - tap)]", PLE
        ),
    )


class NGrams(Part):
    """out = gated + SiLU(conv(RMSNorm(gated))); `weights` is the wrapped PLE layer."""

    role: ClassVar[str] = ""  # none of a layer's kinds: it stands beside what the layer is

    def __init__(self, weights: Any, rows: tuple[Point, ...], layer: int, eps: float):
        super().__init__(weights, rows)
        self.layer = layer
        self.eps = eps

    @property
    def embed_name(self) -> str:
        """The full name of the point that holds the embeddings."""
        return f"blocks.{self.layer}.ple.hook_embed"

    def forward(self, x: Float[Tensor, "batch pos d_model"], run: Run) -> Float[Tensor, "batch pos d_model"]:
        w, copies, zero = self.weights, self.weights.hc_count, run.padding.zero
        embed = self.hook_embed(self._embedded(x, run))
        value = self.hook_value(F.linear(embed, w.value_proj.weight))
        key = self.hook_key(self._normed(F.linear(embed, w.key_proj.weight), w.norm_key))
        query = self.hook_query(self._normed(x, w.norm_query))
        dots = (key * query).unflatten(-1, (copies, -1)).sum(-1) / value.shape[-1] ** 0.5
        gate_pre = self.hook_gate_pre(dots.abs().clamp_min(SMALLEST).sqrt() * dots.sign())
        gate = self.hook_gate(torch.sigmoid(gate_pre))
        gated = zero(self.hook_gated((gate.unsqueeze(-1) * value.unsqueeze(-2)).flatten(-2)))
        normed = zero(self.hook_normed(zero(self._normed(gated, w.norm_conv))))
        return gated + F.silu(self.hook_conv(self._conv(normed, run)))

    def _normed(self, x: Float[Tensor, "batch pos d_model"], norm: Any) -> Float[Tensor, "batch pos d_model"]:
        wide = at_least_float32(x).unflatten(-1, (self.weights.hc_count, -1))
        wide = (wide / (wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()).flatten(-2)
        return (wide * (1 + at_least_float32(norm.weight))).to(x.dtype)

    def _conv(self, x: Float[Tensor, "batch pos d_model"], run: Run) -> Float[Tensor, "batch pos d_model"]:
        """The dilated causal convolution, across padding, calls and documents."""
        conv = self.weights.conv1d
        dilation, weight = conv.dilation[0], conv.weight.squeeze(1)
        width = dilation * (weight.shape[1] - 1) + 1
        tail = run.start("ngram_conv", self.layer, (len(x), width - 1, x.shape[2]), x)
        long = run.padding.behind(x, tail)
        run.leave("ngram_conv", self.layer, run.padding.tail(run.of_last_document(long, width), width))
        taps, within = windows(long, width)[..., ::dilation], run.in_document(width)
        taps = taps if within is None else taps * within[..., ::dilation]
        return run.padding.spread((taps * weight).sum(-1))

    def _embedded(self, x: Float[Tensor, "batch pos d_model"], run: Run) -> Float[Tensor, "batch pos d_ngram"]:
        """The embeddings of the n-grams that end at each position."""
        table = self.weights.ple_embedding
        if run.tokens is None:
            if run.left is not None:
                raise InputError(
                    f"Block {self.layer} reads tokens beside the stream: give tokens=... to go on from its state."
                )
            return run.handed_on(self.embed_name, self.layer, x)
        found = F.embedding(self.hashes(run.tokens, run), table.ngram_embedding.weight.to(x.device))
        return found.flatten(-2)

    def hashes(self, tokens: Int[Tensor, "batch pos"], run: Run) -> Int[Tensor, "batch pos ngram_head"]:
        """`part.hashes(tokens, run)`: of each n-gram head the row of the table."""
        table = self.weights.ple_embedding
        width, end, before = table.ngram_size, table.eos_token_id, self.weights.ple_embedding.layer_multipliers
        x = tokens.unsqueeze(-1) + 1  # so that 0, in a tail and in another document, is no token
        tail = run.start("ngram_tokens", self.layer, (len(x), width - 1, 1), x)
        long = run.padding.behind(x, tail)
        run.leave("ngram_tokens", self.layer, run.padding.tail(run.of_last_document(long, width), width))
        taps, within = windows(long, width), run.in_document(width)
        taps = (taps if within is None else taps * within).squeeze(2).flip(-1) - 1  # the own token, the one before, ...
        last = _ended(taps, end)
        taps = torch.where(last | (taps < 0), end, taps)
        mixed, found = taps[..., 0] * before[0], []
        for size in range(1, width):
            mixed = mixed ^ (taps[..., size] * before[size])
            some = slice((size - 1) * table.heads_per_ngram, size * table.heads_per_ngram)
            found.append(mixed.unsqueeze(-1) % table.ngram_heads_vocab_sizes[some] + table.ngram_heads_offsets[some])
        return run.padding.spread(torch.cat(found, dim=-1))


def _ended(taps: Int[Tensor, "batch pos tap"], end: int) -> Bool[Tensor, "batch pos tap"]:
    """Whether a text has ended between each tap (itself included) and the own token, which stands first."""
    ends = (taps == end) | (taps < 0)
    ends[..., 0] = False
    return ends.long().cumsum(-1) > 0
