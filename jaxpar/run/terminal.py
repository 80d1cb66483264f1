"""Standard output and standard error that a run outlives: a closed terminal, a reader that is gone, a full disk."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def steady_output() -> Iterator[None]:
    """While it is entered, nothing fails because the reader of standard output or standard error is gone (the terminal, or
    `tee` at the end of a pipe): what is printed from then on is dropped. Any other failure, such as a full disk, is an OSError
    that names standard output, once. Standard error never fails, because there is nowhere left to say so.
    """
    before = sys.stdout, sys.stderr
    output, error = _Steady(sys.stdout, "standard output"), _Steady(sys.stderr, None)
    sys.stdout, sys.stderr = output, error
    try:
        yield
    finally:
        error.flush()
        with contextlib.suppress(OSError):
            output.flush()
        sys.stdout, sys.stderr = before


class _Steady:
    """A text stream; see `steady_output`.

    Args:
      stream: None if the process was started without it.
      name: for the error; None: there is none.
    """

    def __init__(self, stream: Any, name: str | None):
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115
        self._name, self._is_terminal = name, self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError as error:
            # The buffer keeps what could not be written; here it goes, or the interpreter would try again at its end.
            with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
            is_lost = isinstance(error, BrokenPipeError) or (error.errno == errno.EIO and self._is_terminal)
            if self._name and not is_lost:
                raise OSError(error.errno, error.strerror, self._name) from None
