"""The report: an Evaluation as a page of its own, with its charts: the table, the curves, and what methods say of samples.

    report(found, model).save("report.html")
    curves({"lrp": steps, ...}, shares, "positive accuracy")     # a chart as SVG text, one line a method with its interval
    png(values)                                                  # a data URI of [height, width] or [height, width, 3], 0 to 1

Charts are inline SVG and pictures inline PNG, so the page loads nothing from elsewhere.
"""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gatedlens.evaluation.item import Item
from gatedlens.evaluation.protocol import PROTOCOLS
from gatedlens.evaluation.result import MEASURED, Evaluation
from gatedlens.model.base import HookedModel
from gatedlens.options import checked
from gatedlens.plot.coloured_text import Html, text
from gatedlens.plot.pixels import visible
from gatedlens.result.bootstrap import Estimate

# -- charts and small pictures ----------------------------------------------------------------------------------------

COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
WIDTH, HEIGHT, MARGIN = 420, 260, 42


def colour_of(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def dash_of(i: int) -> str:
    """Beyond the tenth method lines are dashed."""
    return "" if i < len(COLOURS) else f"stroke-dasharray='{2 + 3 * (i // len(COLOURS))},3'"


def curves(lines: Mapping[str, Sequence[Estimate]], shares: Sequence[float], title: str) -> str:
    """One chart: shares across, values up; hover a line for its method."""
    ends = [v for steps in lines.values() for one in steps for v in (one.value, one.low, one.high) if math.isfinite(v)]
    low, high = min([0.0, *ends]), max([1e-12, *ends])
    width = (shares[-1] - shares[0]) or 1.0

    def at(share: float, value: float) -> str:
        x = MARGIN + (share - shares[0]) / width * (WIDTH - MARGIN - 10)
        y = HEIGHT - MARGIN + 12 - (value - low) / (high - low) * (HEIGHT - MARGIN - 20)
        return f"{x:.1f},{y:.1f}"

    body = "".join(_grid(at, shares, low, high))
    for i, (name, steps) in enumerate(lines.items()):
        known = list(zip(shares, steps, strict=True))
        band = [at(s, e.low) for s, e in known if math.isfinite(e.low)]
        band += [at(s, e.high) for s, e in reversed(known) if math.isfinite(e.high)]
        points = " ".join(at(s, e.value) for s, e in known if math.isfinite(e.value))
        said = f"<title>{html.escape(name)}</title>"
        body += f"<polygon points='{' '.join(band)}' fill='{colour_of(i)}' opacity='.08'>{said}</polygon>"
        body += f"<polyline points='{points}' fill='none' stroke='{colour_of(i)}' stroke-width='2' {dash_of(i)}>{said}</polyline>"
    heading = f"<text x='{MARGIN}' y='12' font-size='12' font-weight='bold'>{html.escape(title)}</text>"
    return f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' role='img'>{heading}{body}</svg>"


def _grid(at, shares: Sequence[float], low: float, high: float) -> list[str]:  # type: ignore[no-untyped-def]
    out = []
    for part in (0.0, 0.5, 1.0):
        value, share = low + part * (high - low), shares[0] + part * (shares[-1] - shares[0])
        (x0, y), (x1, _) = (at(s, value).split(",") for s in (shares[0], shares[-1]))
        out.append(f"<line x1='{x0}' y1='{y}' x2='{x1}' y2='{y}' stroke='#ddd'/>")
        out.append(f"<text x='{MARGIN - 4}' y='{y}' font-size='10' text-anchor='end'>{value:.3g}</text>")
        x, bottom = at(share, low).split(",")
        out.append(f"<text x='{x}' y='{float(bottom) + 14:.1f}' font-size='10' text-anchor='middle'>{share:.0%}</text>")
    return out


def legend(names: Sequence[str]) -> str:
    """The colour and dash of each method, beside its name."""
    items = (
        f"<span style='white-space:nowrap;margin-right:1em'><svg width='24' height='8'><line x1='0' y1='4' x2='24' y2='4' "
        f"stroke='{colour_of(i)}' stroke-width='3' {dash_of(i)}/></svg> {html.escape(name)}</span>"
        for i, name in enumerate(names)
    )
    return f"<p>{' '.join(items)}</p>"


def png(values: Float[Tensor, "height width *colour"]) -> str:
    """A PNG as a data URI; values beyond 0 and 1 are cut off, what is no number is 0."""
    pixels = (values.detach().float().cpu().nan_to_num(0, 1, 0).clamp(0, 1) * 255).round().to(torch.uint8).contiguous()
    height, width = pixels.shape[:2]
    # The format is a signature and three chunks; each row of pixels begins with its filter (0: none), and in the header stand
    # 8 bits a number and the colour type (2: RGB, 0: grey).
    raw = b"".join(b"\0" + bytes(row.flatten().tolist()) for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in parts)
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def heat(scores: Float[Tensor, "row column"]) -> Float[Tensor, "row column 3"]:
    """Red above zero, blue below, white at it; the largest size is full colour. What is no finite number is grey."""
    odd = ~scores.isfinite().unsqueeze(-1)
    scores = scores.nan_to_num(0, 0, 0)
    share = (scores / scores.abs().max().clamp(min=1e-30)).unsqueeze(-1)
    red, blue = torch.tensor([0.84, 0.16, 0.16]), torch.tensor([0.11, 0.31, 0.85])
    shown = 1 + share.clamp(min=0).to(red) * (red - 1) + (-share).clamp(min=0).to(red) * (blue - 1)
    return shown.masked_fill(odd, 0.6)


# -- the page ---------------------------------------------------------------------------------------------------------

PICTURE = "width:96px;height:96px;image-rendering:pixelated;border:1px solid #ccc"
SAID = {"down": "down is better", "up": "up is better"}


@checked
def report(found: Evaluation, model: HookedModel | None = None) -> Html:
    """`gl.evaluation.report(found, model).save("report.html")`: the page; with the `model` the images that it read stand
    beside their maps, and tokens are said in words.
    """
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


def _samples(found: Evaluation, model: HookedModel | None) -> str:
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


def _answer(answer: int, model: HookedModel | None) -> str:
    """A class by its number, a token by its text as well, if the model can say it."""
    if model is None or model.grid is not None or model.tokenizer is None:
        return str(answer)
    return f"{answer} ({model.to_string([answer])!r})"


def _picture(value: Tensor) -> str:
    pixels = visible(value.detach().float().cpu())
    return png(pixels[0] if len(pixels) == 1 else pixels.movedim(0, -1))
