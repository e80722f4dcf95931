"""`gatedlens lens`, `dla`, `attribute`, `ablate`, `circuit`: what is told is what the library finds, and pictures lie there."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import pytest
import torch

import gatedlens as gl
from gatedlens import cli

matplotlib.use("agg")
RECALL, TEXT = "gatedlens/mamba-recall", "D 3 dog A 7 hay ? D"


@pytest.fixture
def asked(tmp_path, capsys):
    """A command's JSON; and it prints a table and its files, which are there."""

    def ask(*line):
        line = [*line, "--out", str(tmp_path)]
        assert cli.main([*line, "--json"]) == 0, capsys.readouterr().err
        found = json.loads(capsys.readouterr().out)
        assert cli.main(line) == 0
        out = capsys.readouterr().out
        assert all(Path(file).stat().st_size > 200 and file in out for file in found["files"])
        assert any(file.endswith((".png", ".html")) for file in found["files"])
        return found, out

    return ask


@pytest.fixture(scope="module")
def model():
    return gl.from_pretrained(RECALL, device="cpu")


def test_lens(asked, model):
    found, out = asked("lens", RECALL, "--text", TEXT, "--answer", "3", "--top", "2")
    lens = gl.lens.logit_lens(model, TEXT)
    assert [one["layer"] for one in found["layers"]] == ["embed", 0, 1] and found["position"] == 8
    for depth, layer in enumerate(lens.layers):
        told = found["layers"][depth]
        assert told["top"][0][0] == lens.words()[depth][-1] and len(told["top"]) == 2
        assert told["answer"] == pytest.approx(float(lens.probability("3")[depth, -1]), abs=1e-6)
        assert told["rank"] == int(lens.rank("3")[depth, -1]), layer
    assert "after layer" in out and "likeliest 2" in out and "rank" in out
    assert asked("lens", RECALL, "--text", TEXT, "--position", "2")[0]["token"] == "3"


def test_a_fitted_lens(asked, model, tmp_path):
    fitted = gl.lens.jacobian_lens(model, TEXT, skip_first=1, dim_batch=64, progress=False)
    path = fitted.save(tmp_path / "j.safetensors")
    found, _ = asked("lens", RECALL, "--text", TEXT, "--fitted", str(path))
    assert found["lens"] == "J-lens"
    words = fitted.read(model, TEXT).words()
    assert [one["top"][0][0] for one in found["layers"]] == [word[-1] for word in words]


def test_dla_sums_to_the_logit(asked, model):
    whole = model(TEXT)[0, -1].detach()
    right, wrong = model.to_single_token("3"), model.to_single_token("7")
    for by in ("component", "token"):
        found, out = asked("dla", RECALL, "--text", TEXT, "--answer", "3", "--wrong", "7", "--by", by)
        assert found["sum"] == pytest.approx(float(whole[right] - whole[wrong]), abs=1e-3) and "share" in out
    assert "'3' at 2" in out, "the source is told with its place"
    assert asked("dla", RECALL, "--text", TEXT)[0]["answer"] == "3", "the likeliest"
    assert asked("dla", "gatedlens/mamba2-recall", "--text", TEXT, "--by", "head")[0]["axes"] == ["layer", "head"]


def test_attribute(asked, model, tmp_path):
    found, out = asked("attribute", RECALL, "--text", TEXT, "--method", "occlusion", "--answer", "3", "--wrong", "7")
    want = gl.attribution.occlusion(
        model, TEXT, (model.to_single_token("3"), model.to_single_token("7")), progress=False
    )
    assert found["scores"] == pytest.approx(want.scores[0].tolist(), abs=1e-4)
    assert found["tops"][0]["pos"] == int(want.order(0)[0]) and "the logit of '3' - '7'" in out
    digit = gl.data.digits()["test"][0][0]
    from PIL import Image

    Image.fromarray(((digit[0] + 1) * 127.5).to(torch.uint8).numpy()).save(tmp_path / "digit.png")
    found, out = asked("attribute", "gatedlens/vim-digits", "--image", str(tmp_path / "digit.png"), "--answer", "3")
    assert found["target"] == [3] and len(found["scores"]) == 16 and "class 3" in out and "patch" in out


def test_ablate(asked, model):
    found, out = asked("ablate", RECALL, "--text", TEXT, "--answer", "3")
    assert (
        found["axes"] == ["component", "layer"] and found["metric"] == "log p(answer)" and "changes most without" in out
    )
    measure = gl.metrics.log_probability(model.to_single_token("3"))
    plain = float(measure(model(TEXT).detach()))
    assert found["whole"] == pytest.approx(plain, abs=1e-5)
    with gl.ablation.no_scan(1).on(model):
        change = float(measure(model(TEXT).detach())) - plain
    assert found["values"][1][1] == pytest.approx(change, abs=1e-4)
    found, _ = asked("ablate", RECALL, "--text", TEXT, "--point", "mixer_out", "--how", "mean", "--axes", "layer,pos")
    assert found["shape"] == [2, 9] and found["tops"][0]["pos"] in (2, 3, 8)
    assert asked("ablate", RECALL, "--text", TEXT, "--point", "gate", "--how", "noise", "--wrong", "7")[0]["shape"] == [
        2
    ]
    rows, _ = asked("ablate", "gatedlens/gdn-recall", "--text", TEXT)
    assert rows["shape"][0] > 3, "a delta rule has an erase, too"


@pytest.mark.parametrize("method", ["eap", "eap_ig", "edge_patch"])
def test_circuit(method, asked, model):
    found, out = asked("circuit", RECALL, "--method", method, "--top", "3", "--quiet")
    assert len(found["edges"]) == 3 and "alone they keep" in out
    kept = gl.circuits.Circuit.load(found["files"][1])
    metric = gl.metrics.logit_difference(*(model.to_single_token(found[name]) for name in ("answer", "wrong")))
    alone = kept.faithfulness(model, found["clean"], found["corrupted"], metric)
    assert found["faithfulness"] == pytest.approx(alone, abs=1e-4) and alone > 0.1
    assert [(e.sender, e.receiver) for e in kept.edges] == [(e["sender"], e["receiver"]) for e in found["edges"]]
