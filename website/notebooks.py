"""Notebooks: each tutorial twice, as a script that is read and edited and as the notebook that is made of it (jupytext).

    python -m website.notebooks               # writes tutorials/*.ipynb from tutorials/*.py          (make notebooks)
    python -m website.notebooks --check       # fails if one is stale
    python -m website.notebooks --run         # runs those that have changed, for their outputs       (make docs, the tests)
    python -m website.notebooks --run 7-      # tutorial 7 alone

A notebook in the repository carries no output. Outputs lie in out/notebooks, each with a digest of what made them: of the
tutorial and of the package. A cell that installs the package is for Colab and is passed over here.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jupytext
import nbformat

ROOT = Path(__file__).parent.parent
FOLDER, OUT = ROOT / "tutorials", ROOT / "out" / "notebooks"
INSTALL = '# %% tags=["skip-execution"]\n# %pip install -q "gatedlens[plot]"  # in Colab\n'
SECONDS = 600  # that one tutorial may take


def tutorials() -> list[Path]:
    """The scripts, in the order of their numbers."""
    return sorted(FOLDER.glob("*.py"), key=lambda path: int(path.name.split("-")[0]))


def repository() -> str:
    """Where the project lies, as pyproject.toml says."""
    found = re.search(r'^Repository = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    assert found is not None
    return found[1]


def title(path: Path) -> str:
    """ "1. First look: from a sentence to what a layer attends to" """
    return re.search(r"^# # (.+)$", path.read_text(encoding="utf-8"), re.M)[1]  # type: ignore[index]


def colab(path: Path) -> str:
    """The line under a tutorial's title that opens it in Colab."""
    where = repository().removeprefix("https://github.com/")
    return f"# [Open in Colab](https://colab.research.google.com/github/{where}/blob/main/tutorials/{path.stem}.ipynb)"


def script(path: Path) -> str:
    """The tutorial's text with its Colab line, and the cell that installs the package there, before the first of code."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"\n#\n# \[Open in Colab\]\(.*\)", "", text, count=1)
    text = re.sub(r"^(# # .+)$", lambda found: f"{found[1]}\n#\n{colab(path)}", text, count=1, flags=re.M)
    return text if INSTALL in text else re.sub(r"^# %%\n", f"{INSTALL}\n# %%\n", text, count=1, flags=re.M)


def notebook(path: Path) -> str:
    """The notebook of a tutorial, as the repository holds it."""
    made = jupytext.reads(script(path), fmt="py:percent")
    for number, cell in enumerate(made.cells):
        cell["id"] = f"cell-{number}"
    made.metadata = nbformat.from_dict(
        {
            "jupytext": {"formats": "ipynb,py:percent"},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    made.nbformat_minor = 5
    return nbformat.writes(made).rstrip() + "\n"


INDEX = """# Tutorials

One idea each, as notebooks and as scripts of the same cells (`make notebooks` makes one of the other). All run offline,
on bundled models.

"""


def index() -> str:
    """tutorials/README.md"""
    lines = [f"{one.name.split('-')[0]}. [{title(one).partition(' ')[2]}]({one.stem}.ipynb)" for one in tutorials()]
    return INDEX + "\n".join(lines) + "\n"


def stale() -> list[str]:
    """The files of tutorials/ that are not as they should be."""
    wanted = {path.with_suffix(".ipynb"): notebook(path) for path in tutorials()}
    wanted |= {path: script(path) for path in tutorials()} | {FOLDER / "README.md": index()}
    wrong = [
        path.name for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    return wrong + sorted(path.name for path in FOLDER.glob("*.ipynb") if path not in wanted)


def write() -> list[str]:
    """Write what is stale; its names."""
    wrong = stale()
    for path in tutorials():
        text = script(path)
        path.write_text(text, encoding="utf-8")
        path.with_suffix(".ipynb").write_text(notebook(path), encoding="utf-8")
    (FOLDER / "README.md").write_text(index(), encoding="utf-8")
    for path in FOLDER.glob("*.ipynb"):
        if not path.with_suffix(".py").exists():
            path.unlink()
    return wrong


# -- outputs ---------------------------------------------------------------------------------------------------------


def digest(path: Path) -> str:
    """Of a tutorial and of all that it may run."""
    found = hashlib.sha256(notebook(path).encode())
    for file in (*sorted((ROOT / "gatedlens").rglob("*.py")), *sorted((FOLDER / "fifth").glob("*.py"))):
        found.update(file.read_bytes())
    return found.hexdigest()


def executed(path: Path) -> Any | None:
    """The notebook with its outputs, if they are of the tutorial and the package as they are."""
    file = OUT / f"{path.stem}.ipynb"
    if not file.exists():
        return None
    found = nbformat.read(file, as_version=4)
    return found if found.metadata.get("digest") == digest(path) else None


def run(path: Path) -> Any:
    """Run a tutorial as a notebook, in a folder of its own; it is kept in out/notebooks. A cell's error is raised."""
    from nbclient import NotebookClient

    found = executed(path)
    if found is not None:
        return found
    made = nbformat.reads(notebook(path), as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        for beside in (one for one in FOLDER.iterdir() if one.is_dir() and not one.name.startswith((".", "_"))):
            shutil.copytree(beside, Path(folder) / beside.name)
        NotebookClient(made, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": folder}}).execute(
            # Models this small are fastest on one thread, and two kernels side by side wait for each other's; what a tutorial
            # shows does not hang on the network.
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        )
    made.metadata["digest"] = digest(path)
    OUT.mkdir(parents=True, exist_ok=True)
    nbformat.write(made, OUT / f"{path.stem}.ipynb")
    return made


def main(asked: Iterable[str] | None = None) -> int:
    """`python -m website.notebooks`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a notebook is stale")
    parser.add_argument("--run", action="store_true", help="run those that have changed, for their outputs")
    parser.add_argument(
        "names", nargs="*", help="tutorials to run, by the beginnings of their names; all when left out"
    )
    args = parser.parse_args(None if asked is None else list(asked))
    if args.check:
        wrong = stale()
        print(f"stale: {', '.join(wrong)} (run `make notebooks`)" if wrong else "the notebooks are up to date")
        return bool(wrong)
    if args.run:
        for path in (one for one in tutorials() if one.name.startswith(tuple(args.names or [""]))):
            print(f"{'kept' if executed(path) is not None else 'run'}: {path.name}", flush=True)
            run(path)
        return 0
    wrong = write()
    print(f"wrote {len(tutorials())} notebooks" + (f" ({', '.join(wrong)} had changed)" if wrong else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
