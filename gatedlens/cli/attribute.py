"""One explanation from the command line: what `gatedlens attribute` does.

    attribute(Source("gatedlens/mamba-recall"), method="lrp")
    attribute(Source("gatedlens/vim-digits"), image="three.png", method="occlusion")

Which tokens or patches a prediction comes from: a coloured text (a page) or a map over the image, and the numbers.
"""

from __future__ import annotations

from gatedlens import plot
from gatedlens.cli.answer import Answer, table
from gatedlens.cli.attention import read
from gatedlens.cli.outfolder import out_folder, stem, written
from gatedlens.cli.prompts import single
from gatedlens.cli.source import Source
from gatedlens.evaluation import explainer
from gatedlens.model.language import HookedLanguageModel


def attribute(
    source: Source, text: str | None = None, image: str | None = None, method: str = "lrp", answer: str | None = None,
    wrong: str | None = None, top: int = 5, out: str = "out",
) -> Answer:  # fmt: skip
    """The relevance of each token or patch to `answer` (minus `wrong`; of an image model the number of a class; None: what the
    model predicts). method: one of gl.attribution's, with options as in `gatedlens evaluate`."""
    explain = explainer(method)
    model = source.open()
    input, labels, said = read(model, text, image)
    chosen = [
        None if one is None else single(model, one, name) for one, name in ((answer, "--answer"), (wrong, "--wrong"))
    ]
    target = (chosen[0], chosen[1]) if wrong is not None else chosen[0]
    folder = out_folder(out)
    found = explain(model, input, target, progress=False)
    scores, places = found.scores[0].flatten(), found.order(0)[:top].tolist()
    if model.grid is not None:  # patches, without the class tokens
        labels = [f"{row},{column}" for row in range(found.shape[1]) for column in range(found.shape[2])]
    tops = [{"label": labels[place], "pos": place, "value": float(scores[place])} for place in places]
    what = _said(model, found.target)
    if isinstance(model, HookedLanguageModel):
        page = plot.text(scores, labels, found.title).save(stem(folder, source.name, f"attribute-{method}", ".html"))
        files = [str(page), *written(folder, source.name, f"attribute-{method}", found, figure=None)]
    else:
        files = written(folder, source.name, f"attribute-{method}", found)
    kind = "token" if isinstance(model, HookedLanguageModel) else "patch"
    return Answer(
        {
            "model": source.name, "input": said, "method": method, "target": found.target, "explains": what,
            "explained": found.explained.tolist()[0], "scores": scores.tolist(), "labels": labels, "tops": tops,
        },
        [
            f"{source.name} reads {said!r}",
            f"{method} of {what}, which is {found.explained.tolist()[0]:+.4f}; the most relevant first:",
            table(f"{kind} position score", [[repr(one["label"]), one["pos"], one["value"]] for one in tops]),
        ],
        files=files,
    )  # fmt: skip


def _said(model: object, target: object) -> str:
    """The target in words: ids become tokens where there are some."""

    def word(ids: list[int]) -> str:
        return repr(model.to_string([ids[0]])) if isinstance(model, HookedLanguageModel) else f"class {ids[0]}"

    if isinstance(target, dict):
        return f"the logit of {word(target['right'])} - {word(target['wrong'])}"
    return f"the logit of {word(target)}"  # type: ignore[arg-type]
