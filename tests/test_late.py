"""Late: nothing heavy is loaded before it must be, and whatever is asked for first is there."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest

import gatedlens as gl
import gatedlens.hooks
from gatedlens.late import late
from tests.conftest import ROOT


def fresh(code: str) -> Any:
    """What the code, run in a process of its own, prints last, as JSON."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# What of neither Python nor gatedlens has been loaded since `before`.
OTHERS = """
others = {name.partition(".")[0] for name in sys.modules.keys() - before} - sys.stdlib_module_names - {"gatedlens"}
print(json.dumps(sorted(others)))
"""
LINES = [
    ["--help"],
    ["--version"],
    *[[command, "--help"] for command in ("demo", "compare", "attention", "patch", "evaluate", "harvest", "models")],
    [],
    ["harvets"],
    ["demo", "--layer", "last"],
    ["table"],
]


def test_help_and_usage_errors_load_nothing_else():
    code = f"""
import sys, json
before = set(sys.modules)
from gatedlens.cli import main
for line in {LINES!r}:
    try:
        main(line)
        raise AssertionError(line)
    except SystemExit as end:
        assert end.code == (0 if line and line[-1] in ("--help", "--version") else 2), line
"""
    assert set(fresh(code + OTHERS)) <= {"click", "rich", "rich_click"}  # the front that it stands on


def test_import_loads_nothing_else():
    code = "import sys, json\nbefore = set(sys.modules)\nimport gatedlens\ndir(gatedlens), gatedlens.__version__\n"
    assert fresh(code + OTHERS) == []


WAYS = {
    "a star": "from gatedlens import *\nfound = [from_pretrained, patching.sweep, ImplicitAttention, __version__]",
    "a name": "from gatedlens import HookedMamba, patching\nfound = [HookedMamba, patching.sweep]",
    "a module": "import gatedlens.patching\nfound = [gatedlens.patching.sweep, gatedlens.lens]",
    "an attribute": "import gatedlens as gl\nfound = [gl.hooks.mamba, gl.loading.BUNDLED, gl.hooks.griffin.HookedGriffin]",
    "a pickle": "import pickle\nfound = [pickle.loads(b'cgatedlens\\nHookedMamba\\n.')]",
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_asking(way):
    assert fresh(f"{WAYS[way]}\nassert all(each is not None for each in found)\nprint(len(found))") >= 1


def test_every_architecture_is_found_whichever_is_asked_for_first():
    code = "import gatedlens as gl, json\nnames = [name for name in gl.bundled_models() if 'moby' in name or 'vim' in name]\n"
    code += "print(json.dumps(sorted({type(gl.from_pretrained(name)).__name__ for name in names})))"
    assert fresh(code) == ["HookedGriffin", "HookedMamba", "HookedRWKV", "HookedViM"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="it forks")
def test_every_public_name_can_be_the_first():
    code = """
import json, os, torch, transformer_lens
import gatedlens as gl
failed = []
for name in gl.__all__:
    if not (child := os.fork()):
        try:
            assert getattr(gl, name) is not None
            os._exit(0)
        except BaseException:
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
print(json.dumps(failed))
"""
    assert fresh(code) == []


def test_every_public_name_is_there_and_is_kept():
    for name in gl.__all__:
        assert getattr(gl, name) is getattr(gl, name) and name in vars(gl)
    assert pickle.loads(pickle.dumps(gl.HookedMamba)) is gl.HookedMamba
    assert pickle.loads(pickle.dumps(gl.from_pretrained)) is gl.from_pretrained


@pytest.mark.parametrize(
    ("package", "misspelt", "right"),
    [
        (gl, "patchin", "patching"),
        (gl, "HookedMambo", "HookedMamba"),
        (gl, "loadin", "loading"),
        (gl.hooks, "vin", "vim"),
    ],
)
def test_a_misspelt_name_is_told_the_nearest(package, misspelt, right):
    with pytest.raises(AttributeError, match=f"{package.__name__} has no '{misspelt}'. Did you mean '{right}'?"):
        getattr(package, misspelt)
    assert getattr(package, misspelt, None) is None


def test_what_is_near_nothing_is_told_so():
    with pytest.raises(AttributeError, match="^gatedlens has no 'zzzzzz'\\.$"):
        _ = gl.zzzzzz
    with pytest.raises(ImportError, match="cannot import name 'zzzzzz'"):
        from gatedlens import zzzzzz  # noqa: F401


def test_a_name_in_no_module_is_an_error_of_its_own():
    """A table that is wrong says so, and does not look like a user's slip."""
    with pytest.raises(AttributeError, match=r"gatedlens\.version.*nowhere"):
        late("gatedlens", {"version": ("nowhere",)})("nowhere")
