"""Process 0's side of a meeting (`meeting.py`): who has come, and what they are told."""

import asyncio
import contextlib
import dataclasses
import hmac
import secrets
import socket

from jaxpar.config.errors import on_a_screen
from jaxpar.run.member import GREETING_SECONDS, MAX_LINE, PROTOCOL, Choose, Member, NotEnough, Outcome, proof_of

MAX_UNKNOWN = 256  # connections that have not said yet who they are; a process may have 1,024 open files


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
        expected = proof_of(self.member.secret, PROTOCOL, nonce, greeting.removesuffix(proof))
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


_waiting: list[socket.socket] = []  # connections of processes that are not needed; they end when this process does


def _chosen(gathering: _Gathering, choose: Choose, missing: str) -> Outcome:
    try:
        return Outcome("met", choose(1 + len(gathering.present)), 0)
    except NotEnough as error:
        return Outcome("fewer", problem=f"{error}; {missing}" if missing else str(error))


async def host(member: Member, seconds: float, sockets: list[socket.socket], choose: Choose | None) -> Outcome:
    """On process 0: waits for the others and tells them the outcome."""
    gathering = _Gathering(member)
    backlog = 128 + member.num_processes
    servers = [
        await asyncio.start_server(gathering.connect, sock=one, limit=MAX_LINE, backlog=backlog) for one in sockets
    ]
    try:
        async with asyncio.timeout(seconds):
            problem, missing = await gathering.problem, ""
    except TimeoutError:
        problem = missing = gathering.missing(seconds)
    for server in servers:
        server.close()
    if choose is not None and (missing or not problem):
        outcome = _chosen(gathering, choose, missing)
    else:
        outcome = Outcome("wrong", problem=problem) if problem else Outcome("met", member.num_processes, 0)
    for number, arrival in enumerate(sorted(gathering.present, key=lambda one: one.process_id), 1):
        place = f"{outcome.num_processes}/{number if number < outcome.num_processes else -1}"
        if outcome.kind == "met" and number >= outcome.num_processes:
            _waiting.append(arrival.writer.get_extra_info("socket").dup())
        words = f"{outcome.kind} {place} {on_a_screen(outcome.problem)}"
        kind, _, rest = words.partition(" ")
        arrival.writer.write(f"{kind} {proof_of(member.secret, arrival.greeting, words)} {rest}\n".encode())
    for connection in gathering.connections:
        connection.cancel()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(5):
            await asyncio.gather(*(one.writer.wait_closed() for one in gathering.present), return_exceptions=True)
    return outcome
