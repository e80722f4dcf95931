"""The command line: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import matplotlib
import pytest
import torch
from safetensors.torch import load_file

import gatedlens as gl
from gatedlens import cli
from gatedlens.cli.answer import Answer, width
from gatedlens.cli.options import bundled
from gatedlens.loading import BUNDLED

matplotlib.use("agg")


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


def test_compare_shows_every_architecture(tmp_path, capsys):
    assert cli.main(["compare", "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = ("mamba", "mamba2", "griffin", "rwkv", "rwkv7", "gdn", "hybrid")
    assert list(found["recalled"]) == [f"gatedlens/{name}-recall" for name in names]
    assert all(answer == right and error < 1e-5 for answer, right, _, error in found["recalled"].values())
    label, guess, probability, error = found["digit"]
    assert label == guess and probability > 0.5 and error < 1e-5
    assert (tmp_path / "seven-architectures.png").stat().st_size > 20_000
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


@pytest.mark.parametrize("reduce", ["mean", "abs_mean", "row"])
def test_attention_of_a_text(reduce, tmp_path, capsys):
    text = "D 3 dog A 7 hay ? D"
    arguments = ["attention", "--model", "gatedlens/mamba-recall", "--text", text, "--reduce", reduce]
    assert cli.main([*arguments, "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    A = gl.implicit_attention(gl.from_pretrained("gatedlens/mamba-recall", device="cpu"), text, layer=-1)
    want = {"mean": A.mean()[0], "abs_mean": A.abs_mean()[0], "row": A.row(-1).mean(1)[0]}[reduce]
    picture, numbers = map(Path, found["files"])
    assert torch.allclose(load_file(numbers)["attention"], want, atol=1e-6)
    assert (
        found["layer"] == 1 and found["position"] == 8 and found["shape"] == list(want.shape) and found["error"] < 1e-5
    )
    own = want if reduce == "row" else want[-1]
    assert found["tops"][0][1] == own.abs().argmax() and abs(found["tops"][0][2]) == pytest.approx(
        own.abs().max().item(), abs=1e-5
    )
    assert picture.suffix == (".html" if reduce == "row" else ".png") and picture.stat().st_size > 500
    assert cli.main([*arguments, "--out", str(tmp_path), "--position", "2", "--layer", "0"]) == 0
    out = capsys.readouterr().out
    assert "position 2 attends most" in out and "layer0" in out and "relative error" in out


def test_attention_of_an_image(tmp_path, capsys):
    from PIL import Image

    Image.linear_gradient("L").resize((8, 8)).save(tmp_path / "image.png")
    arguments = ["attention", "--model", "gatedlens/vim-digits", "--image", str(tmp_path / "image.png"), "--json"]
    for reduce, shape in (("row", [17]), ("abs_mean", [17, 17])):
        assert cli.main([*arguments, "--reduce", reduce, "--out", str(tmp_path)]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["shape"] == shape and found["position"] == 8 and found["error"] < 1e-5
        assert Path(found["files"][0]).read_bytes()[:4] == b"\x89PNG"


def test_harvest_makes_a_store_and_goes_on_with_it(tmp_path, capsys):
    lines = [json.dumps({"text": f"Some years ago, never mind how long, number {i}."}) for i in range(9)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    arguments = ["harvest", "--model", "gatedlens/mamba-moby", "--data", str(tmp_path / "corpus.jsonl")]
    arguments += ["--names", "blocks.*.mixer.hook_gated", "blocks.0.hook_delta", "--context", "32", "--quiet"]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"about \d+ tokens, .* MiB; .* are free", out) and "13 samples, 416 tokens of 4 points" in out
    assert "were left out" in out
    assert cli.main([*arguments, "--out", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    store = gl.store.open(tmp_path / "out")
    assert found["tokens"] == store.n_tokens == 416 and found["points"] == store.names
    assert cli.main([*arguments, "--out", str(tmp_path / "mean"), "--reduce", "mean", "max", "--json"]) == 0
    assert set(gl.store.open(tmp_path / "mean").statistics["gated", 1]) == {"mean", "max"}
    assert cli.main([*arguments, "--out", str(tmp_path / "out"), "--batch-size", "3"]) == 2
    assert "its settings batch_size is 8, this one's 3" in capsys.readouterr().err


def test_evaluate_writes_a_report_and_goes_on(tmp_path, capsys):
    arguments = ["evaluate", "--model", "gatedlens/vim-digits", "--data", "digits", "--methods", "lrp", "random"]
    arguments += ["--limit", "2", "--out", str(tmp_path)]
    assert cli.main([*arguments, "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert shown.err == "" and found["run"]["data"] == "digits" and len(found["samples"]) == 2
    assert {cell["method"] for cell in found["table"]["cells"]} == {"lrp", "random"}
    assert [Path(file).name for file in found["files"]] == ["report.html", "results.json"]
    page = (tmp_path / "report.html").read_text()
    assert "http" not in page and page.count("<img") == 2 * 3 and "<svg" in page
    records = (tmp_path / "records.jsonl").read_text()
    (tmp_path / "records.jsonl").write_text("".join(records.splitlines(keepends=True)[:1]))
    assert cli.main([*arguments, "--quiet"]) == 0
    out = capsys.readouterr()
    assert "gatedlens/vim-digits on digits, 2 samples" in out.out and "report.html" in out.out and out.err == ""
    rows = (tmp_path / "records.jsonl").read_text().splitlines()
    assert rows[0] == records.splitlines()[0] and len(rows) == 4
    again = json.loads((tmp_path / "results.json").read_text())["table"]["cells"]
    for cell, other in zip(again, found["table"]["cells"], strict=True):
        assert cell["value"] == pytest.approx(other["value"], abs=1e-5)
    other = ["evaluate", "--model", "gatedlens/rwkv-recall", "--data", "recall", "--limit", "2", "--out", str(tmp_path)]
    assert cli.main(other) == 2
    assert "holds another run: model was 'gatedlens/vim-digits'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--model", "gatedlens/vim-digits", "--data", "digit"], "Did you mean 'digits'"),
        (["evaluate", "--model", "gatedlens/vim-digits", "--data", "digits", "--methods", "lpr"], "Did you mean 'lrp'"),
        (["evaluate", "--model", "gatedlens/vim-digits", "--data", "recall", "--limit", "1"], "reads images"),
        (["evaluate", "--model", "gatedlens/mamba-recall", "--data", "digits", "--limit", "1"], "reads text"),
        (
            ["evaluate", "--model", "gatedlens/vim-digits", "--data", "digits", "--nothing", "blak"],
            "Did you mean 'black'",
        ),
        (["evaluate", "--model", "gatedlens/vim-digits", "--data", "digits", "--limit", "0"], "limit=0"),
        (["demo", "--model", "gatedlens/mamba-mobi"], "Did you mean 'gatedlens/mamba-moby'"),
        (["demo", "--model", "/no/where"], "There is no folder"),
        (["demo", "--layer", "9"], "has layers 0 to"),
        (["demo", "--model", "gatedlens/mamba-recall", "--text", "D 3 unknownword"], "It knows only: 1 2 3"),
        (["attention", "--model", "gatedlens/mamba-moby", "--layer", "9"], "has layers 0 to"),
        (["attention", "--model", "gatedlens/mamba-moby", "--reduce", "men"], "Did you mean 'mean'"),
        (["attention", "--model", "gatedlens/mamba-moby", "--position", "900"], "position=900 is out of range"),
        (["attention", "--model", "gatedlens/mamba-moby", "--image", "x.png"], "reads text"),
        (["attention", "--model", "gatedlens/vim-digits", "--text", "x"], "reads images: pass --image"),
        (["attention", "--model", "gatedlens/vim-digits"], "reads images: pass --image"),
        (["attention", "--model", "gatedlens/vim-digits", "--image", "no.png"], "there is no such file"),
        (["attention", "--model", "gatedlens/vim-digits", "--image", __file__], "no image that Pillow can read"),
    ],
)
def test_mistakes_are_one_line_and_code_2(arguments, message, tmp_path, capsys):
    assert cli.main([*arguments, *(["--out", str(tmp_path)])]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize("command", ["", *cli.app.commands])
def test_help_has_examples(command, capsys):
    for option in ("--help", "-h"):
        with pytest.raises(SystemExit) as stop:
            cli.main([*command.split(), option])
        assert stop.value.code == 0
        said = capsys.readouterr().out
        assert all(name in said for name in cli.app.commands) if not command else "examples:\n  " in said


EXAMPLES = [
    line.strip()
    for command in cli.app.commands.values()
    for line in (command.epilog or "").replace("\\\n", " ").splitlines()
    if line.strip().startswith("gatedlens ")
]


@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_in_help_are_commands(line):
    """Each parses: its options and arguments exist."""
    name, *rest = shlex.split(line.split(" > ")[0])[1:]
    command = cli.app.commands[name]
    with command.make_context(name, list(rest)) as context:
        assert context.params["json"] == ("--json" in rest)


def test_ctrl_c_is_one_line_and_code_130(monkeypatch, capsys):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("gatedlens.cli.demo.compare", stop)
    assert cli.main(["compare"]) == 130
    assert "stopped" in capsys.readouterr().err


# -- every command with every wrong kind of argument ----------------------------------------------------------------

MOBY, RECALL, VIM = "gatedlens/mamba-moby", "gatedlens/mamba-recall", "gatedlens/vim-digits"
HUGE = "9" * 30
RUNS = {
    "demo": ["demo", "--model", RECALL],
    "attention": ["attention", "--model", RECALL],
    "patch": ["patch", "--model", RECALL],
    "compare": ["compare"],
    "evaluate": ["evaluate", "--model", RECALL, "--data", "recall", "--limit", "1", "--methods", "random", "--quiet"],
    "harvest": ["harvest", "--model", MOBY, "--data", "corpus.jsonl", "--names", "hook_embed", "--quiet"],
    "table": ["table", RECALL],
    "lens": ["lens", RECALL],
    "dla": ["dla", RECALL],
    "attribute": ["attribute", RECALL],
    "ablate": ["ablate", RECALL],
    "circuit": ["circuit", RECALL, "--quiet"],
    "picture": ["attention", "--model", VIM],
}
PROMPTS = ["--clean", "D 3 dog A 7 hay ? D", "--corrupted", "D 5 dog A 7 hay ? D"]
FILES = ["", "text", "binary", "folder", "zero", "broken.jsonl", "latin.jsonl", "cut.png", "no\0name", "n" * 400]
WRONG = {
    **{
        name: [["--layer", layer] for layer in (HUGE, f"-{HUGE}", "-99", "2")]
        for name in ("demo", "attention", "table")
    },
    "patch": [
        *[["--point", point] for point in ("", "[[", "nope")],
        *[["--axes", axes] for axes in ("", "layer,,", "layer,layer", "batch", "layer,nope")],
        ["--clean", "D"],
        [*PROMPTS, "--answer", "", "--wrong", "5"],
        [*PROMPTS, "--answer", "3 5", "--wrong", "5"],
        [*PROMPTS, "--answer", "\udcff", "--wrong", "5"],
        [*PROMPTS[:3], "D 5", "--answer", "3", "--wrong", "5"],
        ["--model", VIM],
        ["--model", MOBY],
    ],
    "evaluate": [
        *[["--limit", limit] for limit in ("-1", "0")],
        *[["--seed", seed] for seed in (HUGE, f"-{HUGE}")],
        *[["--batch-size", size] for size in ("0", "-3")],
        *[["--nothing", "nope"]],
        *[["--methods", m] for m in ("", "lpr", "random:x", "::", "rollout:sign=abc", "occlusion:nope=1")],
        ["--methods", "gradient_attention:mode=1"],
        *[["--data", file] for file in FILES],
    ],
    "harvest": [
        *[[option, "0"] for option in ("--batch-size", "--context", "--max-tokens")],
        *[[option, HUGE] for option in ("--batch-size", "--context", "--max-tokens")],
        *[["--positions", positions] for positions in ("x", "mask")],
        *[["--dtype", dtype] for dtype in ("float8", "")],
        *[["--reduce", reduce] for reduce in ("nope", "sample(0)")],
        *[["--engine", engine] for engine in ("", "x")],
        *[["--names", name] for name in ("", "[[", "hook_nope", "blocks.9.hook_resid_pre")],
        ["--field", "nope"],
        *[["--data", file] for file in FILES if file != "text"],
    ],
    "picture": [
        *[["--image", file] for file in [*FILES, "cut.jpg", "cut.gif", "cut.bmp"]],
        ["--image", "whole.png", "--text", "x"],
    ],
    "compare": [],
    "lens": [
        ["--position", "99"],
        ["--fitted", "no.safetensors"],
        ["--top", "0"],
        ["--answer", "3 5"],
        ["--model", VIM],
    ],
    "dla": [["--by", "tokne"], ["--by", "head"], ["--position", "-99"], ["--answer", ""], ["--wrong", "3 5"]],
    "attribute": [["--method", "lpr"], ["--method", "lrp:x"], ["--answer", "3 5"], ["--image", "whole.png"]],
    "ablate": [
        ["--how", "men"],
        ["--how", "mean"],
        ["--axes", "pos"],
        ["--axes", "layer,pos"],
        ["--point", "gat"],
        ["--wrong", "3 5"],
    ],
    "circuit": [["--method", "epa"], ["--top", "0"], ["--clean", "D"], [*PROMPTS, "--answer", "3 5", "--wrong", "5"]],
}
for _name in set(WRONG) - {"table"}:
    WRONG[_name] = [
        *WRONG[_name],
        *[["--out", out] for out in ("text", "text/x", "/dev/null/x", "no\0name", "n" * 300)],
    ]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with files of every wrong kind."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    Path("corpus.jsonl").write_text('{"text": "Call me Ishmael."}\n' * 3)
    Path("text").write_text("nothing of ours")
    Path("binary").write_bytes(bytes(range(256)) * 4)
    Path("zero").touch()
    Path("broken.jsonl").write_text('{"text": "a"}\n{broken\n')
    Path("latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    noise = Image.effect_noise((8, 8), 60).resize((64, 64))
    noise.save("whole.png")
    for suffix in ("png", "jpg", "gif", "bmp"):
        noise.save(f"cut.{suffix}")
        Path(f"cut.{suffix}").write_bytes(Path(f"cut.{suffix}").read_bytes()[:300])
    return tmp_path


@pytest.mark.parametrize("name", WRONG)
def test_every_wrong_argument_is_one_line(name, files, capsys):
    """Code 2 and one line of our own, whatever is wrong; nothing else is said."""
    for arguments in WRONG[name]:
        own = RUNS[name][:1] if arguments[0] == "--model" and RUNS[name][1] == RECALL else RUNS[name]
        line = [*own, *arguments] if "--out" in arguments or name == "table" else [*own, "--out", "out", *arguments]
        assert cli.main(line) == 2, line
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1 and said.startswith(f"gatedlens {RUNS[name][0]}: "), (line, said)


def test_json_has_no_nan(monkeypatch, capsys):
    odd = Answer({"a": float("nan"), "b": [float("inf"), 1.5], "c": Path("x")})
    monkeypatch.setattr(cli.app.commands["models"], "callback", lambda json: (json, odd))
    assert cli.main(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"a": None, "b": [None, 1.5], "c": "x"}


def run(arguments, **options):
    import os
    import subprocess
    import sys

    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(gl.__file__).parent.parent)}
    return subprocess.Popen(
        [sys.executable, "-m", "gatedlens.cli", *arguments], env=env, stderr=subprocess.PIPE, text=True, **options
    )


def ours(said):
    """What the command says itself, without what torchao and torch say of each other when transformers imports both."""
    theirs = ("Failed to load", "torch/utils/_pytree.py", "Skipping import of cpp extensions")
    return "".join(line for line in said.splitlines(keepends=True) if not any(word in line for word in theirs))


def test_sigterm_ends_as_ctrl_c_does(tmp_path):
    """One line, how to go on, and the same command does go on."""
    import signal
    import time

    lines = [json.dumps({"text": f"Some years ago, never mind how long precisely, number {i}."}) for i in range(3000)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    command = ["harvest", "--model", MOBY, "--data", str(tmp_path / "corpus.jsonl"), "--names", "hook_embed", "--quiet"]
    command += ["--out", str(tmp_path / "out"), "--batch-size", "1"]
    started = run(command, stdout=-3)
    journal = tmp_path / "out" / "journal.jsonl"
    while started.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 2):
        time.sleep(0.01)
    started.send_signal(signal.SIGTERM)
    said = ours(started.communicate(timeout=120)[1])
    assert started.returncode == 143 and len(said.splitlines()) == 1
    assert said.startswith("gatedlens harvest: stopped; ") and "go on when the same command is given again" in said
    store = gl.store.open(tmp_path / "out")
    assert len(store) > 2 and not store.is_finished and len(store["hook_embed"][0])


def test_a_signal_handler_is_put_back(monkeypatch, capsys):
    import signal
    import threading

    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["models"]) == 0 and signal.getsignal(signal.SIGTERM) is before
    codes = []
    thread = threading.Thread(target=lambda: codes.append(cli.main(["models"])))
    thread.start()
    thread.join()
    assert codes == [0], "no handler can be set outside the main thread"


def test_nobody_reads_and_nothing_can_be_written():
    """A broken pipe is silent; a full disk behind the output is one line."""
    import os

    for arguments in (["models"], ["models", "--json"], ["table", RECALL]):
        read, write = os.pipe()
        os.close(read)
        started = run(arguments, stdout=write)
        os.close(write)
        assert ours(started.communicate(timeout=120)[1]) == "" and started.returncode == 1
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            started = run(["models"], stdout=full)
            said = started.communicate(timeout=120)[1]
        assert "gatedlens models: No space left on device." in said and "Traceback" not in said


# -- the front ----------------------------------------------------------------------------------------------------------


def test_json_says_errors_too(capsys, tmp_path):
    assert cli.main(["lens", "gatedlens/mamba-mobi", "--out", str(tmp_path), "--json"]) == 2
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["command"] == "lens" and found["kind"] == "CheckpointError" and found["exit"] == 2
    assert "Did you mean 'gatedlens/mamba-moby'" in found["error"] and shown.err.startswith("gatedlens lens: ")
    for line, said in (
        (["lens", "--jsn"], "--json"),
        (["lnes"], "lens"),
        (["lens"], "Give a model"),
        (["table", RECALL, "--layer", "x"], "'x'"),
    ):
        for more in ([], ["--json"]):
            with pytest.raises(SystemExit) as stop:
                cli.main([*line, *more])
            shown = capsys.readouterr()
            assert stop.value.code == 2 and said in shown.err and len(shown.err.splitlines()) == 1, line
            assert not more or json.loads(shown.out)["error"]


def test_a_model_is_an_argument_or_an_option(capsys):
    for line in (["table", RECALL], ["table", "--model", RECALL], ["table", RECALL, "--model", RECALL]):
        assert cli.main([*line, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["model"] == RECALL
    with pytest.raises(SystemExit):
        cli.main(["table", RECALL, "--model", MOBY])
    assert "given twice" in capsys.readouterr().err


def test_how_a_model_is_opened(tmp_path, capsys):
    """--dtype, --device, --tokenizer reach gl.from_pretrained; what is wrong in them is one line."""
    line = ["lens", RECALL, "--text", "D 3 dog A 7 hay ? D", "--out", str(tmp_path), "--json"]
    found = []
    for more in (["--dtype", "float64"], ["--device", "cpu", "--tokenizer", str(BUNDLED / "mamba-recall")]):
        assert cli.main([*line, *more]) == 0
        found.append(json.loads(capsys.readouterr().out)["layers"][-1]["top"][0])
    assert found[0][0] == found[1][0] == "3" and found[0][1] == pytest.approx(found[1][1], abs=1e-4)
    for more, said in (
        (["--dtype", "flaot64"], "float64"),
        (["--device", "gpu"], "device='gpu'"),
        (["--variant", "x"], "variant='x'"),
    ):
        assert cli.main([*line, *more]) == 2
        assert said in capsys.readouterr().err


def test_tables_fit_the_width(monkeypatch, capsys):
    for columns in (60, 100, 150):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert width() == columns
        for line in (["table", RECALL], ["models"]):
            assert cli.main(line) == 0
            assert max(map(len, capsys.readouterr().out.splitlines())) <= columns
    monkeypatch.delenv("COLUMNS")
    assert width() >= 40


def test_the_shell_completes(monkeypatch):
    assert bundled() == gl.bundled_models()
    import os

    def completed(*words):
        env = {
            "_GATEDLENS_COMPLETE": "bash_complete",
            "COMP_WORDS": " ".join(["gatedlens", *words]),
            "COMP_CWORD": str(len(words)),
        }
        monkeypatch.setattr(os, "environ", {**os.environ, **env})
        started = run([], stdout=-1)
        return started.communicate(timeout=120)[0]

    assert "plain,lens" in completed("le") and "plain,gatedlens/mamba-moby" in completed("lens", "gatedlens/mamba-m")
    assert "--answer" in completed("lens", "--a")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    assert "_GATEDLENS_COMPLETE" in capsys.readouterr().out


def test_python_m_gatedlens_and_version():
    import subprocess
    import sys

    env = {"PYTHONPATH": str(Path(gl.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-m", "gatedlens", "--version"], env=env, capture_output=True, text=True)
    assert done.stdout == f"gatedlens {gl.__version__}\n" and done.returncode == 0


def test_help_imports_nothing_heavy():
    """Help is there in the time that the interpreter and the front take: torch alone would take seconds."""
    import subprocess
    import sys

    code = (
        "import sys\nfrom gatedlens.cli import main\ntry:\n    main(['lens', '--help'])\nexcept SystemExit: pass\n"
        "print('heavy:', sorted({'torch', 'transformers', 'numpy', 'matplotlib', 'huggingface_hub'} & set(sys.modules)))"
    )
    env = {"PYTHONPATH": str(Path(gl.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "examples:" in done.stdout and done.stdout.splitlines()[-1] == "heavy: []", done.stderr


def test_the_words_that_a_shell_completes_are_those_that_there_are():
    """They are written out, so that completing one waits for no torch."""
    from gatedlens.attribution import METHODS
    from gatedlens.cli import commands
    from gatedlens.cli.ablate import HOW
    from gatedlens.cli.attention import REDUCTIONS
    from gatedlens.cli.circuit import METHODS as EDGES
    from gatedlens.cli.dla import BY

    assert set(commands.METHOD.known()) == set(METHODS) and set(commands.HOW.known()) == set(HOW)
    assert set(commands.REDUCE.known()) == set(REDUCTIONS) and set(commands.BY.known()) == set(BY)
    assert set(commands.EDGES.known()) == set(EDGES)
