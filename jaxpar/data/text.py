"""Reads documents from plain text, JSON lines and Parquet files, folders of these, and strings in Python modules."""

import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxpar.config import ConfigError

PYTHON_SCHEME = "python:"


class DataError(ConfigError):
    """Data or a tokenizer that cannot be used. The message says which file, where in the file, and what to change."""


def documents(path: str | Path, text_key: str = "text", *, setting: str = "data.train_data_paths") -> Iterator[str]:
    """Reads the documents of one path, one at a time, in an order that depends on names alone.

    Args:
      path: one of
        * a `.jsonl` or `.json` file: one JSON object per line, blank lines are skipped;
        * a `.parquet` file, streamed in batches of rows;
        * any other file: UTF-8 text, the whole file is one document;
        * a folder: every file below it that ends in one of `SUFFIXES`, sorted, without hidden files;
        * `python:MODULE`: the strings of a dict (sorted by key) or list in module `MODULE`, found under the last part of
          the module's name. `python:pydoc_data.topics` is Python's help text, 0.5 MB of English on every machine.
      text_key: the JSON field or Parquet column that holds the text (`data.text_key`).
      setting: the config key that `path` comes from, for error messages.

    Yields:
      The text of each document, including empty ones.

    Raises:
      DataError: the path does not exist or has no supported file; text is not UTF-8; a line is not a JSON object; the
        field is missing or is not a string.
    """
    if str(path).startswith(PYTHON_SCHEME):
        yield from _module_texts(str(path), setting)
        return
    for file in corpus_files(path, setting=setting):
        yield from _READERS.get(file.suffix.lower(), _plain_text)(file, text_key)


def corpus_files(path: str | Path, *, setting: str = "data.train_data_paths") -> list[Path]:
    """The files that `documents(path)` reads, in the same order. Raises `DataError` as it does."""
    if str(path).startswith(PYTHON_SCHEME):
        return [_module_file(str(path), setting)]
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise DataError(f"{setting}: no such file or folder: {str(path)!r} (looked at {root.absolute()})")
    found = (file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    files = sorted(f for f in found if not any(part.startswith(".") for part in f.relative_to(root).parts))
    if not files:
        raise DataError(f"{setting}: folder {root} has no file that ends in {', '.join(SUFFIXES)}")
    return files


def _plain_text(file: Path, text_key: str) -> Iterator[str]:
    yield _decode(file.read_bytes(), str(file))


def _json_lines(file: Path, text_key: str) -> Iterator[str]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file}, line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads(_decode(line, where))
            except json.JSONDecodeError as error:
                problem = f"invalid JSON ({error.msg}, column {error.colno})"
                raise DataError(f"{where}: {problem}; expected one JSON object per line") from error
            if not isinstance(record, dict):
                raise DataError(f"{where}: expected one JSON object per line, got a {type(record).__name__}")
            if text_key not in record:
                raise _missing_field(where, text_key, list(record))
            yield _checked(record[text_key], where, text_key)


def _parquet(file: Path, text_key: str) -> Iterator[str]:
    import pyarrow  # here, because importing it is slow and most runs do not need it
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if text_key not in names:
                raise _missing_field(str(file), text_key, names)
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
                for value in batch.column(0):
                    yield _checked(value.as_py(), f"{file}, row {row}", text_key)
                    row += 1
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file}: cannot be read as Parquet ({error})") from error


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    **dict.fromkeys((".txt", ".text", ".md", ".rst"), _plain_text),
    **dict.fromkeys((".jsonl", ".json"), _json_lines),
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


def _checked(text: object, where: str, text_key: str) -> str:
    if not isinstance(text, str):
        raise DataError(f"{where}: field {text_key!r} (data.text_key) is a {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can contain half a surrogate pair, which no tokenizer accepts
        raise DataError(f"{where}: field {text_key!r} holds a lone surrogate, which is not valid Unicode") from error
    return text


def _module_file(path: str, setting: str) -> Path:
    name = path.removeprefix(PYTHON_SCHEME)
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.has_location or spec.origin is None:
        raise DataError(f"{setting}: {path}: Python finds no module {name!r} that is a file")
    return Path(spec.origin)


def _module_texts(path: str, setting: str) -> Iterator[str]:
    _module_file(path, setting)
    name = path.removeprefix(PYTHON_SCHEME)
    attribute = name.rpartition(".")[2]
    texts = getattr(importlib.import_module(name), attribute, None)
    if not isinstance(texts, dict | list | tuple):
        raise DataError(f"{setting}: {path}: module {name!r} has no dict or list named {attribute!r}")
    for key in sorted(texts) if isinstance(texts, dict) else range(len(texts)):
        yield _checked(texts[key], f"{path}, entry {key!r}", attribute)
