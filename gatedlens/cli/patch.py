"""One sweep from the command line: what `gatedlens patch` does.

    patch("gatedlens/mamba-recall", point="resid_pre", axes="layer,pos", out="out")
    patch("gatedlens/mamba-moby", clean="...", corrupted="...", answer="e", wrong="a", point="blocks.*.mixer.hook_gate")

Writes the picture and the Result as JSON.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gatedlens import metrics, tasks
from gatedlens.cli.outfolder import out_folder
from gatedlens.errors import InputError, PointError, did_you_mean
from gatedlens.loading import from_pretrained
from gatedlens.model.base import HookedModel
from gatedlens.model.language import HookedLanguageModel
from gatedlens.patching import transformer_lens
from gatedlens.patching.sweeping import carried, copied, sweep
from gatedlens.result.result import Result

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
    model_name: str,
    clean: str | None = None,
    corrupted: str | None = None,
    answer: str | None = None,
    wrong: str | None = None,
    point: str = "resid_pre",
    axes: str = "layer,pos",
    out: str | Path = "out",
    progress: bool = False,
) -> Patched:
    """Everything that `gatedlens patch` shows. Of the prompts and answers all or none are given: a bundled recall model
    has a pair of its own. point: a word of the family (resid_pre, mixer_out, gate, ...), a point's word, or a glob."""
    model = from_pretrained(model_name)
    if not isinstance(model, HookedLanguageModel):
        raise InputError(f"{model_name} reads images; gatedlens patch compares two prompts. Use gl.patching in Python.")
    clean, corrupted, answer, wrong = _prompts(model, model_name, clean, corrupted, answer, wrong)
    points, edits = _points(model, point)
    names = tuple(axis.strip() for axis in axes.split(","))
    folder = out_folder(out)
    _, cache = model.run_with_cache(clean, names_filter=[points, "hook_logits"])
    ids = [_single(model, text, option) for text, option in ((answer, "--answer"), (wrong, "--wrong"))]
    metric = metrics.logit_difference(ids[0], ids[1])
    found = sweep(
        model, corrupted, cache, metric, points, names, edits=edits, normalised=True, progress=progress,
        title=f"{model_name}: patching {point}",
    )  # fmt: skip
    files = _write(found, model_name, point, folder)
    facts = found.facts
    return Patched(
        model_name, clean, corrupted, answer, wrong, points, names, tuple(found.shape), facts["clean"],
        facts["corrupted"], found.top(5), files,
    )  # fmt: skip


def _prompts(model: HookedModel, name: str, *given: str | None) -> tuple[str, str, str, str]:
    """(clean, corrupted, answer, wrong): those that are given, or a recall prompt and its counterfactual."""
    options = ("--clean", "--corrupted", "--answer", "--wrong")
    missing = [option for option, text in zip(options, given, strict=True) if text is None]
    if not missing:
        clean, corrupted, answer, wrong = (str(text) for text in given)
        return clean, corrupted, answer, wrong
    if len(missing) < 4 or not name.endswith("-recall"):
        raise InputError(
            f"gatedlens patch needs {', '.join(missing)} too: two prompts of equal length and the token that each makes "
            "likely. (Only a bundled recall model has a pair of its own, with none of them given.)"
        )
    batch = tasks.recall(1, seed=0)
    values = tasks.ids(tasks.VALUES)
    other = batch.with_answer(values[(batch.answers - values[0] + 1) % len(values)])
    clean, corrupted = (" ".join(tasks.VOCABULARY[i] for i in one.tokens[0, 1:].tolist()) for one in (batch, other))
    return clean, corrupted, tasks.VOCABULARY[int(batch.answers)], tasks.VOCABULARY[int(other.answers)]


def _points(model: HookedModel, point: str) -> tuple[str, Any]:
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


def _single(model: HookedModel, text: str, option: str) -> int:
    try:
        return int(model.to_single_token(text))
    except InputError as error:
        raise InputError(f"{option}: {error}") from error


def _write(found: Result, model_name: str, point: str, folder: Path) -> list[str]:
    """The paths of the picture and of the numbers."""
    stem = folder / f"{Path(model_name).name}-patch-{re.sub(r'[^A-Za-z0-9_]+', '-', point).strip('-')}"
    found.plot().savefig(f"{stem}.png", dpi=110, bbox_inches="tight")
    return [f"{stem}.png", str(found.save(f"{stem}.json"))]
