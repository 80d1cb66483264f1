"""Decisions that all processes of a run must share.

Processes may see a change in a shared file system at different times, so one of them looks and tells the others.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # jax has no public access to its coordinator's key-value store
from jax.experimental import multihost_utils

from jaxpar.config import ConfigError

_PATIENCE = 3600  # seconds that process 0 may take for a decision, such as one that waits for a disk
_decisions = itertools.count()


def decide_on_process_0(decide: Callable[[], Any]) -> Any:
    """Calls `decide` on process 0 only and returns its result in all processes. A collective call.

    Args:
      decide: returns something that JSON can hold.

    Raises:
      ConfigError: `decide` raised one; all processes raise the same error.
    """
    if jax.process_count() == 1:
        return decide()
    answer: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            answer = {"value": decide()}
        except ConfigError as error:
            answer = {"problems": error.problems}
    _wait_for_process_0()
    text = json.dumps(answer).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    buffer = np.frombuffer(text, np.uint8) if jax.process_index() == 0 else np.zeros(length, np.uint8)
    answer = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes())
    if "problems" in answer:
        raise ConfigError(answer["problems"])
    return answer["value"]


def _wait_for_process_0() -> None:
    """Lets the others wait in jax's coordinator. In a run's first collective, Gloo would give up after 30 s."""
    client: Any = distributed.global_state.client
    key = f"jaxpar/decided/{next(_decisions)}"
    if jax.process_index() == 0:
        client.key_value_set(key, "")
    else:
        client.blocking_key_value_get(key, 1000 * _PATIENCE)


def raise_together(problems: Sequence[str]) -> None:
    """Stops all processes if any of them found problems. A collective call.

    Raises:
      ConfigError: with this process's own problems if it has any, otherwise with the number of the first process that
        has some.
    """
    if jax.process_count() == 1:
        failed = [bool(problems)]
    else:
        failed = list(np.asarray(multihost_utils.process_allgather(np.bool_(bool(problems)))).ravel())
    if any(failed):
        raise ConfigError(list(problems) or f"process {failed.index(True)} stopped with an error: see its output")


def highest(*numbers: int) -> list[int]:
    """The highest of each of these numbers over all processes, the same in all of them. A collective call."""
    if jax.process_count() == 1:
        return list(numbers)
    return multihost_utils.process_allgather(np.array(numbers, np.int32)).max(axis=0).tolist()


def from_all_processes(value: Any) -> list[Any]:
    """The value of each process, in the order of their numbers. A collective call.

    Args:
      value: what JSON can hold.
    """
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    padded = np.full(highest(len(text))[0], ord(" "), np.uint8)  # JSON ends before spaces
    padded[: len(text)] = text
    return [json.loads(row.tobytes()) for row in np.asarray(multihost_utils.process_allgather(padded))]
