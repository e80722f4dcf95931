"""Docstrings on the site: they are plain text for `help`, so what Markdown would take for a link in an equation is escaped.

An extension of griffe, named in mkdocs.yml: `scores[b][i, j]` stays what it is.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

CODE = re.compile(r"(`[^`]*`|^ {4,}.*$)", re.M)


class PlainText(griffe.Extension):
    """Every docstring, as it is read."""

    def on_instance(self, *, obj: Any, **more: Any) -> None:
        if obj.docstring is not None:
            pieces = CODE.split(obj.docstring.value)
            obj.docstring.value = "".join(one if i % 2 else one.replace("[", "\\[") for i, one in enumerate(pieces))
