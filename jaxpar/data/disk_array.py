"""A file of numbers that is read piece by piece, and what is raised when it is damaged."""

import os
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from jaxpar.data.formats import DataError


class CacheError(DataError):
    """A token cache is not what was written. `file` is one of its files, `reason` says what is wrong with it."""

    def __init__(self, file: Path, reason: str):
        super().__init__(
            f"the token cache {file.parent} is damaged ({file.name} {reason}): start the run again, which writes it anew"
        )
        self.file, self.reason = file, reason

    def __reduce__(self):
        return CacheError, (self.file, self.reason)  # worker processes send it


class DiskArray:
    """A file of numbers as an array of one dimension; `array[i]` and `array[i:j]` read what they need.

    Unlike a memory map, a file that is cut short or cannot be read is an error, and no bus error that ends the process.

    Args:
      below: every number is at least 0 and less than this.

    Raises:
      CacheError: the file is missing or has another length; on reading, it is too short by now, or a number is not below
        `below`.
    """

    def __init__(self, file: Path, dtype: str | type, length: int, below: int):
        self._file, self.dtype, self._length, self._below = file, np.dtype(dtype), length, below
        try:
            self._descriptor = os.open(file, os.O_RDONLY)
        except OSError as error:
            raise CacheError(file, f"cannot be read: {error.strerror}") from error
        weakref.finalize(self, os.close, self._descriptor)
        if (size := os.fstat(self._descriptor).st_size) != length * self.dtype.itemsize:
            raise CacheError(file, f"has {size:,} bytes instead of {length * self.dtype.itemsize:,}")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        size = self.dtype.itemsize
        if not isinstance(index, slice):
            if not 0 <= index < self._length:
                raise IndexError(index)
            number = int.from_bytes(self._read(int(index) * size, size), sys.byteorder)  # a negative one would be huge
            self._check(number)
            return number
        start, stop, step = index.indices(self._length)
        if start >= stop:
            return np.empty(0, self.dtype)
        numbers = np.frombuffer(self._read(start * size, (stop - start) * size), self.dtype)
        self._check(numbers.min())
        self._check(numbers.max())
        return numbers[::step]

    def _check(self, number: Any) -> None:
        if not 0 <= number < self._below:
            raise CacheError(self._file, f"has the number {number}, outside 0 … {self._below - 1:,}")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def _read(self, offset: int, size: int) -> bytes:
        read = b""
        try:
            while missing := size - len(read):  # one read gives at most 2 GB
                piece = os.pread(self._descriptor, missing, offset + len(read))
                read = read + piece if read else piece
                if not piece:
                    raise CacheError(self._file, f"has been cut to {os.fstat(self._descriptor).st_size:,} bytes")
        except OSError as error:
            raise CacheError(self._file, f"cannot be read: {error.strerror}") from error
        return read
