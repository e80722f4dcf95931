"""A corpus: where its documents come from, how they become tokens or pixels, and how they are batched."""

from gatedlens.store.corpus.corpus import Corpus, Document

# fmt: off
__all__ = [
    "Corpus", "Document",
]
# fmt: on
