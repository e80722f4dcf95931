"""Node: what a feature graph is made of, and by which name it is called.

    feature    a feature of a dictionary that is on at a position          "1_12_7": layer 1, feature 12, position 7
    mixer      what a mixer writes at a position, along itself             "1_0_7"
    error      what nodes and biases leave over at a site and position     "1_-1_7"
    token      what a token's embedding writes                             "E_21_7": token id 21
    bias       what is written whatever is read, all of it together        "E_-1_0"
    logit      a logit, or the difference of two                           "3_17_20": of a model of 2 layers, token id 17

The names are circuit-tracer's. Of several dictionaries of a layer, and of the heads of one that reads each by itself, features
are counted on, in the order in which they write (and so are the errors of dictionaries: -1, -2, ...).
"""

from __future__ import annotations

from dataclasses import dataclass

FEATURE, MIXER, ERROR, TOKEN, BIAS, LOGIT = KINDS = ("feature", "mixer", "error", "token", "bias", "logit")
TARGETS = (FEATURE, MIXER, LOGIT)  # what has edges that come in


@dataclass(frozen=True)
class Node:
    """`graph.node("1_12_7")`. point: where it writes ("" for a logit); number: which feature of its own dictionary it is, or
    which token; activation: how strongly it is on (of an error, a token and the bias 1; of a logit the logit); said: in words."""

    id: str
    kind: str
    layer: int  # -1: the embedding; n_layers: the logits
    pos: int
    number: int
    point: str
    activation: float
    said: str

    @property
    def rank(self) -> int:
        """`node.rank`: the number in the middle of its name."""
        return int(self.id.split("_")[1])

    def __str__(self) -> str:
        return f"{self.id} ({self.said})"
