"""Run every benchmark, print the table, and write benchmarks/results.json and the table in benchmarks/README.md.

python -m benchmarks.run                       # all (make bench)
python -m benchmarks.run secant products       # these parts; the lines of the others stay
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.measure import fresh
from benchmarks.products import CASES

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


def hybrids() -> Iterator[Line]:
    """Whole models of 4 layers, attention among them or beside."""
    limits = {"forward": 0.8, "forward + backward": 0.6}
    titles = {
        "qwen3_next": "Qwen3-Next",
        "kimi_linear": "Kimi Linear",
        "minimax": "MiniMax",
        "bamba": "Bamba",
        "falcon_h1": "Falcon-H1",
        "jamba": "Jamba",
    }
    for name, title in titles.items():
        for what, seconds in fresh("benchmarks.language", name).items():
            yield Line(f"{title}: {what}, pos 1024", seconds["ours"], seconds["theirs"], "s", limits[what])


def products() -> Iterator[Line]:
    """Blocks of each architecture over the matrix products that they are made of."""
    limits = {"forward": 1.5, "forward + backward": 2.0}
    for name in CASES:
        for what, seconds in fresh("benchmarks.products", name).items():
            limit = limits[what.partition(",")[0]]
            yield Line(
                f"{name}: blocks, {what}, over their matrix products", seconds["ours"], seconds["theirs"], "s", limit
            )


def heads() -> Iterator[Line]:
    """Heads with matrix states against transformers' own forms, and the scan's matrix against the products it is made of."""
    titles = {"mamba2": "Mamba-2's scan", "gated_delta": "gated delta rule", "kimi_delta": "Kimi delta rule"}
    limits = {
        "mamba2": {"forward, pos 1024": 0.22, "forward, pos 2048": 0.2, "both, pos 1024": 0.35, "both, pos 2048": 0.3},
        "gated_delta": {
            "forward, pos 1024": 0.65,
            "forward, pos 2048": 0.65,
            "both, pos 1024": 0.75,
            "both, pos 2048": 0.55,
        },
        "kimi_delta": dict.fromkeys(
            ("forward, pos 1024", "forward, pos 2048", "both, pos 1024", "both, pos 2048"), 0.05
        ),
    }
    for name, title in titles.items():
        for what, seconds in fresh("benchmarks.heads", name).items():
            limit = limits[name][what.replace("forward + backward", "both")]
            yield Line(f"{title}: {what}, against transformers'", seconds["ours"], seconds["theirs"], "s", limit)
        peaks = {who: fresh("benchmarks.heads", "memory", name, who) for who in ("ours", "theirs")}
        what = f"{title}: peak memory of forward + backward, pos 1024"
        yield Line(what, peaks["ours"], peaks["theirs"], "MiB", 0.5)
    for what, seconds in fresh("benchmarks.heads", "matrix").items():
        if "abs_mean" in what:
            yield Line(what, seconds["ours"], seconds["theirs"], "s", 6.0)
            continue
        limit = 3.0 if what.endswith("1024") else 2.5
        yield Line(f"{what}, over its matrix products", seconds["ours"], seconds["theirs"], "s", limit)


def attention() -> Iterator[Line]:
    name = "benchmarks.attention"
    limits = {"mean(), pos 256": 1 / 30, "mean(), pos 64": 1.0, "A @ x, pos 1024": 2.0}
    for what, seconds in fresh(name, "ratios").items():
        limit = next(limit for start, limit in limits.items() if what.startswith(start))
        yield Line(f"Implicit attention: {what}", seconds["ours"], seconds["theirs"], "s", limit)
    peaks = {who: fresh(name, "memory", f"{who}, pos 64") for who in ("ours", "TransformerLens")}
    what = "Implicit attention: peak memory of mean(), pos 64, against TransformerLens"
    yield Line(what, peaks["ours"], peaks["TransformerLens"], "MiB", 1 / 20)
    budgets = {  # CPU seconds, MiB
        "mean, pos 256": (None, 600),
        "mean, pos 1024": (5, 1000),
        "mean, pos 2048": (20, 1500),
        "row(-1), pos 4096": (1, None),
        "abs_mean, pos 512": (30, 1000),
        "means of 24 layers, pos 256": (60, 3000),
    }
    for what, (seconds, mebibytes) in budgets.items():
        if seconds:
            yield Line(f"{what}, of a limit of {seconds} s CPU", fresh(name, "cpu", what), seconds, "s", 1.0)
        if mebibytes:
            yield Line(f"{what}, of a limit of {mebibytes} MiB", fresh(name, "memory", what), mebibytes, "MiB", 1.0)
    yield from growth_exponents()


def growth_exponents() -> Iterator[Line]:
    """log2 of what twice the positions cost: at most 2 in time (pos^2), 1 in memory (pos channel state) beside the result."""
    for measure, limit in (("cpu", 2.1), ("memory", 2.1)):
        short, long = (fresh("benchmarks.attention", measure, f"mean, pos {n}") for n in (1024, 2048))
        yield Line(f"mean, growth exponent of {measure}, pos 1024 to 2048", math.log2(long / short), 1.0, "", limit)


def patching() -> Iterator[Line]:
    sweeps = {"changed": "prompts that differ everywhere", "one": "prompts that differ in one token"}
    limits = {"changed": 0.2, "one": 0.1}
    metrics = {"library": "", "own": ", a metric of one's own"}
    for point, differ in (("resid_pre", "changed"), ("resid_pre", "one"), ("mixer_out", "changed")):
        for whose, said in metrics.items():
            seconds = fresh("benchmarks.patching", point, differ, whose)
            what = f"Patching {point}, layer x pos, 12 layers, pos 64, {sweeps[differ]}{said}"
            yield Line(what, seconds["ours"], seconds["theirs"], "s CPU", limits[differ])


def circuits() -> Iterator[Line]:
    for name, seconds in fresh("benchmarks.circuits", "speed").items():
        what = f"Attribution patching of every point that is not lazy / forward + backward, {name}, pos 64"
        yield Line(what, seconds["ours"], seconds["theirs"], "s", 4.0)
    peaks = {who: fresh("benchmarks.circuits", "memory", who) for who in ("ours", "theirs")}
    yield Line("Attribution patching: peak memory, mamba, pos 64", peaks["ours"], peaks["theirs"], "MiB", 4.0)


def secant() -> Iterator[Line]:
    for name in CASES:
        for what, seconds in fresh("benchmarks.secant", "speed", name).items():
            yield Line(f"{name}: secant over lrp, {what}", seconds["ours"], seconds["theirs"], "s CPU", 2.2)
        peaks = {who: fresh("benchmarks.secant", "memory", name, who) for who in ("ours", "theirs")}
        what = f"{name}: peak memory of secant, pos 1024, over forward + backward and a cache"
        yield Line(what, peaks["ours"], peaks["theirs"], "MiB", 1.3)


def features() -> Iterator[Line]:
    for name, seconds in fresh("benchmarks.features", "speed").items():
        what = f"Feature graph: a target, over one forward + backward, {name}"
        yield Line(what, seconds["ours"], seconds["theirs"], "s", 20.0)
    short, long = (fresh("benchmarks.features", "memory", length) for length in ("512", "2048"))
    what = "Feature graph of 64 features: peak memory, pos 2048 over 4 times that of pos 512"
    yield Line(what, long, 4 * short, "MiB", 1.0)


def imports() -> Iterator[Line]:
    lines = {
        "import": "import gatedlens, over import transformer_lens (limit 0.3 s)",
        "names": "every public name of gatedlens loaded, over import transformer_lens (limit 0.3 s)",
        "help": "gatedlens --help in a fresh process, in all (limit 0.3 s)",
    }
    for part, what in lines.items():
        yield Line(what, statistics.median(fresh("benchmarks.imports", part) for _ in range(5)), 1.0, "s", 0.3)


def store() -> Iterator[Line]:
    for name, seconds in fresh("benchmarks.store", "speed").items():
        what = f"Store: a harvest, over run_with_cache on the same batches, {name}"
        yield Line(what, seconds["ours"], seconds["theirs"], "s", 1.25)
    short, long = (fresh("benchmarks.store", "memory", times) for times in ("1", "10"))
    what = "Store: peak memory of a corpus ten times longer, over the short one's (plus 16 MiB for noise)"
    yield Line(what, long, short + 16, "MiB", 1.0)


def table(lines: list[Line]) -> str:
    out = ["| what | gatedlens | peer | unit | ratio | limit |", "|---|---|---|---|---|---|"]
    out += [f"| {x.what} | {x.ours:.3g} | {x.theirs:.3g} | {x.unit} | {x.ratio:.3f} | {x.limit} |" for x in lines]
    return "\n".join(out)


PARTS = (mamba, language, hybrids, products, heads, attention, patching, circuits, features, secant, store, imports)


def held() -> dict[str, Line]:
    """The lines of benchmarks/results.json, by what they measure."""
    told = json.loads((FOLDER / "results.json").read_text())["lines"]
    return {line["what"]: Line(**{name: value for name, value in line.items() if name != "ratio"}) for line in told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [part.__name__ for part in PARTS]
    parser.add_argument("parts", nargs="*", help=f"of {names}: those alone; the lines of the others stay")
    asked = parser.parse_args().parts
    if not set(asked) <= set(names):
        parser.error(f"{', '.join(set(asked) - set(names))} is none of {', '.join(names)}")
    found = held() if asked else {}
    for part in PARTS:
        if not asked or part.__name__ in asked:
            found |= {line.what: line for line in part()}
    lines = list(found.values())
    print(table(lines))
    machine = {"machine": platform.machine(), "python": platform.python_version(), "threads": 1}
    results = {"machine": machine, "lines": [{**asdict(x), "ratio": x.ratio} for x in lines]}
    (FOLDER / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    head = (FOLDER / "README.md").read_text().partition("<!-- table -->")[0]
    (FOLDER / "README.md").write_text(f"{head}<!-- table -->\n\n{table(lines)}\n")


if __name__ == "__main__":
    main()
