"""The meeting of a run's processes, before jax starts: all come to process 0, prove that they belong to this run, and wait until
all are there. Needs no jax.

Why not jax's own coordinator alone: if a process does not come within its time limit, jax 0.10 and 0.12 abort all of them from C++
(`client.h: Terminating process`, exit code 134), without a word on which one is missing, and no Python code can catch that. It also
lets in everyone who reaches its port. So process 0 first listens there itself, and tells all of them the outcome.

The protocol, in lines of text:

    another process  PROTOCOL                          so that a program of another kind answers, and is told apart
    process 0        PROTOCOL NONCE
    another process  NUM_PROCESSES ADDRESS PROCESS_ID IDENTITY PROOF
    process 0        outcome PROOF [what is wrong]     when all are there or time is up;
                     or: refused WHY                   at once

A proof is an HMAC-SHA256, with the secret as its key, of what it answers and says. So a stranger who does not know the secret passes
for neither side, and a recorded greeting is worth nothing: each connection has a nonce of its own. Without a secret only strangers
who do not know this protocol are kept out. The secret guards the meeting, not what follows: jax's coordinator, which then
listens at the same address, has no password, and nothing is encrypted.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import hmac
import os
import secrets
import socket
import time

from jaxpar.config import ConfigError
from jaxpar.config.errors import on_a_screen
from jaxpar.run.listening import listen, own_address, split_address

PROTOCOL = "jaxpar-meeting-1"
MAX_LINE = 4096  # bytes, in both directions
MAX_UNKNOWN = 256  # connections that have not said yet who they are; a process may have 1,024 open files
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


def meet(member: Member, seconds: float) -> None:
    """Waits until all processes of the run are there.

    Raises:
      ConfigError: one is missing after `seconds`, two have the same ID, or this one was refused.
    """
    if member.process_id:
        problem = _come(member, seconds)
    else:
        sockets = listen(member.listens_at)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            problem = asyncio.run(_host(member, seconds, sockets))
        else:  # in a notebook, whose event loop runs in this thread
            in_thread = concurrent.futures.ThreadPoolExecutor(1).submit(asyncio.run, _host(member, seconds, sockets))
            problem = in_thread.result()
    if problem:
        raise ConfigError(problem)


def _proof(secret: str, *words: str) -> str:
    """The HMAC of these words, none of which holds the end of a line."""
    return hmac.new(os.fsencode(secret), "\n".join(words).encode(), "sha256").hexdigest()


# --- process 0 --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class _Arrival:
    """A process that is there. `identity` is its own, however often it connects."""

    process_id: int
    identity: str
    greeting: str
    writer: asyncio.StreamWriter

    @property
    def host(self) -> str:
        return str((self.writer.get_extra_info("peername") or ["unknown"])[0])


class _Gathering:
    """Who has come to process 0."""

    def __init__(self, member: Member):
        self.member = member
        self.present: list[_Arrival] = []
        self.reasons: dict[int, str] = {}  # process ID → why one that came with it does not count
        self.strangers = 0
        self.connections: set[asyncio.Task[None]] = set()
        self.unknown: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}  # those that have not said yet who they are
        self.problem: asyncio.Future[str] = asyncio.get_running_loop().create_future()  # "": all are there

    def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves a connection; closes it at the end of that, or of the meeting."""
        task = asyncio.create_task(self._receive(reader, writer))
        if len(self.unknown) == MAX_UNKNOWN:
            self.unknown.pop(next(iter(self.unknown))).cancel()  # the oldest; a process would have said it by now
            self.strangers += 1
        self.unknown[writer] = task
        self.connections.add(task)
        task.add_done_callback(self.connections.discard)
        task.add_done_callback(lambda _: writer.close())

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(GREETING_SECONDS):
                if await reader.readline() != f"{PROTOCOL}\n".encode():
                    raise ValueError
                nonce = secrets.token_hex(16)
                writer.write(f"{PROTOCOL} {nonce}\n".encode())
                greeting = (await reader.readline()).decode().removesuffix("\n")
            num_processes, address, process_id, identity, proof = greeting.split(" ")
            if not 0 < int(process_id) < 10**9:
                raise ValueError
        except (OSError, ValueError):  # also: no line in time, a line that is too long, not UTF-8
            self.strangers += 1
            return
        finally:
            self.unknown.pop(writer, None)
        arrival = _Arrival(int(process_id), identity, greeting, writer)
        expected = _proof(self.member.secret, PROTOCOL, nonce, greeting.removesuffix(proof))
        if why := self._refusal(
            arrival, num_processes, address, hmac.compare_digest(expected.encode(), proof.encode())
        ):
            self._note(arrival, why)
            writer.write(f"refused {why}\n".encode())
            return
        self._admit(arrival)
        with contextlib.suppress(OSError):
            await reader.read(1)  # a process that waits says nothing more
        if arrival in self.present and not self.problem.done():
            self.present.remove(arrival)
            self._note(arrival, f"came from {arrival.host} and left")

    def _refusal(self, arrival: _Arrival, num_processes: str, address: str, knows_secret: bool) -> str:
        name, member = f"process {arrival.process_id}", self.member
        if not knows_secret:
            is_set = "set" if member.secret else "not set"
            return f"JAXPAR_SECRET of {name} is not that of process 0, where it is {is_set}: give all processes the same one"
        if num_processes != str(member.num_processes) or arrival.process_id >= member.num_processes:
            return f"JAX_NUM_PROCESSES is {num_processes} in {name}, {member.num_processes} in process 0"
        if address != member.address:
            return f"JAX_COORDINATOR_ADDRESS is {address} in {name}, {member.address} in process 0"
        return ""

    def _note(self, arrival: _Arrival, why: str) -> None:
        if arrival.process_id < self.member.num_processes:
            self.reasons[arrival.process_id] = why

    def _admit(self, arrival: _Arrival) -> None:
        other = next((one for one in self.present if one.process_id == arrival.process_id), None)
        if other and other.identity == arrival.identity:  # its first connection broke
            self.present.remove(other)
            other.writer.close()
            other = None
        self.present.append(arrival)
        if self.problem.done():
            return
        if other:
            doubt = "" if self.member.secret else ", or is one of them a stranger (JAXPAR_SECRET keeps those out)"
            self.problem.set_result(
                f"two processes came as process {arrival.process_id}, from {other.host} and from {arrival.host}: "
                f"is JAX_PROCESS_ID the same in both{doubt}? Each process needs its own, 0 to {self.member.num_processes - 1}"
            )
        elif len(self.present) == self.member.num_processes - 1:
            self.problem.set_result("")

    def missing(self, seconds: float) -> str:
        member = self.member
        missing = sorted({*range(1, member.num_processes)} - {arrival.process_id for arrival in self.present})
        names = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        text = (
            f"process 0 of {member.num_processes} waited {seconds:g} s at {member.address}, but {len(missing)} did not "
            f"connect: {names}"
        )
        text += "".join(f"; process {one}: {self.reasons[one]}" for one in missing[:8] if one in self.reasons)
        if self.strangers:
            text += f"; {self.strangers} other connections did not come from jaxpar, or not from this version"
        return member.waited_in_vain(text)


async def _host(member: Member, seconds: float, sockets: list[socket.socket]) -> str:
    """On process 0: waits for the others and tells them the outcome. Returns what is wrong, or ""."""
    gathering = _Gathering(member)
    backlog = 128 + member.num_processes
    servers = [
        await asyncio.start_server(gathering.connect, sock=one, limit=MAX_LINE, backlog=backlog) for one in sockets
    ]
    try:
        async with asyncio.timeout(seconds):
            problem = await gathering.problem
    except TimeoutError:
        problem = gathering.missing(seconds)
    for server in servers:
        server.close()
    words = on_a_screen(problem)
    for arrival in gathering.present:
        proof = _proof(member.secret, arrival.greeting, words)
        arrival.writer.write(f"outcome {proof} {words}\n".encode())
    for connection in gathering.connections:
        connection.cancel()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(5):
            await asyncio.gather(*(one.writer.wait_closed() for one in gathering.present), return_exceptions=True)
    return problem


# --- the other processes ----------------------------------------------------------------------------------------------


def _come(member: Member, seconds: float) -> str:
    """On any other process: goes to process 0 and waits for the outcome. Returns what is wrong, or ""."""
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
            return member.waited_in_vain(
                f"process {member.process_id} of {member.num_processes} waited {seconds:g} s for the coordinator, "
                f"process 0 at {member.address}: {reason}"
            )
        time.sleep(0.5)


def _ask(member: Member, identity: str, connection: socket.socket, seconds: float) -> str:
    """Returns the outcome. Raises ValueError if what answers is not jaxpar's process 0 of this run."""
    connection.sendall(f"{PROTOCOL}\n".encode())
    protocol, nonce = _read_line(connection, GREETING_SECONDS).split(" ")
    if protocol != PROTOCOL:
        raise ValueError
    unproven = f"{member.num_processes} {member.address} {member.process_id} {identity} "
    greeting = unproven + _proof(member.secret, PROTOCOL, nonce, unproven)
    connection.sendall(f"{greeting}\n".encode())
    # Process 0 was there already, so it answers by then.
    kind, _, rest = _read_line(connection, seconds + 5).partition(" ")
    if kind == "refused":
        return f"process {member.process_id} of {member.num_processes} was refused at {member.address}: {rest}"
    proof, _, problem = rest.partition(" ")
    if not hmac.compare_digest(proof.encode(), _proof(member.secret, greeting, problem).encode()):
        raise ValueError
    return problem


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
