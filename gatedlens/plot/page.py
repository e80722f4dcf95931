"""The attention page: a self-contained HTML page on which hovering a token shows what it attends to, layer by layer."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from torch import Tensor

from gatedlens.errors import InputError
from gatedlens.files import in_page
from gatedlens.plot.coloured_text import BOX, Html
from gatedlens.plot.drawing import colour, label

SCRIPT = """
const data = JSON.parse(document.getElementById('gl-data').textContent);
const box = document.getElementById('gl-text'), pick = document.getElementById('gl-layer');
const said = document.getElementById('gl-said'), ends = document.getElementById('gl-ends');
let fixed = data.tokens.length - 1;
const spans = data.tokens.map((token, i) => {
  const span = document.createElement('span');
  span.textContent = token;
  span.className = 'gl-token';
  span.tabIndex = 0;
  span.onmouseenter = span.onfocus = () => show(i);
  span.onclick = () => { fixed = i; show(i); };
  box.append(span);
  return span;
});
box.onmouseleave = () => show(fixed);
Object.keys(data.layers).forEach(name => pick.add(new Option(name, name)));
pick.value = data.first;
pick.onchange = () => show(fixed);
function said_of(value) { return value === null ? 'not a finite number' : value.toPrecision(4); }
function show(i) {
  const row = data.layers[pick.value][i], top = Math.max(...row.map(Math.abs), 1e-12);
  spans.forEach((span, j) => {
    const share = (row[j] || 0) / top, rgb = share > 0 ? '214,40,40' : '29,78,216';
    span.style.background = `rgba(${rgb},${Math.abs(share).toFixed(3)})`;
    span.style.color = Math.abs(share) > 0.6 ? '#fff' : 'inherit';
    span.style.outline = i === j ? '2px solid currentColor' : 'none';
    span.title = `${data.tokens[j]} at ${j}: ${said_of(j in row ? row[j] : 0)}`;
  });
  const best = row.map((v, j) => [Math.abs(v), j]).sort((a, b) => b[0] - a[0]).slice(0, 5);
  ends.textContent = `red adds, up to ${said_of(top)}; blue subtracts, down to ${said_of(-top)}; no colour: nothing`;
  said.textContent = `position ${i} attends most to: ` +
    best.map(([, j]) => `${data.tokens[j]} (${j}): ${said_of(row[j])}`).join(',  ');
}
show(fixed);
"""


def attention_page(
    layers: Mapping[str, Tensor], tokens: Sequence[str], title: str, first: str | None = None, notes: Sequence[str] = ()
) -> Html:
    """`attention_page({"layer 0": A0, "layer 1": A1}, tokens, "Mamba on Moby-Dick").save("attention.html")`.

    layers: a [dst, src] matrix by name; `first` the one shown first (the last one if None); notes: lines below. What is no
    finite number is null in the page's data, and named there.
    """
    if not layers:
        raise InputError("There is no layer to show: the mapping is empty.")
    for name, matrix in layers.items():
        if tuple(matrix.shape) != (len(tokens), len(tokens)):
            raise InputError(
                f"{name} has shape {list(matrix.shape)}; {len(tokens)} tokens take [{len(tokens)}, {len(tokens)}]."
            )
    if first is not None and first not in layers:
        raise InputError(f"first={first!r} is no layer; they are {', '.join(layers)}.")
    rows = {
        name: [
            [float(f"{v:.4g}") for v in row[: i + 1]] for i, row in enumerate(matrix.detach().float().cpu().tolist())
        ]
        for name, matrix in layers.items()
    }
    data = {"tokens": [label(token) for token in tokens], "layers": rows, "first": first or list(layers)[-1]}
    payload = in_page(data)
    lines = "".join(f"<p style='opacity:.7'>{html.escape(note)}</p>" for note in notes)
    stops = ",".join(colour(share) for share in (-1.0, 0.0, 1.0))
    body = (
        f"<h1 style='font-size:1.4em'>{html.escape(title)}</h1>"
        "<p>Hover a token (or move to it with Tab) to see which earlier tokens it reads; click to keep it. "
        "Colours are of its own row, so they do not compare between tokens or layers. "
        "<label>Layer: <select id='gl-layer'></select></label></p>"
        "<p id='gl-text' style='font-family:monospace;font-size:1.1em;line-height:1.9;overflow-wrap:anywhere;cursor:pointer'></p>"
        f"<div style='height:.8em;width:16em;background:linear-gradient(to right,{stops})'></div><p id='gl-ends'></p>"
        f"<p id='gl-said' style='font-family:monospace'></p>{lines}<style>.gl-token{{{BOX}}}</style>"
        f"<script type='application/json' id='gl-data'>{payload}</script><script>{SCRIPT}</script>"
    )
    return Html(body, title)
