"""Training data: documents → tokens → packed samples → global batches, in the same order on every layout."""

from jaxpar.data.cache import token_cache
from jaxpar.data.dynamic import DocumentCost, plan_rows
from jaxpar.data.dynamic_loader import DocumentSource, build_dynamic_loader, pack_row
from jaxpar.data.formats import DataError
from jaxpar.data.loader import BatchLoader, BatchOrder, build_loader
from jaxpar.data.packing import PackedSource, open_dataset
from jaxpar.data.text import documents
from jaxpar.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "BatchLoader",
    "BatchOrder",
    "DataError",
    "DocumentCost",
    "DocumentSource",
    "PackedSource",
    "Tokenizer",
    "build_dynamic_loader",
    "build_loader",
    "documents",
    "load_tokenizer",
    "open_dataset",
    "pack_row",
    "plan_rows",
    "token_cache",
]
