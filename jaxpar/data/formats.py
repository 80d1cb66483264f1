"""Reads the texts of one file: plain text, JSON lines, Parquet and CSV, also compressed."""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from jaxpar.config import ConfigError

# What reading a damaged file or a bad disk raises; pyarrow's own errors are among these, too.
_READ_ERRORS = (OSError, EOFError, ValueError, NotImplementedError, KeyError, zlib.error, lzma.LZMAError, csv.Error)


class DataError(ConfigError):
    """Data or a tokenizer that cannot be used. The message says which file, where in the file, and what to change."""


def file_texts(file: Path, text_key: str) -> Iterator[str]:
    """The texts of a file, one for each of its records, in their order; see `jaxpar.data.documents`.

    Raises:
      DataError: the file cannot be read, or a record is wrong; names the file and the record.
    """
    number, reader = 0, _READERS.get(_suffix(file), _plain_text)
    try:
        for text in reader(file, text_key):
            yield text
            number += 1
    except _READ_ERRORS as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())  # on one line
        after = f" after record {number}" if number else ""
        raise DataError(f"{file}: cannot be read{after} ({reason}): is the file whole?") from error


def is_readable(file: Path) -> bool:
    """Whether a folder's file of this name is read: it ends in one of `SUFFIXES`, or in one of these and a compression's."""
    return _suffix(file) in _READERS


def _suffix(file: Path) -> str:
    return Path(file.stem if file.suffix.lower() in _COMPRESSIONS else file).suffix.lower()


def _zstandard(file: Path, mode: str) -> IO[bytes]:
    import pyarrow  # here, because importing it is slow and most runs do not need it

    return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))


_COMPRESSIONS: dict[str, Callable[[Path, Any], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstandard,
}


def _open(file: Path) -> IO[bytes]:
    """The bytes of a file, decompressed."""
    return _COMPRESSIONS.get(file.suffix.lower(), open)(file, "rb")


def _plain_text(file: Path, text_key: str) -> Iterator[str]:
    with _open(file) as stream:
        yield _decode(stream.read(), str(file))


def _json_lines(file: Path, text_key: str) -> Iterator[str]:
    with _open(file) as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file}, line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads(_decode(line, where))
            except (
                ValueError,
                RecursionError,
            ) as error:  # the latter: nested too deeply; the former: also a number too long
                column = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                problem = f"invalid JSON ({getattr(error, 'msg', error)}{column})"
                raise DataError(f"{where}: {problem}; expected one JSON object per line") from error
            if not isinstance(record, dict):
                raise DataError(f"{where}: expected one JSON object per line, got a {type(record).__name__}")
            if text_key not in record:
                raise _missing_field(where, text_key, list(record))
            yield checked_text(record[text_key], where, text_key)


def _csv(file: Path, text_key: str) -> Iterator[str]:
    csv.field_size_limit(sys.maxsize)  # a document may be long; Python's limit is 131,072 characters
    dialect = "excel-tab" if _suffix(file) == ".tsv" else "excel"
    with _open(file) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as lines:
        rows = csv.reader(lines, dialect, strict=True)
        names = next(rows, [])
        if text_key not in names:
            raise _missing_field(str(file), text_key, names)
        for number, row in enumerate(rows, start=1):
            if row and len(row) != len(names):
                raise DataError(
                    f"{file}, row {number}, which ends in line {rows.line_num}: {len(row)} fields, but the header has "
                    f"{len(names)}: quote fields that hold a separator"
                )
            if row:
                yield row[names.index(text_key)]


def _parquet(file: Path, text_key: str) -> Iterator[str]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as table:
        names = table.schema_arrow.names
        if text_key not in names:
            raise _missing_field(str(file), text_key, names)
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
            for value in batch.column(0):
                yield checked_text(value.as_py(), f"{file}, row {row}", text_key)
                row += 1


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    **dict.fromkeys((".txt", ".text", ".md", ".rst"), _plain_text),
    **dict.fromkeys((".jsonl", ".json"), _json_lines),
    **dict.fromkeys((".csv", ".tsv"), _csv),
    ".parquet": _parquet,
}
SUFFIXES = tuple(_READERS)


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")  # a byte-order mark is not part of the text
    except UnicodeDecodeError as error:
        byte = f"byte 0x{raw[error.start]:02x} at offset {error.start}"
        raise DataError(f"{where}: not UTF-8 text ({byte}); convert it, for example with iconv") from error


def _missing_field(where: str, text_key: str, fields: list[str]) -> DataError:
    names = ", ".join(map(str, fields)) or "none"
    return DataError(f"{where}: no field {text_key!r} (data.text_key); it has the fields: {names}")


def checked_text(text: object, where: str, text_key: str) -> str:
    """The text. Raises `DataError` if it is no string, or not valid Unicode."""
    if not isinstance(text, str):
        raise DataError(f"{where}: field {text_key!r} (data.text_key) is a {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can contain half a surrogate pair, which no tokenizer accepts
        raise DataError(f"{where}: field {text_key!r} holds a lone surrogate, which is not valid Unicode") from error
    return text
