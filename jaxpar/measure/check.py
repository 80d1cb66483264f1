"""Compares a layout with one device: the loss and every gradient, in float32, from the same weights and the same batch.

A model that is right on one device can be wrong on a mesh, without an error: its own attention sees only the tokens of its
rank if the sequence is split, and so do positions from `jnp.arange`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.blueprint import UserModel
from jaxpar.config import Config, ConfigError, MeshSizes, config_from_dict
from jaxpar.program import Program

TOLERANCE = 1e-5  # relative, of the norm of a parameter's gradient, and of each of its layers
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


class LayoutError(Exception):
    """The layout does not compute what one device computes. `report` has the figures."""

    def __init__(self, report: "CheckReport"):
        self.report = report
        super().__init__("\n".join(report.lines()))


@dataclass(frozen=True)
class Difference:
    """How far the gradient of one parameter is from that of one device.

    Attributes:
      name: path of the parameter, such as "layers/mlp/up".
      error: norm of the difference over norm of the gradient: of the whole parameter, or of the worst layer if that is more.
      layer: index of the worst layer; None if the parameter is not stacked.
      largest_difference, largest_gradient: absolute values of single numbers.
      vanishing: the gradient is zero but for rounding, and `error` is relative to the largest gradient of the model.
    """

    name: str
    error: float
    layer: int | None
    largest_difference: float
    largest_gradient: float
    vanishing: bool

    def __str__(self) -> str:
        layer = "" if self.layer is None else f", worst in layer {self.layer}"
        return (
            f"{self.name}: relative {self.error:.1e}{layer}; a number differs by up to {self.largest_difference:.1e}, where the "
            f"largest is {self.largest_gradient:.1e}"
        )


@dataclass(frozen=True)
class CheckReport:
    """A layout beside one device.

    Attributes:
      num_microbatches, shape: of the batch, (rows, tokens of a row).
      loss, expected_loss: on the layout and on one device, nats a token.
      differences: one for each parameter: the embedding's, the layers', the head's.
      notes: what is not as in the config.
    """

    sizes: MeshSizes
    num_microbatches: int
    shape: tuple[int, int]
    loss: float
    expected_loss: float
    differences: list[Difference]
    notes: list[str]
    own_model: bool

    @property
    def loss_error(self) -> float:
        return abs(self.loss - self.expected_loss) / max(abs(self.expected_loss), float(np.finfo(np.float32).tiny))

    @property
    def wrong(self) -> list[Difference]:
        """The parameters whose gradients differ, in the order of the model. A NaN differs."""
        return [one for one in self.differences if not one.error <= TOLERANCE]

    @property
    def passed(self) -> bool:
        return self.loss_error <= TOLERANCE and not self.wrong

    def lines(self) -> list[str]:
        """A short table for the user."""
        axes = "  ".join(f"{axis} {size}" for axis, size in self.sizes.as_dict().items())
        count, wrong = len(self.differences), self.wrong
        worst = max(
            self.differences, key=lambda one: (not one.error <= TOLERANCE, np.nan_to_num(one.error, nan=np.inf))
        )
        lines = [
            f"layout     {axes}  = {self.sizes.num_devices} devices, beside one device",
            f"compared   the loss and {count} gradients in float32; {self.shape[0]} rows of {self.shape[1]} tokens, "
            f"{self.num_microbatches} microbatches",
            *[f"reduced    {note}" for note in self.notes],
            f"loss       {self.loss:.6f}, one device {self.expected_loss:.6f}: relative {self.loss_error:.1e}",
            f"gradients  largest difference: {worst}",
        ]
        if self.passed:
            return [*lines, f"verdict    the same, within {TOLERANCE:g}"]
        if wrong:
            lines.append(f"first      {wrong[0]}")
        what = f"{len(wrong)} of {count} gradients" + ("" if self.loss_error <= TOLERANCE else " and the loss")
        return [*lines, f"verdict    WRONG: {what} differ by more than {TOLERANCE:g}", *self._hints()]

    def _hints(self) -> list[str]:
        hints = []
        if self.own_model and self.sizes.cp > 1:
            hints.append(
                "hint       with cp, a device holds an early and a late part of the sequence: call jaxpar.attention.attention "
                "with segment_ids=info.segment_ids, take positions from info.positions, and mix tokens nowhere else"
            )
        return hints


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
        notes.append(f"actor.global_batch_size {rows_before} → {rows}, {needed} microbatches")
    return with_settings(config, settings), notes


def compare_with_one_device(
    config: Config,
    devices: Sequence[jax.Device],
    model: UserModel | None = None,
    batch: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> CheckReport:
    """Runs one forward and backward pass on `devices` and one on a single device, and compares them.

    Weights are the initial ones plus noise, because norms of 1 and biases of 0 would hide mistakes.

    Args:
      config: the layout; it is compared as `comparable` makes it.
      model: as in `jaxpar.blueprint.Blueprint`.
      batch: as in `jaxpar.Trainer.loss_and_grads`; its first rows are used. Default: random tokens in packed documents.
      notes: what the caller has changed in the config, for the report.

    Raises:
      ConfigError: the config does not suit these devices, or one device has too little memory for the model.
      ValueError: the batch is wrong, as in `jaxpar.Trainer.loss_and_grads`.
    """
    config, changes = comparable(config, len(devices))
    program = Program(config, devices, model)
    first = next(device for device in devices if device.process_index == jax.process_index())
    alone = Program(with_settings(config, ONE_DEVICE), [first], model)
    if batch is None:
        batch = random_batch(program)
    batch = {key: np.asarray(array)[: program.batch_layout.shape[0]] for key, array in batch.items()}
    with jax.default_matmul_precision("highest"):
        try:
            params = _noisy_params(alone)
            expected_loss, expected = jax.device_get(_loss_and_grads(alone, params, batch))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise ConfigError(
                "check: one device has too little memory for the whole model in float32: use `jaxpar check CONFIG`, which "
                "makes the model smaller, or check with fewer layers"
            ) from None
        loss, grads = _loss_and_grads(program, params, batch)
    return CheckReport(
        sizes=program.blueprint.sizes,
        num_microbatches=program.blueprint.schedule.num_microbatches,
        shape=program.batch_layout.shape,
        loss=float(loss),
        expected_loss=float(expected_loss),
        differences=_differences(program, grads, expected),
        notes=[*notes, *changes],
        own_model=model is not None,
    )


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
    return batch


def _noisy_params(program: Program) -> Any:
    """Initial weights with noise, float32 numpy arrays. A matrix gets noise of 1 / sqrt(its longest side), a vector of 0.2."""
    rng = np.random.default_rng(1)

    def noisy(path: Any, x: np.ndarray) -> np.ndarray:
        sides = x.shape[1:] if path[0].key == "layers" else x.shape
        deviation = 1 / max(sides) ** 0.5 if len(sides) > 1 else 0.2
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
    compared = _compiled(jax.jit(_figures), program, grads, expected)(grads, expected)
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
