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
from typing import Any

import jax
from jax._src import distributed  # jax has no public access to its coordinator's key-value store

EXIT_CODE = 75  # EX_TEMPFAIL in sysexits.h: start the run again
_PERIOD = 2.0  # seconds between heartbeats
_SILENCE = 30.0  # seconds without a heartbeat after which a process counts as dead
_HEARTBEATS, _VERDICT = "jaxpar/heartbeat/", "jaxpar/verdict"


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
        self._client: Any = distributed.global_state.client if jax.process_count() > 1 else None
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
        if jax.process_index() > 0:
            ctypes.CDLL(None).signal(signal.SIGABRT, self._on_abort)
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if self._client is not None and isinstance(error, jax.errors.JaxRuntimeError):
            # Most likely a collective failed because another process died. Its silence will show which one.
            self._thread.join(_SILENCE + 5 * _PERIOD)
        self._stop.set()
        self._thread.join(5 * _PERIOD)
        if self._client is not None:
            self._beat(ended=f"{type(error).__name__}: {error}" if error else "")
            if error and jax.process_index() == 0:  # this thread no longer judges
                self._client.key_value_set(_VERDICT, f"process 0 stopped: {error}", allow_overwrite=True)

    def _aborted(self, signal_number: int) -> None:
        host, _, port = str(distributed.global_state.coordinator_address).rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            self._exit(f"process 0 died: its coordinator at {host}:{port} is gone ({error.strerror or error})")

    def _watch(self) -> None:
        while not self._stop.wait(_PERIOD):
            if problem := self._problem():
                self._exit(problem)

    def _problem(self) -> str | None:
        if self._client is None:
            idle = time.monotonic() - self._since
            stalled = 0 < self._stall_timeout < idle
            return f"no progress for {idle:.0f} s in step {self._step}, phase {self._phase}" if stalled else None
        try:
            self._beat()
            problem = self._judge() if jax.process_index() == 0 else self._client.key_value_try_get(_VERDICT)
        except jax.errors.JaxRuntimeError as error:
            problem = None
            if "NOT_FOUND" in str(error):  # no verdict yet
                self._last_answer = time.monotonic()
        else:
            self._last_answer = time.monotonic()
        silence = time.monotonic() - self._last_answer
        if silence > _SILENCE:
            return f"process 0 died or cannot be reached: its coordinator has not answered for {silence:.0f} s"
        return problem

    def _beat(self, ended: str | None = None) -> None:
        now = time.monotonic()
        beat = {
            "time": now,
            "entered": self._entered,
            "step": self._step,
            "phase": self._phase,
            "idle": now - self._since,
            "host": socket.gethostname(),
            "ended": ended,
        }
        self._client.key_value_set(f"{_HEARTBEATS}{jax.process_index()}", json.dumps(beat), allow_overwrite=True)

    def _judge(self) -> str | None:
        """On process 0: checks all heartbeats. If something is wrong, publishes it as the verdict and returns it."""
        now = time.monotonic()
        for key, text in self._client.key_value_dir_get(_HEARTBEATS):
            rank, beat = int(key.rpartition("/")[2]), json.loads(text)
            if rank not in self._heard or self._heard[rank][0]["time"] != beat["time"]:
                self._heard[rank] = (beat, now)
        problem = self._ended() or self._dead(now) or self._stalled()
        if problem:
            self._client.key_value_set(_VERDICT, problem, allow_overwrite=True)
        return problem

    def _ended(self) -> str | None:
        for rank, (beat, _) in self._heard.items():
            if beat["ended"]:
                return f"{_who(rank, beat)} stopped in {_position(beat)}: {beat['ended']}"
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

    def _exit(self, problem: str) -> None:
        own = f"process {jax.process_index()} exits in step {self._step}, phase {self._phase}"
        print(f"error: {problem}; {own}. Run the same command to continue from the newest checkpoint", file=sys.stderr)
        if 0 < self._stall_timeout < time.monotonic() - self._since:
            faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        if self._client is not None and jax.process_index() == 0:
            time.sleep(2 * _PERIOD)  # the coordinator must live until the others have read the verdict
        os._exit(EXIT_CODE)  # the main thread may hang where no exception reaches it


def _who(rank: int, beat: dict[str, Any]) -> str:
    return f"process {rank} on {beat['host']}"


def _position(beat: dict[str, Any]) -> str:
    return f"step {beat['step']}, phase {beat['phase']}"
