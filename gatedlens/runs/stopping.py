"""Stopping: what ends a sweep before its last cell, and what is left of it then.

    with stoppable():          # SIGTERM is Ctrl-C here
        ...

Interrupted is raised for Ctrl-C and SIGTERM, NotSaved where the file of results cannot be written (a full disk). Both
hold what was measured.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gatedlens.errors import GatedlensError
from gatedlens.result.result import Result


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM during a sweep: `results` holds what was measured so far (the rest is NaN); pass it on to continue."""

    def __init__(self, message: str, results: Result):
        super().__init__(message)
        self.results = results


class NotSaved(GatedlensError, OSError):
    """The file of results cannot be written; an older one is left as it was. `results` holds what was measured so far."""

    def __init__(self, message: str, results: Result):
        super().__init__(message)
        self.results = results

    def __str__(self) -> str:  # OSError would print an errno
        return Exception.__str__(self)


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM ends what is in the block as Ctrl-C does, unless the program listens to it itself.

    Only a main thread may listen; in another one SIGTERM does what it always does.
    """
    free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not free or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt("SIGTERM")

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
