"""A circuit from the command line: what `gatedlens circuit` does.

    circuit(Source("gatedlens/mamba-recall"), top=8)

Which edges between blocks carry the difference between two prompts, scored by gradients or by patching; how much of the behaviour
the strongest of them keep; a picture and the circuit as JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gatedlens import circuits, metrics
from gatedlens.cli.answer import Answer, table
from gatedlens.cli.outfolder import out_folder, stem
from gatedlens.cli.prompts import pair_of, single
from gatedlens.cli.source import Source
from gatedlens.errors import InputError, did_you_mean

METHODS: dict[str, Callable[..., circuits.Circuit]] = {
    "eap": circuits.eap,
    "eap_ig": circuits.eap_ig,
    "edge_patch": circuits.edge_patch,
}


def circuit(
    source: Source, clean: str | None = None, corrupted: str | None = None, answer: str | None = None,
    wrong: str | None = None, method: str = "eap_ig", top: int = 8, out: str = "out", progress: bool = False,
) -> Answer:  # fmt: skip
    """The `top` strongest edges, with the faithfulness of these alone: 1 is what the whole model does, 0 what is left of it with
    everything corrupted. Of the prompts and answers all or none are given: a bundled recall model has a pair of its own."""
    if method not in METHODS:
        raise InputError(f"--method {method}: it is {' or '.join(METHODS)}.{did_you_mean(method, METHODS)}")
    if top < 1:
        raise InputError(f"--top {top}: give how many edges to keep, 1 or more.")
    model = source.open_language("circuit")
    clean, corrupted, answer, wrong = pair_of("circuit", source.name, clean, corrupted, answer, wrong)
    right, other = single(model, answer, "--answer"), single(model, wrong, "--wrong")
    metric, folder = metrics.logit_difference(right, other), out_folder(out)
    options: dict[str, Any] = {} if method == "eap" else {"progress": progress}  # one backward shows none
    every = METHODS[method](model, clean, corrupted, metric, **options)
    kept = every.top(top)
    faithful = kept.faithfulness(model, clean, corrupted, metric)
    rows = [[edge.sender, edge.receiver, kept.score(*edge)] for edge in kept.edges]
    shown = f"the {len(kept)} strongest of {len(every)} edges; alone they keep {faithful:.0%} of the difference:"
    where = stem(folder, source.name, f"circuit-{method}")
    kept.plot().savefig(f"{where}.png", dpi=110, bbox_inches="tight")
    return Answer(
        {
            "model": source.name, "clean": clean, "corrupted": corrupted, "answer": answer, "wrong": wrong, "method": method,
            "edges": [dict(zip(("sender", "receiver", "score"), row, strict=True)) for row in rows], "faithfulness": faithful,
        },
        [
            f"clean:     {clean!r} -> {answer!r}",
            f"corrupted: {corrupted!r} -> {wrong!r}",
            shown,
            table("sender receiver score", rows),
        ],
        files=[f"{where}.png", str(kept.save(f"{where}.json"))],
    )  # fmt: skip
