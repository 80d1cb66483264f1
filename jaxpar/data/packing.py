"""A corpus as one flat array of tokens, cut into training samples of equal length.

The packing is that of Megatron-LM's `GPTDataset` (and GPT-3): documents follow one another, each ends with the
end-of-document token, and sample i is the `seq_length + 1` tokens from `i * seq_length`. No token is
lost or repeated as a target. Segment ids and positions that restart separate the documents of a sample.
"""

import bisect
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxpar.data.cache import TokenCache, token_cache
from jaxpar.data.disk_array import DiskArray
from jaxpar.data.formats import DataError
from jaxpar.data.tokenizer import Tokenizer


class PackedSource:
    """Random access to packed samples (a Grain `RandomAccessDataSource`).

    Args:
      tokens: [num_tokens], any integer dtype; every document with its end-of-document token.
      doc_ends: int64 [num_documents], ascending: one past the last token of each document.
      seq_length: tokens in a sample, S.
      folder: the token cache that holds the arrays, if any; a pickle then has its path instead of the corpus.
      across_documents: tokens attend across documents, so positions do not start anew with each.

    `source[i]` is a dict of arrays [S]; sample i starts at token i * S:
      tokens: int32, the inputs; 0 in padding.
      targets: int32, the token after each input.
      loss_mask: float32, 1 where the target exists and is in the same document as its input, else 0.
      segment_ids: int32, the number of the document within the sample, from 1; 0 in padding.
      positions: int32, distance from the start of the document, or of the sample if the document started before it.

    Only the last sample is padded. Over all samples, every pair of adjacent tokens in a document is trained on once.

    Raises:
      DataError: no document has two tokens.
      IndexError: an index outside 0 ... len - 1.

    Reading a sample raises `DataError` if the cache has been cut short or holds what is no token.
    """

    def __init__(
        self,
        tokens: np.ndarray | DiskArray,
        doc_ends: np.ndarray | DiskArray,
        seq_length: int,
        *,
        folder: Path | None = None,
        across_documents: bool = False,
    ):
        if seq_length < 1:
            raise DataError(f"runner.seq_length: must be at least 1, got {seq_length}")
        self.tokens, self.doc_ends, self.seq_length, self.folder = tokens, doc_ends, seq_length, folder
        self.across_documents = across_documents
        self.num_tokens, self.num_documents = len(tokens), len(doc_ends)
        last = self.num_documents - 1
        while last >= 0 and doc_ends[last] - (doc_ends[last - 1] if last else 0) < 2:
            last -= 1  # a document of one token has no target, and a sample without targets would be a wasted row
        if last < 0:
            raise DataError("no document has two tokens or more, so there is nothing to predict")
        last_input = int(doc_ends[last]) - 2
        self._num_samples = last_input // seq_length + 1

    @classmethod
    def read(cls, folder: Path, seq_length: int, *, across_documents: bool = False) -> "PackedSource":
        """Opens a token cache. Raises `DataError` if a file is missing or too short."""
        cache = TokenCache(folder)
        return cls(cache.tokens, cache.doc_ends, seq_length, folder=folder, across_documents=across_documents)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self._num_samples}")
        start = index * self.seq_length
        stop = min(start + self.seq_length + 1, self.num_tokens)
        first, last = (bisect.bisect_right(self.doc_ends, token) for token in (start, stop - 1))
        ends = self.doc_ends[first : last + 1] - start
        offset = np.arange(stop - start)
        document = np.searchsorted(ends, offset, side="right")
        document_start = np.append(0, ends[:-1])
        window = self.tokens[start:stop]
        positions = offset if self.across_documents else offset - document_start[document]

        def padded(values: np.ndarray, dtype: type) -> np.ndarray:
            row: np.ndarray = np.zeros(self.seq_length, dtype)
            values = values[: self.seq_length]
            row[: len(values)] = values
            return row

        return {
            "tokens": padded(window, np.int32),
            "targets": padded(window[1:], np.int32),
            "loss_mask": padded(document[1:] == document[:-1], np.float32),
            "segment_ids": padded(document + 1, np.int32),
            "positions": padded(positions, np.int32),
        }

    def __repr__(self) -> str:
        size = f"{self.num_tokens:,} tokens, {self.num_documents:,} documents"
        return f"PackedSource({size}, {self._num_samples:,} samples of {self.seq_length})"

    def __reduce__(self):
        # The path, not the corpus, is sent to worker processes.
        if self.folder is not None:
            read = functools.partial(PackedSource.read, across_documents=self.across_documents)
            return read, (self.folder, self.seq_length)
        make = functools.partial(PackedSource, across_documents=self.across_documents)
        return make, (self.tokens, self.doc_ends, self.seq_length)


def open_dataset(
    paths: Sequence[str | Path],
    *,
    tokenizer: Tokenizer,
    text_key: str = "text",
    seq_length: int,
    cache_dir: str | Path,
    setting: str = "data.train_data_paths",
) -> PackedSource:
    """Packs the documents of `paths`, in order, into samples of `seq_length` tokens; otherwise as `token_cache`."""
    folder = token_cache(paths, tokenizer=tokenizer, text_key=text_key, cache_dir=cache_dir, setting=setting)
    return PackedSource.read(folder, seq_length)
