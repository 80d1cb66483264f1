"""A corpus as one flat array of tokens on disk, cut into training samples of equal length.

The packing is that of Megatron-LM's `GPTDataset` (and GPT-3): documents follow one another, each ends with the
end-of-document token, and sample i is the `seq_length + 1` tokens from `i * seq_length`. No token is
lost or repeated as a target. Segment ids and positions that restart separate the documents of a sample.
"""

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxpar.data.text import PYTHON_SCHEME, DataError, corpus_files, documents
from jaxpar.data.tokenizer import Tokenizer

_FORMAT = 2  # version of the cache; increase it when the meaning of its files changes
_BATCH_CHARACTERS = 1 << 22  # text tokenized at once, so that memory does not grow with the corpus


class TokenCache:
    """The tokens of a corpus, mapped into memory from a folder that `token_cache` wrote.

    Attributes:
      tokens: uint16 or uint32 [num_tokens]; every document with its end-of-document token.
      doc_ends: int64 [num_documents], ascending: one past the last token of each document.

    Raises:
      DataError: a file is missing or too short.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            counts = json.loads((folder / "counts.json").read_text())
            documents = counts["num_documents"]
            self.tokens = np.memmap(folder / "tokens", counts["dtype"], mode="r", shape=(counts["num_tokens"],))
            self.doc_ends = np.memmap(folder / "doc_ends", np.int64, mode="r", shape=(documents,))
            self._records = np.memmap(folder / "records", np.int64, mode="r", shape=(documents, 2))
            self._files = counts["files"]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"the token cache {folder} is damaged ({error}); delete that folder") from error

    def origin(self, document: int) -> str:
        """The file that a document was read from, and the number of its record in that file, from 1."""
        file, record = self._records[document]
        return f"{self._files[file]}, record {record + 1}"


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
    """

    def __init__(
        self,
        tokens: np.ndarray,
        doc_ends: np.ndarray,
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
        """Maps a token cache into memory. Raises `DataError` if a file is missing or too short."""
        cache = TokenCache(folder)
        return cls(cache.tokens, cache.doc_ends, seq_length, folder=folder, across_documents=across_documents)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self._num_samples}")
        start = index * self.seq_length
        stop = min(start + self.seq_length + 1, self.num_tokens)
        first, last = np.searchsorted(self.doc_ends, (start, stop - 1), side="right")
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
        # numpy pickles a memmap by value, which would send the whole corpus to each worker process.
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


def token_cache(
    paths: Sequence[str | Path],
    *,
    tokenizer: Tokenizer,
    text_key: str = "text",
    cache_dir: str | Path,
    setting: str = "data.train_data_paths",
) -> Path:
    """Tokenizes the documents of `paths` (see `documents`) once, in order; returns the folder of the `TokenCache`.

    The folder is in `cache_dir` and named by a hash of the files (absolute path, size, modification time), the tokenizer
    and `text_key`. It is written under another name and then renamed, so several processes may write it at once, and a
    killed process leaves nothing that looks complete. Memory grows with the largest document, not with the corpus.

    Raises:
      DataError: as `documents`; `paths` is empty; the documents have no text.
    """
    files = [file.resolve() for path in paths for file in corpus_files(path, setting=setting)]
    if not files:
        raise DataError(f"{setting}: is empty: give at least one file, folder or python:MODULE")
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([_FORMAT, tokenizer.fingerprint, text_key, stats]).encode()).hexdigest()[:24]
    cache_dir = Path(cache_dir).expanduser()
    folder = cache_dir / key
    if not folder.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        records = _records(paths, text_key, setting)
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix=f"{key}-unfinished-") as temporary:
            unfinished = Path(temporary) / key  # not the temporary folder itself, which other users may not read
            unfinished.mkdir()
            _write(unfinished, records, tokenizer, setting)
            _publish(unfinished, folder)
    return folder


class _Record(NamedTuple):
    file: str
    number: int  # within the file, from 0
    text: str


def _records(paths: Sequence[str | Path], text_key: str, setting: str) -> Iterator[_Record]:
    for path in paths:
        is_module = str(path).startswith(PYTHON_SCHEME)
        for file in [path] if is_module else corpus_files(path, setting=setting):
            for number, text in enumerate(documents(file, text_key, setting=setting)):
                yield _Record(str(file), number, text)


def _write(folder: Path, records: Iterable[_Record], tokenizer: Tokenizer, setting: str) -> None:
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    end = num_documents = 0
    files: dict[str, int] = {}
    with (
        open(folder / "tokens", "wb") as tokens_file,
        open(folder / "doc_ends", "wb") as doc_ends_file,
        open(folder / "records", "wb") as records_file,
    ):
        for batch in _batched(records):
            for record, ids in zip(batch, tokenizer.encode_batch([record.text for record in batch]), strict=True):
                if not len(ids):
                    continue  # an empty document has nothing to predict
                tokens_file.write(np.append(ids, tokenizer.eos_id).astype(dtype).tobytes())
                end += len(ids) + 1
                num_documents += 1
                doc_ends_file.write(np.int64(end).tobytes())
                file = files.setdefault(record.file, len(files))
                records_file.write(np.array([file, record.number], np.int64).tobytes())
    if not num_documents:
        raise DataError(f"{setting}: has no text: every document is empty")
    counts = {"num_tokens": end, "num_documents": num_documents, "dtype": dtype, "files": list(files)}
    (folder / "counts.json").write_text(json.dumps(counts))


def _publish(unfinished: Path, folder: Path) -> None:
    try:
        os.replace(unfinished, folder)
    except OSError:
        if not folder.exists():
            raise
        # Another process was first. Keep its files: they are the same, and it may have mapped them already.


def _batched(records: Iterable[_Record]) -> Iterator[list[_Record]]:
    batch, characters = [], 0
    for record in records:
        batch.append(record)
        characters += len(record.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch
