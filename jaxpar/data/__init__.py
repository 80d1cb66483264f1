"""Training data: documents -> tokens -> packed samples -> global batches in an order that no layout changes."""

from jaxpar.data.loader import BatchLoader, build_loader
from jaxpar.data.packing import PackedSource, open_dataset
from jaxpar.data.text import DataError, documents
from jaxpar.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "BatchLoader",
    "DataError",
    "PackedSource",
    "Tokenizer",
    "build_loader",
    "documents",
    "load_tokenizer",
    "open_dataset",
]
