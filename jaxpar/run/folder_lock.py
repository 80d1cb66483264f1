"""One experiment, one run: a file in the experiment's folder names the run that writes there and shows that it lives.

A run creates `run.lock` with O_EXCL, which one process alone can do, also on NFS and Lustre, and rewrites it every few seconds.
Another start judges without comparing clocks: on the same machine the holder's process exists or not; elsewhere its file
changes or not. Process 0 alone has the lock.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from jaxpar.config import ConfigError
from jaxpar.run.processes import decide_on_process_0

FILE = "run.lock"
BEAT = 5.0  # seconds between two heartbeats
STALE = 60.0  # seconds without a heartbeat after which a holder on another machine counts as dead
LEAVE = 600.0  # seconds that a run which lost the folder may take to end, at its next step
_BYTES = 512  # of the file, always, so that a heartbeat needs no room on a full disk


class FolderLost(ConfigError):
    """Another run has taken the folder, or it is gone: this run must write nothing more."""


class FolderLock:
    """Holds an experiment's folder while a run writes there. Entering and leaving are collective calls.

    Args:
      folder: the experiment's; created if missing.
      take_over: take it from a run that lives. That run ends at its next step, without saving, and is waited for.

    Raises:
      ConfigError: on entering: another run has it, or the folder cannot be written.
    """

    def __init__(self, folder: Path, *, take_over: bool = False):
        self._folder, self._take_over = folder.absolute(), take_over
        self._path = self._folder / FILE
        self._taken = self._folder / f"{FILE}.taken"  # of a run that must end
        self._made = False  # the folder, by this run
        self._file = -1  # its descriptor: open as long as this run has the lock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="folder lock", daemon=True)
        self._own = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _now(),
            "machine": _machine(),
            "ticks": _ticks(os.getpid()),
        }

    def __enter__(self) -> "FolderLock":
        try:
            decide_on_process_0(self._acquire)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file >= 0:
            self._stop.set()
            if self._thread.ident:  # it was started
                self._thread.join()
            for path in (self._path, self._taken):
                with contextlib.suppress(OSError):
                    if os.path.samestat(path.stat(), os.fstat(self._file)):
                        path.unlink()
            if self._made:
                with contextlib.suppress(OSError):  # a run that has written nothing leaves no folder
                    self._folder.rmdir()
            os.close(self._file)
            self._file = -1

    def problem(self) -> str:
        """Why this run must write nothing more; "" if all is well, and always on other processes than 0. One `stat`."""
        if self._file < 0:
            return ""
        try:
            if os.path.samestat(self._path.stat(), os.fstat(self._file)):
                return ""
            return f"{self._folder} was taken over by {_name(_read(self._path))}: this run ends without saving"
        except (FileNotFoundError, NotADirectoryError):
            return (
                f"{self._folder} was moved, deleted or replaced, or its {FILE} was removed: this run ends without saving: put "
                f"the folder back, and run the same command to continue from its newest checkpoint"
            )
        except OSError:  # a file system that fails for a while
            return ""

    def _acquire(self) -> None:
        try:
            self._made = not self._folder.exists()
            self._folder.mkdir(parents=True, exist_ok=True)
            while not self._create():
                holder = _read(self._path)
                if self._take_over:
                    os.replace(self._path, self._taken)  # the other run sees that, and removes it when it has ended
                elif self._lives(self._path, holder):
                    raise self._busy(_read(self._path) or holder)
                elif holder == _read(self._path):
                    print(f"note: {self._folder}: taken over from {_name(holder)}", file=sys.stderr, flush=True)
                    self._path.unlink(missing_ok=True)
            self._thread.start()
            self._wait_for_end()
        except OSError as error:
            raise ConfigError(
                f"{error.filename or self._path}: {error.strerror}: a run must be able to write its folder: see runner.output_dir"
            ) from error

    def _create(self) -> bool:
        with contextlib.suppress(FileExistsError):
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            self._write()
        return self._file >= 0

    def _lives(self, path: Path, holder: bytes) -> bool:
        """Whether the holder lives. It has no file when it has ended."""
        known = _fields(holder)
        if known.get("machine") == self._own["machine"] is not None:
            return _ticks(known["pid"]) == known["ticks"]
        if holder:
            words = f"{_name(holder)} has {self._folder}: waiting up to {STALE:.0f} s for a sign of life"
            print(f"note: {words}", file=sys.stderr, flush=True)
        end = time.monotonic() + STALE
        while time.monotonic() < end:
            time.sleep(BEAT / 5)
            if (now := _read(path)) != holder:
                return bool(now)
        return False

    def _wait_for_end(self) -> None:
        """Returns when the run from which the folder was taken writes no more."""
        end, holder = time.monotonic() + LEAVE, _read(self._taken)
        if holder:
            print(
                f"note: {self._folder}: taken over from {_name(holder)}: waiting for its end",
                file=sys.stderr,
                flush=True,
            )
        while holder and self._lives(self._taken, holder):
            if time.monotonic() > end:
                raise ConfigError(f"{self._folder}: {_name(holder)} has not ended in {LEAVE:.0f} s: end it by hand")
            time.sleep(BEAT / 5)
            holder = _read(self._taken)
        self._taken.unlink(missing_ok=True)

    def _busy(self, holder: bytes) -> ConfigError:
        return ConfigError(
            f"{self._folder} belongs to {_name(holder)}: stop that run, set another runner.experiment_name, or, if it must end, "
            f"take the folder from it with --take-over"
        )

    def _write(self) -> None:
        text = json.dumps({**self._own, "heartbeat": _now()})
        os.pwrite(self._file, f"{text:<{_BYTES - 1}}\n".encode(), 0)
        os.fsync(self._file)  # NFS sends it to the others with this

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            with contextlib.suppress(OSError):  # if it lasts, another run may take over, and `problem` says so
                self._write()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _fields(holder: bytes) -> dict[str, Any]:
    """What a lock's file says; nothing if it is empty or being written."""
    try:
        return json.loads(holder)
    except ValueError:
        return {}


def _name(holder: bytes) -> str:
    fields = _fields(holder)
    if not fields:
        return "a run that has not said its name"
    return "the run on host {host}, pid {pid}, started {started}, last heartbeat {heartbeat}".format_map(fields)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _machine() -> str | None:
    """What processes that see each other's pids have in common: one boot of one kernel, one pid namespace. None: unknown."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _ticks(pid: int) -> str | None:
    """When a process of this machine started, which tells it from a later one of the same pid. None: there is none."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]
