"""Turns: who runs a model now, so that the threads of a program can share it.

    with turns.call(): ...         # a plain forward: any number of threads side by side
    with turns.alone(): ...        # while hooks are on: one thread, and its calls inside, has the model for itself

Hooks sit on the model and not in a thread, so another thread's call would run through them, and into their caches. It waits
instead. It does not wait for good: where the thread that has the model does not run it (a `with model.hooks()` block left
open, or one that itself waits for the call), the call ends in a HookError that says what to do.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gatedlens.errors import HookError

IDLE = 5.0  # seconds that a call waits for a thread that has the model and does not run it
BUSY = 300.0  # the same while that thread is inside a call: its hook may be waiting for us
WAYS = (
    "Close the block (or the generator that holds it) before other threads call the model. For hooks that all threads are to "
    "run with, use model.add_hook. For hooks of its own give each thread a model: gl.wrap(model.wrapped) shares the weights."
)


class Turns:
    """Plain calls side by side, or the hooked calls of one thread; a thread's calls nest in one another.

    `running` is for what belongs to a thread's call under way, by `threading.get_ident()`. A copy of a model starts with
    turns that nobody has taken.
    """

    def __init__(self) -> None:
        self.running: dict[int, Any] = {}
        self._changed = threading.Condition()
        self._calls: Counter[int] = Counter()  # calls under way, by thread
        self._holds: dict[object, threading.Thread] = {}  # one for each `alone` under way, all of one thread
        self._waiting: list[int] = []  # threads that wait to be alone
        self._moved = time.monotonic()  # when whoever has the model last began or ended something

    def __reduce__(self) -> tuple[Any, ...]:
        return Turns, ()

    @contextmanager
    def call(self) -> Iterator[None]:
        """One forward of this thread; waits while another thread has the model for itself."""
        me = threading.get_ident()
        with self._changed:
            if not self._calls[me]:  # a call inside a call never waits
                self._wait(lambda: self._holder() in (None, me) and not (self._waiting and not self._holds))
            self._calls[me] += 1
            self._moved = time.monotonic()
        try:
            yield
        finally:
            with self._changed:
                self._calls[me] -= 1
                if not self._calls[me]:
                    del self._calls[me]
                self._moved = time.monotonic()
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The model for this thread alone; waits until no other thread has it or runs it."""
        hold, me = object(), threading.get_ident()
        with self._changed:
            if self._holder() != me:
                self._waiting.append(me)
                try:
                    self._wait(lambda: not self._holds and not set(self._calls) - {me})  # nobody has it, nobody runs it
                finally:
                    self._waiting.remove(me)
                    self._changed.notify_all()
            self._holds[hold] = threading.current_thread()
            self._moved = time.monotonic()
        try:
            yield
        finally:
            with self._changed:  # a generator may be closed by another thread than the one that opened it
                self._holds.pop(hold, None)
                self._moved = time.monotonic()
                self._changed.notify_all()

    def clear(self) -> None:
        """Take the model back from a thread that has ended with its hooks on, or from this one's own open blocks."""
        with self._changed:
            if self._holder() == threading.get_ident() or not all(t.is_alive() for t in self._holds.values()):
                self._holds.clear()
                self._changed.notify_all()

    # -- with _changed held ----------------------------------------------------------------------------------------

    def _holder(self) -> int | None:
        return next((thread.ident for thread in self._holds.values()), None)

    def _wait(self, free: Callable[[], bool]) -> None:
        """Until it is `free`; HookError where that does not come about."""
        me = threading.get_ident()
        if free() or _is_backward():
            return
        since = time.monotonic()
        while not free():
            self._check_progress(me, since)
            self._changed.wait(timeout=0.2)

    def _check_progress(self, me: int, since: float) -> None:
        mine = threading.current_thread().name
        if self._calls[me] and any(other != me and self._calls[other] for other in self._waiting):
            raise HookError(
                f"Thread {mine} puts hooks on this model inside a call of it, and so does another thread: each would wait "
                f"for the other's call to end. {WAYS}"
            )
        for thread in self._holds.values():
            if not thread.is_alive():
                raise HookError(
                    f"Thread {thread.name} put hooks on this model and ended without taking them off: model.reset_hooks() "
                    "takes them off."
                )
        holder = self._holder()
        idle = holder is not None and not self._calls[holder]
        waited = time.monotonic() - max(since, self._moved)
        if waited > (IDLE if idle else BUSY):
            who = next((thread.name for thread in self._holds.values()), "another thread")
            why = f"{who} has it for itself while its hooks are on (model.hooks, run_with_hooks, run_with_cache)"
            raise HookError(
                f"Thread {mine} waited {waited:.0f} s for this model: {why if self._holds else f'{who} is in a call of it'}, "
                f"and does not go on. {WAYS}"
            )


def _is_backward() -> bool:
    """Whether this is one of autograd's own threads: what it runs belongs to the thread that waits for its backward."""
    if torch._C._current_graph_task_id() == -1:
        return False
    known = (thread for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread))
    return threading.get_ident() not in {thread.ident for thread in known}
