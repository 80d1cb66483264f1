"""The tokens of a corpus on disk: written once, checked before each run, and read by several processes at once.

A folder `<key>` in the cache holds `tokens`, `doc_ends` and `records`, three files of numbers, and `counts.json`, which has
their lengths and the checksums of their blocks. Its name is a hash of what the tokens depend on.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpar.data.disk_array import CacheError, DiskArray
from jaxpar.data.formats import DataError
from jaxpar.data.text import PYTHON_SCHEME, corpus_files, documents, left_out
from jaxpar.data.tokenizer import Tokenizer

_FORMAT = 3  # version of the cache; increase it when the meaning of its files changes
_BATCH_CHARACTERS = 1 << 22  # text tokenized at once, so that memory does not grow with the corpus
_BLOCK = 1 << 24  # bytes with a checksum of their own
_ABANDONED = 24 * 3600  # seconds without a write, after which an unfinished cache of another host is removed


class TokenCache:
    """The tokens of a corpus, in a folder that `token_cache` wrote.

    Attributes:
      tokens: uint16 or uint32 [num_tokens]; every document with its end-of-document token.
      doc_ends: int64 [num_documents], ascending: one past the last token of each document.

    Raises:
      CacheError: a file is missing or has another length than it should.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._counts = counts = _read_counts(folder / "counts.json")
        num_tokens, num_documents, self._files = counts["num_tokens"], counts["num_documents"], counts["files"]
        self.tokens = DiskArray(folder / "tokens", counts["dtype"], num_tokens, counts["vocab_size"])
        self.doc_ends = DiskArray(folder / "doc_ends", np.int64, num_documents, num_tokens + 1)
        self._records = DiskArray(folder / "records", np.int64, 2 * num_documents, 1 << 62)

    def origin(self, document: int) -> str:
        """The file that a document was read from, and the number of its record in that file, from 1."""
        file, record = self._records[2 * document : 2 * document + 2]
        return f"{self._files[file]}, record {record + 1}"

    def damage(self, share: int = 0, num_shares: int = 1) -> str:
        """Reads every `num_shares`-th block, from number `share` on; says what was altered since it was written, or ""."""
        blocks = [(name, n, crc) for name, crcs in self._counts["checksums"].items() for n, crc in enumerate(crcs)]
        for name, number, crc in blocks[share::num_shares]:
            try:
                with (self.folder / name).open("rb") as file:
                    file.seek(number * _BLOCK)
                    if zlib.crc32(file.read(_BLOCK)) != crc:
                        return f"{name} differs from what was written, in bytes {number * _BLOCK:,} and after"
            except OSError as error:
                return f"{name} cannot be read: {error.strerror}"
        return ""


def token_cache(
    paths: Sequence[str | Path],
    *,
    tokenizer: Tokenizer,
    text_key: str = "text",
    cache_dir: str | Path,
    setting: str = "data.train_data_paths",
    process: tuple[int, int] = (0, 1),
    gather: Callable[[str], list[str]] = lambda value: [value],
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Tokenizes the documents of `paths` (see `documents`) once, in order; returns the folder of the `TokenCache`.

    The folder is in `cache_dir` and named by a hash of the files (absolute path, size, modification time), the tokenizer
    and `text_key`. It is written under another name and then renamed, so several processes may write it at once, and a
    killed process leaves nothing that looks complete; the next one removes what it left. A folder whose checksums are wrong
    is written anew. Memory grows with the largest document, not with the corpus.

    Args:
      process: number of this process and number of all. Each reads its share of the checksums.
      gather: gives the values of all processes, in each of them.
      say: is given lines for the user: files that are not read, a damaged cache.

    Raises:
      DataError: as `documents`; `paths` is empty; the documents have no text; the folder cannot be written, or what was
        written cannot be read again.
    """
    files = [file.resolve() for path in paths for file in corpus_files(path, setting=setting)]
    if not files:
        raise DataError(f"{setting}: is empty: give at least one file, folder or python:MODULE")
    for note in filter(None, (left_out(path, setting=setting) for path in paths)):
        say(note)
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([_FORMAT, tokenizer.fingerprint, text_key, stats]).encode()).hexdigest()[:24]
    folder = Path(cache_dir).expanduser() / key

    def damage() -> str:
        """Of the folder, the same in all processes; writes it first if there is none."""
        if not folder.exists():
            _build(folder, _records(paths, text_key, setting), tokenizer, setting)
        try:
            own = TokenCache(folder).damage(*process)
        except CacheError as error:
            own = f"{error.file.name} {error.reason}"
        return next(filter(None, gather(own)), "")

    _remove_abandoned(folder.parent)
    if found := damage():
        say(f"{setting}: the token cache {folder} is damaged and is written anew ({found})")
        if process[0] == 0:
            os.replace(folder, aside := tempfile.mkdtemp(dir=folder.parent, prefix=_unfinished(key)))
            shutil.rmtree(aside)
        gather("")  # the others wait until it is gone
        if found := damage():
            raise DataError(
                f"{setting}: the token cache {folder} is damaged again, just after it was written ({found})"
            )
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


def _build(folder: Path, records: Iterable[_Record], tokenizer: Tokenizer, setting: str) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=_unfinished(folder.name)) as temporary:
            draft = Path(temporary) / folder.name  # not the temporary folder itself, which other users may not read
            draft.mkdir()
            _write(draft, records, tokenizer, setting)
            _publish(draft, folder)
    except OSError as error:
        raise DataError(
            f"the token cache {folder} cannot be written ({error.strerror}): free space, or set another runner.output_dir"
        ) from error


def _write(folder: Path, records: Iterable[_Record], tokenizer: Tokenizer, setting: str) -> None:
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    end = num_documents = 0
    files: dict[str, int] = {}
    with (
        _BlockWriter(folder / "tokens") as tokens,
        _BlockWriter(folder / "doc_ends") as doc_ends,
        _BlockWriter(folder / "records") as origins,
    ):
        for batch in _batched(records):
            for record, ids in zip(batch, tokenizer.encode_batch([record.text for record in batch]), strict=True):
                if not len(ids):
                    continue  # an empty document has nothing to predict
                if not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
                    where = f"{record.file}, record {record.number + 1}"
                    raise DataError(f"{where}: {tokenizer.name} gives ids outside 0 … {tokenizer.vocab_size - 1}")
                tokens.write(np.append(ids, tokenizer.eos_id).astype(dtype).tobytes())
                end += len(ids) + 1
                num_documents += 1
                doc_ends.write(np.int64(end).tobytes())
                file = files.setdefault(record.file, len(files))
                origins.write(np.array([file, record.number], np.int64).tobytes())
    if not num_documents:
        raise DataError(f"{setting}: has no text: every document is empty")
    counts = {
        "num_tokens": end,
        "num_documents": num_documents,
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "files": list(files),
        "checksums": {file.name: file.checksums for file in (tokens, doc_ends, origins)},
    }
    with _BlockWriter(folder / "counts.json") as counts_file:
        counts_file.write(json.dumps({"checksum": _checksum(counts), **counts}).encode())


def _read_counts(file: Path) -> dict[str, Any]:
    try:
        counts = json.loads(file.read_bytes())
        if counts.pop("checksum") != _checksum(counts):
            raise ValueError("differs from what was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(file, f"cannot be used: {getattr(error, 'strerror', None) or error}") from error
    return counts


def _checksum(counts: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(counts).encode())


class _BlockWriter:
    """A new file, on the disk when it is closed, and the checksums of its blocks."""

    def __init__(self, path: Path):
        self.name, self.checksums, self._block = path.name, [], bytearray()  # type: str, list[int], bytearray
        self._file = path.open("wb")

    def write(self, data: bytes) -> None:
        self._block += data
        while len(self._block) >= _BLOCK:
            self._write_block()

    def _write_block(self) -> None:
        block = bytes(self._block[:_BLOCK])
        del self._block[:_BLOCK]
        self._file.write(block)
        self.checksums.append(zlib.crc32(block))

    def __enter__(self) -> "_BlockWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        with self._file:
            if kind is None:
                if self._block:
                    self._write_block()
                self._file.flush()
                os.fsync(self._file.fileno())


def _publish(draft: Path, folder: Path) -> None:
    _sync_folder(draft)
    try:
        os.replace(draft, folder)
    except OSError:
        if not folder.exists():
            raise
        # Another process was first. Keep its files: they are the same, and it may have opened them already.
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unfinished(key: str) -> str:
    """Start of the name of a folder in which this process writes a cache."""
    return f"{key}-unfinished-{socket.gethostname()}-{os.getpid()}-"


def _remove_abandoned(cache_dir: Path) -> None:
    """Removes what processes left that were killed: of this host, if the process is gone; of another, after a day."""
    for folder in cache_dir.glob("*-unfinished-*"):
        host, _, process = folder.name.partition("-unfinished-")[2].rpartition("-")[0].rpartition("-")
        with contextlib.suppress(OSError):  # its writer has just finished, or it is another user's
            if host == socket.gethostname() and process.isdigit():
                is_gone = not Path("/proc", process).exists()
            else:
                is_gone = time.time() - max(path.stat().st_mtime for path in (folder, *folder.rglob("*"))) > _ABANDONED
            if is_gone:
                shutil.rmtree(folder)


def _batched(records: Iterable[_Record]) -> Iterator[list[_Record]]:
    batch, characters = [], 0
    for record in records:
        batch.append(record)
        characters += len(record.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch
