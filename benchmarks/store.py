"""The activation store against a bare loop of forwards with a cache over the same batches; one thread.

python -m benchmarks.store speed            mamba-moby and griffin-moby: two points a layer, 8 x 128 tokens a batch
python -m benchmarks.store memory 1         peak memory of a harvest of a corpus, and of one ten times longer: 10
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import growth

BATCH, CONTEXT, BATCHES = 8, 128, 64
NAMES = ["blocks.*.mixer.hook_gated", "blocks.*.hook_resid_post"]


def _model(name: str) -> tuple[Any, list[str]]:
    import gatedlens as gl

    model = gl.from_pretrained(f"gatedlens/{name}", device="cpu")
    return model, [n for group in model.names.select(NAMES) for n in group]


def speed() -> dict[str, Any]:
    """Seconds of a harvest, with its estimate, checks, checksums and files, and of the bare loop, which keeps nothing."""
    import gatedlens as gl
    from gatedlens import store

    train, _ = gl.data.text()
    corpus = train[: BATCHES * BATCH * CONTEXT]
    found = {}
    for name in ("mamba-moby", "griffin-moby"):
        model, names = _model(name)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"

            def harvest(model: Any = model, names: list[str] = names, out: Path = out) -> None:
                shutil.rmtree(out, ignore_errors=True)
                store.harvest(model, corpus, names, out, BATCH, context=CONTEXT, progress=False)

            @torch.no_grad()
            def bare(model: Any = model, names: list[str] = names) -> None:
                for rows in corpus.view(BATCHES, BATCH, CONTEXT):
                    model.run_with_cache(rows, names_filter=names)

            both = turns({"ours": harvest, "theirs": bare}, repeats=5)
            found |= {f"{name}, {clock}": seconds for clock, seconds in both.items()}
    return found


def turns(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Medians of rounds in which the functions take turns: by the clock on the wall, and of the CPU (all threads).

    Where other programs share the cores the wall's are noise; the CPU's leave out what waits for the disk.
    """
    clocks = {"wall": time.perf_counter, "CPU": time.process_time}
    taken: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in functions} for clock in clocks}
    for round in range(repeats + 1):
        for name, function in functions.items():
            began = {clock: now() for clock, now in clocks.items()}
            function()
            for clock, now in clocks.items():
                taken[clock][name] += [now() - began[clock]] if round else []  # the first is for warming up
    return {clock: {name: statistics.median(s) for name, s in times.items()} for clock, times in taken.items()}


def memory(times: int) -> float:
    """MiB at the peak of a harvest of `times` short corpora, a generator of documents."""
    from gatedlens import store

    def documents(n: int) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(n):
            yield torch.randint(256, (CONTEXT,), generator=generator).tolist()

    def prepare() -> Any:
        model, names = _model("mamba-moby")
        with tempfile.TemporaryDirectory() as folder:  # what is loaded at the first call is not the corpus's
            store.harvest(model, documents(80), names, Path(folder) / "out", BATCH, progress=False)
        return model, names

    def harvest(made: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            store.harvest(made[0], documents(80 * times), made[1], Path(folder) / "out", BATCH, progress=False)

    return growth(prepare, harvest)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(speed() if sys.argv[1] == "speed" else memory(int(sys.argv[2]))))
