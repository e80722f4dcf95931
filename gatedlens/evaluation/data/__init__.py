"""Data sets that explanations are tried on, one reader a file."""

from gatedlens.evaluation.data.opening import open_samples
from gatedlens.evaluation.data.sample import Listed, Prompt, Sample, Samples

# fmt: off
__all__ = [
    "Listed", "Prompt", "Sample", "Samples", "open_samples",
]
# fmt: on
