"""Charts and small pictures for a page, as inline SVG and PNG: nothing is loaded from elsewhere.

curves({"lrp": steps, ...}, shares, "positive accuracy")         # SVG text, one line a method with its interval
png(values)                                                      # a data URI of [height, width] or [height, width, 3] in 0..1
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

from gatedlens.evaluation.bootstrap import Estimate

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
