"""The page of a feature graph: self-contained HTML on which a click on a node shows what comes into it and goes out of it."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

from gatedlens.feature_graph.layout import Layout
from gatedlens.files import in_page
from gatedlens.plot.coloured_text import Html
from gatedlens.plot.drawing import label

if TYPE_CHECKING:
    from gatedlens.feature_graph.graph import FeatureGraph
else:  # that file imports this one
    FeatureGraph = Any

STYLE = """
.gl-graph{overflow-x:auto;border:1px solid rgba(128,128,128,.4);border-radius:4px}
.gl-graph text{font:11px system-ui,sans-serif;fill:currentColor}
.gl-node{fill:Canvas;stroke:currentColor;stroke-width:1.2;cursor:pointer}
.gl-node:hover,.gl-node.gl-on{stroke:#e0a000;stroke-width:3}
.gl-edge{fill:none;pointer-events:none}
.gl-two{display:flex;flex-wrap:wrap;gap:0 3em}
.gl-two td{padding:1px 10px 1px 0;font-size:90%}
.gl-two tr{cursor:pointer}
.gl-bar{display:inline-block;height:.7em}
"""
SCRIPT = """
const data = JSON.parse(document.getElementById('gl-data').textContent);
const wide = 34, high = 78, left = 150, svg = document.getElementById('gl-svg');
const spot = node => [left + (node.x + .7) * wide, 40 + (data.rows.length - 1 - node.y) * high];
const nodes = new Map(data.nodes.map(node => [node.id, node]));
const most = Math.max(...data.edges.map(edge => Math.abs(edge[2])), 1e-12);
svg.setAttribute('width', left + (data.width + 1) * wide);
svg.setAttribute('height', 100 + (data.rows.length - 1) * high);
function add(kind, attributes, text) {
  const one = document.createElementNS('http://www.w3.org/2000/svg', kind);
  for (const [name, value] of Object.entries(attributes)) one.setAttribute(name, value);
  if (text !== undefined) one.textContent = text;
  svg.append(one);
  return one;
}
data.rows.forEach((row, y) => add('text', {x: 6, y: spot({x: 0, y})[1] + 4}, row));
data.words.forEach((word, i) => {
  const x = spot({x: data.columns[i], y: 0})[0];
  add('text', {x, y: 62 + (data.rows.length - 1) * high, 'text-anchor': 'middle'}, word);
  add('text', {x, y: 76 + (data.rows.length - 1) * high, 'text-anchor': 'middle', opacity: .5}, i);
});
const lines = [...data.edges].reverse().map(([source, target, weight]) => {
  const [x, y] = spot(nodes.get(source)), [u, v] = spot(nodes.get(target)), share = Math.abs(weight) / most;
  const line = add('path', {class: 'gl-edge', d: `M${x},${y} C${x},${(y + v) / 2} ${u},${(y + v) / 2} ${u},${v}`,
    stroke: weight > 0 ? '#d62828' : '#1d4ed8', 'stroke-width': .5 + 3.5 * share});
  return {line, source, target, faint: .15 + .7 * share};
});
const marks = new Map(data.nodes.map(node => {
  const [x, y] = spot(node), r = 7;
  const d = {error: `M${x},${y - r} l${r},${r} l${-r},${r} l${-r},${-r} z`,
    token: `M${x - r},${y - r} h${2 * r} v${2 * r} h${-2 * r} z`, logit: `M${x - r},${y - r} h${2 * r} v${2 * r} h${-2 * r} z`,
  }[node.kind] || `M${x - r},${y} a${r},${r} 0 1,0 ${2 * r},0 a${r},${r} 0 1,0 ${-2 * r},0 z`;
  const mark = add('path', {class: 'gl-node', d, tabindex: 0, role: 'button', 'aria-label': node.said});
  const hint = document.createElementNS('http://www.w3.org/2000/svg', 'title');
  hint.textContent = `${node.id}: ${node.said}`;
  mark.append(hint);
  mark.onclick = () => show(node.id);
  mark.onkeydown = event => { if (event.key === 'Enter') show(node.id); };
  if (node.kind === 'logit') add('text', {x, y: y - 12, 'text-anchor': 'middle'}, node.short);
  return [node.id, mark];
}));
function table(where, edges, end) {
  const box = document.getElementById(where);
  box.replaceChildren();
  const top = Math.max(...edges.map(edge => Math.abs(edge[2])), 1e-12);
  for (const edge of edges.slice(0, 25)) {
    const row = box.insertRow(), other = nodes.get(edge[end]);
    const bar = document.createElement('span');
    bar.className = 'gl-bar';
    bar.style.width = `${60 * Math.abs(edge[2]) / top}px`;
    bar.style.background = edge[2] > 0 ? '#d62828' : '#1d4ed8';
    row.insertCell().textContent = edge[2].toPrecision(4);
    row.insertCell().append(bar);
    row.insertCell().textContent = `${other.id}: ${other.said}`;
    row.onclick = () => show(other.id);
  }
  if (!edges.length) box.insertRow().insertCell().textContent = 'none';
}
function show(id) {
  const node = nodes.get(id);
  marks.forEach((mark, name) => mark.classList.toggle('gl-on', name === id));
  const its = one => one.source === id || one.target === id;
  lines.forEach(one => one.line.setAttribute('opacity', its(one) ? 1 : Math.max(.2, one.faint / 2)));
  document.getElementById('gl-name').textContent = `${id}: ${node.said}` +
    (node.activation === null ? '' : `, ${node.kind === 'logit' ? 'logit' : 'activation'} ${node.activation.toPrecision(4)}`) +
    `, influence ${node.influence.toPrecision(3)}`;
  table('gl-into', data.edges.filter(edge => edge[1] === id), 0);
  table('gl-out', data.edges.filter(edge => edge[0] === id), 1);
}
show(data.first);
"""


def page_of(graph: FeatureGraph) -> Html:
    """`page_of(graph)`: `FeatureGraph.page`."""
    laid = Layout.of(graph)
    influence = graph.influence.tolist()
    nodes = [
        {
            "id": node.id,
            "kind": node.kind,
            "said": node.said,
            "short": label(node.said.removeprefix("logit of ").strip("'")),
            "x": laid.places[node.id][0],
            "y": laid.places[node.id][1],
            "activation": node.activation if node.kind in ("feature", "mixer", "logit") else None,
            "influence": influence[graph.place(node)],
        }
        for node in laid.nodes
    ]
    data = {
        "rows": laid.rows,
        "columns": laid.columns,
        "width": laid.width,
        "words": [label(word) for word in graph.words],
        "nodes": nodes,
        "edges": [list(edge) for edge in laid.edges],
        "first": next(node.id for node in laid.nodes if node.kind == "logit"),
    }
    title = f"Feature graph of {graph.facts.get('model', '')}"
    kept = graph.facts.get("kept")
    facts = [f"replacement {graph.replacement:.3f}, completeness {graph.completeness:.3f}"]
    if kept is not None:
        of_nodes, of_edges = kept["influence of nodes"], kept["influence of edges"]
        facts.append(f"kept: {of_nodes:.0%} of the influence of nodes, {of_edges:.0%} of that of edges")
    if laid.left_out:
        facts.append(f"{laid.left_out} weaker edges are not shown")
    body = (
        f"<style>{STYLE}</style><h1 style='font-size:1.4em'>{html.escape(title)}</h1>"
        f"<p>{html.escape('; '.join(facts))}. Click a node (or move to it with Tab, and Enter): red edges add to what it is made "
        "of, blue ones take away. Circles are features, diamonds errors, squares tokens and logits.</p>"
        "<div class='gl-graph'><svg id='gl-svg' role='img' aria-label='the graph'></svg></div>"
        "<h2 id='gl-name' style='font-size:1.1em'></h2>"
        "<div class='gl-two'><div><b>comes in</b><table id='gl-into'></table></div>"
        "<div><b>goes out</b><table id='gl-out'></table></div></div>"
        f"<script type='application/json' id='gl-data'>{in_page(data)}</script><script>{SCRIPT}</script>"
    )
    return Html(body, title)
