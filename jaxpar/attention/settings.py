"""How attention is computed. The config decides, not the model that calls `attention`."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Backend:
    """What computes a block.

    Attributes:
      name: "xla": plain JAX. "cudnn", "tokamax": kernels of these libraries. "auto": of the three, the first that can, see
        `jaxpar.attention.choose`.
      device: one of the devices that the program is for, which may be there for compiling only. None: not a GPU.
      choices: for the user to read, once a program has been traced: what computes blocks → why.
    """

    name: Literal["auto", "xla", "cudnn", "tokamax"] = "auto"
    device: Any = None
    choices: dict[str, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class AttentionSettings:
    """How calls of `attention` exchange tokens and compute blocks.

    Attributes:
      cp_comm_type: what the cp ranks exchange, by Megatron-LM's names. "p2p": keys and values go round a ring.
        "all_gather": every rank receives all of them. "a2a": each rank receives some heads of the whole sequence.
        "a2a+p2p": "a2a" inside groups of neighbouring ranks, a ring across the groups.
      a2a_size: ranks per group of "a2a+p2p".
      backend: what computes a block.
      calls: once a program has been traced, an entry for each call of `attention` in it: the kind of exchange.
    """

    cp_comm_type: Literal["p2p", "all_gather", "a2a", "a2a+p2p"] = "p2p"
    a2a_size: int = 1
    backend: Backend = Backend()
    calls: list[str] = field(default_factory=list, compare=False)


_current: ContextVar[AttentionSettings | None] = ContextVar("attention settings", default=None)


def current_settings() -> AttentionSettings | None:
    """The settings in force. None: outside of `attention_settings`, where `attention` is used as a library."""
    return _current.get()


@contextmanager
def attention_settings(settings: AttentionSettings) -> Iterator[None]:
    """Applies `settings` to calls of `jaxpar.attention.attention` that are traced inside.

    A sequence that is split is then in zigzag order, unless a call says otherwise.
    """
    token = _current.set(settings)
    try:
        yield
    finally:
        _current.reset(token)
