"""Processes and devices: joining the cluster, and simulating devices on the CPU where there is no accelerator."""

import contextlib
import dataclasses
import os
import socket
import time

import jax
from jax._src import clusters  # jax has no public way to ask where processes will meet, and an error must say it

from jaxpar.config import Config, ConfigError

GPUS_PER_NODE = 8  # assumed where the config says nothing and no GPU is there to ask
THREADS_PER_SIMULATED_DEVICE = 4

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Open MPI first: under mpirun in a Slurm job, Slurm's variables are those of the job's script and not of the rank.
_CLUSTERS = (clusters.OmpiCluster, clusters.SlurmCluster, clusters.GkeTpuCluster, clusters.GceTpuCluster)
_GREETING = "jaxpar: "  # so begins what process 0 answers; a problem follows, or nothing


def start(config: Config) -> None:
    """Join the other processes of this run, if any, and simulate devices if there is no accelerator. Call it before
    anything asks jax for devices; once they are up it changes nothing.

    Several processes find each other by JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or
    by what jax detects: Open MPI, Slurm, a TPU pod. They wait JAXPAR_START_TIMEOUT seconds for each other, 300 if unset.

    Raises:
      ConfigError: a process did not come, those variables are wrong, or the devices to simulate do not divide by the
        processes.
    """
    processes = _join()
    wanted = config.num_configured_devices()
    if wanted is not None:
        if wanted % processes:
            raise ConfigError(
                f"cluster.num_nodes * cluster.num_gpus_per_node: {config.cluster.num_nodes} * "
                f"{config.cluster.num_gpus_per_node} = {wanted} devices do not divide by {processes} processes"
            )
        with contextlib.suppress(RuntimeError):  # devices are up already
            simulate_devices(wanted // processes)


def simulate_devices(count: int) -> None:
    """Let jax split this process's CPU into `count` devices. Of no effect where there is a GPU or TPU: it is then the
    default, and the CPU's devices are not used.

    Raises:
      RuntimeError: devices are up already.
    """
    jax.config.update("jax_num_cpu_devices", count)
    # Each collective of each device holds a thread until all have come, and XLA starts several at a time: with its
    # default of a thread a device, all threads can wait for one that has none (seen with 16 devices on 2 cores:
    # after 40 s XLA aborts). Variable: xla/pjrt/utils.cc, DefaultThreadPoolSize.
    os.environ.setdefault("PJRT_NPROC", str(max(os.cpu_count() or 1, THREADS_PER_SIMULATED_DEVICE * count)))


def devices(config: Config) -> list[jax.Device]:
    """All devices of the run: GPUs or TPUs where there are any, otherwise as many simulated ones as the config has.

    Raises:
      ConfigError: the run has fewer hosts than cluster.num_nodes, or fewer simulated devices than wanted.
    """
    found = jax.devices()
    if found[0].platform == "cpu":
        wanted = config.num_configured_devices() or len(found)
        if wanted > len(found):
            raise ConfigError(
                f"cluster.num_nodes * cluster.num_gpus_per_node = {wanted} devices are to be simulated, but jax was "
                f"started with {len(found)} before: build the Trainer before anything else asks jax for devices"
            )
        return found[:wanted] if jax.process_count() == 1 else found
    if config.cluster.num_nodes > jax.process_count():
        raise ConfigError(
            f"cluster.num_nodes: {config.cluster.num_nodes}, but {jax.process_count()} process with {len(found)} "
            f"devices is running: start one process on each node (srun, mpirun), or set cluster.num_nodes=1"
        )
    return found


def num_devices_to_show(config: Config) -> tuple[int, str]:
    """Devices that a run of this config would have, without starting it, and where that number comes from."""
    nodes = config.cluster.num_nodes
    if jax.default_backend() != "cpu":
        return nodes * jax.local_device_count(), f"{nodes} nodes x {jax.local_device_count()} devices of this machine"
    per_node = config.cluster.num_gpus_per_node
    if per_node is None:
        source = "cluster.num_gpus_per_node is not given and no GPU is here: 8 assumed"
        return nodes * GPUS_PER_NODE, source
    return nodes * per_node, f"cluster.num_nodes {nodes} x cluster.num_gpus_per_node {per_node}"


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where this process stands in the run; `address` is host:port of the coordinator, which is process 0."""

    address: str
    num_processes: int
    process: int

    def __post_init__(self) -> None:
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigError(f"JAX_COORDINATOR_ADDRESS: {self.address} is not host:port, such as node0:12355")
        if self.process >= self.num_processes:
            raise ConfigError(
                f"JAX_PROCESS_ID: {self.process}, but JAX_NUM_PROCESSES is {self.num_processes}: they count from 0"
            )


def _join() -> int:
    """Joins the cluster if this process is one of several; the number of processes."""
    if jax.distributed.is_initialized():
        return jax.process_count()
    seconds = _number("JAXPAR_START_TIMEOUT", "300")
    place = _place(seconds)
    if place is None or place.num_processes == 1:
        return 1
    # jax waits too, but if anybody stays away it aborts, from C++ and with a stack trace that names nobody.
    problem = _await_others(place, seconds) if place.process == 0 else _await_first(place, seconds)
    if problem:
        host, _, port = place.address.rpartition(":")
        raise ConfigError(
            f"{problem}. Check that all {place.num_processes} processes were started, one on each node or for each GPU; "
            f"that {host} is process 0's node on every node; that no firewall closes its port {port}. To wait longer, "
            f"set JAXPAR_START_TIMEOUT (seconds)"
        )
    # A process alone on its node takes all GPUs there; jax's detection would take one, as it does for each of several.
    local: list[int] | None = [] if _alone_on_node() and "JAX_LOCAL_DEVICE_IDS" not in os.environ else None
    jax.distributed.initialize(place.address, place.num_processes, place.process, local)
    return place.num_processes


def _place(seconds: int) -> _Place | None:
    """By the three variables, or by jax's detection; None where nothing speaks of other processes."""
    address, *numbers = _VARIABLES
    missing = [name for name in _VARIABLES if name not in os.environ]
    if not missing:
        return _Place(os.environ[address], *map(_number, numbers))
    cluster = next((cluster for cluster in _CLUSTERS if cluster.is_env_present()), None)
    if cluster and cluster.get_process_count() > 1:
        where = os.environ.get(address) or cluster.get_coordinator_address(
            seconds, os.environ.get("JAX_COORDINATOR_PORT")
        )
        return _Place(where, cluster.get_process_count(), cluster.get_process_id())
    if cluster is None and len(missing) < len(_VARIABLES):
        raise ConfigError(f"{' and '.join(missing)} not set: set all of {', '.join(_VARIABLES)}, or none")
    return None


def _alone_on_node() -> bool:
    """As far as Open MPI or Slurm say."""
    if size := os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"):
        return size == "1"
    return os.environ.get("SLURM_STEP_NUM_TASKS") == os.environ.get("SLURM_STEP_NUM_NODES")


def _number(name: str, default: str = "") -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise ConfigError(f"{name}: {text!r} is not a whole number")
    return int(text)


def _await_others(place: _Place, seconds: int) -> str:
    """Process 0: hears the others' numbers on the coordinator's port, then answers all; what is wrong, or ""."""
    deadline = time.monotonic() + seconds
    port = int(os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", place.address).rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    missing, here, problem = set(range(1, place.num_processes)), [], ""
    with contextlib.ExitStack() as stack:
        try:
            server = socket.create_server(("", port), family=family, backlog=place.num_processes, dualstack_ipv6=both)
        except OSError as error:
            raise ConfigError(
                f"coordinator {place.address}: process 0 cannot listen on port {port} ({os.strerror(error.errno or 0)}): set another in "
                f"JAX_COORDINATOR_ADDRESS, or in JAX_COORDINATOR_PORT under Slurm, for all processes"
            ) from None
        stack.enter_context(server)
        while missing and (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(OSError, ValueError):  # time is up, or it is a stranger
                server.settimeout(left)
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(5)
                missing.discard(int(connection.makefile(errors="replace").readline()))
                here.append(connection)
        if missing:
            names = ", ".join(map(str, sorted(missing)[:8])) + (", …" if len(missing) > 8 else "")
            problem = (
                f"process 0 of {place.num_processes} waited {seconds} s at {place.address} for {len(missing)} that did not "
                f"come: {names}"
            )
        for connection in here:
            with contextlib.suppress(OSError):  # it has gone
                connection.sendall(f"{_GREETING}{problem}".encode())
    return problem


def _await_first(place: _Place, seconds: int) -> str:
    """Any other process: tells process 0 its number and awaits the answer; what is wrong, or ""."""
    deadline = time.monotonic() + seconds
    host, _, port = place.address.rpartition(":")
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as connection:
                connection.sendall(f"{place.process}\n".encode())
                connection.settimeout(seconds + 5)  # process 0 began to wait before now
                answer = connection.makefile(errors="replace").read()
            if answer.startswith(_GREETING):
                return answer.removeprefix(_GREETING)
            why = "what listens there is no jaxpar" if answer else "it closed the connection"
        except OSError as error:
            why = error.strerror or str(error)
        if time.monotonic() > deadline:
            return (
                f"process {place.process} of {place.num_processes} waited {seconds} s for the coordinator, process 0 at "
                f"{place.address}: {why}"
            )
        time.sleep(0.5)
