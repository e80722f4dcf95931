"""The door to circuitsvis: `for_circuitsvis(attention)` gives what its functions draw; see `compat/circuitsvis.py`."""

from gatedlens.compat.circuitsvis import for_circuitsvis

__all__ = ["for_circuitsvis"]
