"""The bundled models and data, and `python -m gatedlens.bundled.make`, which makes them."""
