"""The meeting of a run's processes, before jax starts: all come to process 0, prove that they belong to this run, and wait until
all are there. Needs no jax.

Why not jax's own coordinator alone: if a process does not come within its time limit, jax 0.10 and 0.12 abort all of them from C++
(`client.h: Terminating process`, exit code 134), without a word on which one is missing, and no Python code can catch that. It also
lets in everyone who reaches its port. So process 0 first listens there itself, and tells all of them the outcome.

The protocol, in lines of text:

    another process  PROTOCOL                          so that a program of another kind answers, and is told apart
    process 0        PROTOCOL NONCE
    another process  NUM_PROCESSES ADDRESS PROCESS_ID IDENTITY PROOF
    process 0        OUTCOME PROOF PLACE [WORDS]       when all are there or time is up; OUTCOME is met, wrong or fewer,
                                                       PLACE this process's number among those that are needed
                     or: refused WHY                   at once

A proof is an HMAC-SHA256, with the secret as its key, of what it answers and says. So a stranger who does not know the secret passes
for neither side, and a recorded greeting is worth nothing: each connection has a nonce of its own. Without a secret only strangers
who do not know this protocol are kept out. The secret guards the meeting, not what follows: jax's coordinator, which then
listens at the same address, has no password, and nothing is encrypted.
"""

import asyncio
import concurrent.futures
import contextlib
import hmac
import secrets
import socket
import time

from jaxpar.config import ConfigError
from jaxpar.run.gathering import host
from jaxpar.run.listening import listen, split_address
from jaxpar.run.member import GREETING_SECONDS, MAX_LINE, PROTOCOL, Choose, Member, NotEnough, Outcome, proof_of


def meet(member: Member, seconds: float, choose: Choose | None = None) -> Outcome:
    """Waits until all processes of the run are there, or, with `choose`, goes on after `seconds` with those that are.

    Args:
      choose: on process 0: the number of processes that have come → how many of them are needed. It raises NotEnough if they are
        too few. Those that go on are numbered anew, in their old order.

    Returns:
      This process's number among those that go on. One that is not needed returns when process 0 has ended.

    Raises:
      ConfigError: one is missing after `seconds`, two have the same ID, or this one was refused.
      NotEnough: with `choose`, they are too few.
    """
    if member.process_id:
        outcome = _come(member, seconds, choose is not None)
    else:
        sockets = listen(member.listens_at)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            outcome = asyncio.run(host(member, seconds, sockets, choose))
        else:  # in a notebook, whose event loop runs in this thread
            gathered = host(member, seconds, sockets, choose)
            outcome = concurrent.futures.ThreadPoolExecutor(1).submit(asyncio.run, gathered).result()
    if outcome.problem:
        raise (NotEnough if outcome.kind == "fewer" else ConfigError)(outcome.problem)
    return outcome


def _come(member: Member, seconds: float, elastic: bool) -> Outcome:
    """On any other process: goes to process 0 and waits for the outcome."""
    deadline, identity = time.monotonic() + seconds, secrets.token_hex(16)
    host, port = split_address(member.address)
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=5) as connection:
                return _ask(member, identity, connection, seconds)
        except ValueError:
            reason = "the program that listens there is not jaxpar, or not this version or run"
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            problem = member.waited_in_vain(
                f"process {member.process_id} of {member.num_processes} waited {seconds:g} s for the coordinator, "
                f"process 0 at {member.address}: {reason}"
            )
            return Outcome("fewer" if elastic else "wrong", problem=problem)
        time.sleep(0.5)


def _ask(member: Member, identity: str, connection: socket.socket, seconds: float) -> Outcome:
    """Returns the outcome. Raises ValueError if what answers is not jaxpar's process 0 of this run."""
    connection.sendall(f"{PROTOCOL}\n".encode())
    protocol, nonce = _read_line(connection, GREETING_SECONDS).split(" ")
    if protocol != PROTOCOL:
        raise ValueError
    unproven = f"{member.num_processes} {member.address} {member.process_id} {identity} "
    greeting = unproven + proof_of(member.secret, PROTOCOL, nonce, unproven)
    connection.sendall(f"{greeting}\n".encode())
    # Process 0 was there already, so it answers by then.
    kind, _, rest = _read_line(connection, seconds + 5).partition(" ")
    if kind == "refused":
        name = f"process {member.process_id} of {member.num_processes}"
        return Outcome("wrong", problem=f"{name} was refused at {member.address}: {rest}")
    proof, _, rest = rest.partition(" ")
    if not hmac.compare_digest(proof.encode(), proof_of(member.secret, greeting, f"{kind} {rest}").encode()):
        raise ValueError
    place, _, problem = rest.partition(" ")
    num_processes, process_id = map(int, place.split("/"))
    if kind == "met" and process_id < 0:
        _wait_for_end(connection)
    return Outcome(kind, num_processes, process_id, problem)


def _wait_for_end(connection: socket.socket) -> None:
    """Waits until process 0 has ended, or its machine has been silent for two minutes."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):  # not on macOS, where it takes two hours
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    with contextlib.suppress(OSError):
        connection.recv(1)


def _read_line(connection: socket.socket, seconds: float) -> str:
    deadline, line = time.monotonic() + seconds, b""
    while not line.endswith(b"\n"):
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        more = connection.recv(MAX_LINE)
        if not more:
            raise ConnectionError("it closed the connection")
        line += more
        if len(line) > MAX_LINE:
            raise ValueError
    return line.decode().removesuffix("\n")
