"""Replay: an iterator whose beginning can be read several times, for estimates before the pass that counts.

replay = Replay(documents)
first = list(islice(replay, 64)); again = list(islice(replay, 64))       # the same
replay.let_go()
for document in replay: ...                                              # all of them, once, and held no longer
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any


class Replay:
    """`Replay(iterator)`: what was read before `let_go` is read again; the pass after it is the last."""

    def __init__(self, data: Iterator[Any]):
        self.data = data
        self.held: deque[Any] = deque()
        self.keeps = True

    def let_go(self) -> None:
        self.keeps = False

    def __iter__(self) -> Iterator[Any]:
        if not self.keeps:
            while self.held:
                yield self.held.popleft()
            yield from self.data
            return
        at = 0
        while True:
            if at == len(self.held):
                try:
                    self.held.append(next(self.data))
                except StopIteration:
                    return
            yield self.held[at]
            at += 1
