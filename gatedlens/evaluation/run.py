"""A run of an evaluation: every protocol that applies, by every method, on every sample; it can stop and go on.

    evaluate(model, "digits", ["lrp", "rollout"], limit=100, out="out")      # an Evaluation
    explainer("gradient_attention:factors=hidden,mode=official")             # a method with options, by a name that says it all

What is measured: of images the positive and negative perturbation, deletion and insertion, and with masks the segmentation; of
tokens the positive and negative perturbation, activation and pruning; and, where it is known which tokens hold the
answer, their rank and mass. What is explained is the label; where there is none, the answer that the model gives. With `out` each
record is kept as it is made, and the same call goes on where it stopped: of the same model, data, samples and "nothing", which
are compared (records of more samples or other methods may join).
A method is named as `gl.attribution.METHODS` does, with options behind a colon: "lrp:gates=half". In such a name a number stands
for itself, and several words of one option are joined by "+": "gradient_attention:factors=scan+act".

In which batch a sample is measured decides its last digits alone: orders are those of rounded scores (`rounding.py`).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from gatedlens.attribution import METHODS, Attribution, method
from gatedlens.attribution.target import Asked
from gatedlens.errors import InputError, did_you_mean
from gatedlens.evaluation.case import Case
from gatedlens.evaluation.data.opening import open_samples
from gatedlens.evaluation.data.sample import Samples, chosen
from gatedlens.evaluation.item import Item, Items, alike
from gatedlens.evaluation.known_truth import located
from gatedlens.evaluation.overlap import segmentation
from gatedlens.evaluation.protocol import PROTOCOLS, measured
from gatedlens.evaluation.records import Records
from gatedlens.evaluation.removal import Nothing
from gatedlens.evaluation.result import COUNTS, MEASURED, TRUTH, Evaluation
from gatedlens.model.base import HookedModel
from gatedlens.model.batch import Input
from gatedlens.options import checked
from gatedlens.runs.fingerprints import checksum, fingerprint, settings
from gatedlens.version import __version__

# -- methods by name --------------------------------------------------------------------------------------------------

NEEDS_NOTHING = "baseline"  # the option of methods that put "nothing" somewhere


@dataclass(frozen=True)
class Explainer:
    """name: as it was given; method: one of `gl.attribution.METHODS`."""

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, model: HookedModel, input: Input, target: Asked = None, **more: Any) -> Attribution:
        """The attribution; of `more` the method gets what it knows, but not what the name decided."""
        known = inspect.signature(METHODS[self.method]).parameters
        given = {key: value for key, value in more.items() if key in known}
        return METHODS[self.method](model, input, target, **{**given, **self.options})


def explainer(name: str) -> Explainer:
    """`gl.evaluation.explainer("gradient_attention:factors=hidden")`: the Explainer of a name; InputError for a method or
    an option that there is not.
    """
    word, _, rest = name.partition(":")
    known = [key for key in inspect.signature(method(word)).parameters if key not in ("model", "input", "target")]
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key not in known:
            raise InputError(
                f"{name!r}: {word} has no option {key!r}; they are {', '.join(known)}.{did_you_mean(key, known)}"
            )
        options[key] = _value(value)
    return Explainer(name, word, options)


def _value(text: str) -> Any:
    """What stands behind an option's "=", as Python has it."""
    if "+" in text.rstrip("+"):
        return tuple(_value(part) for part in text.split("+"))
    if text.endswith("+"):  # a sequence of one: "scan+"
        return (_value(text[:-1]),)
    words = {"True": True, "False": False, "None": None}
    if text in words:
        return words[text]
    try:
        return json.loads(text)  # a number
    except json.JSONDecodeError:
        return text


# -- the run ----------------------------------------------------------------------------------------------------------

OF_IMAGES = ("positive", "negative", "deletion", "insertion")
OF_TOKENS = ("positive", "negative", "activation", "pruning")
SHOWN = 6  # samples whose scores are kept
DIGITS = 6  # of a number that is kept


@checked
def evaluate(
    model: HookedModel,
    data: Samples | str | Path,
    methods: Sequence[str] | None = None,
    *,
    out: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    nothing: Nothing = None,
    batch_size: int = 8,
    progress: bool = True,
) -> Evaluation:
    """`gl.evaluation.evaluate(model, "digits", ["lrp"], out="out")`: every protocol, by every method (all if None).

    data: a name or path (`opening.py`), or `Samples`. limit: how many samples, drawn from `seed`; all if None. nothing: what
    is put in the place of what is taken away (`removal.py`), in methods that need it as well ("blur" of images excepted: they
    keep black). batch_size: samples that are explained together. out: a folder that keeps each record as it is made; the same
    call goes on from there.

    InputError for data that the model cannot read, a method or option that there is not, and a folder of another run.
    """
    samples = data if isinstance(data, Samples) else open_samples(data)
    if isinstance(methods, str):
        raise InputError(f"methods={methods!r}: give a list, [{methods!r}].")
    explainers = [explainer(name) for name in dict.fromkeys(METHODS if methods is None else methods)]
    if not explainers or batch_size < 1:
        raise InputError(f"methods={methods!r}, batch_size={batch_size}: give at least one method, and at least 1.")
    indices = chosen(samples, limit, seed)
    names = {index: samples.name(index) for index in indices}
    if len(set(names.values())) < len(names):
        raise InputError(f"{samples.title}: two samples have one name; names tell samples apart.")
    run = _run(model, samples, nothing)
    records = Records.open(out, run)
    _check(model, samples, names, records, progress)
    missing = [i for i in indices if any((names[i], one.name) not in records for one in explainers)]
    shown = set(indices[:SHOWN])
    done = (len(indices) - len(missing)) * len(explainers)
    total = len(indices) * len(explainers)
    with tqdm(total=total, initial=done, disable=not progress, desc="evaluate", unit="map") as bar:
        for items in _batches(model, samples, missing, batch_size):
            for one in explainers:
                todo = {index: item for index, item in items.items() if (names[index], one.name) not in records}
                if todo:
                    kept = [index in shown for index in todo]
                    for row in _measure(model, one, list(todo.values()), kept, nothing):
                        records.add(row)
                bar.update(len(items))
    drawn = {"limit": limit, "seed": seed} if len(indices) < len(samples) else {}
    return Evaluation({**run, **drawn}, tuple(one.name for one in explainers), names, records, samples)


def _run(model: HookedModel, samples: Samples, nothing: Nothing) -> dict[str, Any]:
    """What makes two runs the same: records of more samples or other methods may join them."""
    return {
        "model": model.cfg.model_name,
        "weights": fingerprint(model),
        "settings": settings(model),
        "hooks": sorted(model.list_hooks()) or None,
        "gatedlens": __version__,
        "data": samples.title,
        "samples": len(samples),
        "nothing": f"a tensor, {checksum(nothing):08x}" if isinstance(nothing, Tensor) else nothing,
    }


def _check(model: HookedModel, samples: Samples, names: Mapping[int, str], records: Records, progress: bool) -> None:
    """InputError unless the samples that were measured are what they were, and the model is without hooks."""
    hooked = sorted(model.list_hooks())
    if len(records) and hooked:
        raise InputError(
            f"{records.folder} holds records, and the model has hooks at {', '.join(hooked[:4])}: whether they do what they did "
            "then is not known. Give another folder, or take the hooks off."
        )
    before = records.items
    done = {index: name for index, name in names.items() if name in before}
    for index, name in tqdm(done.items(), disable=not progress or not done, desc="compare", unit="sample"):
        if before[name] != {Item.of(model, samples[index]).checksum}:
            raise InputError(
                f"{records.folder} holds another {name}: the sample is not what it was when it was measured. Give another "
                "folder, or empty this one."
            )


def _batches(
    model: HookedModel, samples: Samples, indices: Sequence[int], batch_size: int
) -> Iterator[dict[int, Item]]:
    """Up to `batch_size` items that may stand together, by their index; each is read when its batch begins."""
    held: dict[int, Item] = {}
    for index in indices:
        item = Item.of(model, samples[index])
        if held and (len(held) == batch_size or not alike(next(iter(held.values())), item)):
            yield held
            held = {}
        held[index] = item
    if held:
        yield held


def _measure(
    model: HookedModel, one: Explainer, items: list[Item], shown: list[bool], nothing: Nothing
) -> Iterator[dict[str, Any]]:
    """The records of one method for some items."""
    batch = Items.of(items)
    protocols = OF_TOKENS if model.grid is None else OF_IMAGES
    cases = _cases(model, batch, protocols, nothing)
    case = cases[protocols[0]]
    target = case.labels if case.among is None else case.among.gather(1, case.labels.unsqueeze(1)).squeeze(1)
    more = _baseline(model, case, nothing)
    found = one(model, batch.input, target, attention_mask=batch.attention_mask, progress=False, **more)
    curves = {name: measured(cases[name], found, PROTOCOLS[name], MEASURED[name], progress=False) for name in protocols}
    object_ = None if batch.masks is None else segmentation(found, batch.masks)
    truth = _truth(items, found.scores, case)
    for r, item in enumerate(items):
        row: dict[str, Any] = {
            "sample": item.sample.name,
            "method": one.name,
            "item": item.checksum,
            "explained": int(target[r]),
            "correct": bool(case.clean[r].argmax() == case.labels[r]),
            "nothing": {name: cases[name].said for name in protocols},
            "curves": {name: {m: _short(v[r]) for m, v in values.items()} for name, values in curves.items()},
        }
        if object_ is not None:
            row["segmentation"] = {name: _short(vars(object_)[name][r]) for name in COUNTS}
        if truth is not None:
            row["truth"] = {name: _short(vars(truth)[name][r]) for name in TRUTH}
        if shown[r]:
            row["scores"] = _short(found.scores[r])
            row["tokens"] = None if model.grid is not None else found.facts["tokens"][r]
        yield row


def _baseline(model: HookedModel, case: Case, nothing: Nothing) -> dict[str, Any]:
    """What methods put in, the same as the test does; "blur" differs from image to image and is no baseline."""
    if model.grid is None:
        return {NEEDS_NOTHING: int(case.nothing[0, 0, 0])}
    return {} if nothing is None or (isinstance(nothing, str) and nothing == "blur") else {NEEDS_NOTHING: nothing}


def _cases(model: HookedModel, batch: Items, protocols: Sequence[str], nothing: Nothing) -> dict[str, Case]:
    """The case of each protocol; those that put in the same share one."""
    made: dict[Any, Case] = {}
    out = {}
    for name in protocols:
        asked = PROTOCOLS[name].nothing if nothing is None and model.grid is not None else nothing
        key = asked if asked is None or isinstance(asked, str | int | float) else id(asked)
        if key not in made:
            options: dict[str, Any] = {"keep": batch.keep, "among": batch.among, "attention_mask": batch.attention_mask}
            made[key] = Case.of(model, batch.input, batch.labels, nothing=asked, **options)
        out[name] = made[key]
    return out


def _truth(items: list[Item], scores: Tensor, case: Case) -> Any:
    if not items[0].sample.truth:
        return None
    truth = torch.zeros(scores.shape, dtype=torch.bool)
    for row, item in zip(truth, items, strict=True):
        size = len(item.value)
        if not item.sample.truth or not all(0 <= pos < size for pos in item.sample.truth):
            raise InputError(f"{item.sample.name}: truth={item.sample.truth}; give positions from 0 to {size - 1}.")
        row[[len(row) - size + pos for pos in item.sample.truth]] = True
    return located(scores, truth, case.free)


def _short(values: Tensor) -> Any:
    """Numbers as JSON holds them, to `DIGITS` figures."""
    if values.ndim == 0:
        return float(f"{float(values):.{DIGITS}g}")
    return [_short(one) for one in values]
