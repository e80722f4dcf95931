"""The project holds together: catalogue fresh, README and tutorials run, import light, no cycles, no machine paths."""

from __future__ import annotations

import ast
import gc
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

import gatedlens as gl
from gatedlens import catalogue, model
from gatedlens.hooks import architectures, unregister
from gatedlens.model import stages
from tests.conftest import EVERY, ROOT
from website import notebooks

PACKAGE = ROOT / "gatedlens"
TUTORIALS = notebooks.tutorials()


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    env = {**os.environ, "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def test_the_catalogue_is_fresh(tmp_path):
    assert catalogue.stale() == [], "run `make catalogue`"
    (tmp_path / "extra.md").write_text("")
    assert "mamba.md" in catalogue.stale(tmp_path) and "extra.md" in catalogue.stale(tmp_path)


@pytest.mark.parametrize("name", EVERY)
def test_catalogue_pages_hold_every_point_and_their_code_runs(name):
    page = (ROOT / "hooks" / f"{name}.md").read_text()
    data = json.loads((ROOT / "hooks" / "catalogue.json").read_text())[name]
    for rows in data["blocks"].values():
        for row in rows:
            assert f"`blocks.{{l}}.{row['name']}`" in page
            assert f"{row['name'].rpartition('.')[2]}]" in page.split("```mermaid", 1)[1], "not in the diagram"
    for code in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(compile(code, f"hooks/{name}.md", "exec"), {})


@pytest.mark.parametrize("name", EVERY)
def test_the_words_of_the_attention_name_every_point_that_it_is_derived_from(name):
    hooked = EVERY[name]
    words = hooked.attention_words
    said = set(re.findall(r"[A-Za-z_]+(?=\W|$)", " ".join(words.values())))
    for block in hooked.tiny().blocks:
        for point in block.mixer.attention_points:
            leaf = point.rpartition(".")[2].removeprefix("hook_")
            assert leaf in said, f"{point} is not in the words of {name}"
    assert {"gate", "scan", "skip", "act", "conv", "r"} <= set(words)
    page = (ROOT / "hooks" / f"{name}.md").read_text()
    assert all(f"| {factor} | `{here}` |" in page for factor, here in words.items())


def test_diagram_arrows_are_the_equations():
    rows = architectures()["mamba"].block_points
    arrows = set(catalogue.arrows(rows))
    for pair in (
        ("mixer.hook_dt", "mixer.hook_decay"),
        ("mixer.hook_B", "mixer.hook_write"),
        ("ln1.hook_out", "mixer.hook_x"),
    ):
        assert pair in arrows
    order = [row.name for row in rows]
    assert all(order.index(a) < order.index(b) for a, b in arrows)


OWN_TESTS = ("architecture.md", "ecosystem.md", "loading.md")  # of pages whose code takes more than running it


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name not in OWN_TESTS)]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """From top to bottom, each page by itself."""
    import matplotlib

    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    for i, block in enumerate(blocks_of(page)):
        exec(compile(block, f"{page.name} block {i}", "exec"), scope)


def test_the_readme_is_one_screen():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) < 450 and len(blocks_of(ROOT / "README.md")) == 1 and len(text.splitlines()) < 60


def test_commands_on_pages_parse():
    """Each `gatedlens ...` in a block of shell is a command with options that it has."""
    from gatedlens.cli import app

    found = 0
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["gatedlens"]:
                    app.commands[words[1]].make_context(words[1], words[2:]).close()
                    found += 1
    assert found > 15


def test_the_page_of_the_contract_runs_and_names_what_there_is():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    scope: dict = {}
    try:
        for i, block in enumerate(blocks):
            exec(compile(block, f"docs/architecture.md block {i}", "exec"), scope)
    finally:
        unregister("forget")
        scope.clear()
        gc.collect()  # an error of another test names every architecture that is defined
    tables = re.split(r"\n\n+", page.partition("## What you give")[2].partition("Rules.")[0])
    given = {
        "of the model": {*dir(gl.HookedLanguageModel), *dir(gl.HookedVisionModel), "title", "small"},
        "of the mixer": {*dir(model.PathMixer), "sizes"},
        "stage": {name for name, one in vars(stages).items() if isinstance(one, type) and issubclass(one, model.Stage)},
    }
    for head, known in given.items():
        (table,) = [one for one in tables if one.startswith(f"| {head}")]
        first = " ".join(row.split("|")[1] for row in table.splitlines()[2:])
        named = {name.partition("(")[0] for name in re.findall(r"`([^`]+)`", first)}
        assert named <= known, named - known
        if head == "stage":
            assert named == {name for name in known if getattr(stages, name).__module__ == stages.__name__}


def test_the_tutorial_quotes_the_file():
    """Each block of code that tutorial 8 shows in its text is in the file that it walks through, word for word."""
    text = (ROOT / "tutorials" / "8-a-fifth-architecture.py").read_text(encoding="utf-8")
    source = (ROOT / "tutorials" / "fifth" / "my_mamba2.py").read_text(encoding="utf-8")
    prose = "\n".join(line.removeprefix("#").removeprefix(" ") for line in text.splitlines() if line.startswith("#"))
    quoted = re.findall(r"```python\n(.*?)\n```", prose, re.S)
    assert len(quoted) >= 4
    for block in quoted:
        assert block in source, block


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.name)
def test_tutorials_run_as_notebooks(path):
    """Once: what `make docs` shows is what has run here. In a process of its own, where nobody else closes a kernel's sockets."""
    command = [sys.executable, "-m", "website.notebooks", "--run", path.name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert notebooks.executed(path).metadata["digest"] == notebooks.digest(path)


def test_tutorials_are_numbered():
    numbers = [int(path.name.split("-")[0]) for path in TUTORIALS]
    assert numbers[0] == 0 and len(set(numbers)) == len(numbers), "two tutorials have one number"


def test_notebooks_are_their_scripts_and_carry_no_output(tmp_path):
    assert notebooks.stale() == [], "run `make notebooks`"
    for path in TUTORIALS:
        made = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
        nbformat.validate(made)
        code = [cell for cell in made.cells if cell.cell_type == "code"]
        assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
        assert (
            f"tutorials/{path.stem}.ipynb" in made.cells[0].source
            and "colab.research.google.com" in made.cells[0].source
        )
        (install,) = [cell for cell in code if cell.source.startswith("%pip")]
        assert install.metadata["tags"] == ["skip-execution"]
        assert (
            jupytext.writes(made, "py:percent").partition("# %%")[2].split()
            == path.read_text().partition("# %%")[2].split()
        )


def test_a_new_tutorial_gets_its_notebook_and_what_is_changed_is_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
    mine = tmp_path / "1-mine.py"
    mine.write_text("# %% [markdown]\n# # 1. Mine\n#\n# One idea.\n\n# %%\nprint(1 + 1)\n")
    assert notebooks.stale() == ["1-mine.ipynb", "1-mine.py", "README.md"]
    assert notebooks.main([]) == 0 and notebooks.main(["--check"]) == 0
    assert "colab" in mine.read_text() and "[Mine](1-mine.ipynb)" in (tmp_path / "README.md").read_text()
    mine.write_text(mine.read_text() + "\n# %%\nprint(2)\n")
    assert notebooks.stale() == ["1-mine.ipynb"] and notebooks.main(["--check"]) == 1
    assert notebooks.main([]) == 0
    mine.unlink()
    assert notebooks.stale() == ["README.md", "1-mine.ipynb"]


def test_there_is_one_version():
    version = gl.__version__
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert (
        notebooks.repository() in (ROOT / "CITATION.cff").read_text()
        and notebooks.repository() in (ROOT / "mkdocs.yml").read_text()
    ), "the project lies in one place: pyproject.toml says it"


def test_import_is_light():
    code = (
        "import sys, torch, transformer_lens\nbefore = set(sys.modules)\nfrom gatedlens import *\n"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
        "heavy = {'nnsight', 'matplotlib', 'plotly', 'mamba_ssm', 'causal_conv1d', 'captum', 'ray'} & set(sys.modules)\n"
        "print(sorted(heavy), sorted(new - {'gatedlens'}))"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[] "), done.stdout


def imports(path: Path) -> set[str]:
    """The gatedlens modules that a file imports at module level."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gatedlens"):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name for name in inner if (ROOT / (name.replace(".", "/") + ".py")).exists()} or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("gatedlens")}
    return found


def test_there_is_no_import_cycle():
    graph = {".".join(p.relative_to(ROOT).with_suffix("").parts): imports(p) for p in PACKAGE.rglob("*.py")}
    graph = {name.removesuffix(".__init__"): edges for name, edges in graph.items()}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"import cycle: {' -> '.join([*path, name])}"
        for other in graph.get(name, ()):
            if other != "gatedlens":
                visit(other, (*path, name))

    for name in graph:
        visit(name, ())


def test_the_face_is_an_explicit_list_of_under_70_lines():
    lines = (PACKAGE / "__init__.py").read_text().splitlines()
    assert len(lines) < 70
    import gatedlens

    assert all(getattr(gatedlens, name) is not None for name in gatedlens.__all__)


def test_no_machine_paths_and_no_swallowed_errors():
    for path in [*PACKAGE.rglob("*.py"), ROOT / "README.md", *TUTORIALS]:
        text = path.read_text()
        assert not re.search(r"(^|[^\w.])/(tmp|work|root)/[a-z]", text), path
        assert not re.search(r"except[^\n]*:\s*\n\s*pass\b", text), path
        assert "hasattr(" not in text or path.name in ("hookpoint.py",), path
