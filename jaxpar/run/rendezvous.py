"""The rendezvous of a run's processes: how they find each other and wait for each other.

jax waits for missing processes too, but if one does not come it aborts from C++, with a stack trace that does not say
which one is missing. So process 0 first listens on the coordinator's port until all others have connected, and tells
all of them the outcome. Only then does jax start its coordinator on that port.
"""

import contextlib
import dataclasses
import os
import socket
import time

import jax
from jax._src import clusters  # jax has no public way to ask for the coordinator's address, which error messages need

from jaxpar.config import ConfigError

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Open MPI first: under mpirun in a Slurm job, Slurm's variables describe the job script, not the rank.
_CLUSTERS = (clusters.OmpiCluster, clusters.SlurmCluster, clusters.GkeTpuCluster, clusters.GceTpuCluster)
_GREETING = "jaxpar: "  # start of process 0's answer; an error message follows, or nothing


@dataclasses.dataclass(frozen=True)
class _Membership:
    """This process's part in the run. `address` is host:port of the coordinator, which runs in process 0."""

    address: str
    num_processes: int
    process_id: int

    def __post_init__(self) -> None:
        host, port = self.host_and_port
        if not host or not port.isdecimal():
            raise ConfigError(f"JAX_COORDINATOR_ADDRESS: {self.address} is not host:port, such as node0:12355")
        if self.process_id >= self.num_processes:
            raise ConfigError(
                f"JAX_PROCESS_ID: {self.process_id}, but JAX_NUM_PROCESSES is {self.num_processes}: IDs start at 0"
            )

    @property
    def host_and_port(self) -> tuple[str, str]:
        host, _, port = self.address.rpartition(":")
        return host, port


def join() -> int:
    """Joins the other processes of this run, if there are any, and returns the number of processes.

    Several processes find each other by JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or
    by what jax detects: Open MPI, Slurm, a TPU pod. They wait JAXPAR_START_TIMEOUT seconds (300) for each other.

    Raises:
      ConfigError: a process is missing, or one of these variables is wrong.
    """
    if jax.distributed.is_initialized():
        return jax.process_count()
    seconds = _integer_variable("JAXPAR_START_TIMEOUT", "300")
    member = _find_membership(seconds)
    if member is None or member.num_processes == 1:
        return 1
    problem = _wait_for_others(member, seconds) if member.process_id == 0 else _wait_for_process_0(member, seconds)
    if problem:
        host, port = member.host_and_port
        raise ConfigError(
            f"{problem}. Check that all {member.num_processes} processes were started, one on each node or for each "
            f"GPU; that {host} is the name of process 0's node on every node; that no firewall blocks its port {port}. "
            f"To wait longer, set JAXPAR_START_TIMEOUT (seconds)"
        )
    # The only process on a node takes all GPUs there. jax's detection would give it one, as if there were several.
    local: list[int] | None = [] if _alone_on_node() and "JAX_LOCAL_DEVICE_IDS" not in os.environ else None
    jax.distributed.initialize(member.address, member.num_processes, member.process_id, local)
    return member.num_processes


def _find_membership(seconds: int) -> _Membership | None:
    """Reads the three variables, or what jax detects; None if nothing indicates other processes."""
    address, *numbers = _VARIABLES
    missing = [name for name in _VARIABLES if name not in os.environ]
    if not missing:
        return _Membership(os.environ[address], *map(_integer_variable, numbers))
    cluster = next((cluster for cluster in _CLUSTERS if cluster.is_env_present()), None)
    if cluster and cluster.get_process_count() > 1:
        coordinator = os.environ.get(address) or cluster.get_coordinator_address(
            seconds, os.environ.get("JAX_COORDINATOR_PORT")
        )
        return _Membership(coordinator, cluster.get_process_count(), cluster.get_process_id())
    if cluster is None and len(missing) < len(_VARIABLES):
        raise ConfigError(f"{' and '.join(missing)} not set: set all of {', '.join(_VARIABLES)}, or none")
    return None


def _alone_on_node() -> bool:
    """Whether this is the only process on its node, as far as Open MPI or Slurm tell; True without either."""
    if size := os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"):
        return size == "1"
    return os.environ.get("SLURM_STEP_NUM_TASKS") == os.environ.get("SLURM_STEP_NUM_NODES")


def _integer_variable(name: str, default: str = "") -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise ConfigError(f"{name}: {text!r} is not a whole number")
    return int(text)


def _wait_for_others(member: _Membership, seconds: int) -> str:
    """On process 0: waits until all others have sent their IDs, then answers them. Returns what is wrong, or ""."""
    deadline = time.monotonic() + seconds
    missing, connections, problem = set(range(1, member.num_processes)), [], ""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(member))
        while missing and (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(OSError, ValueError):  # time is up, or another program has connected
                server.settimeout(left)
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(5)
                missing.discard(int(connection.makefile(errors="replace").readline()))
                connections.append(connection)
        if missing:
            names = ", ".join(map(str, sorted(missing)[:8])) + (", …" if len(missing) > 8 else "")
            problem = (
                f"process 0 of {member.num_processes} waited {seconds} s at {member.address}, but {len(missing)} did "
                f"not connect: {names}"
            )
        for connection in connections:
            with contextlib.suppress(OSError):  # that process has ended
                connection.sendall(f"{_GREETING}{problem}".encode())
    return problem


def _listen(member: _Membership) -> socket.socket:
    port = int(os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", member.address).rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, backlog=member.num_processes, dualstack_ipv6=both)
    except OSError as error:
        raise ConfigError(
            f"coordinator {member.address}: process 0 cannot listen on port {port} ({os.strerror(error.errno or 0)}): "
            f"set another port in JAX_COORDINATOR_ADDRESS, or under Slurm in JAX_COORDINATOR_PORT, for all processes"
        ) from None


def _wait_for_process_0(member: _Membership, seconds: int) -> str:
    """On any other process: sends its ID to process 0 and waits for the answer. Returns what is wrong, or ""."""
    deadline = time.monotonic() + seconds
    host, port = member.host_and_port
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as connection:
                connection.sendall(f"{member.process_id}\n".encode())
                connection.settimeout(seconds + 5)  # process 0 began to wait earlier, so it answers by then
                answer = connection.makefile(errors="replace").read()
            if answer.startswith(_GREETING):
                return answer.removeprefix(_GREETING)
            reason = "the program that listens there is not jaxpar" if answer else "it closed the connection"
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            return (
                f"process {member.process_id} of {member.num_processes} waited {seconds} s for the coordinator, "
                f"process 0 at {member.address}: {reason}"
            )
        time.sleep(0.5)
