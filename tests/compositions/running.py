"""Computes a case on its mesh and on one device, and compares the loss and every gradient.

The reference is the same model on one device, in one microbatch, with attention by its definition; for half of the cases for which
there is one, a plain loop over the layers without the engine (`support.reference`).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from compositions.drawing import OWN_MODELS, Case
from support import QUICK, TOLERANCE, random_params, reference
from user_models import GPT, LinenGPT, NoStack

import jaxpar
from jaxpar.attention import reference_attention
from jaxpar.config import Config, ConfigError, config_from_dict
from jaxpar.examples import gemma, gpt2, moe
from jaxpar.measure.check import ONE_DEVICE, with_settings
from jaxpar.models import decoder
from jaxpar.program import Program

# Of the largest number of a parameter's gradient in a layer. In 8 or 11 bits, sums in another order are rounded otherwise.
TOLERANCES = {"fp32": TOLERANCE, "bf16": 0.05, "fp16": 0.02}
ROUNDING = 3  # how many times the rounding of one device an error may be, where that is more than the tolerance
BUILD: dict[str, Callable[[Any], Any]] = {
    "GPT": GPT,
    "LinenGPT": LinenGPT,
    "NoStack": lambda attention: lambda rngs: NoStack(rngs, attention),
    "gemma": lambda _: gemma.build(),
    "gpt2": lambda _: gpt2.build(),
    "moe": lambda _: moe.build(),
}
assert BUILD.keys() == OWN_MODELS.keys()
SEED = np.array([3, 4], np.uint32)  # of dropout


@dataclass(frozen=True)
class Result:
    """What came of a case.

    Attributes:
      kind: "same", "refused" or "WRONG".
      error: the largest of the loss and all gradients, relative.
      text: where it is, or why the case was refused.
    """

    kind: str
    error: float
    text: str


def run(case: Case) -> Result:
    """Any exception but ConfigError is a fault of the engine, and is raised."""
    try:
        config = config_from_dict(case.values())
        program = _program(case, config, case.settings["cluster.num_gpus_per_node"])
    except ConfigError as error:
        assert all(":" in problem and len(problem) < 4000 for problem in error.problems), error
        return Result("refused", 0.0, "; ".join(error.problems))
    params, batch = random_params(program.blueprint.model), make_batch(case, program)
    found, expected = _compute(case, program, params, batch), _reference(case, program, params, batch)
    errors, tolerance = relative_errors(found, expected), TOLERANCES[config.actor.model.precision]
    where, worst = max(errors.items(), key=lambda item: np.nan_to_num(item[1], nan=np.inf))
    if worst <= tolerance:
        return Result("same", worst, where)
    otherwise = {"actor.model.precision": "fp32", "actor.micro_batch_size": 1}
    rounding = relative_errors(expected, _alone(case, program, _rounded(params, case.number), batch, **otherwise))
    wrong = {name: error for name, error in errors.items() if not error <= max(tolerance, ROUNDING * rounding[name])}
    where = max(wrong, key=lambda name: wrong[name], default=where)
    text = f"{where} ({rounding[where]:.1e} on one device with rounded weights; {len(wrong)} of {len(errors)})"
    return Result("WRONG" if wrong else "same", errors[where], text)


def _rounded(params: Any, seed: int) -> Any:
    """The weights, each other by up to half of the last of float32's 24 bits."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(x * (1 + rng.uniform(-1, 1, x.shape) * 2**-24)), params)


def whole_rows(tokens: jaxpar.TokenStatistics, batch: Any) -> jax.Array:
    """A loss of a user: each token's, times a weight that depends on all tokens before it in the row."""
    before = jnp.cumsum(tokens.log_probs * batch["loss_mask"], 1)
    return -tokens.log_probs * jax.nn.sigmoid(before / 50)


def _program(case: Case, config: Config, devices: int, attention: Any = None) -> Program:
    model = BUILD[case.model](attention or jaxpar.attention.attention) if case.model else None
    objective = jaxpar.Objective(whole_rows, whole_rows=True) if case.own_objective else None
    return Program(config, jax.devices()[:devices], model, objective=objective)


def _compute(case: Case, program: Program, params: Any, batch: Any) -> tuple[Any, Any]:
    """(loss, gradients) as numpy arrays; of frozen parameters None."""
    rows = program.batch_layout.put_on_mesh(program.batch_layout.own_rows(batch))
    placed = jax.tree.map(
        lambda x, shape, sharding: jax.device_put(np.asarray(x, shape.dtype), sharding),
        params,
        program.state_shapes["params"],
        program.state_shardings["params"],
    )
    if not case.updates:
        arguments = placed, rows, program.blueprint.loss_scale, SEED
        return jax.device_get(program.loss_and_grads.lower(*arguments).compile(compiler_options=QUICK)(*arguments))
    state = program.init.lower(placed).compile(compiler_options=QUICK)(placed)
    state, metrics = program.train_step.lower(state, rows).compile(compiler_options=QUICK)(state, rows)
    moments = optax.tree.get(state["opt_state"], "mu")
    beta = program.blueprint.config.actor.optim.adam_beta1
    return jax.device_get((metrics["loss"], jax.tree.map(lambda x: x / np.float32(1 - beta), jax.device_get(moments))))


def _reference(case: Case, program: Program, params: Any, batch: Any) -> tuple[Any, Any]:
    config, model = program.blueprint.config, program.blueprint.model
    plain = config.actor.model.precision == "fp32" and not case.own_objective and not config.actor.model.is_lora
    plain = plain and not case.model and config.actor.optim.trainable is None
    with _plain_attention():
        if plain and case.number % 2 and not any(key.startswith("algorithm.") for key in case.settings):
            rows = program.batch_layout.own_rows(batch)
            vocab = program.blueprint.vocab_size
            return reference(model, params, rows, vocab=vocab, table=lambda params: params["embed"]["table"])
    return _alone(case, program, params, batch)


def _alone(case: Case, program: Program, params: Any, batch: Any, **more: Any) -> tuple[Any, Any]:
    """One device's, through jaxpar without any other setting of the layout than `more`."""
    config, rows = program.blueprint.config, len(batch["tokens"])
    settings = {
        **ONE_DEVICE, "actor.micro_batch_size": rows, "actor.global_batch_size": rows, "runner.seq_length": config.row_length,
        "runner.enable_dynamic_batch_size": False, "runner.max_tokens_per_mbs": None, "actor.optim.grad_reduce_dtype": "fp32",
        "actor.optim.optimizer_cpu_offload": False, **more,
    }  # fmt: skip
    with _plain_attention():
        return _compute(case, _program(case, with_settings(config, settings), 1, reference_attention), params, batch)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Replaces jaxpar's attention where it is a global of the model's module."""
    with ExitStack() as stack:
        for module in (decoder, gemma, gpt2, moe):
            stack.enter_context(mock.patch.object(module, "attention", reference_attention))
        yield


def relative_errors(found: tuple[Any, Any], expected: tuple[Any, Any]) -> dict[str, float]:
    """Name → largest difference over largest number, of the loss and of each parameter, a stacked one's layers by themselves. What
    is zero must be zero: else the error is infinite."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = zip(jax.tree_util.tree_leaves_with_path(found[1]), jax.tree.leaves(expected[1]), strict=True)
    errors = {"loss": _error(found[0], expected[0])}
    for (path, grad), other in pairs:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert grad.shape == other.shape and grad.dtype == np.float32, f"{name}: {grad.dtype}{grad.shape}"
        if name.startswith("layers/"):
            errors |= {f"{name}[{i}]": _error(*one) for i, one in enumerate(zip(grad, other, strict=True))}
        else:
            errors[name] = _error(grad, other)
    return errors


def _error(found: Any, expected: Any) -> float:
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    difference, largest = np.abs(found - expected).max(), np.abs(expected).max()
    return float(difference / largest) if largest else float("inf" if difference else 0)


# --- batches ----------------------------------------------------------------------------------------------------------


def make_batch(case: Case, program: Program) -> dict[str, np.ndarray]:
    """A global batch with all that the model and the objective take.

    `case.documents`: "packed", of several lengths; "padded", with padding behind them; "one", which attention is not told of.
    `case.mask`: "dense"; "uneven", denser along both dimensions; "weights" of any size; "empty", none on the first half of the rows
    (at least one dp rank), on one microbatch more, and on the first cp rank; "few", two tokens in all.
    """
    rng, (rows, seq) = np.random.default_rng(case.number), program.batch_layout.shape
    vocab = program.blueprint.vocab_size
    tokens = rng.integers(0, vocab, (rows, seq + 1)).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": _mask(case.mask, rng, rows, seq)}
    if case.documents != "one":
        starts = rng.random((rows, seq)) < 0.08
        if program.blueprint.config.algorithm.loss_type == "dpo":  # pairs of documents, each with trained tokens
            starts = np.tile(np.arange(seq) % -(-seq // 4) == 0, (rows, 1))
            batch["loss_mask"] = np.ones((rows, seq), np.float32) * (np.arange(rows) >= rows // 2)[:, None]
        starts[:, 0] = True
        index = np.arange(seq)
        batch["segment_ids"] = starts.cumsum(-1).astype(np.int32)
        batch["positions"] = (index - np.maximum.accumulate(np.where(starts, index, 0), -1)).astype(np.int32)
        if case.documents == "padded":
            is_padding = index[None] >= rng.integers(seq // 2, seq, rows)[:, None]
            for name in ("segment_ids", "loss_mask", "positions"):
                batch[name] = np.where(is_padding, 0, batch[name])
            batch["loss_mask"][-1, :2] = 1
    for name, one in program.blueprint.inputs.items():
        batch[name] = _INPUTS[name](rng, (rows, seq), one, batch, vocab)
    return batch


def _mask(kind: str, rng: np.random.Generator, rows: int, seq: int) -> np.ndarray:
    density = np.linspace(0.2, 1, rows)[:, None] * np.linspace(0.3, 1, seq)
    mask = (rng.random((rows, seq)) < density).astype(np.float32)
    if kind == "dense":
        mask[:] = 1
    elif kind == "weights":
        mask *= rng.uniform(0.1, 3, mask.shape).astype(np.float32)
    elif kind == "empty":
        mask[: (rows + 1) // 2], mask[:, : seq // 8], mask[:, -(seq // 8) :] = 0, 0, 0
    elif kind == "few":
        mask[:] = 0
    mask[-1, [seq // 3, seq // 2]] = 1
    return mask


def _teacher_tokens(rng: Any, shape: Any, one: Any, batch: Any, vocab: int) -> np.ndarray:
    return np.argsort(rng.random((*shape, vocab)), -1)[..., : one.shape[0]].astype(np.int32)


def _teacher_log_probs(rng: Any, shape: Any, one: Any, batch: Any, vocab: int) -> np.ndarray:
    k = one.shape[0]
    return np.log(rng.dirichlet(np.full(k + 1, 3), shape)[..., :k]).astype(np.float32)


def _log_probs(rng: Any, shape: Any, one: Any, batch: Any, vocab: int) -> np.ndarray:
    return (-np.log(vocab) + 0.5 * rng.normal(size=shape)).astype(np.float32)


def _completions(rng: Any, shape: Any, one: Any, batch: Any, vocab: int) -> np.ndarray:
    """Answers have the targets of masks with few of them."""
    mask = batch["loss_mask"]
    return (
        np.where(mask.sum() <= 4, mask > 0, rng.random(shape) < 0.8).astype(np.float32)
        if (mask == 0).any()
        else mask * 0 + 1
    )


_INPUTS: dict[str, Callable[..., np.ndarray]] = {
    "completion_mask": _completions,
    "old_log_probs": _log_probs,
    "ref_log_probs": _log_probs,
    "advantages": lambda rng, shape, *_: rng.normal(size=shape).astype(np.float32),
    "teacher_tokens": _teacher_tokens,
    "teacher_log_probs": _teacher_log_probs,
}
