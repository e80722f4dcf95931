"""The house: which room may import which, and that what a file is called helps to find what it holds.

Every import is looked at, late ones too; those under TYPE_CHECKING are for annotations alone and bind nothing.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import gatedlens as gl

PACKAGE = Path(gl.__file__).parent

# From the cellar up: a room may import what stands on a floor below it. The words never import each other.
FLOORS = (
    {"errors", "files", "foreign", "late", "markup", "options", "version"},
    {"address", "recurrence", "result"},
    # what a mixer hands to mamba-ssm's kernels; what a vendor's module makes of its weight; two runs, a rule an operation
    {"fused", "weights", "secant"},
    {"model"},
    {"formats", "compat.names"},  # data of the architectures: checkpoints, and other tools' names, though compat is a door
    {"parts"},
    {"hooks", "attention"},
    {"plot", "metrics"},
    {"loading", "runs"},
    {
        "ablation", "comparing", "knockout", "states", "tracing", "lens", "patching", "dictionaries", "subspaces", "probes",
        "circuits", "attribution", "store", "steering", "profiles", "tasks", "data", "layers", "inspection", "verification",
    },
    {"evaluation", "amplify", "feature_graph"},  # which build on attribution, dictionaries, tasks and data
    {"__main__", "cli", "compat", "catalogue", "bundled", "bridge", "circuitsvis", "gatedlens"},
)  # fmt: skip
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
SIDEWAYS = {("files", "errors"), ("late", "errors"), ("options", "errors"), ("bundled", "cli"), ("__main__", "cli")}
SIDEWAYS |= {(door, "compat") for door in ("bridge", "circuitsvis", "gatedlens")}
# The doors: `.nnsight()`, `.from_pretrained()`, `.plot()`.
UPWARD = {("model.base", "compat.nnsight"), ("model.base", "loading"), ("result.result", "plot.results")}


class Import(NamedTuple):
    """`by` imports `what`, both as module names below gatedlens."""

    by: str
    what: str


def modules() -> dict[str, Path]:
    """`{"model.base": .../model/base.py}`; a package goes by its own name, the top one by "gatedlens"."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "gatedlens"] = path
    return found


MODULES = modules()


def imports() -> Iterator[Import]:
    for by, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        unbound = {
            id(node)
            for test in ast.walk(tree)
            if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.dump(test.test)
            for node in ast.walk(test)
        }
        for node in ast.walk(tree):
            if id(node) in unbound:
                continue
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.split(".")[0] == "gatedlens"]
                yield from (Import(by, name.partition(".")[2] or "gatedlens") for name in names)
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{by} imports relatively"
                package, _, module = (node.module or "").partition(".")
                if package != "gatedlens":
                    continue
                for alias in node.names:  # a module of a package, or a name in a module
                    inner = f"{module}.{alias.name}" if module else alias.name
                    yield Import(by, inner if inner in MODULES else module or "gatedlens")


IMPORTS = sorted(set(imports()))


def room(module: str) -> str:
    """`room("model.base")`: "model". Other tools' names are a room of their own within compat."""
    return next(
        (inner for inner in FLOOR if "." in inner and f"{module}.".startswith(f"{inner}.")), module.partition(".")[0]
    )


def test_every_room_has_its_floor():
    assert {room(module) for module in MODULES} == set(FLOOR)


def test_every_import_goes_down():
    up = [
        one
        for one in IMPORTS
        if room(one.by) != room(one.what)
        and FLOOR[room(one.what)] >= FLOOR[room(one.by)]
        and (room(one.by), room(one.what)) not in SIDEWAYS
    ]
    assert set(up) == UPWARD, "\n".join(f"{by} imports {what}" for by, what in sorted(set(up) ^ UPWARD))


def test_the_page_of_the_house_names_every_room_and_file():
    page = (PACKAGE.parent / "docs" / "code.md").read_text(encoding="utf-8")
    assert not [
        one
        for one in FLOOR
        if f"`{one}`" not in page and f"`{one.replace('.', '/')}/`" not in page and one != "gatedlens"
    ]
    for file in re.findall(r"`((?:\w+/)+\w+\.py)`", page):
        assert (PACKAGE / file).is_file() or (PACKAGE.parent / file).is_file(), file


def test_what_must_not_know_torch_does_not():
    for name in (
        "address.names",
        "cli.answer",
        "cli.command_line",
        "cli.commands",
        "cli.options",
        "cli.source",
        "errors",
        "late",
        "version",
    ):
        tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
        known = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        known |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) if n.module}
        assert not {one for one in known if one.split(".")[0] in ("torch", "jaxtyping", "transformers")}, name


def test_no_module_is_imported_in_a_circle():
    """Of modules, but a package's face, which imports what is in it."""
    below: dict[str, set[str]] = {module: set() for module in MODULES}
    for by, what in IMPORTS:
        if (by, what) not in UPWARD and not what.startswith(f"{by}.") and by != "gatedlens":
            below[by].add(what)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in sorted(below[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_no_file_hides_a_function_of_its_package():
    """A file of one noun: no file bears the name of a public function of its package, which would hide one of the two."""
    for name, path in MODULES.items():
        if path.name != "__init__.py" or name == "hooks":
            continue
        package = importlib.import_module("gatedlens" if name == "gatedlens" else f"gatedlens.{name}")
        inside = {one.stem for one in path.parent.glob("*.py")} | {
            one.name for one in path.parent.iterdir() if one.is_dir()
        }
        public = {
            each
            for each in getattr(package, "__all__", ())
            if callable(getattr(package, each)) and not isinstance(getattr(package, each), type)
        }
        assert not inside & public, f"{name}: {inside & public}"


def test_gl_shows_what_a_user_says():
    assert dir(gl) == sorted(gl.__all__)


def test_the_face_tells_checkers_and_python_the_same():
    """The imports that checkers read, the table that Python reads, and `__all__`: three times the same names."""
    tree = ast.parse(MODULES["gatedlens"].read_text(encoding="utf-8"))
    (choice,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {a.name: node.module for node in choice.body for a in node.names}
    (table,) = [node for node in ast.walk(choice.orelse[0]) if isinstance(node, ast.Dict)]
    listed = {name: f"gatedlens.{module}" for module, names in ast.literal_eval(table).items() for name in names} | {
        name: "gatedlens" for name in gl.__all__ if name in MODULES
    }
    assert seen == listed
    at_once = {a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert set(gl.__all__) == listed.keys() | at_once - {"TYPE_CHECKING", "late"}
    for name, module in listed.items():
        held = (
            importlib.import_module(f"gatedlens.{name}") if module == "gatedlens" else importlib.import_module(module)
        )
        assert getattr(gl, name) is (held if module == "gatedlens" else getattr(held, name)), name


@pytest.mark.parametrize(
    "name", [name for name, path in MODULES.items() if path.name == "__init__.py" and name != "gatedlens"]
)
def test_every_face_is_explicit(name):
    package = importlib.import_module(f"gatedlens.{name}")
    assert package.__doc__
    for each in getattr(package, "__all__", ()):
        assert getattr(package, each) is not None
