"""Attention that chooses what it attends to: an indexer scores blocks of keys, and each query attends to the best ones (QSA).

b batch, l pos, k key position, h head of the indexer, R the compress ratio, r the rank of a token in its document:

    index_q, index_k = index_qk_proj(n)             index_q normed head by head, then turned by position as q is
    block B          = the tokens of ranks R B ... R B + R - 1; its key: the mean of their index_k, normed, turned by the position
                       of the first of them
    score_B          = sum over h of relu(index_q_h . key_B) / sqrt(d_index), of the blocks that are complete at the query
    attended         = the tokens of the budget / R best blocks, and those behind the last complete block

So the choice is one more mask, made of the hidden states, and no gradient goes through it. Where no block can be left out (so few
positions) nothing is scored, unless somebody listens. Equal scores are told apart as torch's topk of a query's own blocks does.
The state carries the raw index_k and their positions. Attention of Qwen4, in transformers Qwen4ExpTextQSAIndexer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from gatedlens.address.point import Point
from gatedlens.model.hookpoint import rows_of
from gatedlens.model.norm import GemmaNorm, norm_rows
from gatedlens.model.run import DocumentRun
from gatedlens.model.state import Carried
from gatedlens.parts.attention import CARRIED_WINDOW, RMSNORM, ROPE, rotate
from gatedlens.parts.grid_positions import AXES, GridAttention
from gatedlens.recurrence.scanning import at_least_float32

QSA = "QSA, the indexer of Qwen4's attention"
CARRIED_INDEX = {  # what such an attention leaves for the next call
    **CARRIED_WINDOW,
    "index_keys": Carried("window", "batch key_pos d_index"),
    "index_positions": Carried("window", "batch key_pos axis"),
}


def index_rows(normed: str, reads: str = "ln1.out") -> tuple[Point, ...]:
    """`index_rows("(1 + w) * normalized")`: the points of the indexer, which fire before the scores of the attention."""
    queries = "batch pos index_head d_index"
    rows = (
        Point("hook_index_q", queries, f"index_qk_proj({reads}), all but the last head", QSA),
        Point("hook_index_k", "batch pos d_index", f"index_qk_proj({reads}), the last head", QSA),
        *norm_rows("index_q_norm", "index_q", RMSNORM, normed, queries),
        Point("hook_index_rot_q", queries, "index_q_norm.out, its first rotary_dim turned by position", ROPE),
        Point(
            "hook_index_scores", "batch pos key_pos",
            "sum over index_head of relu(index_rot_q . key) / sqrt(d_index.size), one number a block of keys (that of its first "
            "one counts), key: the mean of its index_k, normed, turned; 0 behind the last complete block, and where unseen",
            QSA, True,
        ),
        Point(
            "hook_chosen", "batch pos key_pos",
            "1 where index_scores are among the budget's best blocks, and behind the last complete one; else 0: then attn_scores "
            "are -inf", QSA, True,
        ),
    )  # fmt: skip
    return tuple(replace(row, chooses=True) for row in rows)


def with_index(rows: tuple[Point, ...], normed: str) -> tuple[Point, ...]:
    """`with_index(KIND.rows(PAPER), NORMED)`: the points of an attention, those of its indexer before the scores."""
    place = next(i for i, row in enumerate(rows) if row.name == "hook_attn_scores")
    return (*rows[:place], *index_rows(normed), *rows[place:])


class Blocks(NamedTuple):
    """How the keys of each row stand in blocks: `of_key`, the block of each; `tokens`, the keys of each block; `rank`, that of a
    key in its document; `first`, of each query the first block of its document; `complete`, how many of these are complete."""

    of_key: Int[Tensor, "batch key_pos"]
    tokens: Int[Tensor, "batch block ratio"]
    rank: Int[Tensor, "batch key_pos"]
    first: Int[Tensor, "batch pos"]
    complete: Int[Tensor, "batch pos"]


class IndexedAttention(GridAttention):
    """As `GridAttention`, of the tokens that its indexer chooses; `weights.indexer` is the wrapped one."""

    def __init__(self, weights: Any, rows: tuple[Point, ...], layer: int, kind: Any, *options: Any):
        super().__init__(weights, rows, layer, kind, *options)
        indexer = weights.indexer
        self.index_q_norm = GemmaNorm(indexer.q_layernorm, rows_of("index_q_norm", rows), indexer.q_layernorm.eps)

    def seen(
        self,
        n: Float[Tensor, "batch pos d_read"],
        kept: Mapping[str, Shaped[Tensor, "batch key_pos ..."]],
        carried: Int[Tensor, "batch carried"],
        run: DocumentRun,
    ) -> Bool[Tensor, "batch 1 pos key_pos"] | None:
        indexer = self.weights.indexer
        both = F.linear(n, indexer.index_qk_proj.weight).unflatten(-1, (-1, indexer.index_head_dim))
        q, k = both.split([indexer.index_n_heads, indexer.index_kv_heads], dim=2)
        # In memory of their own: a copy that a hook gets has the same layout then, and so the same rounding behind it.
        q, k = self.hook_index_q(q.contiguous()), self.hook_index_k(k.squeeze(2).contiguous())
        q = self.index_q_norm(q)
        q = self.hook_index_rot_q(rotate(q, *self.turning(run, q)))
        axes = (run.positions.expand(AXES, -1, -1) if run.axes is None else run.axes).permute(1, 2, 0)
        keys = self.behind("index_keys", run.padding.zero(k), carried, run)
        positions = self.behind("index_positions", axes, carried, run)
        seen = super().seen(n, {**kept, "index_keys": keys, "index_positions": positions}, carried, run)
        return self._chosen(q, keys, positions, seen, carried, run)

    def _chosen(
        self,
        q: Float[Tensor, "batch pos index_head d_index"],
        keys: Float[Tensor, "batch key_pos d_index"],
        positions: Int[Tensor, "batch key_pos axis"],
        seen: Bool[Tensor, "batch 1 pos key_pos"] | None,
        carried: Int[Tensor, "batch carried"],
        run: DocumentRun,
    ) -> Bool[Tensor, "batch 1 pos key_pos"] | None:
        """Of the keys that a query may see those that it attends to; None: all that are not ahead of it."""
        ratio, best = self.weights.indexer.compress_ratio, self.weights.indexer.block_topk
        heard, visible, chosen = self.hook_index_scores.heard(), seen, None
        if heard or keys.shape[1] // ratio > best:  # else no block can be left out
            visible = self.visible(carried, run) if seen is None else seen
            blocks = self._blocks(carried, run, ratio)
            scores, by_key = self._scores(q, keys, positions, blocks), blocks.of_key.unsqueeze(1)
            # What stands in complete blocks at each query; keys behind them are attended to anyway.
            inside = blocks.rank.unsqueeze(1) // ratio < blocks.complete.unsqueeze(2)
            by_key = by_key.expand_as(inside)
            if heard:
                of_keys = scores.gather(2, by_key).masked_fill(~(inside & visible[:, 0]), 0)
                scores = self.hook_index_scores(of_keys).gather(2, blocks.tokens[:, None, :, 0].expand_as(scores))
            chosen = ~inside | _best(scores.detach(), blocks, best).gather(2, by_key)
        if self.hook_chosen.heard():
            visible = self.visible(carried, run) if visible is None else visible
            marked = visible[:, 0] if chosen is None else visible[:, 0] & chosen
            chosen = self.hook_chosen(marked.to(q.dtype)) != 0
        if visible is None or chosen is None:
            return seen
        # A position of padding sees itself, as everywhere.
        return visible & (chosen | ~run.real.unsqueeze(2)).unsqueeze(1)

    def _blocks(self, carried: Int[Tensor, "batch carried"], run: DocumentRun, ratio: int) -> Blocks:
        """How keys stand in blocks: of real tokens, counted from where their document begins."""
        real = torch.cat([carried >= 0, run.real], dim=1)
        count = real.long().cumsum(1)
        begins = real & (count == 1)
        if run.documents is not None:
            begins = begins | torch.cat([torch.zeros_like(carried, dtype=torch.bool), run.begins], dim=1)
        rank = count - torch.where(begins, count, 0).cummax(1).values
        of_key = ((real & (rank % ratio == 0)).long().cumsum(1) - 1).clamp(min=0)
        # A document's last block may have fewer tokens.
        number = -(-real.shape[1] // ratio) if run.documents is None else real.shape[1]
        tokens = rank.new_zeros(len(real), number + 1, ratio)  # the last: where padding is put
        place = torch.where(real, of_key, number) * ratio + rank % ratio
        keys_at = torch.arange(real.shape[1], device=real.device).expand_as(place)
        tokens = tokens.flatten(1).scatter(1, place, keys_at).unflatten(1, (-1, ratio))[:, :-1]
        own = carried.shape[1]
        first = of_key[:, own:] - rank[:, own:] // ratio
        complete = torch.where(run.real, (rank[:, own:] + 1) // ratio, 0)
        return Blocks(of_key, tokens, rank, first, complete)

    def _scores(
        self,
        q: Float[Tensor, "batch pos index_head d_index"],
        keys: Float[Tensor, "batch key_pos d_index"],
        positions: Int[Tensor, "batch key_pos axis"],
        blocks: Blocks,
    ) -> Float[Tensor, "batch pos block"]:
        """Of each query and block, whether or not it is complete there."""
        norm, rows = self.weights.indexer.k_layernorm, torch.arange(len(keys), device=keys.device)
        pooled = at_least_float32(keys[rows[:, None, None], blocks.tokens]).mean(2).to(keys.dtype)
        wide = at_least_float32(pooled)
        wide = wide / (wide.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * (1 + at_least_float32(norm.weight))
        starts = positions[rows[:, None], blocks.tokens[..., 0]].permute(2, 0, 1)
        key = rotate(wide.to(keys.dtype).unsqueeze(2), *self.turning_by(starts, keys)).squeeze(2)
        products = torch.einsum("blhd,bnd->blhn", at_least_float32(q), at_least_float32(key))
        return products.relu().sum(2) / q.shape[-1] ** 0.5


def _best(scores: Float[Tensor, "batch pos block"], blocks: Blocks, best: int) -> Bool[Tensor, "batch pos block"]:
    """The best of each query's complete blocks. Queries with as many of them are taken together, each with its own alone: topk
    tells equal scores apart by how many there are."""
    number = torch.arange(scores.shape[2], device=scores.device)
    own = number - blocks.first.unsqueeze(2)
    chosen = (own >= 0) & (own < blocks.complete.unsqueeze(2))
    for count in blocks.complete[blocks.complete > best].unique().tolist():
        row, query = (blocks.complete == count).nonzero(as_tuple=True)
        at = blocks.first[row, query].unsqueeze(1) + torch.arange(count, device=scores.device)
        each = scores[row, query].gather(1, at)
        kept = at.gather(1, each.topk(best, dim=-1).indices)
        alone = torch.zeros(len(row), scores.shape[2], dtype=torch.bool, device=scores.device).scatter(1, kept, True)
        chosen[row, query] = alone
    return chosen
