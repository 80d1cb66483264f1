"""One start of `jaxpar train` in the soak."""

import os
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from runs import start_command, start_ranks

PATIENCE = 240  # seconds until a process hangs


class Violation(Exception):
    """Something was lost, doubled or changed in silence, or a run has not ended as its table of faults says."""


def check(holds: object, problem: str) -> None:
    if not holds:
        raise Violation(problem)


class Run:
    """One start of `jaxpar train`: its processes, and the lines that each has printed so far."""

    def __init__(self, commands: list[list], **variables: str):
        one = len(commands) == 1
        self.processes = [start_command(*commands, **variables)] if one else start_ranks(commands, **variables)
        self.lines: list[list[str]] = [[] for _ in commands]
        self.deaf = False  # closes standard output at its next line
        pairs = zip(self.processes, self.lines, strict=True)
        self._readers = [threading.Thread(target=self._read, args=pair, daemon=True) for pair in pairs]
        for reader in self._readers:
            reader.start()

    def _read(self, process: subprocess.Popen, lines: list[str]) -> None:
        with process.stdout as output:
            for line in output:
                lines.append(line.rstrip())
                if self.deaf:
                    return

    @property
    def over(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    @property
    def output(self) -> str:
        return "\n".join(line for lines in self.lines for line in lines)

    def found(self, pattern: str) -> list[int]:
        """The number that a pattern finds in each line of process 0."""
        return [int(match[1]) for line in [*self.lines[0]] if (match := re.search(pattern, line))]

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        """Returns when it holds, or when the run is over."""
        end = time.monotonic() + PATIENCE
        while not condition() and not self.over:
            check(time.monotonic() < end, f"no {what} in {PATIENCE} s")
            time.sleep(0.003)

    def send(self, number: int) -> None:
        for process in self.processes:
            process.send_signal(number)

    def wait(self) -> list[int]:
        """The exit codes. An end by signal N is -N."""
        end = time.monotonic() + PATIENCE
        try:
            codes = [process.wait(max(1, end - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise Violation(f"it has not ended in {PATIENCE} s") from None
        for reader in self._readers:
            reader.join(10)
        return codes


def cached() -> dict[str, str]:
    """Environment variables with which a restart does not compile again."""
    folder = Path(__file__).parents[2] / ".pytest_cache/jax"
    return {
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(folder)),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
    }
