"""Wheel and sdist: built, and installed where nothing of this checkout is; what a user needs is inside."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import gatedlens as gl
from tests.conftest import ROOT

OUTSIDE = ("out", "dist", "build", ".git", ".venv", ".venv-old")
INSIDE = {
    "gatedlens/py.typed",
    "gatedlens/catalogue.json",
    "gatedlens/bundled/data/moby-dick.txt",
    "gatedlens/bundled/data/digits.safetensors",
    "gatedlens/bundled/mamba-recall/config.json",
    "gatedlens/bundled/mamba-recall/training.json",
    "gatedlens/bundled/mamba-recall/tokenizer.json",
    "gatedlens/__main__.py",
}
IN_SOURCE = {
    "hooks/mamba.md",
    "tutorials/1-first-look.ipynb",
    "docs/start.md",
    "CITATION.cff",
    "llms.txt",
    "website/pages.py",
    "mkdocs.yml",
}
TRY = """
import sys, gatedlens as gl
assert gl.__file__.startswith(sys.prefix), gl.__file__
model = gl.from_pretrained("gatedlens/mamba-recall", device="cpu")
prompt = "D 3 dog A 7 hay ? D"
print(model.to_string(model(prompt)[0, -1].argmax()), gl.__version__, len(gl.bundled_models()))
import json, importlib.resources
assert "mamba" in json.loads(importlib.resources.files("gatedlens").joinpath("catalogue.json").read_text())
"""


def run(*line, **options):
    done = subprocess.run([str(one) for one in line], capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """(wheel, sdist), of a copy: a build leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*OUTSIDE, "__pycache__", ".*_cache"))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "made", folder / "source")
    (wheel,), (sdist,) = (folder / "made").glob("*.whl"), (folder / "made").glob("*.tar.gz")
    return wheel, sdist


@pytest.mark.slow
def test_what_is_inside(dist):
    wheel, sdist = dist
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names >= INSIDE and not [name for name in names if name.startswith(("tests/", "website/", "docs/"))]
    for path in (ROOT / "gatedlens").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert str(path.relative_to(ROOT)) in names, f"{path} is not in the wheel"
    with tarfile.open(sdist) as packed:
        source = {name.partition("/")[2] for name in packed.getnames()}
    assert source >= IN_SOURCE | INSIDE - {"gatedlens/catalogue.json"}
    assert wheel.name.startswith(f"gatedlens-{gl.__version__}-") and sdist.name == f"gatedlens-{gl.__version__}.tar.gz"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_installs_and_runs_in_a_clean_environment(kind, dist, tmp_path):
    """Nothing of the checkout is on its path: the libraries that it depends on are lent by this environment, it itself is not."""
    wheel, sdist = dist
    run(sys.executable, "-m", "venv", tmp_path / "clean")
    python = tmp_path / "clean" / "bin" / "python"
    lent = {**os.environ, "PYTHONPATH": sysconfig.get_paths()["purelib"], "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    run(python, "-m", "pip", "install", *options, wheel if kind == "wheel" else sdist, env=lent)
    (tmp_path / "work").mkdir()
    where = {"cwd": tmp_path / "work", "env": lent}
    assert run(python, "-c", TRY, **where).split() == ["3", gl.__version__, str(len(gl.bundled_models()))]
    command = tmp_path / "clean" / "bin" / "gatedlens"
    assert run(command, "--version", **where) == f"gatedlens {gl.__version__}\n"
    run(command, "lens", "gatedlens/mamba-recall", "--out", "out", **where)
    assert {path.suffix for path in (tmp_path / "work" / "out").iterdir()} == {".png", ".json"}
    assert Path(run(python, "-c", "import gatedlens; print(gatedlens.__file__)", **where).strip()).is_relative_to(
        tmp_path
    )
