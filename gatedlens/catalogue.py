"""The catalogue of hook points that people read: `python -m gatedlens.catalogue` writes the pages under `hooks/`.

All of it is derived from rows: a diagram whose arrows are the names in the equations, the table, the recurrence's terms,
other tools' names. `--check` writes nothing and fails if a page is stale.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from gatedlens.address.equations import arrows
from gatedlens.address.names import Point
from gatedlens.errors import in_bytes
from gatedlens.hooks import architectures
from gatedlens.model.base import HookedModel

__all__ = ["data", "diagram", "index", "main", "page", "pages", "stale"]

FOLDER = Path(__file__).parent.parent / "hooks"


def diagram(rows: tuple[Point, ...]) -> str:
    """`diagram(rows)`: a mermaid flow chart of one block: a box a point (rounded: lazy), an arrow a dependency."""
    key = {row.name: f"p{i}" for i, row in enumerate(rows)}
    lines = ["```mermaid", "flowchart TD"]
    parts = list(dict.fromkeys(row.part for row in rows))
    for part in parts:
        indent = "    " if part else "  "
        if part:
            lines.append(f'  subgraph {part.replace(".", "_")} ["{part}"]')
        for row in rows:
            if row.part == part:
                left, right = ("([", "])") if row.lazy else ("[", "]")
                lines.append(f"{indent}{key[row.name]}{left}{row.leaf}{right}")
        if part:
            lines.append("  end")
    lines += [f"  {key[a]} --> {key[b]}" for a, b in arrows(rows)]
    return "\n".join([*lines, "```"])


def _table(rows: tuple[Point, ...], sizes: dict[str, int], prefix: str) -> str:
    lines = ["| point | axes | equation | source | bytes per token |", "|---|---|---|---|---|"]
    for row in rows:
        known = {"one": 1, "key_pos": 1, "class": 1000, "d_vocab": 50280, **sizes}
        bytes_ = "-"
        if "pos" in row.dims and all(dim in known or dim in ("batch", "pos") for dim in row.dims):
            bytes_ = in_bytes(4 * row.elements(known, batch=1, pos=1))
        name = f"`{prefix}{row.name}`" + (" (lazy)" if row.lazy else "")
        lines.append(
            f"| {name} | {row.axes} | `{row.equation.replace('|', chr(92) + '|')}` | {row.source} | {bytes_} |"
        )
    return "\n".join(lines)


def imported(hooked: Any) -> str:
    """The line that imports an architecture's class from its file: it holds for one that `gl` does not list, too."""
    return f"from {hooked.__module__} import {hooked.__name__}"


def page(name: str, hooked: type[HookedModel]) -> str:
    """`page("mamba", HookedMamba)`: the page of one architecture."""
    model, sizes = hooked.reference
    is_package = "__path__" in vars(sys.modules[hooked.__module__])
    file = hooked.__module__.replace(".", "/") + ("/" if is_package else ".py")
    counted = f" Bytes per token are those of {model} in float32." if model else ""
    made = f"{hooked.__name__}.tiny()" if hooked.small else f"{hooked.__name__}(module)  # yours"
    erased = " - erase_t (probe_t . state_{t-1})" if "erase" in hooked.recurrence else ""
    out = [
        f"# {hooked.title}: hook points",
        f"{hooked.paper}\n\nWritten by `python -m gatedlens.catalogue` from `{file}`; do not edit.",
        f"`{{l}}` is a layer. A lazy point (rounded) builds its tensor only when somebody listens.{counted}",
        "## The recurrence",
        f"    state_t = decay_t * state_{{t-1}}{erased} + write_t      scan_t = read_t . state_t      y_t = scan_t + skip * u_t",
        "| term | here |\n|---|---|\n" + "\n".join(f"| {term} | {here} |" for term, here in hooked.recurrence.items()),
        "## The implicit attention",
        "    o = A x + r      A = diag(gate) (S + diag(skip)) diag(act) M      (UIA, arXiv 2405.16504; per channel, [pos, pos])",
        "What `gl.implicit_attention(model, text, layer=0)` makes of the points. A factor that is none is the identity "
        "(skip: zero).",
        "| factor | from the points |\n|---|---|\n"
        + "\n".join(f"| {factor} | `{here}` |" for factor, here in hooked.attention_words.items()),
        "## Read one point",
        f"```python\n{imported(hooked)}\n\nmodel = {made}\n{hooked.snippet()}\n```",
    ]
    for kind, rows in hooked.kinds().items():
        many = len(hooked.kinds()) > 1
        out += [f"## {'Blocks: ' + kind if many else 'A block'}", diagram(rows), _table(rows, sizes, "blocks.{l}.")]
    outside = (*hooked.first_points, *hooked.final_points, *hooked.last_points)
    out += ["## Outside the blocks", _table(outside, sizes, "")]
    names = [(a.tool, a.name, a.target) for a in hooked.aliases]
    names += [(v.tool, v.name, f"{v.equation} (computed{'' if v.visit else ', read only'})") for v in hooked.views]
    if names:
        lines = [f"| {tool} | `{theirs}` | {ours} |" for tool, theirs, ours in sorted(names)]
        out += ["## Other tools' names", "| tool | name | here |\n|---|---|---|\n" + "\n".join(lines)]
    return "\n\n".join(out) + "\n"


def index(found: dict[str, Any]) -> str:
    """`index(found)`: hooks/README.md."""
    lines = [
        f"| [{hooked.title}]({name}.md) | `{hooked.__name__}` | {hooked.paper} |" for name, hooked in found.items()
    ]
    shared = [{row.leaf for rows in hooked.kinds().values() for row in rows} for hooked in found.values()]
    common = ", ".join(f"`{leaf}`" for leaf in sorted(set.intersection(*shared)))
    return (
        "# The hook points\n\n"
        "Every gate, convolution and scan intermediate of every architecture, by name. Written by "
        "`python -m gatedlens.catalogue`; `model.hook_table()` shows the same for a model of yours, and "
        "[catalogue.json](catalogue.json) holds it as data.\n\n"
        "| architecture | class | paper |\n|---|---|---|\n" + "\n".join(lines) + "\n\n"
        f"Every architecture has: {common}.\n"
    )


def data(found: dict[str, Any]) -> dict[str, Any]:
    """`data(found)`: hooks/catalogue.json."""
    return {
        name: {
            "title": hooked.title,
            "class": hooked.__name__,
            "outside": [_row(r) for r in (*hooked.first_points, *hooked.final_points, *hooked.last_points)],
            "blocks": {kind: [_row(r) for r in rows] for kind, rows in hooked.kinds().items()},
            "aliases": [{"name": a.name, "target": a.target, "tool": a.tool} for a in hooked.aliases],
            "views": [{"name": v.name, "axes": v.axes, "equation": v.equation, "tool": v.tool} for v in hooked.views],
            "recurrence": hooked.recurrence,
            "attention": hooked.attention_words,
        }
        for name, hooked in found.items()
    }


def _row(row: Point) -> dict[str, Any]:
    return {"name": row.name, "axes": row.axes, "equation": row.equation, "source": row.source, "lazy": row.lazy}


def pages() -> dict[str, str]:
    """`pages()["mamba.md"]`: every file of the catalogue by name, as it should be."""
    found = architectures()
    files = {"README.md": index(found), "catalogue.json": json.dumps(data(found), indent=1) + "\n"}
    return files | {f"{name}.md": page(name, hooked) for name, hooked in found.items()}


def stale(folder: Path = FOLDER) -> list[str]:
    """`stale(folder)`: the files that are missing or differ from what the rows say."""
    wanted = pages()
    present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    wrong = [name for name, text in wanted.items() if name not in present or (folder / name).read_text() != text]
    return wrong + sorted(present - set(wanted))


def _here() -> Path:
    """The repository's hooks/; of an installed package, which has none, one where the command runs."""
    return FOLDER if FOLDER.exists() else Path("hooks")


def main() -> int:
    """`main()` is `python -m gatedlens.catalogue`: write the pages, or with --check fail on a stale one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=_here(), help="where the pages lie (%(default)s)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is stale")
    args = parser.parse_args()
    folder: Path = args.folder
    wrong = stale(folder)
    if args.check:
        print(f"stale: {', '.join(wrong)} (run `make catalogue`)" if wrong else "the catalogue is up to date")
        return bool(wrong)
    folder.mkdir(exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text)
    print(f"wrote {len(pages())} files to {folder.name}/" + (f" ({', '.join(wrong)} had changed)" if wrong else ""))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
