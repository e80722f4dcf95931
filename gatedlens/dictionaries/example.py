"""Example: a place at which a feature fires, with the words around it."""

from __future__ import annotations

from dataclasses import dataclass

from gatedlens.markup import number


@dataclass(frozen=True)
class Example:
    """A feature at a place: its `value` at position `pos` of a sample; `words` and `activations` of what stands around it."""

    feature: int
    sample: int
    pos: int
    value: float
    words: tuple[str, ...]
    activations: tuple[float, ...]
    at: int  # which of the words

    def __repr__(self) -> str:
        said = " ".join(f"[{word}]" if i == self.at else word for i, word in enumerate(self.words))
        return f"Example(feature {self.feature}, {number(self.value)} at {self.pos} of sample {self.sample}: {said})"
