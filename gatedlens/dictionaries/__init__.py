"""Dictionaries: sparse autoencoders, transcoders and crosscoders at any point or state of a model.

    with gl.dictionaries.splice(model, sae):                      # nothing changes until a feature is edited
        logits, cache = model.run_with_cache(tokens, names_filter="*.sae.hook_features")

`Dictionary` is the weights and what they read and write; `splice` puts it in a forward.
"""

from gatedlens.dictionaries.activation import Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from gatedlens.dictionaries.dictionary import Dictionary
from gatedlens.dictionaries.splicing import Spliced, splice

__all__ = ["Activation", "BatchTopK", "Dictionary", "Gated", "JumpReLU", "ReLU", "Spliced", "TopK", "splice"]
