"""What goes wrong, said so that the next attempt is right.

Each message repeats the question, says why it has no answer, and names the nearest right one. Every class is
also the builtin error that a caller would expect, so `except KeyError` keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GatedlensError(Exception):
    """The base of every error that gatedlens raises on purpose."""


class PointError(GatedlensError, KeyError):
    """A hook point that does not exist, cannot fire, or did not fire."""

    def __str__(self) -> str:  # KeyError would print the message as a quoted repr
        return Exception.__str__(self)


class HookError(GatedlensError, ValueError):
    """A hook returned something that cannot stand in for the activation."""


class InputError(GatedlensError, ValueError):
    """Tokens, masks, states or options that the model cannot run on."""


class CheckpointError(GatedlensError, ValueError):
    """A checkpoint that is damaged, foreign, incomplete or unsupported."""


class StoreError(GatedlensError, OSError):
    """An activation store that cannot be written, is in use, is damaged, or holds another harvest."""

    def __str__(self) -> str:  # OSError would print an errno
        return Exception.__str__(self)


class TooLargeError(GatedlensError, MemoryError):
    """A request that would allocate more than its limit; nothing was allocated."""


def nearest(word: str, known: Iterable[str], n: int = 3) -> list[str]:
    """`nearest("blocks.3.mixer.hook_dta", names)`: the `n` closest known words, best first."""
    return difflib.get_close_matches(str(word), list(known), n=n, cutoff=0.6)


def did_you_mean(word: str, known: Iterable[str], n: int = 3) -> str:
    """`did_you_mean("hook_dta", names)`: " Did you mean a, b or c?", or an empty text where nothing is close."""
    close = nearest(word, known, n)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def in_bytes(n: int | float) -> str:
    """`in_bytes(3 * 2**20)` is `3.0 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"
