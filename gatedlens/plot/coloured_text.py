"""Coloured text, as HTML: a token's score is its background."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from gatedlens.errors import InputError
from gatedlens.options import checked
from gatedlens.plot.drawing import Matrix, farthest, label, numbers_of

BODY = "font-family:system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em"


class Html:
    """A piece of HTML that a notebook shows and `save` writes as a page of its own."""

    def __init__(self, body: str, title: str = "gatedlens"):
        self.body = body
        self.title = title

    def _repr_html_(self) -> str:
        return self.body

    def page(self) -> str:
        """`html.page()`: the whole page as text, self-contained."""
        head = f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(self.title)}</title></head>"
        return f"{head}<body style='{BODY}'>{self.body}</body></html>"

    @checked
    def save(self, path: str | Path) -> Path:
        """`html.save("page.html")`: write a self-contained page and return its path."""
        Path(path).write_text(self.page(), encoding="utf-8", errors="xmlcharrefreplace")
        return Path(path)


def colour(share: float) -> str:
    """A background for a value in [-1, 1]: red above zero, blue below, none for what is no number."""
    share = share if share == share else 0.0
    r, g, b = (214, 40, 40) if share > 0 else (29, 78, 216)
    return f"rgba({r},{g},{b},{min(abs(share), 1):.3f})"


@checked
def text(scores: Matrix, tokens: Sequence[str], title: str = "Scores by token") -> Html:
    """`gl.plot.text(A.mean()[0, -1], tokens)`: the text with each token coloured by its score; hover for the number."""
    data = numbers_of(scores, "text()").detach().float().cpu()
    if data.ndim != 1 or len(data) != len(tokens):
        raise InputError(f"text() colours {len(tokens)} tokens by as many scores; these have shape {list(data.shape)}.")
    bound = farthest(data)
    spans = "".join(
        f"<span title='{html.escape(repr(token), quote=True)} at {i}: {value:.4g}' "
        f"style='background:{colour(value / bound)};padding:1px 0'>{html.escape(label(token))}</span>"
        for i, (token, value) in enumerate(zip(tokens, data.tolist(), strict=True))
    )
    heading = f"<p style='margin:.3em 0'><b>{html.escape(title)}</b></p>"
    return Html(f"{heading}<p style='font-family:monospace;line-height:1.8;overflow-wrap:anywhere'>{spans}</p>", title)
