"""Finds the documents of a path: a file, a folder of files, or strings in a Python module."""

import importlib
import importlib.util
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from jaxpar.data.formats import SUFFIXES, DataError, checked_text, file_texts, is_readable

PYTHON_SCHEME = "python:"
_TRAINING = "data.train_data_paths"


def documents(path: str | Path, text_key: str = "text", *, setting: str = _TRAINING) -> Iterator[str]:
    """Reads the documents of one path, one at a time, in an order that depends on names alone.

    Args:
      path: one of
        * a `.jsonl` or `.json` file: one JSON object per line, blank lines are skipped;
        * a `.parquet` file, streamed in batches of rows;
        * a `.csv` or `.tsv` file, whose first row names the columns; blank rows are skipped;
        * any other file: UTF-8 text, the whole file is one document;
        * one of these, except Parquet, compressed: `.gz`, `.bz2`, `.xz` or `.zst` follows its name;
        * a folder: every file below it with the suffix of one of these, sorted, without hidden files. Links are followed;
        * `python:MODULE`: the strings of a dict (sorted by key) or list in module `MODULE`, found under the last part of
          the module's name. `python:pydoc_data.topics` is Python's help text, 0.5 MB of English on every machine.
      text_key: the JSON field, or the column of Parquet or CSV, that holds the text (`data.text_key`).
      setting: the config key that `path` comes from, for error messages.

    Yields:
      The text of each document, including empty ones.

    Raises:
      DataError: the path does not exist or has no supported file; a file is damaged; text is not UTF-8; a line is not a
        JSON object; the field is missing or is not a string.
    """
    if str(path).startswith(PYTHON_SCHEME):
        yield from _module_texts(str(path), setting)
        return
    for file in corpus_files(path, setting=setting):
        yield from file_texts(file, text_key)


def corpus_files(path: str | Path, *, setting: str = _TRAINING) -> list[Path]:
    """The files that `documents(path)` reads, in the same order. Raises `DataError` as it does."""
    if str(path).startswith(PYTHON_SCHEME):
        return [_module_file(str(path), setting)]
    root = _existing(path, setting)
    if root.is_file():
        return [root]
    files = [file for file in _files_below(root, setting) if is_readable(file) and not _is_hidden(file, root)]
    if dangling := [file for file in files if not file.exists()]:
        raise DataError(
            f"{setting}: {dangling[0]} is a link to {os.readlink(dangling[0])}, which does not exist "
            f"({len(dangling)} such links below {root}): restore the files, or remove the links"
        )
    if not files:
        raise DataError(f"{setting}: folder {root} has no file that ends in {', '.join(SUFFIXES)}")
    return sorted(files)


def left_out(path: str | Path, *, setting: str = _TRAINING) -> str:
    """Says how many files below a folder `documents(path)` does not read, by suffix; "" if there are none."""
    if str(path).startswith(PYTHON_SCHEME) or (root := _existing(path, setting)).is_file():
        return ""
    kinds = Counter(
        "hidden" if _is_hidden(file, root) else file.suffix or "without a suffix"
        for file in _files_below(root, setting)
        if _is_hidden(file, root) or not is_readable(file)
    )
    if not kinds:
        return ""
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) + (", …" if len(kinds) > 5 else "")
    return f"{setting}: {kinds.total()} files below {root} are not read ({counts}): only {', '.join(SUFFIXES)} are"


def _existing(path: str | Path, setting: str) -> Path:
    """The path as one of a file or folder that is there."""
    if not str(path).strip():
        raise DataError(f"{setting}: an empty path {str(path)!r}: give a file, a folder or python:MODULE")
    try:
        root = Path(path).expanduser()
        if root.is_file() or root.is_dir():
            return root
    except (OSError, RuntimeError, ValueError) as error:  # no permission, no such user, a NUL
        raise DataError(f"{setting}: {str(path)!r} is not a path that can be read ({error})") from error
    raise DataError(f"{setting}: no such file or folder: {str(path)!r} (looked at {root.absolute()})")


def _files_below(root: Path, setting: str) -> Iterator[Path]:
    """All files below a folder. Links to folders are followed, but to no folder that is being walked already."""

    def fail(error: OSError) -> None:
        raise DataError(f"{setting}: {error.filename} cannot be read ({error.strerror})") from error

    for folder, names, files in os.walk(root, followlinks=True, onerror=fail):
        inside = {os.path.realpath(parent) for parent in (Path(folder), *Path(folder).parents)}
        names[:] = [name for name in names if os.path.realpath(os.path.join(folder, name)) not in inside]
        yield from (Path(folder, name) for name in files)


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


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
        yield checked_text(texts[key], f"{path}, entry {key!r}", attribute)
