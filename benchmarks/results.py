"""The results of docs/results.md: every attribution method on the bundled models, by every protocol that applies.

    python -m benchmarks.results                          # minutes on one thread; writes docs/results.md and results.json
    python -m benchmarks.results --limit 2 --out out      # the same with two samples a model
    nice python -m benchmarks.results --records out/records      # keeps each record, and goes on where it stopped

What is written by hand, above the line `<!-- numbers -->`, stays.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import gatedlens as gl
from gatedlens.evaluation import Estimate, Evaluation, ScoreTable, estimate, evaluate
from gatedlens.evaluation.protocol import PROTOCOLS
from gatedlens.evaluation.table import cell

DOCS = Path(__file__).parent.parent / "docs"
MARK = "<!-- numbers -->"
MODELS = {
    "gatedlens/mamba-recall": "recall",
    "gatedlens/griffin-recall": "recall",
    "gatedlens/rwkv-recall": "recall",
    "gatedlens/mamba2-recall": "recall",
    "gatedlens/gdn-recall": "recall",
    "gatedlens/hybrid-recall": "recall",
    "gatedlens/rwkv7-recall": "recall",
    "gatedlens/vim-digits": "digits",
    "gatedlens/mamba-moby": "moby",
    "gatedlens/griffin-moby": "moby",
    "gatedlens/rwkv-moby": "moby",
}
LIMIT, SEED = 128, 0
LIMIT_OF_BYTES = 48  # samples of 48 bytes, which take longer
PAPER = ("raw_attention", "rollout", "gradient_attention")
VARIANTS = ("", ":factors=hidden", ":sign=abs", ":sign=abs,factors=hidden", ":mode=official,start_layer=0")
METHODS = (
    *(name + variant for name in PAPER for variant in VARIANTS),
    "gradient_attention:mode=official,start_layer=0,factors=hidden",
    "lrp",
    "secant",
    "secant:steps=2",
    "mix",
    "grad_x_input",
    "integrated_gradients",
    "integrated_gradients:keep=read",
    "integrated_gradients:n_steps=3",
    "integrated_gradients:n_steps=3,keep=read",
    "smoothgrad",
    "occlusion",
    "random",
)
# Of whole sentences of bytes: what the other models leave open, and no more.
OF_BYTES = ("raw_attention:sign=abs", *METHODS[METHODS.index("lrp") :])
AGAINST = (
    ("secant", "lrp"),
    ("secant", "integrated_gradients"),
    ("secant", "integrated_gradients:keep=read"),
    ("secant", "occlusion"),
    ("secant:steps=2", "secant"),
    ("mix", "secant"),
    ("mix", "lrp"),
    ("integrated_gradients:keep=read", "integrated_gradients"),
    ("integrated_gradients:n_steps=3,keep=read", "integrated_gradients:keep=read"),
    ("integrated_gradients:n_steps=3", "integrated_gradients"),
)
FULL = ("gate", "scan", "act", "conv")  # the unified matrix
ABLATED = {"skip": "all", **{name: "+".join(f for f in FULL if f != name) for name in ("conv", "gate", "act")}}
OF_FACTORS = ("gradient_attention", "rollout:sign=abs")
FIELD = {"conv": "taps"}  # where a factor is in `Factors`, if not by its own name
WORD = {"down": -1, "up": 1}

PUBLISHED = """| method | positive ↓ | negative ↑ | pixel accuracy ↑ | mAP ↑ | mIoU ↑ |
| --- | --- | --- | --- | --- | --- |
| raw attention | 17.27 | 34.03 | 67.64 | 74.88 | 45.09 |
| attention rollout | 18.81 | 41.86 | 71.01 | 80.78 | 51.51 |
| Mamba-Attribution | 16.62 | 39.63 | 74.72 | 81.70 | 54.24 |"""

ABOUT = """In percent, from Ali, Zimerman and Wolf (arXiv 2403.01590): perturbation on ImageNet's validation set, segmentation on
ImageNet-Segmentation. They need the released checkpoint and these images, which are not in this repository:

    gatedlens evaluate --model vim_s_midclstok_80p5acc.pth --data imagenet --out out/imagenet --methods METHOD ...
    gatedlens evaluate --model vim_s_midclstok_80p5acc.pth --data gtsegs_ijcv.mat --out out/gtsegs --methods METHOD ...

They stand here for the order of methods; digits of 8 x 8 pixels are no ImageNet, and the numbers cannot be compared."""


@dataclass(frozen=True)
class Contrast:
    """The difference of two methods on the same samples: `better` is 1, -1, or 0 where the interval holds 0."""

    column: str
    estimate: Estimate
    better: int


def methods_of(name: str) -> tuple[str, ...]:
    """The methods that a model's table shows."""
    return OF_BYTES if MODELS[name] == "moby" else METHODS


def with_factors(method: str, factors: str) -> str:
    return f"{method}{',' if ':' in method else ':'}factors={factors}"


def contrasts(found: Evaluation, one: str, other: str) -> Iterator[Contrast]:
    """one - other, paired, in the areas of the curves and, where the answer is known, in its mass."""
    for protocol in found.protocols:
        measure = "squared_error" if protocol == "pruning" else "probability"
        areas = [found.curve(method, protocol, measure).areas for method in (one, other)]
        yield _contrast(protocol, areas[0] - areas[1], PROTOCOLS[protocol].better)
    if "truth" in found.rows(one)[0]:
        masses = [torch.tensor([row["truth"]["mass"] for row in found.rows(m)]).double() for m in (one, other)]
        yield _contrast("mass", masses[0] - masses[1], "up")


def _contrast(column: str, differences: torch.Tensor, better: str) -> Contrast:
    found = estimate(differences)
    sign = WORD[better] * ((found.low > 0) - (found.high < 0))
    return Contrast(f"{column} {'↑' if better == 'up' else '↓'}", found, sign)


def contrast_table(rows: dict[str, list[Contrast]]) -> str:
    heads = ["", *next(iter(rows.values()))]
    lines = [["difference", *(c.column for c in heads[1:])], ["---"] * len(heads)]
    for name, found in rows.items():
        lines.append([name, *(f"{cell(c.estimate)}{(' better', '', ' worse')[1 - c.better]}" for c in found)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def has_factor(model: Any, name: str) -> bool:
    """Does any layer of this architecture have such a factor?"""
    input = torch.zeros(1, *model.image_shape) if model.grid is not None else [[0, 1, 2]]
    with torch.no_grad():
        layers = list(gl.implicit_attention(model, input, layers=slice(None)))
    return any(getattr(branch, FIELD.get(name, name)) is not None for layer in layers for branch in layer.branches)


def section(model: Any, found: Evaluation) -> tuple[str, dict[str, Any]]:
    """(markdown, JSON) of one model."""
    whole, shown = found.table(), methods_of(found.run["model"])
    table = ScoreTable(whole.title, {m: whole.rows[m] for m in shown}, whole.better)
    against = {
        f"{one} - {other}": list(contrasts(found, one, other)) for one, other in AGAINST if {one, other} <= set(shown)
    }
    both = [m for m in shown if "hidden" not in m and with_factors(m, "hidden") in shown]
    pairs = {f"{m}: unified - hidden": list(contrasts(found, m, with_factors(m, "hidden"))) for m in both}
    pieces = {}
    for method in OF_FACTORS if both else ():
        for name, factors in ABLATED.items():
            if has_factor(model, name):
                whole_, less = (method, with_factors(method, factors))
                one, other = (less, whole_) if name == "skip" else (whole_, less)
                pieces[f"{method}: with {name} - without"] = list(contrasts(found, one, other))
    text = f"## {found.run['model']}\n\n{table.markdown()}\n"
    if against:
        text += f"\nOf two runs against others, paired over samples:\n\n{contrast_table(against)}\n"
    if both:
        text += (
            f"\nUnified against hidden, paired over samples:\n\n{contrast_table(pairs)}\n\n"
            f"What each factor adds to the unified matrix, paired over samples:\n\n{contrast_table(pieces)}\n"
        )
    every = {**against, **pairs, **pieces}
    numbers = {name: {c.column: [*c.estimate, c.better] for c in row} for name, row in every.items()}
    return text, {"run": dict(found.run), "table": whole.to_dict(), "differences": numbers}


def run(
    limit: int, models: Sequence[str], progress: bool = True, records: Path | None = None
) -> tuple[str, dict[str, Any]]:
    """(markdown, JSON) of all models; records: a folder that keeps what is done, so that a run that was stopped goes on."""
    began, parts, numbers = time.time(), [], {}
    for name in models:
        model = gl.from_pretrained(name, device="cpu")
        methods = list(methods_of(name))
        if any(method in methods for method in OF_FACTORS):
            methods += [
                with_factors(m, f) for m in OF_FACTORS for part, f in ABLATED.items() if has_factor(model, part)
            ]
        out = None if records is None else records / name.rpartition("/")[2]
        most = min(limit, LIMIT_OF_BYTES) if MODELS[name] == "moby" else limit
        found = evaluate(model, MODELS[name], methods, out=out, limit=most, seed=SEED, batch_size=32, progress=progress)
        text, numbers[name] = section(model, found)
        parts.append(text)
    machine = {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
    seconds = round(time.time() - began)
    head = (
        f"{limit} samples a model (of bytes {min(limit, LIMIT_OF_BYTES)}), drawn with seed {SEED}; {seconds} s with "
        f"{machine['threads']} thread, torch "
        f"{machine['torch']}. Curves: area, trapezoid (positive and negative over 10 to 90 %, so at most 0.8; the others over "
        "0 to 100 %). In brackets: 95 %, bootstrap over samples. Bold: the best number of a column. A difference is marked "
        "better or worse where its interval leaves 0 out.\n"
    )
    return "\n".join([head, *parts]), {"limit": limit, "seed": SEED, "seconds": seconds, **machine, "models": numbers}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=LIMIT)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--out", type=Path, default=DOCS)
    parser.add_argument("--records", type=Path, help="a folder that keeps each record, to go on from after a stop")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    text, numbers = run(args.limit, args.models, records=args.records)
    args.out.mkdir(parents=True, exist_ok=True)
    page = args.out / "results.md"
    head = page.read_text(encoding="utf-8").partition(MARK)[0] if page.exists() else ""
    published = f"## Published numbers of ViM-S\n\n{PUBLISHED}\n\n{ABOUT}\n"
    page.write_text(f"{head}{MARK}\n\n{text}\n{published}", encoding="utf-8")
    (args.out / "results.json").write_text(json.dumps(_finite(numbers), indent=1) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and value != value else value


if __name__ == "__main__":
    main()
