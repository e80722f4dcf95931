"""JSON that every reader takes: what is no finite number is null, and in a page no `<` stands in it.

to_json({"a": float("nan")})                  # '{"a": null}'
in_page({"tokens": ["<!--", "</script>"]})    # for a <script type='application/json'>: '{"tokens": ["\\u003c!--", ...]}'
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON knows no NaN and no infinity; what is neither text, number, list nor object is said as a text."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False, default=str)


def in_page(value: Any) -> str:
    """In a script element nothing but `<` can begin what ends it, or a comment."""
    return to_json(value).replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value
