"""IMDB and ARC-Easy, as JSON lines or as folders that `datasets` saved: rows of text become prompts with answers to choose from.

    JsonLines("imdb/test.jsonl"), SavedDataset("ai2_arc/ARC-Easy")

    IMDB      {"text": ..., "label": 0 or 1}
    ARC       {"question": ..., "choices": {"text": [...], "label": [...]}, "answerKey": "B"}, as on the hub, or
              {"question": {"stem": ..., "choices": [{"text": ..., "label": ...}]}, "answerKey": "B"}, as from AI2

What may be taken away is the review, or the question; the words around them stay. A row of another task: one more
`Task`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatedlens.errors import InputError
from gatedlens.evaluation.data.sample import Prompt, Sample, Samples

SPLITS = ("test", "validation", "dev", "train")


@dataclass(frozen=True)
class Task:
    """keys: what a row must have to be of this task; prompt: a row -> (Prompt, index of the right choice)."""

    keys: frozenset[str]
    prompt: Callable[[Mapping[str, Any]], tuple[Prompt, int]]


def _review(row: Mapping[str, Any]) -> tuple[Prompt, int]:
    label = row["label"]
    if label not in (0, 1):
        raise ValueError(f"label is {label!r}; it is 0 (negative) or 1 (positive)")
    return Prompt(_written(row["text"]), "Review: ", "\nSentiment:", (" negative", " positive")), int(label)


def _written(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _question(row: Mapping[str, Any]) -> tuple[Prompt, int]:
    asked = row["question"]
    if isinstance(asked, Mapping):
        stem, choices = _written(asked["stem"]), [(str(c["label"]), str(c["text"])) for c in asked["choices"]]
    else:
        pairs = zip(row["choices"]["label"], row["choices"]["text"], strict=True)
        stem, choices = _written(asked), [(str(label), str(text)) for label, text in pairs]
    labels = [label for label, _ in choices]
    if row["answerKey"] not in labels:
        raise ValueError(f"answerKey is {row['answerKey']!r}; the choices are {labels}")
    listed = "".join(f"\n{label}. {text}" for label, text in choices)
    prompt = Prompt(stem, "Question: ", f"{listed}\nAnswer:", tuple(f" {label}" for label in labels))
    return prompt, labels.index(row["answerKey"])


TASKS = {
    "IMDB": Task(frozenset({"text", "label"}), _review),
    "ARC": Task(frozenset({"question", "answerKey"}), _question),
}


def as_sample(row: Any, name: str) -> Sample:
    """A row as a Sample; `name` says where it stands, in an error too."""
    if not isinstance(row, Mapping):
        raise InputError(f"{name}: a row is an object with keys, not {type(row).__name__}.")
    task = next((task for task in TASKS.values() if task.keys <= row.keys()), None)
    if task is None:
        known = "; ".join(f"{title}: {', '.join(sorted(task.keys))}" for title, task in TASKS.items())
        raise InputError(f"{name} has the keys {', '.join(map(str, row))}, of no known task ({known}).")
    try:
        prompt, right = task.prompt(row)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{name}: {type(error).__name__}: {error}.") from error
    return Sample(name, prompt, right)


class JsonLines(Samples):
    """A file with one JSON object a line; empty lines are passed over. Only where lines begin is held in memory."""

    def __init__(self, path: str | Path):
        self.title, self.path = str(path), Path(path)
        if not self.path.is_file():
            raise InputError(f"There is no file {path}.")
        self.lines: list[tuple[int, int]] = []  # (number, byte at which it begins)
        with self.path.open("rb") as file:
            at = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    self.lines.append((number, at))
                at += len(line)
        if not self.lines:
            raise InputError(f"{path} holds no sample: it is empty.")

    def __len__(self) -> int:
        return len(self.lines)

    def name(self, i: int) -> str:
        return f"{self.path}, line {self.lines[i][0]}"

    def read(self, i: int) -> Sample:
        where, (_, at) = self.name(i), self.lines[i]
        with self.path.open("rb") as file:
            file.seek(at)
            line = file.readline()
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{where} is broken: {error}.") from error
        return as_sample(row, where)


class SavedDataset(Samples):
    """A folder of `datasets`' save_to_disk; of one with splits the test split (or validation, or train)."""

    def __init__(self, path: str | Path):
        try:
            import datasets  # type: ignore[import-untyped]
        except ImportError as error:
            raise ImportError("A datasets folder needs datasets: pip install 'gatedlens[data]'.") from error
        self.title = str(path)
        try:
            found = datasets.load_from_disk(str(path))
        except Exception as error:  # arrow's and datasets' errors have no common class
            raise InputError(f"{path} is damaged, or no folder of datasets' save_to_disk: {error}.") from error
        if isinstance(found, datasets.DatasetDict):
            split = next((name for name in SPLITS if name in found), None)
            if split is None:
                raise InputError(f"{path} has the splits {', '.join(found)}; one of {', '.join(SPLITS)} is read.")
            found, self.title = found[split], f"{path}/{split}"
        if len(found) == 0:
            raise InputError(f"{self.title} holds no sample: it is empty.")
        self.rows = found

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        return f"{self.title}, row {i}"

    def read(self, i: int) -> Sample:
        return as_sample(self.rows[i], self.name(i))
