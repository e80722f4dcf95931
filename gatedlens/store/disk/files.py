"""Writing so that a crash at any moment leaves either the old or the new, and a full disk is said to be full.

with locked(folder): ...           # one run a folder; the lock goes when its process does, however it ends
with explained(path): ...          # an OSError of the disk becomes a StoreError; explained_reading(path) where it is read
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gatedlens.errors import StoreError


@contextmanager
def explained(path: Path, safe: str = "") -> Iterator[None]:
    """StoreError in place of what the operating system says of `path`; `safe`: what is not lost."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(f"{error.filename or path} cannot be written: {reason}. {safe}".rstrip()) from error


@contextmanager
def explained_reading(path: Path) -> Iterator[None]:
    """StoreError in place of what the operating system says when it shall read `path`."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}; expected a file of the store.") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder: a second run into it is refused. The lock is the kernel's, so no crash leaves it behind."""
    path = folder / "lock"
    with explained(path):
        handle = path.open("a+")
    with handle:
        if not _lock(handle):
            handle.seek(0)
            raise StoreError(
                f"Another run writes into {folder} (process {handle.read().strip() or 'unknown'}). Wait for it, or use "
                "another folder."
            )
        with explained(path):
            handle.truncate(0)
            handle.write(str(os.getpid()))
            handle.flush()
        yield


def _lock(handle: Any) -> bool:
    """Whether the lock was free and now is ours."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
