"""A checkpoint layout: the config of an original (not transformers') checkpoint, and where its tensors go.

    class HookedMine(HookedLanguageModel):
        layout = MyLayout()                # gl.from_pretrained then reads a folder, or one file, that is laid out so

`formats/` holds those that gatedlens knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from gatedlens.model.fields import Field


class Layout:
    """`Layout()` knows no config: an architecture that is read by transformers alone."""

    fields: ClassVar[Mapping[str, Field]] = {}  # what the keys of its config.json may hold

    def knows(self, config: Mapping[str, Any]) -> bool:
        """`layout.knows(config)`: whether a config.json is of this layout."""
        return False

    def empty(self, config: dict[str, Any]) -> nn.Module:
        """`layout.empty(config)`: a module for the parameters of a checkpoint with this config; CheckpointError for one that
        cannot be built.
        """
        raise NotImplementedError

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """`layout.rename(state)`: a checkpoint's tensors by the names of `empty`; CheckpointError for what cannot be."""
        return state

    def config_of_file(
        self, state: Mapping[str, Tensor], told: Mapping[str, Any], variant: str | None
    ) -> dict[str, Any] | None:
        """`layout.config_of_file(state, told, variant)`: the config for `empty` of a checkpoint that is one file; None when its
        keys are not of this layout.

        state: its tensors. told: what its training script left beside them (`args`). variant: what the caller says.
        """
        return None
