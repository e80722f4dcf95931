"""How large a store will be, before anything runs.

gl.store.estimate(model, "corpus.jsonl", "blocks.*.mixer.hook_gated", context=128)
# Estimate(about 1,204,000 tokens, 770.6 MiB; 61.2 GiB are free)
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gatedlens.errors import TooLargeError, in_bytes
from gatedlens.store.corpus.batches import Batches
from gatedlens.store.disk.layout import Layout
from gatedlens.store.statistics import Reduction

SPARE = 64 * 2**20  # bytes that a disk is left with


@dataclass(frozen=True)
class Estimate:
    """`tokens` that will be read (None: nobody knows), `bytes` that will be written, `free` on the disk of the store.

    `largest`: the points that take most of it, with the bytes of one token.
    """

    tokens: int | None
    bytes: int | None
    free: int
    largest: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        what = "an unknown number of tokens" if self.tokens is None else f"about {self.tokens:,} tokens"
        size = "an unknown number of bytes" if self.bytes is None else in_bytes(self.bytes)
        return f"{what}, {size}; {in_bytes(self.free)} are free"

    def check(self, folder: Path, written: int = 0) -> None:
        """`estimate.check(folder)`: TooLargeError if the disk has no room for what is still to be written."""
        if self.bytes is not None and self.bytes - written + SPARE > self.free:
            worst = ", ".join(f"{name} ({in_bytes(size)} a token)" for name, size in self.largest)
            raise TooLargeError(
                f"The store would take {in_bytes(self.bytes)} ({self}) in {folder}. Most of it is {worst}. Harvest fewer "
                'points, fewer tokens (max_tokens), positions="last", a smaller dtype, or statistics (reduce=...).'
            )


def estimate_of(batches: Batches, layouts: Sequence[Layout], reductions: Sequence[Reduction], folder: Path) -> Estimate:
    """The estimate of a harvest of `layouts` into `folder`."""
    tokens = _tokens(batches)
    length = batches.length
    rows = None if tokens is None else -(-tokens // (length or batches.model.cfg.n_ctx))
    kept = rows if batches.positions == "last" else tokens
    each = {layout.name: layout.bytes for layout in layouts}
    largest = tuple(sorted(each.items(), key=lambda item: -item[1])[:3])
    total: int | None = None
    if reductions:
        total = sum(r.bytes(layout.numbers) for r in reductions for layout in layouts)
    elif kept is not None and rows is not None:
        per_token = 12 + sum(layout.bytes for layout in layouts if layout.per == "token")
        total = kept * per_token + rows * sum(layout.bytes for layout in layouts if layout.per == "row")
    return Estimate(tokens, total, shutil.disk_usage(_existing(folder)).free, largest)


def _tokens(batches: Batches) -> int | None:
    """Tokens that the model will read; of images, positions."""
    count = batches.corpus.count
    if batches.length is not None and batches.corpus.width is None and batches.context is None:
        known = None if count is None else count * batches.length
    else:
        known = batches.corpus.expected_tokens()
    if batches.max_tokens is None:
        return known
    return batches.max_tokens if known is None else min(known, batches.max_tokens)


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.absolute().parent)
