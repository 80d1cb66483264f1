"""Times the train step on the devices of this machine, with random tokens: one config by itself, or several layouts of its
model beside one device and beside plain JAX."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np

from jaxpar.attention import choice_lines
from jaxpar.blueprint import UserModel
from jaxpar.config import Config, ConfigError
from jaxpar.hardware import peak_flops
from jaxpar.measure.baseline import BaselineProgram
from jaxpar.measure.compile import Memory, compile_train_step, read_memory, read_report
from jaxpar.measure.hlo import count
from jaxpar.pipeline.tick_scope import taken_fraction
from jaxpar.program import Program

_Result = TypeVar("_Result")

WARM_UP = 2  # steps that are not timed
ONE_DEVICE, PLAIN = "one device", "plain JAX, dp {}"


@dataclass(frozen=True)
class Measurement:
    """One config's train step.

    Attributes:
      device: kind of the devices, as jax names it.
      step_seconds: wall time of a step: median, 10th and 90th percentile.
      tokens_per_second: of all devices, from the median.
      mfu: `jaxpar.models.flops.model_flops_per_token` at that rate over the devices' bf16 peak; None if that is unknown.
      flops: executed by one device in a step, by `jaxpar.measure.hlo.count`.
      memory: of the compiled step; capacity is what jax may take, 0 if the device does not say.
      measured_peak: bytes, the most that one device has held since the process began; None if it does not say.
      loss: of the last step, nats a token.
      attention: what computed the blocks of attention → why, see `jaxpar.attention.choose`.
    """

    device: str
    devices: int
    mesh: dict[str, int]
    steps: int
    compile_seconds: float
    step_seconds: dict[str, float]
    tokens_per_second: float
    mfu: float | None
    flops: float
    model_flops: float | None
    memory: Memory
    measured_peak: int | None
    loss: float
    attention: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_second_per_device": self.tokens_per_second / self.devices}


@dataclass(frozen=True)
class Comparison:
    """One layout beside others, measured in turns.

    Attributes:
      microbatches: in a step; None for plain JAX, which has none.
      cpu_seconds, wall_seconds: of a step, the least of all rounds. CPU seconds are those of all threads of this process:
        on simulated devices, which share the cores, this is the whole work.
      temporaries: bytes of the compiled step on one device.
      flops: executed by all devices together, by `jaxpar.measure.hlo.count`.
      loss: of the last step, nats a token.
    """

    name: str
    microbatches: int | None
    cpu_seconds: float
    wall_seconds: float
    temporaries: int
    flops: float
    loss: float


class _Run:
    """A compiled train step with its state and batch."""

    def __init__(self, program: Program | BaselineProgram, vocab_size: int):
        self.compiled, self.compile_seconds = compile_train_step(program)
        self._state = program.init(None)
        layout = program.batch_layout
        rows, seq = layout.shape
        tokens = np.random.default_rng(0).integers(0, vocab_size, (rows, seq + 1))
        self._batch = layout.put_on_mesh(layout.own_rows({"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}))
        self.loss = float("nan")

    def step(self) -> tuple[float, float]:
        """Takes one step and waits for it. Returns its wall seconds, and the CPU seconds of all threads."""
        wall, cpu = time.perf_counter(), time.process_time()
        self._state, metrics = jax.block_until_ready(self.compiled(self._state, self._batch))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.loss = float(metrics["loss"])
        return wall, cpu


def _check_inputs(program: Program) -> None:
    """Raises ConfigError if batches need more than tokens."""
    if inputs := program.blueprint.inputs:
        raise ConfigError(
            f"bench: it makes batches of tokens, but the model or the objective also takes {', '.join(inputs)}: set "
            f"algorithm.loss_type: cross_entropy, or time your own calls of trainer.train_step(batch)"
        )


def measure(config: Config, devices: list[jax.Device], steps: int, model: UserModel | None = None) -> Measurement:
    """Times `steps` steps of the config's train step after `WARM_UP` more.

    Raises:
      ConfigError: the config does not suit these devices, or they have too little memory.
    """
    program = Program(config, devices, model)
    _check_inputs(program)
    run = _in_memory(partial(_Run, program, program.blueprint.vocab_size))
    seconds = _in_memory(lambda: [run.step()[0] for _ in range(WARM_UP + steps)])[WARM_UP:]
    low, median, high = (float(np.percentile(seconds, q)) for q in (10, 50, 90))
    stats = [device.memory_stats() or {} for device in program.mesh.local_devices]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    report = read_report(program, run.compiled, run.compile_seconds, stats[0].get("bytes_limit", 0))
    rate, peak = math.prod(program.batch_layout.shape) / median, peak_flops(devices[0].device_kind)
    return Measurement(
        device=devices[0].device_kind,
        devices=len(devices),
        mesh=report.mesh,
        steps=steps,
        compile_seconds=report.compile_seconds,
        step_seconds={"median": median, "p10": low, "p90": high},
        tokens_per_second=rate,
        mfu=report.model_flops / median / peak if report.model_flops and peak else None,
        flops=report.flops,
        model_flops=report.model_flops,
        memory=report.memory,
        measured_peak=max(peaks, default=None),
        loss=run.loss,
        attention=program.attention_choices,
    )


def compare(
    layouts: Mapping[str, Config],
    one_device: Config,
    devices: list[jax.Device],
    rounds: int,
    say: Callable[[str], None],
    model: UserModel | None = None,
) -> list[Comparison]:
    """Measures one device, plain JAX on all devices, and each layout on all devices. They take one step each in turn, so
    that other work of the machine affects them alike. All keep their state in memory.

    Args:
      layouts: the config of each layout, by name.
      one_device: the config of the same model and batch on one device.
      rounds: steps of each, after one that does not count.
      model: the user's own, as in `jaxpar.blueprint.Blueprint`.

    Raises:
      ConfigError: a config does not suit the devices, or they have too little memory.
    """
    alone = Program(one_device, devices[:1], model)
    _check_inputs(alone)
    programs: dict[str, Program | BaselineProgram] = {
        ONE_DEVICE: alone,
        PLAIN.format(len(devices)): BaselineProgram(one_device, devices, model),
    }
    programs |= {name: Program(config, devices, model) for name, config in layouts.items()}
    vocab_size, runs = alone.blueprint.vocab_size, dict[str, _Run]()
    for name, program in programs.items():
        runs[name] = _in_memory(partial(_Run, program, vocab_size))
        say(f"compiled {name} in {runs[name].compile_seconds:.1f} s")
        for line in choice_lines(program.attention_choices):
            say(f"{name}: {line}")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            times[name].append(_in_memory(run.step))
        say(f"round {turn} of {rounds}" if turn else "warmed up")
    return [
        Comparison(
            name=name,
            microbatches=program.blueprint.schedule.num_microbatches if isinstance(program, Program) else None,
            wall_seconds=min(wall for wall, _ in times[name][1:]),
            cpu_seconds=min(cpu for _, cpu in times[name][1:]),
            temporaries=read_memory(runs[name].compiled, 0).temporaries,
            flops=count(runs[name].compiled.as_text() or "", taken=taken_fraction).flops * program.mesh.size,
            loss=runs[name].loss,
        )
        for name, program in programs.items()
    ]


def _in_memory(action: Callable[[], _Result]) -> _Result:
    try:
        return action()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ConfigError(
            f"out of memory on a device: {str(error).splitlines()[0]}: use a smaller actor.micro_batch_size, recompute "
            f"(actor.model.recompute_granularity=full), more devices, or fewer layouts at a time"
        ) from None
