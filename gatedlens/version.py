"""The version of gatedlens: that of `pyproject.toml`."""

__version__ = "0.1.0"
