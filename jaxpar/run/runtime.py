"""The devices of a run: GPUs or TPUs, or simulated ones on the CPU if there is no accelerator."""

import contextlib
import os

import jax

from jaxpar.config import Config, ConfigError, elastic
from jaxpar.run import rendezvous
from jaxpar.run.member import NotEnough

GPUS_PER_NODE = 8  # assumed if the config does not say and there is no GPU to ask
THREADS_PER_SIMULATED_DEVICE = 4


def start(config: Config) -> None:
    """Joins the other processes of this run, if any, and simulates devices if there is no accelerator.

    Call it before anything asks jax for devices; once they are initialized it has no effect. How the processes find
    each other: `jaxpar.run.rendezvous.join`.

    Raises:
      ConfigError: a process is missing, its environment variables are wrong, or the number of simulated devices is not
        divisible by the number of processes.
    """
    _simulate(config, rendezvous.join())


def start_elastic(config: Config, least: int) -> tuple[Config, str]:
    """Like `start`, but with as many nodes as there are and have a layout, from `least` on. One process runs on each node.

    Returns:
      The config for these nodes (`jaxpar.config.elastic`), and a line about it.

    Raises:
      ConfigError: no number of nodes from `least` to the config's has a layout, or a node has several processes.
      NotEnough: too few nodes are there now. Start the run again.
      NotNeeded: the run has ended, and this node had no part in it.
    """
    elastic.usable_nodes(config, max(config.cluster.num_nodes, least), least)  # a mistake, however many will come
    if not rendezvous.alone_on_node():
        raise ConfigError("--elastic: several processes run on this node: start one on each, which takes all its GPUs")
    present = 1

    def choose(count: int) -> int:
        nonlocal present
        present = count
        try:
            return elastic.usable_nodes(config, count, least)
        except ConfigError as error:
            raise NotEnough(error.problems) from None

    nodes = rendezvous.join(choose)
    fitted = elastic.for_nodes(config, nodes)
    _simulate(fitted, nodes)
    return fitted, elastic.changes(config, fitted, present)


def _simulate(config: Config, processes: int) -> None:
    wanted = config.num_configured_devices()
    if wanted is not None:
        if wanted % processes:
            raise ConfigError(
                f"cluster.num_nodes * cluster.num_gpus_per_node: {config.cluster.num_nodes} * "
                f"{config.cluster.num_gpus_per_node} = {wanted} devices are not divisible by {processes} processes"
            )
        with contextlib.suppress(RuntimeError):  # devices are already initialized
            simulate_devices(wanted // processes)


def simulate_devices(count: int) -> None:
    """Makes jax split this process's CPU into `count` devices.

    Has no effect on a machine with a GPU or TPU: jax then uses that by default and not the CPU's devices.

    Raises:
      RuntimeError: devices are already initialized.
    """
    jax.config.update("jax_num_cpu_devices", count)
    # Each collective holds a thread for each device until all devices have arrived, and XLA starts several collectives
    # at a time. With its default of one thread per device, all threads can wait for a device that has no thread left
    # (seen with 16 devices on 2 cores: XLA aborts after 40 s). The variable: xla/pjrt/utils.cc, DefaultThreadPoolSize.
    os.environ.setdefault("PJRT_NPROC", str(max(os.cpu_count() or 1, THREADS_PER_SIMULATED_DEVICE * count)))
    # Even with threads to spare, devices that each start independent collectives in an order of their own wait for each other
    # for ever: a ZeRO-3 step on 16 devices in 7 of 13 runs, and in none of 12 without the scheduler that makes them independent.
    flag, given = "xla_cpu_enable_concurrency_optimized_scheduler", os.environ.get("XLA_FLAGS", "")
    if flag not in given:
        os.environ["XLA_FLAGS"] = f"--{flag}=false {given}".strip()


def devices(config: Config) -> list[jax.Device]:
    """All devices of the run: GPUs or TPUs if there are any, otherwise as many simulated devices as the config says.

    Raises:
      ConfigError: the run has fewer hosts than cluster.num_nodes, or too few simulated devices.
    """
    found = jax.devices()
    if found[0].platform == "cpu":
        wanted = config.num_configured_devices() or len(found)
        if wanted > len(found):
            raise ConfigError(
                f"cluster.num_nodes * cluster.num_gpus_per_node = {wanted} simulated devices are needed, but jax was "
                f"already initialized with {len(found)}: build the Trainer before anything else asks jax for devices"
            )
        return found[:wanted] if jax.process_count() == 1 else found
    if config.cluster.num_nodes > jax.process_count():
        raise ConfigError(
            f"cluster.num_nodes: {config.cluster.num_nodes}, but {jax.process_count()} process(es) with {len(found)} "
            f"devices are running: start one process on each node (srun, mpirun), or set cluster.num_nodes=1"
        )
    return found


def num_devices_to_show(config: Config) -> tuple[int, str]:
    """The number of devices that a run of this config would have, and where that number comes from. Starts nothing."""
    nodes = config.cluster.num_nodes
    if jax.default_backend() != "cpu":
        return nodes * jax.local_device_count(), f"{nodes} nodes x {jax.local_device_count()} devices of this machine"
    per_node = config.cluster.num_gpus_per_node
    if per_node is None:
        source = "cluster.num_gpus_per_node is not set and this machine has no GPU: 8 assumed"
        return nodes * GPUS_PER_NODE, source
    return nodes * per_node, f"cluster.num_nodes {nodes} x cluster.num_gpus_per_node {per_node}"
