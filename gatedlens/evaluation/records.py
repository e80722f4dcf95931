"""Records: what was measured of one sample by one method, kept line by line, so that a run can stop and go on.

    records = Records.open("out", run)       # run: model, data, ...: what makes two runs the same
    records.add({"sample": "test/3", "method": "lrp", ...})
    ("test/3", "lrp") in records

`run.json` says what was run, `records.jsonl` holds a line a sample and method, with a checksum. A folder of another run is
refused, and so is a line that is not as it was written. A last line that was cut off when the run was stopped is measured anew.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gatedlens.errors import InputError

FORMAT = 2
RUN, LINES = "run.json", "records.jsonl"
CHECK = "crc32"


class Records:
    """In memory, and in `folder` if there is one."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self.held: dict[tuple[str, str], dict[str, Any]] = {}

    @classmethod
    def open(cls, folder: str | Path | None, run: Mapping[str, Any]) -> Records:
        """Those of a folder, which is made if it is not there."""
        if folder is None:
            return cls()
        path, run = Path(folder), {"format": FORMAT, **run}
        if path.exists() and not path.is_dir():
            raise InputError(f"--out {path} is a file: give a folder.")
        path.mkdir(parents=True, exist_ok=True)
        records = cls(path)
        begun = (path / LINES).is_file() and (path / LINES).stat().st_size > 0
        if begun and not (path / RUN).is_file():
            raise InputError(f"{path} holds {LINES} but no {RUN}: what was run is not known. Give another folder.")
        if begun:
            records._check(run)
            records._read()
        else:  # a call that failed before its first record binds nobody
            (path / RUN).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        return records

    def _check(self, run: Mapping[str, Any]) -> None:
        assert self.folder is not None
        try:
            before = json.loads((self.folder / RUN).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise InputError(f"{self.folder / RUN} is broken ({error}): give another folder.") from error
        differ = [key for key in {**before, **run} if before.get(key) != run.get(key)]
        if differ:
            said = "; ".join(f"{key} was {before.get(key)!r} and is now {run.get(key)!r}" for key in differ)
            raise InputError(f"{self.folder} holds another run: {said}. Give another folder, or empty this one.")

    def _read(self) -> None:
        assert self.folder is not None
        path = self.folder / LINES
        data = path.read_bytes() if path.is_file() else b""
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            row = _record(line, f"{path}, line {number}")
            self.held[row["sample"], row["method"]] = row
        if len(whole) < len(data):
            path.write_bytes(whole)

    def add(self, row: dict[str, Any]) -> None:
        """Keep one record, on the disk at once."""
        self.held[row["sample"], row["method"]] = row
        if self.folder is not None:
            with (self.folder / LINES).open("a", encoding="utf-8") as file:
                file.write(_line(row) + "\n")

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self.held

    def __getitem__(self, key: tuple[str, str]) -> dict[str, Any]:
        return self.held[key]

    @property
    def items(self) -> dict[str, set[str]]:
        """The checksums of what was measured, by the sample's name: one, unless it was changed in between."""
        out: dict[str, set[str]] = {}
        for (name, _), row in self.held.items():
            out.setdefault(name, set()).add(row.get("item", ""))
        return out

    def __len__(self) -> int:
        return len(self.held)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.held.values())


def _line(row: Mapping[str, Any]) -> str:
    """A record as JSON, with the checksum of all else as its last key."""
    return json.dumps({**row, CHECK: _checked(row)})


def _checked(row: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(row).encode()):08x}"


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if not isinstance(row, dict) or not {"sample", "method"} <= row.keys():
            why = "it is no record"
        elif row.pop(CHECK, None) != _checked(row):
            why = "it is not as it was written"
        else:
            return row
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        why = str(error)
    raise InputError(f"{where} is broken: {why}. Delete that line to have it measured anew.")
