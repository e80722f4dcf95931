"""In a notebook every picture appears once, and pyplot knows of none."""

from __future__ import annotations

import os

import matplotlib
import pytest
import torch

import gatedlens as gl
from tests.conftest import ROOT
from tests.plot import gallery

BEGIN = """
import torch, gatedlens as gl
from tests.plot import gallery
from gatedlens.evaluation.curves import AXES, Curve
model = gl.from_pretrained("gatedlens/mamba-recall")
prompt = "B 4 dog F 1 gnu ? F"
stack = gl.implicit_attention(model, prompt)
found = gl.Result(torch.randn(2, 3, 4), ("layer", "pos", "head"), title="T")
"""
ONCE = {
    "heatmap": "gl.plot.heatmap(stack[1])",
    "layers": "gl.plot.layers(stack)",
    "heads": "gl.plot.heads(torch.rand(3, 5, 5))",
    "bars": "found.at(layer=0, pos=0).plot()",
    "map": "found.at(layer=0).plot()",
    "panels": "found.plot()",
    "circuit": "gallery.circuit(2, 5).plot()",
    "lens": "gl.lens.logit_lens(model, prompt).plot()",
    "activation": 'gl.plot.activation(model.run_with_cache(prompt)[1], ("dt", 1))',
    "image": "gl.plot.image(torch.rand(3, 8, 8))",
    "ours": "figure, axes = gl.plot.panels(1, 2); gl.plot.heatmap(torch.rand(3, 3), ax=axes[0][0])",
    "shown": "gl.plot.heatmap(torch.rand(3, 3)).show()",
}
AS_HTML = {
    "text": "gl.plot.text(stack[1].mean()[0, -1])",
    "attribution": "gl.attribution.lrp(model, prompt)",
    "model": "model",
    "result": "found",
    "view": "stack.abs_mean(progress=False)[0]",
    "profile": "stack.profiles(progress=False)",
}
END = "import matplotlib.pyplot as plt\nplt.get_fignums()"


@pytest.mark.slow
def test_every_plot_appears_once_in_a_notebook(monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    # The second half is with pyplot known to the kernel, whose hooks look for open figures behind each cell.
    sources = [BEGIN, *ONCE.values(), *AS_HTML.values(), END, *ONCE.values(), END]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    _, *cells = book.cells
    names = [*ONCE, *AS_HTML, "end", *ONCE, "end"]
    for name, cell in zip(names, cells, strict=True):
        shown = [out["data"] for out in cell.outputs if out.output_type in ("display_data", "execute_result")]
        if name == "end":
            assert shown[0]["text/plain"] == "[]", "pyplot holds figures"
        elif name in ONCE:
            assert len([data for data in shown if "image/png" in data]) == len(shown) == 1, name
        else:
            assert len([data for data in shown if "text/html" in data]) == len(shown) == 1, name


def test_pyplot_knows_of_no_picture():
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.close("all")
    for _ in range(25):
        gl.plot.heatmap(torch.rand(3, 3))
    gl.plot.layers({0: torch.rand(3, 3)})
    gl.Result(torch.rand(2, 3), ("layer", "pos")).plot()
    gallery.circuit(2, 3).plot()
    picture = gl.plot.panels(2, 2)[0]
    assert plt.get_fignums() == []
    assert picture._repr_png_().startswith(b"\x89PNG") and "\n" not in repr(picture)
    picture.show()
    assert plt.get_fignums() == [], "a window that is closed leaves nothing behind"


def test_an_ax_of_the_callers_is_drawn_into():
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    theirs, ax = plt.subplots()
    assert gl.plot.heatmap(torch.rand(3, 3), ax=ax) is theirs
    assert gl.Result(torch.rand(2, 3), ("layer", "pos")).plot(ax=plt.subplots()[1]).axes
    plt.close("all")
