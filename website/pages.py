"""Pages that are made when the site is built, a hook of mkdocs: all that stands elsewhere in the repository, and the reference.

    index.md            README.md                          changelog.md     CHANGELOG.md
    hooks/*.md          hooks/*.md, the catalogue           benchmarks.md    benchmarks/README.md
    tutorials/*.md      tutorials/*.py, with the outputs of out/notebooks where these are fresh
    reference/*.md      every public callable, from its docstring; the commands, from their help
    llms.txt, hooks/catalogue.json, ...                     as they are

A link to a file of the repository becomes one to its page, so every page reads on in the repository, too.
"""

from __future__ import annotations

import base64
import importlib
import inspect
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.structure.files import File

from website import notebooks

ROOT = Path(__file__).parent.parent
MOVED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "hooks/README.md": "hooks/index.md",
    "tutorials/README.md": "tutorials/index.md",
}  # where a file of the repository stands on the site; docs/x.md is x.md, and tutorials/x.ipynb tutorials/x.md
AS_THEY_ARE = ("llms.txt", "CITATION.cff", "LICENSE", "AGENTS.md", "hooks/catalogue.json")
DOORS = ("bridge", "circuitsvis", "compat.mamba_lens", "compat.sae_lens", "catalogue")
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?(?=\))")
CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.M | re.S)


# -- mkdocs -----------------------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """The navigation: what a reader does first, first."""
    config.nav = navigation()
    return config


def on_files(files: Any, config: Any) -> Any:
    """Every page that is made, and every file that is taken as it is."""
    for where, content in generated().items():
        files.append(File.generated(config, where, content=content))
    for name in AS_THEY_ARE:
        files.append(File.generated(config, place(name), content=as_it_is(name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links of the pages that lie in docs/: those of the others are turned when they are made."""
    made = page.file.src_uri.startswith(("hooks/", "tutorials/", "reference/")) or page.file.src_uri in MOVED.values()
    return markdown if made else turned(markdown, f"docs/{page.file.src_uri}")


# -- links ------------------------------------------------------------------------------------------------------------


def place(file: str) -> str:
    """`place("docs/names.md")`: where a file of the repository stands on the site, "names.md"; itself if it is no page."""
    if file in MOVED:
        return MOVED[file]
    if file in AS_THEY_ARE:
        return file if "." in file and not file.endswith(".md") else f"{file.removesuffix('.md')}.txt"
    if file.startswith("tutorials/") and file.count("/") == 1:
        return str(Path(file).with_suffix(".md"))
    return file.removeprefix("docs/")


def turned(text: str, source: str) -> str:
    """The text of the repository's file `source`, its links as they must be on the site. Code is left alone."""
    here = posixpath.dirname(place(source))

    def turn(found: re.Match[str]) -> str:
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[1]))
        if not (ROOT / file).is_file() and not (ROOT / file).is_dir():
            return found[0]
        known = file in MOVED or file in AS_THEY_ARE or file.startswith(("docs/", "hooks/"))
        known |= file.startswith("tutorials/") and Path(file).suffix in (".py", ".ipynb") and file.count("/") == 1
        if not known:
            return f"{notebooks.repository()}/blob/main/{file}"
        return posixpath.relpath(place(file), here or ".") + (found[2] or "")

    pieces = CODE.split(text)
    return "".join(piece if piece.startswith("`") else LINK.sub(turn, piece) for piece in pieces)


def as_it_is(name: str) -> str:
    """A file of the repository that is no page; what is a map (llms.txt) leads to the site's pages."""
    text = (ROOT / name).read_text(encoding="utf-8")
    maps = name in ("llms.txt", "AGENTS.md")
    return re.sub(r"(\]\((?!https?:)[^)]+)\.md(?=\))", r"\1.html", turned(text, name)) if maps else text


def read(source: str) -> str:
    """A page of the repository, as the site has it."""
    return turned((ROOT / source).read_text(encoding="utf-8"), source)


# -- what is made ----------------------------------------------------------------------------------------------------


def generated() -> dict[str, str | bytes]:
    """Every page that is made, by its place."""
    found: dict[str, str | bytes] = {where: read(file) for file, where in MOVED.items()}
    for path in sorted((ROOT / "hooks").glob("*.md")):
        if path.name != "README.md":
            found[f"hooks/{path.name}"] = read(f"hooks/{path.name}")
    for path in notebooks.tutorials():
        found |= tutorial(path)
    return found | reference()


def navigation() -> list[Any]:
    """The site's pages in the order of their reading."""
    tutorials = [{notebooks.title(path): f"tutorials/{path.stem}.md"} for path in notebooks.tutorials()]
    points = [f"hooks/{path.name}" for path in sorted((ROOT / "hooks").glob("*.md")) if path.name != "README.md"]
    return [
        {"Home": "index.md"},
        {"Start": ["start.md", "loading.md", "questions.md", "command-line.md", {"Coming from other libraries": "ecosystem.md"}]},
        {
            "Guides": [
                "names.md", "attention.md", "mechanism.md", "states.md", "explain.md", "secant.md", "lenses.md", "subspaces.md",
                "dictionaries.md", "feature-graphs.md", "comparing.md", "store.md", "vision.md", "speed.md",
            ]
        },
        {"Hook points": ["hooks/index.md", *points]},
        {"Tutorials": ["tutorials/index.md", *tutorials]},
        {"Reference": list(reference())},
        {"Results": ["models.md", {"Attribution methods": "results.md"}, {"Benchmarks": "benchmarks.md"}]},
        {"Develop": [{"An architecture of yours": "architecture.md"}, "code.md", "developing.md", {"Changelog": "changelog.md"}]},
    ]  # fmt: skip


# -- tutorials -------------------------------------------------------------------------------------------------------


def tutorial(path: Path) -> dict[str, str | bytes]:
    """The page of a tutorial and its pictures: with outputs, if it has been run as it is."""
    import nbformat

    made = notebooks.executed(path)
    fresh = made is not None
    made = nbformat.reads(notebooks.notebook(path), as_version=4) if made is None else made
    files: dict[str, str | bytes] = {}
    parts: list[str] = []
    for number, cell in enumerate(made.cells):
        if cell.cell_type == "markdown":
            parts.append(turned(cell.source, f"tutorials/{path.name}"))
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for count, output in enumerate(cell.outputs):
            shown = _output(output, f"{path.stem}-{number}-{count}", files)
            if shown:
                parts.append(f'<div class="output" markdown>\n\n{shown}\n\n</div>')
    if not fresh:
        parts.insert(1, "!!! note\n    Without outputs: `make docs` runs the tutorials first.")
    files[f"tutorials/{path.stem}.md"] = "\n\n".join(parts) + "\n"
    return files


ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def _output(output: Any, stem: str, files: dict[str, str | bytes]) -> str:
    """One output as Markdown: a picture, a piece of HTML, or text. What goes to stderr, bars and the like, is left out."""
    if output.output_type == "stream":
        return f"```text\n{ANSI.sub('', output.text).rstrip()}\n```" if output.name == "stdout" else ""
    data = output.get("data", {})
    if "image/png" in data:
        files[f"tutorials/{stem}.png"] = base64.b64decode(data["image/png"])
        return f"![what the cell shows]({stem}.png)"
    if "text/html" in data:
        flat = "\n".join(line.strip() for line in str(data["text/html"]).splitlines() if line.strip())
        return f'<div class="html">{flat}</div>'
    return f"```text\n{ANSI.sub('', data['text/plain']).rstrip()}\n```" if "text/plain" in data else ""


# -- reference -------------------------------------------------------------------------------------------------------


def public() -> Iterator[tuple[str, ModuleType, list[str]]]:
    """(what a user says, module, the callables that it shows): `gl` itself, `gl.lens`, ..., and the doors."""
    import gatedlens as gl

    modules = {f"gl.{name}": getattr(gl, name) for name in gl.__all__ if isinstance(getattr(gl, name), ModuleType)}
    modules |= {f"gatedlens.{door}": importlib.import_module(f"gatedlens.{door}") for door in DOORS}
    seen: set[int] = set()
    for said, module in {"gl": gl, **modules}.items():
        names = []
        for name in module.__all__:
            value = inspect.unwrap(getattr(module, name))
            ours = getattr(value, "__module__", "").startswith("gatedlens")
            if ours and (inspect.isclass(value) or inspect.isfunction(value)) and id(value) not in seen:
                seen.add(id(value))
                names.append(name)
        yield said, module, names


def reference() -> dict[str, str | bytes]:
    """A page for each word behind `gl.`, and one for the commands."""
    found: dict[str, str | bytes] = {}
    shown = {inspect.unwrap(getattr(module, name)) for _, module, names in public() for name in names}
    for said, module, names in public():
        head = f"# {said}\n\n{_opening(module)}"
        blocks = [_entry(f"{said}.{name}", inspect.unwrap(getattr(module, name)), shown) for name in names]
        found[f"reference/{said}.md"] = "\n\n".join([head, *blocks]) + "\n"
    found["reference/commands.md"] = commands()
    return found


def _opening(module: ModuleType) -> str:
    """The head of a module's docstring; what is indented in it is code."""
    return inspect.cleandoc(module.__doc__ or "")


def _entry(said: str, value: Any, shown: set[Any]) -> str:
    """One callable, by where it is written: only that is sure to be found without running anything.

    A class shows what it has from bases of ours that have no place of their own.
    """
    options = f'      heading: "{said}"\n      toc_label: "{said.rpartition(".")[2]}"'
    if inspect.isclass(value):
        bases = [base for base in value.__mro__[1:] if base.__module__.startswith("gatedlens") and base not in shown]
        names = dict.fromkeys(name for base in bases for name in vars(base) if not name.startswith("_"))
        options += f"\n      inherited_members: {list(names)}" if names else ""
    return f"::: {value.__module__}.{value.__qualname__}\n    options:\n{options}"


def commands() -> str:
    """Every command with its help; how a model is opened is told once."""
    from gatedlens.cli import app
    from gatedlens.cli.options import OF_MODEL

    every = [one for command in app.commands.values() for one in command.params]
    of_model = {one.opts[0]: one for one in every if getattr(one, "panel", None) == OF_MODEL}
    parts = [
        "# Commands",
        "[The command line](../command-line.md) on one page; here is what each `--help` says. Each takes `--json` "
        "besides, and where it takes a MODEL, also the options of [how it is opened](#how-the-model-is-opened).",
    ]
    for name, command in app.commands.items():
        own = [one for one in command.params if one.opts[0] not in of_model and one.opts[0] not in ("named", "--json")]
        takes = any(one.opts[0] == "named" for one in command.params)
        examples = (command.epilog or "").removeprefix("examples:").strip("\n")
        parts += [f"## gatedlens {name}{' MODEL' if takes else ''}", inspect.cleandoc(command.help or "")]
        parts += [_options(own)] if own else []
        parts.append(f"```text\n{examples}\n```")
    return "\n\n".join([*parts, f"## {OF_MODEL}", _options(list(of_model.values()))]) + "\n"


def _options(params: list[Any]) -> str:
    """A table of options."""
    lines = ["| option | | default |", "|---|---|---|"]
    for one in params:
        words = ", ".join(f"`{word}`" for word in (*one.opts, *one.secondary_opts))
        told = (getattr(one, "help", "") or "").replace("|", "\\|")
        default = one.default if isinstance(one.default, str | int) and not isinstance(one.default, bool) else None
        lines.append(f"| {words} | {told} | {'' if default is None else f'`{default}`'} |")
    return "\n".join(lines)
