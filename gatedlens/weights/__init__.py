"""What a module's weight is when it is read, where its parameters do not hold it as floats: quantised, adapted, on the disk."""

from gatedlens.weights.as_read import AsRead, bare
from gatedlens.weights.reader import Reader
from gatedlens.weights.readers import READERS, reader_of, why_not_read

__all__ = ["READERS", "AsRead", "Reader", "bare", "reader_of", "why_not_read"]
