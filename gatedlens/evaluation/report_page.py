"""Report: an Evaluation as a page of its own: the table, the curves, and what the methods say of a few samples.

report(found).save("report.html")
"""

from __future__ import annotations

import html
from typing import Any

import torch
from torch import Tensor

from gatedlens.evaluation.charts import curves, heat, legend, png
from gatedlens.evaluation.item import Item
from gatedlens.evaluation.protocol import PROTOCOLS
from gatedlens.evaluation.result import MEASURED, Evaluation
from gatedlens.plot.matrices import Html, text, visible

PICTURE = "width:96px;height:96px;image-rendering:pixelated;border:1px solid #ccc"
SAID = {"down": "down is better", "up": "up is better"}


def report(found: Evaluation, model: Any = None) -> Html:
    """The page; with the `model` the images that it read stand beside their maps, and tokens are said in words."""
    run = ", ".join(f"{key} {value}" for key, value in found.run.items() if value is not None)
    notes = (
        "Numbers of curves are areas (trapezoid over the shares; of 10 to 90 % at most 0.8). In brackets: 95 %, bootstrap over "
        f"samples. Put in the place of what is taken away: {html.escape(_nothing(found))}."
    )
    title = f"Attributions of {found.run['model']} on {found.run['data']}"
    body = (
        f"<h1 style='font-size:1.4em'>{html.escape(title)}</h1><p style='color:#555'>{html.escape(run)}</p>"
        f"<div style='overflow-x:auto'>{found.table()._repr_html_()}</div><p style='color:#555'>{notes}</p>"
        f"<h2 style='font-size:1.2em'>Curves</h2>{legend(found.methods)}{_curves(found)}"
        f"<h2 style='font-size:1.2em'>Samples</h2>{_samples(found, model)}"
    )
    return Html(body, title)


def _nothing(found: Evaluation) -> str:
    said = found.rows(found.methods[0])[0]["nothing"]
    return ", ".join(
        f"{word} ({', '.join(p for p in said if said[p] == word)})" for word in dict.fromkeys(said.values())
    )


def _curves(found: Evaluation) -> str:
    out = []
    for protocol in found.protocols:
        for measure in MEASURED[protocol]:
            lines = {method: found.curve(method, protocol, measure).steps() for method in found.methods}
            row = PROTOCOLS[protocol]
            title = f"{protocol} {measure.replace('_', ' ')} ({SAID[row.better]})"
            out.append(curves(lines, row.shares, title))
    return f"<div style='display:flex;flex-wrap:wrap;gap:1em'>{''.join(out)}</div>"


def _samples(found: Evaluation, model: Any) -> str:
    out = ""
    for index in found.shown:
        rows = {method: found.records[found.names[index], method] for method in found.methods}
        first = rows[found.methods[0]]
        wrong = "" if first["correct"] else ", which the model gets wrong"
        said = f"{first['sample']}: explained is {_answer(first['explained'], model)}{wrong}"
        out += f"<h3 style='font-size:1em'>{html.escape(said)}</h3>"
        if first["tokens"] is None:
            shown = {} if model is None else {"image": _picture(Item.of(model, found.samples[index]).value)}
            shown |= {method: png(heat(torch.tensor(row["scores"]))) for method, row in rows.items()}
            figures = (
                f"<figure style='margin:0;width:100px'><img src='{uri}' style='{PICTURE}' alt=''>"
                f"<figcaption style='font-size:.7em;overflow-wrap:anywhere'>{html.escape(name)}</figcaption></figure>"
                for name, uri in shown.items()
            )
            out += f"<div style='display:flex;flex-wrap:wrap;gap:.5em'>{''.join(figures)}</div>"
        else:
            out += "".join(
                text(torch.tensor(row["scores"]), row["tokens"], method).body for method, row in rows.items()
            )
    return out


def _answer(answer: int, model: Any) -> str:
    """A class by its number, a token by its text as well, if the model can say it."""
    if model is None or model.grid is not None or model.tokenizer is None:
        return str(answer)
    return f"{answer} ({model.to_string([answer])!r})"


def _picture(value: Tensor) -> str:
    pixels = visible(value.detach().float().cpu())
    return png(pixels[0] if len(pixels) == 1 else pixels.movedim(0, -1))
