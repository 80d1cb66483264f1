"""The rendezvous of a run's processes: how they find each other. How they then wait for each other: `meeting.py`."""

import os

import jax
from jax._src import clusters  # jax has no public way to ask for the coordinator's address, which error messages need

from jaxpar.config import ConfigError
from jaxpar.run.meeting import Choose, Member, meet

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Open MPI first: under mpirun in a Slurm job, Slurm's variables describe the job script, not the rank.
_CLUSTERS = (clusters.OmpiCluster, clusters.SlurmCluster, clusters.GkeTpuCluster, clusters.GceTpuCluster)
_goes_on_alone = False  # without the others, who have not come: there is no second meeting


class NotNeeded(Exception):
    """This process has no part in the run, which has ended."""


def join(choose: Choose | None = None) -> int:
    """Joins the other processes of this run, if there are any, and returns the number of processes.

    Several processes find each other by JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or
    by what jax detects: Open MPI, Slurm, a TPU pod. They wait JAXPAR_START_TIMEOUT seconds (300) for each other. With
    JAXPAR_SECRET only those that have it, too, are let in.

    Args:
      choose: with it, the run goes on with fewer processes, see `jaxpar.run.meeting.meet`.

    Raises:
      ConfigError: a process is missing, two have one ID, they have different secrets, or one of these variables is wrong.
      NotEnough: with `choose`, they are too few.
      NotNeeded: with `choose`, the run has ended, and this process was not needed.
    """
    global _goes_on_alone
    if jax.distributed.is_initialized():
        return jax.process_count()
    if _goes_on_alone:
        return 1
    seconds = _integer_variable("JAXPAR_START_TIMEOUT", "300")
    member = _find_membership(seconds)
    if member is None or member.num_processes == 1:
        return choose(1) if choose else 1
    outcome = meet(member, seconds, choose)
    if outcome.process_id < 0:
        raise NotNeeded
    if outcome.num_processes == 1:
        _goes_on_alone = True
        return 1
    # The only process on a node takes all GPUs there. jax's detection would give it one, as if there were several.
    local: list[int] | None = [] if alone_on_node() and "JAX_LOCAL_DEVICE_IDS" not in os.environ else None
    bind_address = member.listens_at if member.process_id == 0 else None
    jax.distributed.initialize(
        member.address, outcome.num_processes, outcome.process_id, local, coordinator_bind_address=bind_address
    )
    return outcome.num_processes


def _find_membership(seconds: int) -> Member | None:
    """Reads the three variables, or what jax detects; None if nothing indicates other processes."""
    address, count, process_id = _VARIABLES
    more = os.environ.get("JAXPAR_SECRET", ""), os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "")
    missing = [name for name in _VARIABLES if name not in os.environ]
    if not missing:
        return Member(os.environ[address], _integer_variable(count), _integer_variable(process_id), *more)
    cluster = next((cluster for cluster in _CLUSTERS if cluster.is_env_present()), None)
    if cluster and cluster.get_process_count() > 1:
        coordinator = os.environ.get(address) or cluster.get_coordinator_address(
            seconds, os.environ.get("JAX_COORDINATOR_PORT")
        )
        return Member(coordinator, cluster.get_process_count(), cluster.get_process_id(), *more)
    if cluster is None and len(missing) < len(_VARIABLES):
        raise ConfigError(f"{' and '.join(missing)} not set: set all of {', '.join(_VARIABLES)}, or none")
    return None


def alone_on_node() -> bool:
    """Whether this is the only process on its node, as far as Open MPI or Slurm tell; True without either."""
    if size := os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"):
        return size == "1"
    return os.environ.get("SLURM_STEP_NUM_TASKS") == os.environ.get("SLURM_STEP_NUM_NODES")


def _integer_variable(name: str, default: str = "") -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise ConfigError(f"{name}: {text!r} is not a whole number")
    return int(text)
