"""Processes and devices: joining the cluster, and simulating devices on the CPU where there is no accelerator."""

import contextlib
import os

import jax

from jaxpar.config import Config, ConfigError

GPUS_PER_NODE = 8  # assumed where the config says nothing and no GPU is there to ask

_LAUNCHERS = {"SLURM_NTASKS": "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK"}


def start(config: Config) -> None:
    """Join the other processes of this run, if any, and simulate devices if there is no accelerator. Call it before
    anything asks jax for devices; once they are up it changes nothing.

    Several processes find each other by Slurm's or Open MPI's environment, or by JAX_COORDINATOR_ADDRESS (host:port),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
      ConfigError: the devices to simulate do not divide by the processes, or those variables are incomplete.
    """
    processes = _join()
    wanted = config.num_configured_devices()
    if wanted is not None:
        if wanted % processes:
            raise ConfigError(
                f"cluster.num_nodes * cluster.num_gpus_per_node: {config.cluster.num_nodes} * "
                f"{config.cluster.num_gpus_per_node} = {wanted} devices do not divide by {processes} processes"
            )
        # Of no effect where there is a GPU or TPU: it is then the default, and the CPU's devices are not used.
        with contextlib.suppress(RuntimeError):  # devices are up already
            jax.config.update("jax_num_cpu_devices", wanted // processes)


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


def _join() -> int:
    """Joins the cluster if this process is one of several; the number of processes."""
    if jax.distributed.is_initialized():
        return jax.process_count()
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        missing = [name for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID") if name not in os.environ]
        if missing:
            raise ConfigError(f"JAX_COORDINATOR_ADDRESS is set, but {' and '.join(missing)} not: set all three")
        processes = int(os.environ["JAX_NUM_PROCESSES"])
        jax.distributed.initialize(num_processes=processes, process_id=int(os.environ["JAX_PROCESS_ID"]))
        return processes
    for size, rank in _LAUNCHERS.items():
        if int(os.environ.get(size, "1")) > 1 and rank in os.environ:
            jax.distributed.initialize()
            return int(os.environ[size])
    return 1
