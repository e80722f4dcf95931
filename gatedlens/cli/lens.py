"""The logit lens from the command line: what `gatedlens lens` does.

    lens(Source("gatedlens/mamba-moby"), text="It was the whiteness of the whale")

What each layer's residual stream would predict at one position, and a picture of all positions.
"""

from __future__ import annotations

from gatedlens.cli.answer import Answer, table
from gatedlens.cli.demo import default_text
from gatedlens.cli.outfolder import out_folder, written
from gatedlens.cli.source import Source
from gatedlens.errors import InputError
from gatedlens.lens import FittedLens, logit_lens
from gatedlens.runs.inputs import word


def lens(
    source: Source, text: str | None = None, answer: str | None = None, position: int | None = None, top: int = 3,
    fitted: str | None = None, out: str = "out",
) -> Answer:  # fmt: skip
    """The `top` likeliest tokens after each layer at `position` (None: the last), and the rank of `answer`, if one is given.

    fitted: the file of a FittedLens to read by; None: the logit lens.
    """
    if top < 1:
        raise InputError(f"--top {top}: give how many tokens, 1 or more.")
    model = source.open_language("lens")
    text = default_text(source.name) if text is None else text
    found = logit_lens(model, text) if fitted is None else FittedLens.load(fitted).read(model, text)
    tokens = model.to_str_tokens(text)
    place = len(tokens) - 1 if position is None else position
    if not -len(tokens) <= place < len(tokens):
        raise InputError(f"--position {place} is out of range: the text has {len(tokens)} tokens.")
    place %= len(tokens)
    asked = None if answer is None else int(model.to_single_token(answer))
    folder, depths = out_folder(out), []
    for layer in found.layers:
        shares = found.logits(layer)[0, place].float().softmax(-1)
        best = shares.topk(min(top, len(shares)))
        likely = [(word(model, i), p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
        depth = {"layer": layer, "top": likely}
        if asked is not None:
            depth |= {"answer": float(shares[asked]), "rank": int((shares > shares[asked]).sum())}
        depths.append(depth)
    shown = found.top() if answer is None else found.probability(answer)
    figure = found.plot() if answer is None else shown.plot()
    columns = "after_layer " + " ".join(f"likeliest_{i + 1}" for i in range(len(depths[0]["top"])))
    rows = [[one["layer"], *(f"{token!r} {p:.0%}" for token, p in one["top"])] for one in depths]
    if asked is not None:
        columns += " answer rank"
        rows = [[*row, f"{one['answer']:.1%}", one["rank"]] for row, one in zip(rows, depths, strict=True)]
    return Answer(
        {
            "model": source.name,
            "lens": found.called,
            "text": text,
            "position": place,
            "token": tokens[place],
            "answer": answer,
            "layers": depths,
        },
        [
            f"{source.name} reads {text!r}; after {tokens[place]!r} at {place} each layer would say:",
            table(columns, rows),
        ],
        files=written(folder, source.name, "lens", shown, figure),
    )
