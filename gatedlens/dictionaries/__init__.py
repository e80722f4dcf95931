"""Dictionaries: sparse autoencoders, transcoders and crosscoders at any point or state of a model.

    with gl.dictionaries.splice(model, sae):                      # nothing changes until a feature is edited
        logits, cache = model.run_with_cache(tokens, names_filter="*.sae.hook_features")

`Dictionary` is the weights and what they read and write; `splice` puts it in a forward.
"""

from gatedlens.dictionaries.activation import Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from gatedlens.dictionaries.dictionary import Dictionary
from gatedlens.dictionaries.example import Example
from gatedlens.dictionaries.finding import examples
from gatedlens.dictionaries.found_examples import Examples
from gatedlens.dictionaries.layouts import load
from gatedlens.dictionaries.measuring import Quality, measure
from gatedlens.dictionaries.splicing import Spliced, splice
from gatedlens.dictionaries.training import train
from gatedlens.dictionaries.write_atom import WriteAtom

# fmt: off
__all__ = [
    "Activation", "BatchTopK", "Dictionary", "Example", "Examples", "Gated", "JumpReLU", "Quality", "ReLU", "Spliced", "TopK",
    "WriteAtom", "examples", "load", "measure", "splice", "train",
]
# fmt: on
