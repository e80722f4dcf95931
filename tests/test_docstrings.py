"""`help(...)` is enough: every callable that a user reaches shows a usage that fits its signature.

What a user reaches: what `gl.<TAB>` and `gl.word.<TAB>` show, the public methods of these classes, and the doors.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from types import ModuleType
from typing import Any

import pytest

import gatedlens as gl

DOORS = ("bridge", "circuitsvis", "compat.mamba_lens", "compat.sae_lens", "catalogue")
MENTIONS = re.compile(r"^(?P<names>[a-z_]+(?:, [a-z_]+)*): ", re.MULTILINE)  # `layers: a glob`, at the start of a line
SECTIONS = {"source", "errors", "units", "shapes", "usage", "note", "example", "returns", "raises"}
OF_PYTHON = {"capitalize", "count", "index", "mro"}  # what NamedTuples and the like bring


def ours(value: Any) -> bool:
    return getattr(value, "__module__", "").startswith("gatedlens")


def reached() -> dict[str, Any]:
    """Every function, class and public method that a user reaches, by the name it is reached under."""
    found: dict[str, Any] = {}
    modules = {f"gl.{name}": getattr(gl, name) for name in gl.__all__ if isinstance(getattr(gl, name), ModuleType)}
    modules |= {f"gatedlens.{door}": importlib.import_module(f"gatedlens.{door}") for door in DOORS}
    for said, module in {"gl": gl, **modules}.items():
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) and ours(value):
                found[f"{said}.{name}"] = value
                found |= {f"{said}.{name}.{method}": each for method, each in methods(value).items()}
            elif callable(value) and ours(value) and inspect.isfunction(inspect.unwrap(value)):
                found[f"{said}.{name}"] = value
    by_value: dict[int, str] = {}
    return {
        said: value for said, value in found.items() if by_value.setdefault(id(inspect.unwrap(value)), said) == said
    }


def methods(kind: type) -> dict[str, Any]:
    """The public methods that are written in the class or in one of its bases that are ours; of an override without a
    docstring of its own, the one that it inherits the docstring from, as `help` does."""
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        for name, value in vars(base).items() if ours(base) else ():
            function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            written = inspect.isfunction(function) and ours(function) and function.__name__ == name
            if not name.startswith("_") and written and not getattr(found.get(name), "__doc__", None):
                found[name] = function
    return found


REACHED = reached()


def usages(said: str, doc: str) -> list[str]:
    """Every piece of the docstring that calls it: `name(...)` up to its closing bracket, with what stands before the name."""
    name = said.rpartition(".")[2]
    found = []
    for match in re.finditer(rf"[\w.\[\]\"']*\b{re.escape(name)}\(", doc):
        depth, end = 1, match.end()
        while end < len(doc) and depth:
            depth += (doc[end] in "([{") - (doc[end] in ")]}")
            end += 1
        found.append(doc[match.start() : end].lstrip("[\"'."))
    return found


def tree_of(text: str) -> ast.AST:
    """A piece of code, parsed; empty where it is none."""
    try:
        return ast.parse(text.replace("\n", " "), mode="eval")
    except SyntaxError:
        return ast.Module([], [])


def fits(call: ast.Call, signature: inspect.Signature) -> bool:
    """Whether the arguments of a call fit; `...` stands for the rest."""
    if any(isinstance(arg, ast.Constant) and arg.value is ... for arg in call.args):
        names = {k.arg for k in call.keywords}
        takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        return takes_all or all(name is None or name in signature.parameters for name in names)
    try:
        signature.bind(*(0 for _ in call.args), **{k.arg: 0 for k in call.keywords if k.arg})
    except TypeError:
        return False
    return True


def signature_of(said: str, value: Any) -> inspect.Signature:
    signature = inspect.signature(value)
    parameters = list(signature.parameters.values())
    if parameters and parameters[0].name in ("self", "cls"):
        signature = signature.replace(parameters=parameters[1:])
    return signature


def wrong(said: str, value: Any) -> str:
    """What is wrong with its docstring; empty if nothing is."""
    if inspect.isclass(value):  # what it is; how it is made or loaded is its methods' matter
        return (
            ""
            if "__doc__" in vars(value) and not value.__doc__.startswith(f"{value.__name__}(")
            else "it has no docstring"
        )
    if not inspect.getdoc(value):
        return "it has no docstring"
    doc = "\n".join(docs_of(said, value))
    signature = signature_of(said, value)
    calls = [node for text in usages(said, doc) for node in ast.walk(tree_of(text)) if isinstance(node, ast.Call)]
    name = said.rpartition(".")[2]
    own = [c for c in calls if getattr(c.func, "attr", getattr(c.func, "id", None)) == name]
    if not own:
        return "no usage: a line that calls it and parses"
    if not any(fits(call, signature) for call in own):
        return f"its usage does not fit its signature {signature}"
    known = set(signature.parameters)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for match in MENTIONS.finditer(doc):
        for one in match["names"].split(", "):
            if one not in known | SECTIONS and not takes_all and not one.isdigit() and one not in fields_of(value):
                return f"it speaks of {one!r}, which it does not take; it takes {', '.join(known) or 'nothing'}"
    return ""


def docs_of(said: str, value: Any) -> list[str]:
    """Its docstring, and those of the methods of ours that it overrides: an override may say only what is its own."""
    owner = REACHED.get(said.rpartition(".")[0])
    kinds = owner.__mro__ if inspect.isclass(owner) else ()
    name = said.rpartition(".")[2]
    overridden = [vars(kind)[name] for kind in kinds if ours(kind) and name in vars(kind)]
    docs = (inspect.getdoc(getattr(one, "__func__", one)) for one in (value, *overridden))
    return [doc for doc in dict.fromkeys(docs) if doc]


def fields_of(value: Any) -> set[str]:
    """The fields of what it returns, where it returns a class of ours."""
    returned = (
        inspect.unwrap(value).__annotations__.get("return") if inspect.isfunction(inspect.unwrap(value)) else None
    )
    kind = getattr(gl, str(returned), None)
    return set(getattr(kind, "__annotations__", {}))


@pytest.mark.parametrize("said", REACHED)
def test_help_shows_a_usage_that_fits(said):
    assert not (told := wrong(said, REACHED[said])), told


def test_the_face_is_reached():
    assert len(REACHED) > 240 and {"gl.from_pretrained", "gl.ablation.zero", "gl.Result.top"} <= set(REACHED)
