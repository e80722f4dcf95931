"""Run every benchmark, print the table, and write benchmarks/results.json and the table in benchmarks/README.md."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.measure import fresh

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Line:
    """One measurement: `ours` and `theirs` in `unit`, their ratio, and the most it may be."""

    what: str
    ours: float
    theirs: float
    unit: str
    limit: float

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs


def mamba() -> Iterator[Line]:
    limits = {
        "forward, pos 256": 0.6,
        "forward, pos 1024": 0.6,
        "run_with_cache (not lazy) / plain, pos 256": 1.3,
        "forward + backward to the embeddings, pos 256": 0.1,
    }
    for what, seconds in fresh("benchmarks.mamba", "speed").items():
        yield Line(f"Mamba: {what}", seconds["ours"], seconds["theirs"], "s", limits[what])
    for what, suffix in (("with logits", ""), ("blocks alone", ", blocks")):
        peaks = {who: fresh("benchmarks.mamba", "memory", f"{who}{suffix}") for who in ("ours", "theirs")}
        name = f"Mamba: peak memory of a plain forward, pos 1024, {what}"
        yield Line(name, peaks["ours"], peaks["theirs"], "MiB", 0.5)


def language() -> Iterator[Line]:
    for name, title in (("griffin", "Griffin"), ("rwkv", "RWKV")):
        seconds = fresh("benchmarks.language", name)
        yield Line(f"{title}: forward + backward, pos 1024", seconds["ours"], seconds["theirs"], "s", 0.25)


def imports() -> Iterator[Line]:
    seconds = statistics.median(fresh("benchmarks.imports") for _ in range(5))
    yield Line("import gatedlens, over import transformer_lens (limit 0.3 s)", seconds, 1.0, "s", 0.3)


def table(lines: list[Line]) -> str:
    out = ["| what | gatedlens | peer | unit | ratio | limit |", "|---|---|---|---|---|---|"]
    out += [f"| {x.what} | {x.ours:.3g} | {x.theirs:.3g} | {x.unit} | {x.ratio:.3f} | {x.limit} |" for x in lines]
    return "\n".join(out)


def main() -> None:
    lines = [line for part in (mamba, language, imports) for line in part()]
    print(table(lines))
    machine = {"machine": platform.machine(), "python": platform.python_version(), "threads": 1}
    results = {"machine": machine, "lines": [{**asdict(x), "ratio": x.ratio} for x in lines]}
    (FOLDER / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    head = (FOLDER / "README.md").read_text().partition("<!-- table -->")[0]
    (FOLDER / "README.md").write_text(f"{head}<!-- table -->\n\n{table(lines)}\n")


if __name__ == "__main__":
    main()
