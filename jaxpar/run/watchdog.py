"""Ends all processes of a run when one has died or makes no progress, and says which one, where and since when."""

import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, NamedTuple, NoReturn

import jax
from jax._src import distributed  # jax has no public access to its coordinator's key-value store

from jaxpar.config import ConfigError

EXIT_CODE = 75  # EX_TEMPFAIL in sysexits.h: start the run again
MISTAKE = 2  # the exit code of a user's mistake, which another start would not mend
_PERIOD = 2.0  # seconds between heartbeats
_SILENCE = 30.0  # seconds without a heartbeat after which a process counts as dead
_HEARTBEATS, _VERDICT = "jaxpar/heartbeat/", "jaxpar/verdict"


class _Verdict(NamedTuple):
    """Why all processes end, and with which exit code."""

    problem: str
    code: int = EXIT_CODE


class Watchdog:
    """A thread that reports this process's progress to the others and ends this process when any of them fails.

    Process 0 reads all heartbeats and decides; the others read its verdict. Heartbeats go through jax's coordinator,
    not through the devices.

    Args:
      stall_timeout: seconds without a call of `enter` after which a process counts as stalled; 0: never.
    """

    def __init__(self, stall_timeout: float):
        self._stall_timeout = stall_timeout
        self._entered, self._step, self._phase, self._since = 0, 0, "starting", time.monotonic()
        # Not jax.process_count(), which asks for devices and may wait for processes that are no more.
        self._client: Any = distributed.global_state.client if distributed.global_state.num_processes > 1 else None
        self._rank = distributed.global_state.process_id
        self._stop = threading.Event()
        self._heard: dict[int, tuple[dict[str, Any], float]] = {}
        self._last_answer = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        # As soon as the coordinator is gone, jax's own client aborts from C++, without naming rank or step. Python's
        # signal handlers do not run then, so this one is installed in C and called directly.
        self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)

    def enter(self, step: int, phase: str) -> None:
        """This process begins `phase` of `step`, such as "reading the batch". Call it at least once a step."""
        self._entered, self._step, self._phase, self._since = self._entered + 1, step, phase, time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self._rank > 0:
            self._before_abort = _libc_signal()(signal.SIGABRT, ctypes.cast(self._on_abort, ctypes.c_void_p))
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if self._client is not None and isinstance(error, jax.errors.JaxRuntimeError):
            # Most likely a collective failed because another process died. Its silence will show which one.
            self._thread.join(_SILENCE + 5 * _PERIOD)
        self._stop.set()
        self._thread.join(5 * _PERIOD)
        if self._client is not None:
            is_mistake = isinstance(error, ConfigError)
            words = "" if error is None else str(error) if is_mistake else f"{type(error).__name__}: {error}"
            self._beat(ended=words, mistake=is_mistake)
            if error and self._rank == 0:  # this thread no longer judges
                self._publish(_Verdict(f"process 0 stopped: {words}", MISTAKE if is_mistake else EXIT_CODE))
                time.sleep(2 * _PERIOD)  # the coordinator must live until the others have read it
        if self._rank > 0:  # the callback must not outlive this object: C would call what is no longer there
            _libc_signal()(signal.SIGABRT, self._before_abort)

    def _aborted(self, signal_number: int) -> None:
        host, _, port = str(distributed.global_state.coordinator_address).rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            problem = f"process 0 died: its coordinator at {host}:{port} is gone ({error.strerror or error})"
            self._exit(_Verdict(problem))

    def _watch(self) -> None:
        while not self._stop.wait(_PERIOD):
            if verdict := self._verdict():
                self._exit(verdict)

    def _verdict(self) -> _Verdict | None:
        if self._client is None:
            idle = time.monotonic() - self._since
            stalled = 0 < self._stall_timeout < idle
            problem = f"no progress for {idle:.0f} s in step {self._step}, phase {self._phase}"
            return _Verdict(problem) if stalled else None
        verdict = None
        try:
            self._beat()
            if self._rank == 0:
                verdict = self._judge()
            else:
                verdict = _Verdict(*json.loads(self._client.key_value_try_get(_VERDICT)))
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):  # no verdict yet
                self._last_answer = time.monotonic()
        else:
            self._last_answer = time.monotonic()
        silence = time.monotonic() - self._last_answer
        if silence > _SILENCE:
            return _Verdict(
                f"process 0 died or cannot be reached: its coordinator has not answered for {silence:.0f} s"
            )
        return verdict

    def _publish(self, verdict: _Verdict) -> None:
        self._client.key_value_set(_VERDICT, json.dumps(verdict), allow_overwrite=True)

    def _beat(self, ended: str | None = None, *, mistake: bool = False) -> None:
        now = time.monotonic()
        beat = {
            "time": now,
            "entered": self._entered,
            "step": self._step,
            "phase": self._phase,
            "idle": now - self._since,
            "host": socket.gethostname(),
            "ended": ended,
            "mistake": mistake,
        }
        self._client.key_value_set(f"{_HEARTBEATS}{self._rank}", json.dumps(beat), allow_overwrite=True)

    def _judge(self) -> _Verdict | None:
        """On process 0: checks all heartbeats. If something is wrong, publishes it as the verdict and returns it."""
        now = time.monotonic()
        for key, text in self._client.key_value_dir_get(_HEARTBEATS):
            rank, beat = int(key.rpartition("/")[2]), json.loads(text)
            if rank not in self._heard or self._heard[rank][0]["time"] != beat["time"]:
                self._heard[rank] = (beat, now)
        problem = self._dead(now) or self._stalled()
        verdict = self._ended() or (_Verdict(problem) if problem else None)
        if verdict:
            self._publish(verdict)
        return verdict

    def _ended(self) -> _Verdict | None:
        for rank, (beat, _) in self._heard.items():
            if beat["ended"]:
                code = MISTAKE if beat["mistake"] else EXIT_CODE
                return _Verdict(f"{_who(rank, beat)} stopped in {_position(beat)}: {beat['ended']}", code)
        return None

    def _dead(self, now: float) -> str | None:
        for rank, (beat, heard) in self._heard.items():
            if beat["ended"] is None and now - heard > _SILENCE:
                return f"{_who(rank, beat)} died or hangs: last heard from {now - heard:.0f} s ago in {_position(beat)}"
        return None

    def _stalled(self) -> str | None:
        running = {rank: beat for rank, (beat, _) in self._heard.items() if beat["ended"] is None}
        if not running or not 0 < self._stall_timeout < max(beat["idle"] for beat in running.values()):
            return None
        rank = min(running, key=lambda rank: running[rank]["entered"])  # the others wait for the slowest
        beat = running[rank]
        return f"{_who(rank, beat)} makes no progress: it has been in {_position(beat)} for {beat['idle']:.0f} s"

    def _exit(self, verdict: _Verdict) -> None:
        own = f"process {self._rank} exits in step {self._step}, phase {self._phase}"
        advice = "Run the same command to continue from the newest checkpoint"
        print(f"error: {verdict.problem}; {own}{f'. {advice}' if verdict.code == EXIT_CODE else ''}", file=sys.stderr)
        if 0 < self._stall_timeout < time.monotonic() - self._since:
            faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        if self._client is not None and self._rank == 0:
            time.sleep(2 * _PERIOD)  # the coordinator must live until the others have read the verdict
        os._exit(verdict.code)  # the main thread may hang where no exception reaches it


def leave(code: int) -> NoReturn:
    """Ends this process after a mistake. In a run of several processes, Python's normal end would wait for the others in jax's
    shutdown, which aborts from C++ as they have ended too."""
    sys.stdout.flush()
    sys.stderr.flush()
    if distributed.global_state.num_processes > 1:
        os._exit(code)
    sys.exit(code)


def _libc_signal() -> Any:
    """C's `signal`: (number, handler) → the handler before."""
    function = ctypes.CDLL(None).signal
    function.argtypes, function.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    return function


def _who(rank: int, beat: dict[str, Any]) -> str:
    return f"process {rank} on {beat['host']}"


def _position(beat: dict[str, Any]) -> str:
    return f"step {beat['step']}, phase {beat['phase']}"
