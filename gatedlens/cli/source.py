"""Source: the model that a command is given, by its name and by how it is opened; nothing is read before `open`.

source = Source("gatedlens/mamba-moby", dtype="float64")
source.name, source.open()
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gatedlens.model.language import HookedLanguageModel


@dataclass(frozen=True)
class Source:
    """What the options say; None is what `gl.from_pretrained` does of its own accord."""

    name: str
    tokenizer: str | None = None
    variant: str | None = None
    device: str | None = None
    dtype: str | None = None
    revision: str | None = None
    offload: str | None = None

    def open(self) -> Any:
        """`source.open()`: the hooked model."""
        from gatedlens.loading import from_pretrained

        how = {name: value for name, value in vars(self).items() if name != "name" and value is not None}
        return from_pretrained(self.name, **how)

    def open_language(self, command: str) -> HookedLanguageModel:
        """`source.open_language("lens")`: the model; InputError if it reads no text."""
        from gatedlens.errors import InputError
        from gatedlens.model.language import HookedLanguageModel

        model = self.open()
        if not isinstance(model, HookedLanguageModel):
            raise InputError(f"{self.name} reads images, and gatedlens {command} takes a model that reads text.")
        return model
