"""What TransformerLens calls Mamba-2's points."""

from __future__ import annotations

from gatedlens.address.point import block_aliases
from gatedlens.compat.names.transformer_lens import BLOCK, DT, MIXER, NORM, STATE

ALIASES = block_aliases("TransformerLens", *BLOCK, *NORM, *MIXER, DT, *STATE)
