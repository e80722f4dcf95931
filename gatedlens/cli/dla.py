"""Direct logit attribution from the command line: what `gatedlens dla` does.

    dla(Source("gatedlens/mamba-recall"), by="token")

Who wrote a logit (or a difference of two): the components of the model, the source tokens, or the heads. All of it sums exactly.
"""

from __future__ import annotations

from gatedlens.cli.answer import Answer, cells, table
from gatedlens.cli.demo import default_text
from gatedlens.cli.outfolder import out_folder, written
from gatedlens.cli.prompts import likeliest, single
from gatedlens.cli.source import Source
from gatedlens.errors import InputError, did_you_mean
from gatedlens.lens import head_attribution, head_token_attribution, logit_attribution, token_attribution

BY = {
    "component": logit_attribution,
    "token": token_attribution,
    "head": head_attribution,
    "head-token": head_token_attribution,
}


def dla(
    source: Source, text: str | None = None, answer: str | None = None, wrong: str | None = None, by: str = "component",
    position: int | None = None, top: int = 10, out: str = "out",
) -> Answer:  # fmt: skip
    """The shares of logit[answer] (minus logit[wrong]) at `position` (None: the last), the largest first."""
    if by not in BY:
        raise InputError(f"--by {by}: it is {' or '.join(BY)}.{did_you_mean(by, BY)}")
    model = source.open_language("dla")
    text = default_text(source.name) if text is None else text
    right = likeliest(model, text, position) if answer is None else single(model, answer, "--answer")
    other = None if wrong is None else single(model, wrong, "--wrong")
    folder = out_folder(out)
    found = BY[by](model, text, right, other, pos=position).at(batch=0)
    said = model.to_string([right])
    what = f"the logit of {said!r}" + (f" - {wrong!r}" if wrong is not None else "")
    tops = found.top(top)
    names = list(found.axes)
    rows = cells(tops, names)
    total = float(found.values.double().sum())
    return Answer(
        {
            "model": source.name, "text": text, "answer": said, "wrong": wrong, "by": by, "axes": names, "sum": total,
            "tops": tops,
        },
        [
            f"{source.name} reads {text!r}",
            f"what gives {what} = {total:+.4f}, the largest of {found.values.numel()} shares:",
            table(" ".join([*names, "share"]), rows),
        ],
        files=written(folder, source.name, f"dla-{by}", found),
    )  # fmt: skip
