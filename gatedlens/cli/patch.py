"""One sweep from the command line: what `gatedlens patch` does.

    patch(Source("gatedlens/mamba-recall"), point="resid_pre", axes="layer,pos", out="out")
    patch(Source("gatedlens/mamba-moby"), clean="...", corrupted="...", answer="e", wrong="a", point="blocks.*.mixer.hook_gate")

Writes the picture and the Result as JSON.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from gatedlens import metrics
from gatedlens.cli.outfolder import out_folder, written
from gatedlens.cli.prompts import pair_of, single
from gatedlens.cli.source import Source
from gatedlens.errors import PointError, did_you_mean
from gatedlens.model.base import HookedModel
from gatedlens.patching import transformer_lens
from gatedlens.patching.sweeping import carried, copied, sweep

WORDS = {
    name.removeprefix("get_act_patch_"): kind.points
    for name, kind in vars(transformer_lens).items()
    if isinstance(kind, transformer_lens.Kind)
}


@dataclass(frozen=True)
class Patched:
    """What was done; `tops` are the strongest cells; `clean_metric` and `corrupted_metric` the logit differences of the
    two runs, which are 1 and 0 in the score."""

    model: str
    clean: str
    corrupted: str
    answer: str
    wrong: str
    points: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    clean_metric: float
    corrupted_metric: float
    tops: list[dict[str, Any]]
    files: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def patch(
    source: Source,
    clean: str | None = None,
    corrupted: str | None = None,
    answer: str | None = None,
    wrong: str | None = None,
    point: str = "resid_pre",
    axes: str = "layer,pos",
    out: str = "out",
    batch_size: int | None = None,
    progress: bool = False,
) -> Patched:
    """Everything that `gatedlens patch` shows. Of the prompts and answers all or none are given: a bundled recall model
    has a pair of its own. point: a word of the family (resid_pre, mixer_out, gate, ...), a point's word, or a glob."""
    model, model_name = source.open_language("patch"), source.name
    clean, corrupted, answer, wrong = pair_of("patch", model_name, clean, corrupted, answer, wrong)
    points, edits = points_of(model, point)
    names = tuple(axis.strip() for axis in axes.split(","))
    folder = out_folder(out)
    _, cache = model.run_with_cache(clean, names_filter=[points, "hook_logits"])
    ids = [single(model, text, option) for text, option in ((answer, "--answer"), (wrong, "--wrong"))]
    metric = metrics.logit_difference(ids[0], ids[1])
    found = sweep(
        model, corrupted, cache, metric, points, names, edits=edits, normalised=True, progress=progress, max_rows=batch_size,
        title=f"{model_name}: patching {point}",
    )  # fmt: skip
    files = written(folder, model_name, f"patch-{point}", found)
    facts = found.facts
    return Patched(
        model_name, clean, corrupted, answer, wrong, points, names, tuple(found.shape), facts["clean"],
        facts["corrupted"], found.top(5), files,
    )  # fmt: skip


def points_of(model: HookedModel, point: str) -> tuple[str, Any]:
    """(glob, edits) of a word of the family, of a point's word or name in any layer, or of a full name or glob."""
    if point in WORDS:
        return WORDS[point], carried if point == "state" else copied
    rests = {name.split(".", 2)[2] for name in model.names if name.startswith("blocks.")}
    if "." in point:
        return f"blocks.*.{point}" if point in rests else point, copied
    leaf = point if point.startswith("hook_") else f"hook_{point}"
    hits = sorted((rest for rest in rests if rest.rpartition(".")[2] == leaf), key=lambda rest: rest.count("."))
    for preferred in (leaf, f"mixer.{leaf}", f"attn.{leaf}", *hits[:1]):  # as in TransformerLens's shorthand
        if preferred in hits:
            return f"blocks.*.{preferred}", copied
    raise PointError(f"--point {point} is no point of {model.cfg.model_name}.{did_you_mean(point, [*WORDS, *rests])}")
