"""What both sides of a meeting (`meeting.py`) know: who a process is, how it proves that, and how a meeting can end."""

import dataclasses
import functools
import hmac
import os
from collections.abc import Callable
from typing import NamedTuple

from jaxpar.config import ConfigError
from jaxpar.run.listening import own_address, split_address

PROTOCOL = "jaxpar-meeting-1"
MAX_LINE = 4096  # bytes, in both directions
GREETING_SECONDS = 10.0  # that a connection has to say who it is; it keeps nobody else waiting


@dataclasses.dataclass(frozen=True)
class Member:
    """This process's part in the run.

    Args:
      address: host:port of the coordinator, which runs in process 0. The same text in all processes.
      secret: the same in all processes; "": none.
      bind_address: host:port where process 0 listens; "": as `own_address` chooses.
    """

    address: str
    num_processes: int
    process_id: int
    secret: str = dataclasses.field(default="", repr=False)
    bind_address: str = ""

    def __post_init__(self) -> None:
        for name, text in (
            ("JAX_COORDINATOR_ADDRESS", self.address),
            ("JAX_COORDINATOR_BIND_ADDRESS", self.bind_address or self.address),
        ):
            host, port = split_address(text)
            is_plain = text.isascii() and text.isprintable() and " " not in text
            if not is_plain or not host or not port.isdecimal() or int(port) > 65535:
                raise ConfigError(f"{name}: {text} is not host:port, such as node0:12355")
        if self.process_id >= self.num_processes:
            raise ConfigError(
                f"JAX_PROCESS_ID: {self.process_id}, but JAX_NUM_PROCESSES is {self.num_processes}: IDs start at 0"
            )

    @functools.cached_property
    def listens_at(self) -> str:
        """host:port where process 0 listens, and then jax's coordinator."""
        return self.bind_address or own_address(self.address)

    def waited_in_vain(self, text: str) -> str:
        host, port = split_address(self.address)
        return (
            f"{text}. Check that all {self.num_processes} processes were started, one on each node or for each GPU; that {host} "
            f"is the name of process 0's node on every node; that no firewall blocks its port {port}. To wait longer, set "
            f"JAXPAR_START_TIMEOUT (seconds)"
        )


class NotEnough(ConfigError):
    """Fewer processes have come than the run needs, but `choose` says that they come and go: start it again."""


class Outcome(NamedTuple):
    """How a meeting ended, for one process.

    Attributes:
      kind: "met"; "fewer": too few have come, to a meeting with `choose`; "wrong": anything else.
      num_processes, process_id: of those that go on; 0 and -1 for a process that is not needed.
      problem: what is wrong, or "".
    """

    kind: str
    num_processes: int = 0
    process_id: int = -1
    problem: str = ""


Choose = Callable[[int], int]


def proof_of(secret: str, *words: str) -> str:
    """The HMAC of these words, none of which holds the end of a line."""
    return hmac.new(os.fsencode(secret), "\n".join(words).encode(), "sha256").hexdigest()
