"""How attention is computed, chosen by the config and not by the model that calls it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AttentionSettings:
    """Attributes:
    cp_comm_type: what travels between cp ranks (Megatron-LM's names). "p2p": keys and values go round a ring.
      "all_gather": every rank gets all of them. "a2a": each rank gets some heads of the whole sequence. "a2a+p2p": that
      inside groups of neighbours, and a ring across.
    a2a_size: ranks in such a group, with "a2a+p2p".
    backend: what computes a block: "xla", plain JAX; "pallas", our flash kernel for GPUs.
    """

    cp_comm_type: Literal["p2p", "all_gather", "a2a", "a2a+p2p"] = "p2p"
    a2a_size: int = 1
    backend: Literal["xla", "pallas"] = "xla"


DEFAULT = AttentionSettings()
_current: ContextVar[AttentionSettings] = ContextVar("attention settings", default=DEFAULT)


def current_settings() -> AttentionSettings:
    return _current.get()


@contextmanager
def attention_settings(settings: AttentionSettings) -> Iterator[None]:
    """Calls of `jaxpar.attention.attention` that are traced inside follow `settings`."""
    token = _current.set(settings)
    try:
        yield
    finally:
        _current.reset(token)
