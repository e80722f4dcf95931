"""Coloured text, as HTML: a token's score is its background, its frame where it begins and ends."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, overload

from gatedlens.errors import InputError
from gatedlens.foreign import Figure
from gatedlens.markup import BORDER, number
from gatedlens.options import checked
from gatedlens.plot.backends import plotly
from gatedlens.plot.drawing import MARK, Matrix, colour, farthest, label, numbers_of
from gatedlens.result.labelled_tensor import LabelledTensor, label_of

HTML = "html"
BODY = "font-family:system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em"
BOX = (
    "padding:1px 2px;margin:0 1px;border-radius:3px;box-shadow:inset 0 0 0 1px rgba(128,128,128,.35)"  # a token's frame
)


class Html:
    """A piece of HTML that a notebook shows and `save` writes as a page of its own."""

    def __init__(self, body: str, title: str = "gatedlens"):
        self.body = body
        self.title = title

    def _repr_html_(self) -> str:
        return self.body

    def page(self) -> str:
        """`html.page()`: the whole page as text, self-contained."""
        dark = "<meta name='color-scheme' content='light dark'>"
        head = f"<!doctype html><html lang='en'><head><meta charset='utf-8'>{dark}<title>{html.escape(self.title)}</title></head>"
        return f"{head}<body style='{BODY}'>{self.body}</body></html>"

    @checked
    def save(self, path: str | Path) -> Path:
        """`html.save("page.html")`: write a self-contained page and return its path."""
        Path(path).write_text(self.page(), encoding="utf-8", errors="xmlcharrefreplace")
        return Path(path)


def style(share: float) -> str:
    """The background with a colour of the letters that is legible on it, whatever the page's own colours are."""
    own = ";color:#fff" if share == share and abs(share) > 0.6 else ""
    return f"background:{colour(share)}{own};{BOX}"


def legend(least: float, most: float, said: str = "") -> str:
    """What the colours mean: from blue over none to red, with the numbers at both ends."""
    ends = [(least, "left"), (0.0, "center"), (most, "right")] if least < 0 else [(0.0, "left"), (most, "right")]
    stops = ",".join(colour(value / max(abs(least), abs(most), 1e-30)) for value, _ in ends)
    numbers = "".join(f"<small>{number(value)}</small>" for value, _ in ends)
    return (
        "<div style='width:16em;max-width:100%;font-size:85%;margin:.4em 0'>"
        f"<div style='height:.8em;background:linear-gradient(to right,{stops});{BORDER}'></div>"
        f"<div style='display:flex;justify-content:space-between'>{numbers}</div>"
        + (f"<div>{html.escape(said)}</div>" if said else "")
        + "</div>"
    )


@overload
def text(
    scores: Matrix,
    tokens: Sequence[str] | None = None,
    title: str | None = None,
    pos: slice | Sequence[int] | None = None,
    value: str | None = None,
    backend: Literal["html"] = ...,
) -> Html: ...
@overload
def text(
    scores: Matrix,
    tokens: Sequence[str] | None = None,
    title: str | None = None,
    pos: slice | Sequence[int] | None = None,
    value: str | None = None,
    backend: str = ...,
) -> Html | Figure: ...
@checked
def text(
    scores: Matrix,
    tokens: Sequence[str] | None = None,
    title: str | None = None,
    pos: slice | Sequence[int] | None = None,
    value: str | None = None,
    backend: str = HTML,
) -> Html | Figure:
    """`gl.plot.text(A.mean()[0, -1], tokens)`: the text with each token coloured by its score; hover for the number.

    tokens, title, value (what a score is): None for what the scores themselves say. pos: some positions, a slice or a list.
    Each token has a frame, and a legend says what the colours are. Returns an `Html`, which shows itself in a notebook and
    `save`s a page; with backend="plotly" plotly's figure of the same.
    """
    data = numbers_of(scores, "text()").detach().float().cpu()
    if tokens is None and isinstance(scores, LabelledTensor) and len(scores.axes) == 1:
        tokens = scores.labels.get(scores.axes[0])
    tokens = [str(i) for i in range(len(data))] if tokens is None and data.ndim == 1 else tokens or []
    if data.ndim != 1 or len(data) != len(tokens):
        raise InputError(f"text() colours {len(tokens)} tokens by as many scores; these have shape {list(data.shape)}.")
    if title is None:
        title = (scores.title if isinstance(scores, LabelledTensor) else "") or "Scores by token"
    value = value or label_of(scores) or "score"
    places = list(range(len(data)))
    if pos is not None:
        if not isinstance(pos, slice) and not all(-len(data) <= i < len(data) for i in pos):
            raise InputError(f"pos={pos!r}: there are {len(data)} positions, 0 to {len(data) - 1}.")
        places = places[pos] if isinstance(pos, slice) else [places[i] for i in pos]
    bound = farthest(data)
    if backend != HTML and plotly(backend, None):
        from gatedlens.plot.interactive import token_map

        return token_map([(tokens[i], i, float(data[i])) for i in places], bound, title, value)
    if backend != HTML:
        raise InputError(f"backend={backend!r}: a text is drawn by 'html' or 'plotly'.")
    spans = ""
    for before, i in zip([None, *places], places, strict=False):
        gap = f"<i style='opacity:.6'> {MARK} </i>" if i != (-1 if before is None else before) + 1 else ""
        score = float(data[i])
        hover = html.escape(f"{tokens[i]!r} at {i}: {number(score)}", quote=True)
        spans += f"{gap}<span title='{hover}' style='{style(score / bound)}'>{html.escape(label(tokens[i]))}</span>"
        spans += "<br>" * ("\n" in tokens[i])
    if places and places[-1] != len(data) - 1:
        spans += f"<i style='opacity:.6'> {MARK}</i>"
    finite = data[data.isfinite()]
    least, most = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 0.0)
    heading = f"<p style='margin:.3em 0'><b>{html.escape(title)}</b></p>"
    ends = legend(-bound if least < 0 else 0.0, bound, f"{value}, {number(least)} to {number(most)} in this text")
    line = "font-family:monospace;line-height:1.9;overflow-wrap:anywhere;margin:.3em 0"
    return Html(f"{heading}<p style='{line}'>{spans}</p>{ends}", title)
