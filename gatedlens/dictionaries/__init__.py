"""Dictionaries: sparse autoencoders, transcoders and crosscoders at any point or state of a model.

dictionary = gl.dictionaries.Dictionary(W_enc, W_dec, b_enc, b_dec, point="blocks.3.mixer.hook_gated", activation=...)
"""

from gatedlens.dictionaries.activation import Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from gatedlens.dictionaries.dictionary import Dictionary

__all__ = ["Activation", "BatchTopK", "Dictionary", "Gated", "JumpReLU", "ReLU", "TopK"]
