"""`gatedlens patch`: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import pytest

from gatedlens import cli
from gatedlens.result.result import Result

matplotlib.use("agg")
PAIR = ["--clean", "D 3 dog A 7 hay ? D", "--corrupted", "D 5 dog A 7 hay ? D", "--answer", "3", "--wrong", "5"]


@pytest.mark.parametrize("name", ["mamba-recall", "griffin-recall", "rwkv-recall"])
def test_a_recall_model_has_a_pair_of_its_own(name, tmp_path, capsys):
    assert cli.main(["patch", "--model", f"gatedlens/{name}", "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["clean_metric"] > 1 and found["corrupted_metric"] < -1, "each prompt has its own answer"
    assert found["tops"][0]["value"] == pytest.approx(1, abs=0.05)
    picture, numbers = map(Path, found["files"])
    assert picture.read_bytes()[:4] == b"\x89PNG"
    saved = Result.load(numbers)
    assert saved.axes == ("layer", "pos") and list(saved.shape) == found["shape"] and saved["pos"][0] == "<bos>"
    assert saved[0].max() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("point", "axes", "shape"),
    [
        ("gate", "layer,pos", [2, 9]),
        ("mixer.hook_dt", "layer", [2]),
        ("state", "pos,layer", [9, 2]),
        ("blocks.1.*conv_taps", "tap", [4]),
    ],
)
def test_points_and_axes(point, axes, shape, tmp_path, capsys):
    arguments = ["patch", "--model", "gatedlens/mamba-recall", *PAIR, "--point", point, "--axes", axes]
    assert cli.main([*arguments, "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shape"] == shape and found["clean_metric"] > found["corrupted_metric"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "strongest (1: as in the clean run" in out and "logit of '3' - '5'" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gatedlens/mamba-moby"], "needs --clean, --corrupted, --answer, --wrong too"),
        (["--model", "gatedlens/mamba-recall", "--clean", "D 3 ? D"], "needs --corrupted, --answer, --wrong too"),
        (["--model", "gatedlens/mamba-recall", *PAIR, "--point", "gat"], "--point gat"),
        (["--model", "gatedlens/mamba-recall", *PAIR, "--axes", "layer,head"], "has no axis 'head'"),
        (["--model", "gatedlens/mamba-recall", *PAIR, "--clean", "D 3 ? D"], "both must be equally long"),
        (["--model", "gatedlens/mamba-recall", *PAIR, "--answer", "3 5"], "--answer: '3 5' is 2 tokens"),
        (["--model", "gatedlens/vim-digits", *PAIR], "reads images"),
        (["--model", "gatedlens/rwkv-recall", "--point", "conv"], "matches no hook point"),
    ],
)
def test_mistakes_are_one_line_and_code_2(arguments, message, tmp_path, capsys):
    assert cli.main(["patch", *arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("gatedlens patch: ") and message in error


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["patch", "--help"])
    assert stop.value.code == 0 and "examples:" in capsys.readouterr().out
