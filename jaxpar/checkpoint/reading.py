"""Reads from a file system that may fail for a while. What cannot be read is not taken for missing or torn."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from jaxpar.config import ConfigError

WAITS = (1, 2, 4, 8, 15)  # seconds before each further attempt
T = TypeVar("T")


class CheckpointError(ConfigError):
    """A checkpoint cannot be written or read: no space, no permission, damage. The message names the file."""


def patiently(read: Callable[[Path], T], path: Path) -> T:
    """`read(path)`, tried again after a read error, with a line on standard error each time.

    Raises:
      FileNotFoundError: `path` is missing; raised at once.
      CheckpointError: it could not be read in the end, either.
    """
    for wait in WAITS:
        try:
            return read(path)
        except FileNotFoundError:
            raise
        except OSError as error:
            print(f"note: {_words(path, error)}: trying again in {wait} s", file=sys.stderr, flush=True)
            time.sleep(wait)
    try:
        return read(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{_words(path, error)}, after {len(WAITS) + 1} attempts in {sum(WAITS)} s: nothing was changed: see that the file "
            f"system is well and the file may be read, then run the same command"
        ) from error


def _words(path: Path, error: OSError) -> str:
    return f"{error.filename or path} cannot be read ({error.strerror or error})"
