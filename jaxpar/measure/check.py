"""Compares a layout with one device: the loss and every gradient, in float32, from the same weights and the same batch.

A model that is right on one device can be wrong on a mesh, without an error: its own attention sees only the tokens of its
rank if the sequence is split, and so do positions from `jnp.arange`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpar.blueprint import Blueprint, UserModel
from jaxpar.config import Config, ConfigError, config_from_dict
from jaxpar.measure.check_report import CheckReport, Difference, LayoutError
from jaxpar.models.lora import ADAPTERS
from jaxpar.models.trainable import Trainable
from jaxpar.objectives import UserObjective
from jaxpar.program import Program

# A gradient below this part of the largest one is rounding of sums that are zero, such as that of a key's bias.
VANISHING = 1e-6
QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 12):  # later, XLA has no other way to make kernels for a CPU
    QUICK["xla_cpu_use_fusion_emitters"] = False
ONE_DEVICE: dict[str, Any] = {
    "cluster.num_nodes": 1,
    "cluster.num_gpus_per_node": 1,
    "actor.model.tensor_model_parallel_size": 1,
    "actor.model.sequence_parallel": False,
    "actor.model.pipeline_model_parallel_size": 1,
    "actor.model.virtual_pipeline_model_parallel_size": None,
    "actor.model.pipeline_schedule": "1f1b",
    "actor.model.context_parallel_size": 1,
    "actor.model.cp_comm_type": "p2p",
    "actor.model.hierarchical_context_parallel_sizes": None,
    "actor.model.tp_comm_overlap": False,
    "actor.model.recompute_granularity": None,
    "actor.model.recompute_method": None,
    "actor.model.recompute_num_layers": None,
    "actor.model.recompute_modules": None,
    "actor.model.offload_activations": False,
    "actor.optim.zero_stage": 0,
}


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """The same config with other values, given as key.path → value.

    Raises:
      ConfigError: as `jaxpar.config_from_dict`.
    """
    values = config.model_dump()
    for key, value in settings.items():
        *path, name = key.split(".")
        section = values
        for part in path:
            section = section[part]
        section[name] = value
    return config_from_dict(values)


def comparable(config: Config, num_devices: int) -> tuple[Config, list[str]]:
    """The same layout in float32, with static batches of as few rows as its schedule needs; and what has changed."""
    sizes, model = config.mesh_sizes(num_devices), config.actor.model
    needed, rows_before = 2 * sizes.pp, config.actor.global_batch_size
    settings: dict[str, Any] = {"actor.model.precision": "fp32", "actor.optim.grad_reduce_dtype": "fp32"}
    notes = [f"actor.model.precision {model.precision} → fp32"] * (model.precision != "fp32")
    if model.attention_backend in ("cudnn", "tokamax"):
        settings["actor.model.attention_backend"] = "auto"
        notes.append(f"actor.model.attention_backend {model.attention_backend}, which has no float32 → auto")
    if config.runner.enable_dynamic_batch_size:
        settings |= {
            "runner.enable_dynamic_batch_size": False,
            "runner.max_tokens_per_mbs": None,
            "runner.seq_length": config.row_length,
            "actor.model.seq_length": None,
            "actor.micro_batch_size": 1,
        }
        notes.append("runner.enable_dynamic_batch_size → one row in each microbatch")
    else:
        needed = min(needed, config.num_microbatches(sizes))
    rows = needed * sizes.dp * config.rows_per_microbatch
    settings["actor.global_batch_size"] = rows
    if rows != rows_before:
        notes.append(f"actor.global_batch_size {rows_before} → {rows}")
    return with_settings(config, settings), notes


Build = Callable[[Config, Sequence[jax.Device]], Program]


@dataclass(frozen=True)
class Reference:
    """What one device computes: numpy weights and batch, the loss, and the gradients, a tree like the weights."""

    params: Any
    batch: dict[str, np.ndarray]
    loss: float
    grads: Any


def compare_with_one_device(
    config: Config,
    devices: Sequence[jax.Device],
    model: UserModel | None = None,
    batch: Mapping[str, Any] | None = None,
    *,
    objective: UserObjective | None = None,
    trainable: Trainable | None = None,
    notes: Sequence[str] = (),
    each_axis: bool = False,
) -> CheckReport:
    """Runs one forward and backward pass on `devices` and one on a single device, and compares them.

    Weights are the initial ones plus noise, because norms of 1 and biases of 0 would hide mistakes.

    Args:
      config: the layout; it is compared as `comparable` makes it.
      model, objective, trainable: as in `jaxpar.blueprint.Blueprint`.
      batch: as in `jaxpar.Trainer.loss_and_grads`; its first rows are used. Default: random tokens in packed documents.
      notes: what the caller has changed in the config, for the report.
      each_axis: if the layout is wrong, compare each of its axes by itself too.

    Raises:
      ConfigError: the config does not suit these devices, or one device has too little memory for the model.
      ValueError: the batch is wrong, as in `jaxpar.Trainer.loss_and_grads`.
    """

    def build(config: Config, devices: Sequence[jax.Device]) -> Program:
        return Program(config, devices, model, objective=objective, trainable=trainable)

    config, changes = comparable(config, len(devices))
    sizes = config.mesh_sizes(len(devices))
    one = next(device for device in devices if device.process_index == jax.process_index())
    with jax.default_matmul_precision("highest"):
        reference = _reference(config, one, build, batch)
        report = replace(_compare(config, devices, build, reference), notes=[*notes, *changes])
        if not each_axis or report.passed or sum(size > 1 for size in sizes.as_dict().values()) < 2:
            return report
        alone = {
            f"{axis} {size}": _compare(_one_axis(config, axis, size), devices[:size], build, reference).passed
            for axis, size in sizes.as_dict().items()
            if size > 1
        }
    return replace(report, alone=alone)


def check_layout(
    blueprint: Blueprint, devices: Sequence[jax.Device], batch: Mapping[str, Any] | None = None
) -> CheckReport:
    """As `jaxpar.Trainer.check`: `compare_with_one_device`, printed. Raises LayoutError if the layout is wrong."""
    report = compare_with_one_device(
        blueprint.config,
        devices,
        blueprint.user_model,
        batch,
        objective=blueprint.user_objective,
        trainable=blueprint.user_trainable,
    )
    if not report.passed:
        raise LayoutError(report)
    if jax.process_index() == 0:
        print("\n".join(report.lines()))
    return report


def _reference(
    config: Config,
    device: jax.Device,
    build: Build,
    batch: Mapping[str, Any] | None,
) -> Reference:
    program = build(with_settings(config, ONE_DEVICE), [device])
    if batch is None:
        batch = random_batch(program)
    batch = {key: np.asarray(array)[: program.batch_layout.shape[0]] for key, array in batch.items()}
    try:
        params = _noisy_params(program)
        loss, grads = jax.device_get(_loss_and_grads(program, params, batch))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ConfigError(
            "check: one device has too little memory for the whole model in float32: use `jaxpar check CONFIG`, which makes the "
            "model smaller, or check with fewer layers"
        ) from None
    return Reference(params, batch, float(loss), grads)


def _compare(
    config: Config,
    devices: Sequence[jax.Device],
    build: Build,
    reference: Reference,
) -> CheckReport:
    program = build(config, devices)
    loss, grads = _loss_and_grads(program, reference.params, reference.batch)
    return CheckReport(
        sizes=program.blueprint.sizes,
        num_microbatches=program.blueprint.schedule.num_microbatches,
        shape=program.batch_layout.shape,
        loss=float(loss),
        expected_loss=reference.loss,
        differences=_differences(program, grads, reference.grads),
        notes=[],
        own_model=program.blueprint.user_model is not None,
    )


def _one_axis(config: Config, axis: str, size: int) -> Config:
    """The same config with only one axis of more than one device."""
    of_axis = {
        "pp": ("pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size", "pipeline_schedule"),
        "tp": ("tensor_model_parallel_size",),
        "sp": ("tensor_model_parallel_size", "sequence_parallel", "tp_comm_overlap"),
        "cp": ("context_parallel_size", "cp_comm_type", "hierarchical_context_parallel_sizes"),
        "dp": (),
    }[axis]
    kept = {f"actor.model.{key}": getattr(config.actor.model, key) for key in of_axis}
    more = {"actor.optim.zero_stage": config.actor.optim.zero_stage} if axis in ("dp", "cp") else {}
    return with_settings(config, {**ONE_DEVICE, **kept, **more, "cluster.num_gpus_per_node": size})


def random_batch(program: Program) -> dict[str, np.ndarray]:
    """Random tokens in documents of several lengths, of which some are not trained on. Ranks and microbatches have different
    numbers of trained tokens."""
    rows, seq = program.batch_layout.shape
    rng, index = np.random.default_rng(7), np.arange(seq)
    tokens = rng.integers(0, program.blueprint.vocab_size, (rows, seq + 1), dtype=np.int32)
    density = np.linspace(0.4, 1, rows)[:, None] * np.linspace(0.5, 1, seq)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": rng.random((rows, seq)) < density}
    if program.blueprint.config.data.reset_attention_mask:
        starts = rng.random((rows, seq)) < min(0.1, 5 / seq)
        starts[:, 0] = True
        batch["segment_ids"] = starts.cumsum(axis=1, dtype=np.int32)
        batch["positions"] = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    for name, one in program.blueprint.inputs.items():
        shape = rows, seq, *one.shape
        if np.issubdtype(one.dtype, np.integer):
            batch[name] = rng.integers(0, program.blueprint.vocab_size, shape, one.dtype)
        else:
            batch[name] = rng.standard_normal(shape).astype(one.dtype)
    return batch


def _noisy_params(program: Program) -> Any:
    """Initial weights with noise, float32 numpy arrays. A matrix gets noise of 1 / sqrt(its longest side), a vector of 0.2.
    Adapters get less, so that they do not outweigh their matrices: with sharp attention, rounding would look like mistakes."""
    rng, lora = np.random.default_rng(1), program.blueprint.lora

    def noisy(path: Any, x: np.ndarray) -> np.ndarray:
        sides = x.shape[1:] if path[0].key == "layers" else x.shape
        deviation = 1 / max(sides) ** 0.5 if len(sides) > 1 else 0.2
        if lora and ADAPTERS in {key.key for key in path} and path[-1].key == "b":
            deviation /= lora.scale * lora.rank**0.5
        return x + np.float32(deviation) * rng.standard_normal(x.shape, np.float32)

    init = jax.jit(program.blueprint.model.init, static_argnums=0, out_shardings=program.state_shardings["params"])
    params = _compiled(init, program, program.blueprint.config.actor.seed)()
    return jax.tree_util.tree_map_with_path(noisy, jax.device_get(params))


def _loss_and_grads(program: Program, params: Any, batch: Mapping[str, np.ndarray]) -> tuple[jax.Array, Any]:
    """On the program's devices, from numpy weights."""
    params = jax.tree.map(_put, params, program.state_shardings["params"])
    layout = program.batch_layout
    on_mesh = layout.put_on_mesh(layout.own_rows(batch))
    return _compiled(program.loss_and_grads, program, params, on_mesh)(params, on_mesh)


def _compiled(function: Any, program: Program, *arguments: Any) -> Any:
    """A jitted function, compiled for one call: to make fast machine code for a CPU takes longer than to run slow code."""
    on_cpu = program.mesh.devices.flat[0].platform == "cpu"
    return function.lower(*arguments).compile(compiler_options=QUICK if on_cpu else None)


def _put(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _differences(program: Program, grads: Any, expected: Any) -> list[Difference]:
    expected = jax.tree.map(lambda one, grad: _put(one, grad.sharding), expected, grads)
    everywhere = NamedSharding(program.mesh, P())  # so that each process can read them
    compared = _compiled(jax.jit(_figures, out_shardings=everywhere), program, grads, expected)(grads, expected)
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(grads)
    ]
    figures = {name: [np.asarray(x, np.float64) for x in row] for name, row in zip(names, compared, strict=True)}
    largest = max(float(np.linalg.norm(norms)) for _, norms, _, _ in figures.values())
    return [
        _difference(name, largest, *figures[name])
        for part in ("embed", "layers", "head")
        for name in figures
        if name.partition("/")[0] == part
    ]


def _figures(grads: Any, expected: Any) -> list[tuple[jax.Array, ...]]:
    """For each parameter: norms of difference and expected gradient, [num_layers] or [1], and the largest number of both."""

    def norms(path: Any, x: jax.Array) -> jax.Array:
        axes = tuple(range(1, x.ndim)) if path[0].key == "layers" else None
        return jnp.atleast_1d(jnp.sqrt(jnp.sum(jnp.square(x), axis=axes)))

    def figures(path: Any, grad: jax.Array, one: jax.Array) -> tuple[jax.Array, ...]:
        difference = grad - one
        return norms(path, difference), norms(path, one), jnp.max(jnp.abs(difference)), jnp.max(jnp.abs(one))

    paths = jax.tree_util.tree_leaves_with_path(grads)
    return [figures(path, grad, one) for (path, grad), one in zip(paths, jax.tree.leaves(expected), strict=True)]


def _difference(
    name: str, largest: float, errors: np.ndarray, norms: np.ndarray, largest_difference: Any, largest_gradient: Any
) -> Difference:
    """Args: `largest`, the norm of the model's largest gradient; and the parameter's `_figures`."""
    floor = max(VANISHING * largest, float(np.finfo(np.float32).tiny))
    whole = float(np.linalg.norm(norms))
    of_whole = float(np.linalg.norm(errors)) / (whole if whole > floor else max(largest, floor))
    of_layers = errors / np.where(norms > floor, norms, max(largest, floor))
    worst = int(np.argmax(np.nan_to_num(of_layers, nan=np.inf)))
    return Difference(
        name=name,
        error=float(np.max([of_whole, of_layers[worst]])),
        layer=worst if name.startswith("layers/") else None,
        largest_difference=float(largest_difference),
        largest_gradient=float(largest_gradient),
        vanishing=whole <= floor,
    )
