"""The meeting of a run's processes, among others who reach the same port. Processes are threads here, unless a test says so."""

import asyncio
import contextlib
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxpar import ConfigError
from jaxpar.run import gathering, meeting
from jaxpar.run.listening import listen, own_address, split_address
from jaxpar.run.meeting import PROTOCOL, Member, NotEnough, meet

ROOT = Path(__file__).parents[2]
SECRET = "c0ffee"


def members(number: int, secret: str = SECRET, host: str = "127.0.0.1") -> list[Member]:
    with socket.socket() as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    return [Member(f"{host}:{port}", number, index, secret) for index in range(number)]


def outcome(member: Member, seconds: float) -> str:
    try:
        meet(member, seconds)
    except ConfigError as error:
        return str(error)
    return ""


def outcomes(all_members: Sequence[Member], seconds: float = 20) -> list[str]:
    """What is wrong, for each of these processes; all start at the same time."""
    with ThreadPoolExecutor(len(all_members)) as pool:
        return list(pool.map(lambda member: outcome(member, seconds), all_members))


def connected(member: Member) -> socket.socket:
    host, port = split_address(member.address)
    while True:  # until process 0 listens
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection((host, int(port)), 5)
        time.sleep(0.02)


@contextlib.contextmanager
def waiting(member: Member, identity: str) -> Iterator[None]:
    """A connection of a process of the run that has said who it is and waits, without a process."""
    with connected(member) as connection, ThreadPoolExecutor(1) as pool:
        pool.submit(meeting._ask, member, identity, connection, 5)
        yield
        connection.shutdown(socket.SHUT_RDWR)


# --- strangers --------------------------------------------------------------------------------------------------------


class Strangers:
    """Clients that do not belong to the run. Each connects again and again until `stop`.

    Args:
      recorded: what a process of the run has said in another connection.
    """

    def __init__(self, member: Member, recorded: str):
        self.member, self.recorded = member, recorded
        self.stop = threading.Event()
        self.flood = [0]  # bytes that were sent by each one-time flood
        self.answers: list[str] = []  # to those that pretend to be a process of the run
        self.threads: list[threading.Thread] = []
        self.kinds = [
            self.slow, self.endless, self.old_greeting, self.garbage, self.connects, self.silent, self.replays, self.guesses,
        ]  # fmt: skip

    def start(self, number: int) -> None:
        for index in range(number):
            self.threads.append(threading.Thread(target=self.run, args=[index], daemon=True))
            self.threads[-1].start()

    def run(self, index: int) -> None:
        host, port = split_address(self.member.address)
        while not self.stop.is_set():
            with contextlib.suppress(OSError, ValueError), socket.create_connection((host, int(port)), 5) as connection:
                self.kinds[index % len(self.kinds)](connection, index)
            self.stop.wait(0.1)

    def end(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(30)

    def slow(self, connection: socket.socket, index: int) -> None:
        for byte in f"{PROTOCOL}\n{self.recorded}\n".encode():
            connection.sendall(bytes([byte]))
            if self.stop.wait(1):
                return

    def endless(self, connection: socket.socket, index: int) -> None:
        self.flood.append(0)
        place = len(self.flood) - 1
        for _ in range(500):
            self.flood[place] += connection.send(bytes(10**6))

    def old_greeting(self, connection: socket.socket, index: int) -> None:
        connection.sendall(b"1\n")
        connection.recv(100)

    def garbage(self, connection: socket.socket, index: int) -> None:
        connection.sendall(f"{PROTOCOL}\n".encode() * (index % 2) + random.Random(index).randbytes(300) + b"\n" * 50)
        connection.recv(100)

    def connects(self, connection: socket.socket, index: int) -> None:
        pass

    def silent(self, connection: socket.socket, index: int) -> None:
        self.stop.wait(60)

    def replays(self, connection: socket.socket, index: int) -> None:
        connection.sendall(f"{PROTOCOL}\n".encode())
        meeting._read_line(connection, 5)
        connection.sendall(f"{self.recorded}\n".encode())
        self.answers.append(meeting._read_line(connection, 60))

    def guesses(self, connection: socket.socket, index: int) -> None:
        number = self.member.num_processes
        pretender = Member(self.member.address, number, 1 + index % (number - 1), ("", "guess")[index % 2])
        self.answers.append(meeting._ask(pretender, "me", connection, 60).problem)


def record(member: Member) -> str:
    """The greeting of a process of the run, as one hears it who is at its coordinator's address too early."""
    host, port = split_address(member.address)
    with socket.create_server((host, int(port))) as server, ThreadPoolExecutor(1) as pool:
        process = pool.submit(outcome, member, 0)
        with server.accept()[0] as connection:
            assert meeting._read_line(connection, 5) == PROTOCOL
            connection.sendall(f"{PROTOCOL} {'0' * 32}\n".encode())
            greeting = meeting._read_line(connection, 5)
        assert "it closed the connection" in process.result(10)
    return greeting


@contextlib.contextmanager
def among_strangers(member: Member, number: int) -> Iterator[Strangers]:
    """Half of them are there first, before any process of the run."""
    strangers = Strangers(member, record(member))
    try:
        strangers.start(number // 2)
        time.sleep(0.3)
        late = threading.Timer(0.3, strangers.start, [number - number // 2])
        late.start()
        yield strangers
        late.join()
    finally:
        strangers.end()
    assert all(answer.startswith(("refused ", "process ")) for answer in strangers.answers), strangers.answers
    assert any("JAXPAR_SECRET of process " in answer for answer in strangers.answers)
    assert max(strangers.flood) < 50e6  # what the system itself takes, not the process


def test_all_meet_among_strangers():
    run = members(8)
    with among_strangers(run[1], 16):
        start = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            ends = [pool.submit(outcome, member, 20) for member in run[:7]]
            time.sleep(1)
            ends.append(pool.submit(outcome, run[7], 20))
            assert [end.result() for end in ends] == [""] * 8
        assert time.monotonic() - start < 5


@pytest.mark.parametrize("says", [b"", PROTOCOL.encode(), PROTOCOL.encode() + b"\n64 node0:7 1 me"])
def test_a_connection_that_does_not_say_who_it_is_is_closed(monkeypatch, says):
    monkeypatch.setattr(gathering, "GREETING_SECONDS", 0.2)
    run = members(2)
    with ThreadPoolExecutor(1) as pool:
        process_0 = pool.submit(outcome, run[0], 0.8)
        with connected(run[0]) as connection:
            connection.settimeout(0.6)
            connection.sendall(says)
            assert b"".join(iter(lambda: connection.recv(100), b"")).count(b"\n") == says.count(b"\n")
        assert "1 did not connect: 1; 1 other connections did not come from jaxpar" in process_0.result()


def test_of_many_silent_connections_the_oldest_are_closed(monkeypatch):
    """So that they do not use up the files that a process may open."""
    monkeypatch.setattr(gathering, "MAX_UNKNOWN", 8)
    run = members(3)
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        process_0 = pool.submit(outcome, run[0], 0.8)
        silent = [stack.enter_context(connected(run[0])) for _ in range(30)]
        time.sleep(0.2)
        for connection in silent[:22]:
            assert connection.recv(1) == b""
        silent[22].setblocking(False)
        with pytest.raises(BlockingIOError):
            silent[22].recv(1)
        process_1 = pool.submit(outcome, run[1], 0)
        assert "1 did not connect: 2; 23 other connections" in process_0.result()
        assert process_1.result() == process_0.result()


PROCESS = """
import os, sys, threading, time
from jaxpar.run.meeting import Member, meet
address, number, process_id = sys.argv[1:]
member = Member(address, int(number), int(process_id), os.environ["JAXPAR_SECRET"])
pages = lambda: int(open("/proc/self/statm").read().split()[1])
most = before = pages()
def watch():
    global most
    while True:
        most = max(most, pages())
        time.sleep(0.05)
if member.process_id == 0:
    threading.Thread(target=watch, daemon=True).start()
meet(member, 60)
print("jax" in sys.modules, (max(most, pages()) - before) * os.sysconf("SC_PAGE_SIZE"))
"""


@pytest.mark.slow
@pytest.mark.alone
def test_64_processes_meet_among_100_strangers():
    run = members(64)
    with among_strangers(run[1], 100):
        start = time.monotonic()
        words = [[m.address, str(m.num_processes), str(m.process_id)] for m in run]
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAXPAR_SECRET": SECRET}
        processes = [subprocess.Popen([sys.executable, "-c", PROCESS, *w], env=environment, **quiet) for w in words]
        ends = [process.communicate(timeout=60) for process in processes]
        seconds = time.monotonic() - start
    assert [stderr for _, stderr in ends] == [""] * 64
    assert [stdout.split()[0] for stdout, _ in ends] == ["False"] * 64
    megabytes = int(ends[0][0].split()[1]) / 1e6
    print(f"{seconds:.1f} s; process 0 took {megabytes} MB for all of them")
    assert megabytes < 20
    assert seconds < 20


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secrets", [("a", "b"), ("a", ""), ("", "b")])
def test_different_secrets_are_named_by_both(secrets):
    first, second = members(2)
    run = [Member(m.address, 2, m.process_id, secret) for m, secret in zip((first, second), secrets, strict=True)]
    at_0, at_1 = outcomes(run, 1)
    words = f"JAXPAR_SECRET of process 1 is not that of process 0, where it is {'set' if secrets[0] else 'not set'}"
    assert f"1 did not connect: 1; process 1: {words}" in at_0
    assert f"process 1 of 2 was refused at {first.address}: {words}" in at_1


@pytest.mark.parametrize("secret", ["", SECRET])
def test_processes_of_another_run_are_named_by_both(secret):
    run = members(3, secret)
    port = run[0].address.rpartition(":")[2]
    others = [Member(run[0].address, 4, 1, secret), Member(f"localhost:{port}", 3, 2, secret)]
    at_0, at_1, at_2 = outcomes([run[0], *others], 1)
    assert "JAX_NUM_PROCESSES is 4 in process 1, 3 in process 0" in at_1
    assert f"JAX_COORDINATOR_ADDRESS is localhost:{port} in process 2, 127.0.0.1:{port} in process 0" in at_2
    assert at_1.partition("JAX_")[2] in at_0 and at_2.partition("JAX_")[2] in at_0


@pytest.mark.parametrize("secret", ["", SECRET])
def test_two_processes_with_one_id_are_named_at_once_by_all(secret):
    run = members(3, secret)
    start = time.monotonic()
    words = "two processes came as process 1, from 127.0.0.1 and from 127.0.0.1: is JAX_PROCESS_ID the same in both"
    ends = outcomes([run[0], run[1], run[1]])
    assert all(words in end for end in ends), ends
    assert all(("JAXPAR_SECRET keeps those out" in end) == (not secret) for end in ends)
    assert time.monotonic() - start < 5


def test_a_process_that_left_is_missing():
    run = members(4)
    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(outcome, member, 1) for member in run[:2]]
        with waiting(run[2], "first"):
            time.sleep(0.3)
        for end in others:
            assert "2 did not connect: 2, 3; process 2: came from 127.0.0.1 and left" in end.result()


@pytest.mark.parametrize("stays_open", [True, False])
def test_a_process_may_come_again(monkeypatch, stays_open):
    """It is no second process with its ID, even where process 0 has not noticed that its first connection broke."""
    run = members(4)
    monkeypatch.setattr(meeting.secrets, "token_hex", lambda _: "same")
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(outcome, member, 5) for member in run[:2]]
        with waiting(run[2], "same" if stays_open else "before"):
            time.sleep(0.2)
            again = pool.submit(outcome, run[2], 5) if stays_open else None
            time.sleep(0.2)
        others += [again or pool.submit(outcome, run[2], 5), pool.submit(outcome, run[3], 5)]
        assert [end.result() for end in others] == [""] * 4


def test_process_0_that_does_not_know_the_secret_is_not_believed():
    run = members(2)
    host, port = split_address(run[0].address)
    with socket.create_server((host, int(port))) as server, ThreadPoolExecutor(1) as pool:
        process = pool.submit(outcome, run[1], 0)
        with server.accept()[0] as connection:
            meeting._read_line(connection, 5)
            connection.sendall(f"{PROTOCOL} 0\n".encode())
            greeting = meeting._read_line(connection, 5)
            connection.sendall(f"met {meeting.proof_of('guess', greeting, 'met 2/1 ')} 2/1 \n".encode())
            assert "the program that listens there is not jaxpar" in process.result(10)


# --- where process 0 listens ------------------------------------------------------------------------------------------


def test_process_0_listens_at_its_own_address_only():
    run = members(2)
    (listening,) = listen(run[0].listens_at)
    with listening:
        assert f"{listening.getsockname()[0]}:{listening.getsockname()[1]}" == run[0].address
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", listening.getsockname()[1]), 5)


@pytest.mark.parametrize(
    ("known_as", "address", "listens_at"),
    [
        (["127.0.0.1"], "localhost:7", "localhost:7"),
        (["127.0.0.1"], "127.0.0.1:7", "127.0.0.1:7"),
        (["127.0.1.1"], "node0:7", "[::]:7"),  # in Debian's /etc/hosts; the other nodes have another address
        (["192.0.2.1"], "node0:7", "[::]:7"),  # of a NAT, or a Kubernetes service
        ([], "node0:7", "[::]:7"),
        (["192.0.2.1", "0.0.0.0"], "node0:7", "node0:7"),  # several, one of which is this machine's
    ],
)
def test_an_address_that_is_not_this_machines_is_a_note(monkeypatch, capsys, known_as, address, listens_at):
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 7)) for ip in known_as]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)
    assert own_address(address) == listens_at
    note = capsys.readouterr().err
    assert (f"note: coordinator {address}: " in note and "JAX_COORDINATOR_BIND_ADDRESS" in note) == (
        address != listens_at
    )


def test_an_address_to_listen_at_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="JAX_COORDINATOR_BIND_ADDRESS: .* does not have the address 192.0.2.1:7"):
        meet(Member("node0:7", 2, 0, bind_address="192.0.2.1:7"), 1)


def test_in_a_notebook():
    """An event loop runs already where process 0 is."""
    run = members(2)

    async def cell() -> str:
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(outcome, run[1], 5)
            meet(run[0], 5)
            return other.result()

    assert asyncio.run(cell()) == ""


JOIN = """
import socket, sys
from jaxpar.run import rendezvous
assert rendezvous.join() == 2
try:
    socket.create_connection(("127.0.0.2", int(sys.argv[1])), 5)
except ConnectionRefusedError:
    print("refused elsewhere")
socket.create_connection(("127.0.0.1", int(sys.argv[1])), 5)
"""


@pytest.mark.slow
def test_jaxs_coordinator_listens_there_too():
    """On the same port, though strangers still hold connections to it."""
    run = members(2)
    common = {"JAX_COORDINATOR_ADDRESS": run[0].address, "JAX_NUM_PROCESSES": "2", "JAXPAR_SECRET": SECRET}
    words = [sys.executable, "-c", JOIN, run[0].address.rpartition(":")[2]]
    variables = [{**os.environ, "PYTHONPATH": str(ROOT), **common, "JAX_PROCESS_ID": str(i)} for i in range(2)]
    strangers = Strangers(run[1], record(run[1]))
    strangers.start(16)
    try:
        processes = [subprocess.Popen(words, env=one, stdout=subprocess.PIPE, text=True) for one in variables]
        assert [process.communicate(timeout=60)[0] for process in processes] == ["refused elsewhere\n"] * 2
    finally:
        strangers.end()
    assert [process.returncode for process in processes] == [0, 0]


def test_a_run_goes_on_with_those_who_have_come():
    """Of five, process 2 is missing; three are needed. They are numbered anew; the fifth waits for the end of process 0."""
    asked = []

    def choose(count):
        asked.append(count)
        return 3

    run = members(5)
    with ThreadPoolExecutor(5) as pool:
        others = [pool.submit(meet, run[rank], 20, choose) for rank in (1, 3, 4)]
        assert meet(run[0], 2, choose)[1:3] == (3, 0)
        assert [other.result(10)[1:3] for other in others[:2]] == [(3, 1), (3, 2)]
        assert asked == [4]
        assert not others[2].done(), "the one that is not needed did not wait"
        gathering._waiting.pop().close()  # as when process 0 ends
        assert others[2].result(10)[1:3] == (3, -1)


def test_too_few_for_a_run_whose_processes_come_and_go():
    def choose(count):
        raise NotEnough("at least 4 are needed")

    run = members(4)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(meet, run[1], 20, choose)
        for end in (lambda: meet(run[0], 1, choose), lambda: other.result(10)):
            with pytest.raises(
                NotEnough, match="at least 4 are needed; process 0 of 4 waited 1 s .*did not connect: 2, 3"
            ):
                end()
