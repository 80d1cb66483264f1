"""Notes on settings that were given and have no effect."""

from __future__ import annotations

from collections.abc import Iterator

from jaxpar.config.keys import ADVANTAGES, LOSS_TYPES, Algorithm, Data, Model, Optim, Runner, Section
from jaxpar.config.lora import lora_note

LOSS_SCALE = ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")


def without_effect(runner: Runner, data: Data, algorithm: Algorithm, model: Model, optim: Optim) -> Iterator[str]:
    """A line for each group of settings that nothing reads because of another setting. Null and off are no such settings."""
    if note := lora_note(model):
        yield note
    given = algorithm.model_fields_set
    if unused := sorted(given - {"loss_type", *LOSS_TYPES.get(algorithm.loss_type, given)}):
        yield f"algorithm: {', '.join(unused)} have no effect with loss_type {algorithm.loss_type}"
    elif algorithm.loss_type == "actor" and (known := ADVANTAGES.get(algorithm.adv_type)):
        others = {key for keys in ADVANTAGES.values() for key in keys} - set(known)
        yield from _unread(algorithm, "algorithm", tuple(sorted(others)), f"with adv_type {algorithm.adv_type}")
    if not data.val_data_paths:
        validation = ("val_check_interval", "limit_val_batches", "keep_best_checkpoint")
        yield from _unread(runner, "runner", validation, "without data.val_data_paths or eval_batches")
    elif runner.val_check_interval < 1:
        yield from _unread(
            runner, "runner", ("limit_val_batches", "keep_best_checkpoint"), "without val_check_interval"
        )
        yield "data.val_data_paths has no effect without runner.val_check_interval"
    if not runner.enable_dynamic_batch_size:
        yield from _unread(runner, "runner", ("max_tokens_per_mbs",), "without enable_dynamic_batch_size")
    if model.recompute_granularity is None:
        recompute = ("recompute_method", "recompute_num_layers")
        yield from _unread(model, "actor.model", recompute, "without recompute_granularity: full")
    elif model.recompute_granularity == "selective":
        yield from _unread(model, "actor.model", ("recompute_num_layers",), "with recompute_granularity selective")
    if model.precision != "fp16":
        yield from _unread(optim, "actor.optim", LOSS_SCALE, f"with actor.model.precision {model.precision}")
    elif optim.loss_scale is not None:
        yield from _unread(optim, "actor.optim", LOSS_SCALE[1:], "with a loss_scale, which never changes")


def _unread(section: Section, path: str, names: tuple[str, ...], why: str) -> Iterator[str]:
    given = [name for name in names if name in section.model_fields_set and _is_on(getattr(section, name))]
    if given:
        yield f"{path}: {', '.join(given)} {'have' if len(given) > 1 else 'has'} no effect {why}"


def _is_on(value: object) -> bool:
    return value is not None and value is not False and value != -1
