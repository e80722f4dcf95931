"""Every picture at every size that users have: `python -m tests.plot.gallery FOLDER [WORD]` draws those with the word in the name.

Numbers are made up, sizes are not: 2, 24 and 64 layers, 8, 60 and 300 tokens, 14 x 14 patches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import gatedlens as gl
from gatedlens.circuits import Circuit
from gatedlens.evaluation.curves import AXES, Curve
from gatedlens.plot import results

LAYERS, LENGTHS = (2, 24, 64), (8, 60, 300)
WORDS = "It was the whiteness of the whale that above all things app alled me , and\n yet".split(" ")


def tokens(n: int) -> list[str]:
    return ["<bos>", *(f" {WORDS[i % len(WORDS)]}" for i in range(n - 1))][:n]


def attention(n: int, seed: int = 0) -> torch.Tensor:
    """Something like a layer's: signed, decaying, with a few far reads."""
    random = torch.Generator().manual_seed(seed)
    near = torch.arange(n)
    weights = torch.exp(-(near[:, None] - near[None, :]).abs() / (3 + seed % 5)) * torch.rand(n, n, generator=random)
    weights[n // 2, n // 3] = -0.8
    return (weights * 3.0 ** -(seed % 4)).tril()


def sweep(*shape: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random) * torch.rand(shape, generator=random) ** 4


def circuit(layers: int, edges: int | None) -> Circuit:
    names = ["embed", *(f"{i}.{kind}" for i in range(layers) for kind in ("mixer", "mlp")), "logits"]
    n = len(names) - 1
    values = sweep(n, n).masked_fill(~torch.ones(n, n, dtype=torch.bool).triu(), torch.nan)
    whole = Circuit.of(gl.Result(values, ("sender", "receiver"), {"sender": names[:-1], "receiver": names[1:]}, "EAP"))
    return whole if edges is None else whole.top(edges)


def grid(side: int) -> Any:
    return gl.HookedViM.tiny(img_size=4 * side).grid


def pictures() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, what draws it)"""
    for n in LENGTHS:
        words = tokens(n)
        layer_by_token = {"pos": words}
        yield f"heatmap-{n}", lambda n=n, w=words: gl.plot.heatmap(attention(n), w, value="|attention| (mean over channels)")
        yield f"text-{n}", lambda n=n, w=words: gl.plot.text(sweep(n), w, "lrp of mamba-130m")
        yield f"bars-{n}", lambda n=n, s=layer_by_token: gl.Result(sweep(n), ("pos",), s, "Occlusion", "logit difference").plot()
        for layers in LAYERS:
            yield (
                f"layers-{layers}x{n}",
                lambda n=n, w=words, k=layers: gl.plot.layers({i: attention(n, i) for i in range(k)}, w),
            )
            title = "Patching blocks.*.hook_resid_pre of mamba-130m-hf"
            yield (
                f"sweep-{layers}x{n}",
                lambda n=n, k=layers, s=layer_by_token: gl.Result(
                    sweep(k, n), ("layer", "pos"), s, title, "normalised logit difference (corrupted 0, clean 1)"
                ).plot(),
            )
            yield (
                f"ranks-{layers}x{n}",
                lambda n=n, k=layers, s=layer_by_token: gl.Result(
                    torch.linspace(11, 0, k).exp().sub(1).round()[:, None].expand(k, n).contiguous(),
                    ("layer", "pos"), s, "Logit lens: rank of ' whale'", "rank (0: the likeliest)", {"scale": "log"},
                ).plot(),
            )  # fmt: skip
            yield (
                f"lens-{layers}x{n}",
                lambda n=n, k=layers, s=layer_by_token, w=words: results.words(
                    gl.Result(torch.rand(k, n), ("layer", "pos"), s, "Logit lens: probability of the likeliest token", "probability"),
                    [w[i % 3 :] + w[: i % 3] for i in range(k)],
                ),
            )
            for heads in (4, 16):
                yield (
                    f"by-head-{layers}x{n}x{heads}",
                    lambda n=n, k=layers, h=heads, s=layer_by_token: gl.Result(
                        sweep(k, n, h), ("layer", "pos", "head"), s, "Patching hook_scan by head", "score (corrupted 0, clean 1)"
                    ).plot(),
                )
    yield "layers-one-scale", lambda: gl.plot.layers({i: attention(8, i) for i in range(3)}, tokens(8), one_scale=True)
    yield "layers-some-pos", lambda: gl.plot.layers({i: attention(300, i) for i in range(2)}, tokens(300), pos=slice(-20, None))
    yield "text-some-pos", lambda: gl.plot.text(sweep(300), tokens(300), pos=slice(100, 140))
    for heads in (4, 16, 64):
        yield f"heads-{heads}", lambda h=heads: gl.plot.heads(torch.stack([attention(24, i) for i in range(h)]), tokens(24))
    for layers in LAYERS:
        for edges in (8, 40, None):
            yield f"circuit-{layers}-{edges or 'all'}", lambda k=layers, e=edges: circuit(k, e).plot()
    for layers in LAYERS:
        yield (
            f"one-row-{layers}",
            lambda k=layers: gl.Result(sweep(k, 1), ("layer", "pos"), {"pos": ["?"]}, "Patching at one position", "score").plot(),
        )
        names = ["embed", *(f"{i}_{kind}_out" for i in range(layers) for kind in ("mixer", "mlp"))]
        yield (
            f"components-{layers}",
            lambda k=len(names), s=names: gl.Result(
                sweep(k), ("component",), {"component": s}, "Direct logit attribution", "logit difference"
            ).plot(),
        )
    for side in (3, 14):
        image = torch.linspace(-1, 1, 4 * side).outer(torch.linspace(0, 1, 4 * side)).expand(3, -1, -1)
        yield f"over-image-{side}", lambda g=grid(side), x=image, s=side: gl.plot.over_image(sweep(s, s), x, g, value="relevance")
        yield f"image-{side}", lambda x=image: gl.plot.image(x, "a long title of an image, read as a whale (97%), or what else it is")
        yield f"patches-{side}", lambda s=side: gl.plot.heatmap(attention(s * s), [f"{i},{j}" for i in range(s) for j in range(s)])
    steps = {"share": [i / 10 for i in range(1, 10)]}
    yield "curve", lambda: Curve(torch.rand(20, 9), AXES, steps, "lrp, positive perturbation", "probability of the class").plot()
    for n in LENGTHS:
        yield f"activation-{n}", lambda n=n: activation(n)
    yield "one-cell", lambda: gl.Result(torch.tensor([[0.5]]), ("layer", "pos"), title="One", value="score").plot()
    yield "tiny-numbers", lambda: gl.Result(-torch.rand(2, 8) * 3e-7, ("layer", "pos"), title="Tiny", value="score").plot()


def activation(n: int) -> Any:
    model = gl.HookedMamba.tiny()
    _, cache = model.run_with_cache(torch.arange(n)[None] % 20, names_filter="blocks.1.mixer.hook_decay")
    return gl.plot.activation(cache, ("decay", 1), tokens(n))


def save(figure: Any, stem: Path) -> None:
    if isinstance(figure, gl.plot.Html):
        figure.save(stem.with_suffix(".html"))
    else:
        figure.savefig(stem.with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    folder, word = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in pictures():
        if word in name:
            save(draw(), folder / name)
