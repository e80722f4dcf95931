"""The walk of a reader: every function of gatedlens that a call enters, in the order of first visits.

    python -m benchmarks.walk                 # of run_with_cache and of a patch sweep: functions, files, switches between files
    python -m benchmarks.walk --list          # and each function by name

A switch is counted where two functions first entered one after the other stand in different files.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

import gatedlens as gl

PACKAGE = Path(gl.__file__).parent


class Walk(NamedTuple):
    """What a call enters: (file, function) at each first visit."""

    visits: list[tuple[str, str]]

    @property
    def files(self) -> int:
        return len({file for file, _ in self.visits})

    @property
    def switches(self) -> int:
        return sum(a[0] != b[0] for a, b in zip(self.visits, self.visits[1:], strict=False))


def walk(call: Callable[[], Any]) -> Walk:
    """The walk of a call, by Python's own profiler hook; lambdas, comprehensions and dataclass methods are not counted."""
    seen: dict[tuple[str, int], tuple[str, str]] = {}

    def visit(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or code.co_name.startswith("<") or not code.co_filename.startswith(str(PACKAGE)):
            return
        file = str(Path(code.co_filename).relative_to(PACKAGE))
        name = code.co_qualname if sys.version_info >= (3, 11) else code.co_name
        seen.setdefault((code.co_filename, code.co_firstlineno), (file, name))

    sys.setprofile(visit)
    try:
        call()
    finally:
        sys.setprofile(None)
    return Walk(list(seen.values()))


def calls() -> dict[str, Callable[[], Any]]:
    """The two calls that are read most."""
    model = gl.from_pretrained("gatedlens/mamba-recall", device="cpu")
    batch = gl.tasks.recall(2, seed=0)
    other = gl.tasks.recall(2, seed=1)
    metric = gl.metrics.logit_difference(batch.answers, other.answers)
    _, cache = model.run_with_cache(batch.tokens)
    return {
        "run_with_cache": lambda: model.run_with_cache(batch.tokens),
        "a patch sweep": lambda: gl.patching.get_act_patch_resid_pre(
            model, other.tokens, cache, metric, progress=False
        ),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--list", action="store_true", help="name each function")
    listed = options.parse_args().list
    torch.set_num_threads(1)
    for name, call in calls().items():
        found = walk(call)
        print(f"{name}: {len(found.visits)} functions, {found.files} files, {found.switches} switches between files")
        if listed:
            print("".join(f"    {file:32} {function}\n" for file, function in found.visits))


if __name__ == "__main__":
    main()
