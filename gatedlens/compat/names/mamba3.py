"""What TransformerLens calls Mamba-3's points."""

from __future__ import annotations

from gatedlens.address.point import block_aliases
from gatedlens.compat.names.transformer_lens import BLOCK, MIXER, NORM, STATE

ALIASES = block_aliases("TransformerLens", *BLOCK, *NORM, *MIXER, *STATE)
