"""What the processes of a run agree on: files are seen by each at its own time, a decision must be one."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxpar.config import ConfigError


def from_first(decide: Callable[[], Any]) -> Any:
    """What `decide`, called on process 0 alone, returns there (something JSON can hold), in all processes.

    Raises:
      ConfigError: it raised one; all processes raise the same.
    """
    if jax.process_count() == 1:
        return decide()
    answer: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            answer = {"value": decide()}
        except ConfigError as error:
            answer = {"problems": error.problems}
    text = json.dumps(answer).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    buffer = np.frombuffer(text, np.uint8) if jax.process_index() == 0 else np.zeros(length, np.uint8)
    answer = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes())
    if "problems" in answer:
        raise ConfigError(answer["problems"])
    return answer["value"]


def check_together(problems: Sequence[str]) -> None:
    """Raises ConfigError in all processes if any has problems: its own where it has some, else the number of the first
    process that does."""
    if jax.process_count() == 1:
        failed = [bool(problems)]
    else:
        failed = list(np.asarray(multihost_utils.process_allgather(np.bool_(bool(problems)))).ravel())
    if any(failed):
        raise ConfigError(list(problems) or f"process {failed.index(True)} stopped with an error, which it printed")
