"""Prompts: the texts and tokens of a command, as the model knows them.

clean, corrupted, answer, wrong = pair_of("patch", "gatedlens/mamba-recall", None, None, None, None)
right = single(model, answer, "--answer")            # its id, or an InputError that names the option
right = likeliest(model, text)                       # the id of what the model would say
"""

from __future__ import annotations

import torch

from gatedlens import tasks
from gatedlens.errors import InputError
from gatedlens.model.base import HookedModel
from gatedlens.model.language import HookedLanguageModel


def pair_of(command: str, name: str, *given: str | None) -> tuple[str, str, str, str]:
    """(clean, corrupted, answer, wrong): those that are given, or a recall prompt and its counterfactual."""
    options = ("--clean", "--corrupted", "--answer", "--wrong")
    missing = [option for option, text in zip(options, given, strict=True) if text is None]
    if not missing:
        clean, corrupted, answer, wrong = (str(text) for text in given)
        return clean, corrupted, answer, wrong
    if len(missing) < 4 or not (name.startswith("gatedlens/") and name.endswith("-recall")):
        raise InputError(
            f"gatedlens {command} needs {', '.join(missing)} too: two prompts of equal length and the token that each makes "
            "likely. (Only a bundled recall model has a pair of its own, with none of them given.)"
        )
    batch = tasks.recall(1, seed=0)
    values = tasks.ids(tasks.VALUES)
    other = batch.with_answer(values[(batch.answers - values[0] + 1) % len(values)])
    clean, corrupted = (" ".join(tasks.VOCABULARY[i] for i in one.tokens[0, 1:].tolist()) for one in (batch, other))
    return clean, corrupted, tasks.VOCABULARY[int(batch.answers)], tasks.VOCABULARY[int(other.answers)]


def single(model: HookedModel, text: str, option: str) -> int:
    """The id of a text that is one token, or of a class that is given by its number."""
    if not isinstance(model, HookedLanguageModel):
        if not text.isdecimal():
            raise InputError(f"{option} {text!r}: {model.cfg.model_name} tells classes apart by number, 3 say.")
        return int(text)
    try:
        return int(model.to_single_token(text))
    except InputError as error:
        raise InputError(f"{option}: {error}") from error


@torch.no_grad()
def likeliest(model: HookedLanguageModel, text: str, position: int | None = None) -> int:
    """The id that the model finds likeliest after `position` (None: the last)."""
    logits = model(text)[0]
    place = -1 if position is None else position
    if not -len(logits) <= place < len(logits):
        raise InputError(f"--position {place} is out of range: the text has {len(logits)} tokens.")
    return int(logits[place].argmax())
