"""The command line: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import re

import pytest

from gatedlens import cli


def test_demo_prints_and_writes(tmp_path, capsys):
    assert (
        cli.main(["demo", "--model", "gatedlens/mamba-recall", "--text", "D 3 dog A 7 hay ? D", "--out", str(tmp_path)])
        == 0
    )
    out = capsys.readouterr().out
    assert "relative error" in out and "What the last position attends to" in out and "next token: '3'" in out
    assert (tmp_path / "mamba-recall.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "mamba-recall.html").read_text()
    assert "http" not in re.sub(r"https?://www\.w3\.org\S*", "", page), "the page must be self-contained"
    data = json.loads(re.search(r"id='gl-data'>(.*?)</script>", page, re.S)[1])
    assert data["tokens"][:3] == ["<bos>", "D", "3"] and all(len(rows) == 9 for rows in data["layers"].values())


def test_demo_as_json(tmp_path, capsys):
    assert cli.main(["demo", "--text", "It was", "--layer", "0", "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layer"] == 0 and found["text"] == "It was" and len(found["tops"]) == 5
    assert all(error < 1e-5 for error in found["errors"].values())


def test_compare_shows_all_four(tmp_path, capsys):
    assert cli.main(["compare", "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["recalled"]) == {f"gatedlens/{name}-recall" for name in ("mamba", "griffin", "rwkv")}
    assert all(answer == right and error < 1e-5 for answer, right, _, error in found["recalled"].values())
    label, guess, probability, error = found["digit"]
    assert label == guess and probability > 0.5 and error < 1e-5
    assert (tmp_path / "four-architectures.png").stat().st_size > 20_000
    assert cli.main(["compare", "--out", str(tmp_path)]) == 0
    assert "reads a handwritten" in capsys.readouterr().out


def test_models_and_table(capsys):
    assert cli.main(["models"]) == 0
    assert "gatedlens/mamba-recall" in capsys.readouterr().out
    assert cli.main(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gatedlens/mamba-moby"]["bits_per_byte"] < 2.4
    assert cli.main(["table", "gatedlens/mamba-recall", "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert points[0]["name"] == "hook_embed" and points[-1]["name"] == "hook_logits"
    assert cli.main(["table", "gatedlens/mamba-recall"]) == 0
    assert "hook_gate_pre" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--model", "gatedlens/mamba-mobi"], "Did you mean 'gatedlens/mamba-moby'"),
        (["demo", "--model", "/no/where"], "There is no folder"),
        (["demo", "--layer", "9"], "has layers 0 to"),
        (["demo", "--model", "gatedlens/mamba-recall", "--text", "D 3 unknownword"], "It knows only: 1 2 3"),
    ],
)
def test_mistakes_are_one_line_and_code_2(arguments, message, tmp_path, capsys):
    assert cli.main([*arguments, *(["--out", str(tmp_path)])]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize("command", [[], ["demo"], ["compare"], ["models"], ["table"]])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    assert not command or "examples:" in capsys.readouterr().out
