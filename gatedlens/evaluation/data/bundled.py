"""The bundled data as samples: digits with their ink, key-value recall with its answer, and windows of Moby-Dick.

    digits(), recall(), moby()        # `open_samples("digits")`, ...

The ink of a digit is where at least 8 of the 16 points that a pixel was counted from are ink.
"""

from __future__ import annotations

from gatedlens.data import digits as load_digits
from gatedlens.data import text as load_text
from gatedlens.evaluation.data.sample import Listed, Sample
from gatedlens.tasks import recall as make_recall

INK = 0.0  # of pixels in [-1, 1]: 8 of 16 points
BOS_BYTE = 256
WINDOW = 48  # bytes of a window, its BOS not counted


def digits() -> Listed:
    """The 360 held-out digits: image [1, 8, 8], class, and the ink as mask."""
    images, labels = load_digits()["test"]
    pairs = enumerate(zip(images, labels.tolist(), strict=True))
    return Listed(
        "digits",
        [Sample(f"test/{i}", image, label, (image[0] >= INK).long(), classes=10) for i, (image, label) in pairs],
    )


def recall(n: int = 4096, seed: int = 7) -> Listed:
    """`n` prompts of `gl.tasks.recall`: tokens, answer, and where it stands."""
    batch = make_recall(n, seed)
    rows = enumerate(zip(batch.tokens, batch.answers.tolist(), batch.answer_pos.tolist(), strict=True))
    return Listed("recall", [Sample(f"recall/{i}", tokens, answer, truth=(at,)) for i, (tokens, answer, at) in rows])


def moby(window: int = WINDOW) -> Listed:
    """Windows of the held-out part of the book behind a BOS; what is explained is the byte that the model predicts."""
    _, held_out = load_text()
    rows = held_out[: len(held_out) // window * window].reshape(-1, window).tolist()
    return Listed("moby", [Sample(f"byte {i * window}", [BOS_BYTE, *row]) for i, row in enumerate(rows)])


BUNDLED = {"digits": digits, "recall": recall, "moby": moby}
