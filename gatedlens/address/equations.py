"""Equations: which point is made of which, read off the rows.

arrows(rows)                  # [("mixer.hook_dt", "mixer.hook_decay"), ...]: an edit of the first moves the second
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gatedlens.address.point import Point


def arrows(rows: Sequence[Point]) -> list[tuple[str, str]]:
    """`arrows(rows)`: (from, to) row names: an equation that names another row of the block depends on it.

    A bare word is the row of the same part if there is one, else the only row of that leaf; `ln1.out` names its part.
    """
    by_leaf: dict[str, list[str]] = {}
    for row in rows:
        by_leaf.setdefault(row.leaf.removeprefix("hook_"), []).append(row.name)
    place = {row.name: i for i, row in enumerate(rows)}
    found = []
    for row in rows:
        formula = re.sub(r"\[[^\]]*\]", "", row.equation)  # an index is no dependency
        for word in dict.fromkeys(re.findall(r"[A-Za-z_][A-Za-z_0-9]*(?:\.[A-Za-z_][A-Za-z_0-9]*)*", formula)):
            part, _, leaf = word.rpartition(".")
            names = [name for name in by_leaf.get(leaf, []) if not part or name == f"{part}.hook_{leaf}"]
            near = [name for name in names if name.rpartition(".")[0] == row.part]
            chosen = near or (names if len(names) == 1 else [])
            found += [(name, row.name) for name in chosen if place[name] < place[row.name]]
    return found
