"""Cuts a config down so that its layout can be checked on a laptop, without losing what is special about it: each axis of the
mesh that has several devices keeps several, and schedule, chunks, ZeRO, recompute and kind of attention stay."""

import math
from collections.abc import Iterator
from typing import Any

from jaxpar.config import Architecture, Config
from jaxpar.config.checks import all_to_all_problem
from jaxpar.config.keys import TP_OVERLAP_PIECES
from jaxpar.measure.check import comparable, with_settings

MOST_DEVICES = 16
SEQ_LENGTH, HIDDEN_SIZE, HEAD_DIM, ROWS = 64, 64, 8, 2
LAYERS_OF_A_PART = 2  # of each chunk of each stage, so that there are loops over layers


def cut_down(
    config: Config, num_devices: int, *, own_model: bool = False, own_layers: bool = False
) -> tuple[Config, list[str]]:
    """A small config of the same kind, and a line for each thing that was reduced.

    Args:
      own_model: the model is the user's own: its sizes stay.
      own_layers: it is built from the config, so that the config's number of layers may be cut.
    """
    before = config.mesh_sizes(num_devices)
    rows_before = config.actor.global_batch_size
    config, changes = comparable(config, num_devices)
    changes = [text for text in changes if "global_batch_size" not in text]  # there will be still fewer
    axes = {"dp": before.dp, "pp": before.pp, "tensor": before.tensor, "cp": before.cp}
    sizes = fewer_devices(axes)
    settings: dict[str, Any] = {
        "cluster.num_nodes": 1,
        "cluster.num_gpus_per_node": math.prod(sizes.values()),
        "actor.model.pipeline_model_parallel_size": sizes["pp"],
        "actor.model.tensor_model_parallel_size": sizes["tensor"],
        "actor.model.context_parallel_size": sizes["cp"],
        "actor.micro_batch_size": min(ROWS, config.actor.micro_batch_size),
        "actor.model.seq_length": None,
    }
    model, names = config.actor.model, {"tensor": "sp" if before.sp > 1 else "tp"}
    settings["actor.model.sequence_parallel"] = model.sequence_parallel and sizes["tensor"] > 1
    settings["actor.model.tp_comm_overlap"] = model.tp_comm_overlap and sizes["tensor"] > 1
    if model.hierarchical_context_parallel_sizes:
        settings["actor.model.hierarchical_context_parallel_sizes"] = _ranks(
            model.hierarchical_context_parallel_sizes, sizes["cp"]
        )
    rows = settings["actor.micro_batch_size"] * sizes["dp"] * min(2 * sizes["pp"], config.num_microbatches(before))
    settings |= {"actor.global_batch_size": rows, "runner.seq_length": _seq_length(config, sizes)}
    architecture = config.architecture() if own_layers or not own_model else None
    if architecture:
        settings |= dict(_layers(config, architecture, sizes["pp"], before.pp))
    if architecture and not own_model:
        settings |= dict(_widths(config, architecture, sizes, before.tensor, settings["runner.seq_length"]))
    devices = [f"{names.get(axis, axis)} {size} → {sizes[axis]}" for axis, size in axes.items() if size != sizes[axis]]
    lost = [names.get(axis, axis) for axis, size in axes.items() if size > 1 == sizes[axis]]
    kept = [names.get(axis, axis) for axis, size in sizes.items() if size > 1]
    notes = [f"devices: {', '.join(devices)}; checked: {', '.join(kept)}"] * bool(devices)
    notes += [f"NOT CHECKED: {', '.join(lost)}"] * bool(lost)
    notes += [f"actor.global_batch_size {rows_before} → {rows}"] * (rows != rows_before) + changes
    return with_settings(config, settings), notes + _changes(config, settings)


def fewer_devices(sizes: dict[str, int], most: int = MOST_DEVICES) -> dict[str, int]:
    """Sizes with a product of at most `most`. dp shrinks first, to 2. Then the largest of the others shrinks again and again,
    by its smallest factor, but while another way is left, none becomes 1."""
    sizes = dict(sizes)
    if math.prod(sizes.values()) > most:
        sizes["dp"] = min(sizes["dp"], 2)
    while math.prod(sizes.values()) > most:
        smaller = {axis: size // _smallest_factor(size) for axis, size in sizes.items() if size > 1}
        allowed = [axis for axis, size in smaller.items() if size > 1] or ["dp"] * (sizes["dp"] > 1) or list(smaller)
        axis = max(
            reversed(allowed), key=lambda axis: sizes[axis]
        )  # of equals not pp, so that schedules stay as they are
        sizes[axis] = smaller[axis]
    return sizes


def _smallest_factor(number: int) -> int:
    return next(factor for factor in range(2, number + 1) if number % factor == 0)


def _ranks(hierarchy: list[int], cp: int) -> list[int]:
    """Sizes of the all-to-all and of the ring whose product is `cp`, both above 1 if possible."""
    choices = [[size, cp // size] for size in range(1, cp + 1) if cp % size == 0]
    return min(choices, key=lambda pair: (1 in pair and 1 not in hierarchy, abs(pair[0] - hierarchy[0])))


def _seq_length(config: Config, sizes: dict[str, int]) -> int:
    model = config.actor.model
    unit = 2 * sizes["cp"] * (sizes["tensor"] if model.sequence_parallel else 1)
    unit *= TP_OVERLAP_PIECES if model.tp_comm_overlap else 1
    return min(config.runner.seq_length, -(-SEQ_LENGTH // unit) * unit)


def _layers(config: Config, architecture: Architecture, pp: int, pp_before: int) -> Iterator[tuple[str, Any]]:
    """As many layers for each part of the pipeline, and one more if they were uneven."""
    model, layers = config.actor.model, architecture.num_hidden_layers
    chunks = model.virtual_pipeline_model_parallel_size or 1 if pp > 1 else 1
    yield "actor.model.virtual_pipeline_model_parallel_size", chunks if chunks > 1 else None
    uneven = layers % (pp_before * chunks) > 0
    fewer = min(layers, LAYERS_OF_A_PART * pp * chunks + uneven)
    yield "actor.model.num_hidden_layers", fewer
    if model.recompute_num_layers is not None:
        all_of_them = model.recompute_num_layers >= -(-layers // (pp_before * chunks))
        most = -(-fewer // (pp * chunks)) if all_of_them else 1
        yield "actor.model.recompute_num_layers", min(model.recompute_num_layers, most)


def _widths(
    config: Config, a: Architecture, sizes: dict[str, int], tensor_before: int, seq: int
) -> Iterator[tuple[str, Any]]:
    """Narrow layers. Whether heads are shared, repeated over the tensor group, or padded in the vocabulary stays as it is."""
    model, tensor = config.actor.model, sizes["tensor"]
    heads, kv_heads = _heads(config, a, sizes, tensor_before)
    unit = math.lcm(16, sizes["pp"] * tensor)
    vocab = 8 * unit - (5 if a.padded_vocab_size > a.vocab_size else 0)
    narrow = {
        "hidden_size": min(a.hidden_size, HIDDEN_SIZE),
        "intermediate_size": min(a.intermediate_size, 24 * tensor),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": min(a.head_dim, HEAD_DIM),
    }
    if vocab < a.vocab_size:
        narrow |= {"vocab_size": vocab, "make_vocab_size_divisible_by": unit}
    if a.sliding_window:
        narrow["sliding_window"] = min(a.sliding_window, max(2, seq // 4))
    for key, value in narrow.items():
        if getattr(model, key) != value:
            yield f"actor.model.{key}", value


def _heads(config: Config, a: Architecture, sizes: dict[str, int], tensor_before: int) -> tuple[int, int]:
    """The fewest heads and kv heads that divide over the tensor group and an all-to-all as before."""
    tensor, model = sizes["tensor"], config.actor.model
    hierarchy = model.hierarchical_context_parallel_sizes
    ranks = {"a2a": sizes["cp"], "a2a+p2p": _ranks(hierarchy, sizes["cp"])[0] if hierarchy else 1}
    ratios = [1] if a.num_attention_heads == a.num_key_value_heads else [2, 3, 4, 6, 8]
    repeated = tensor_before > a.num_key_value_heads
    found = [
        (kv_heads * ratio, kv_heads)
        for kv_heads in range(1 if repeated else min(2, a.num_key_value_heads), a.num_key_value_heads + 1)
        for ratio in ratios
        if kv_heads * ratio % tensor == 0
        and (kv_heads < tensor and tensor % kv_heads == 0 if repeated else kv_heads % tensor == 0)
        and not all_to_all_problem(
            kv_heads * ratio // tensor, max(1, kv_heads // tensor), ranks.get(model.cp_comm_type, 1)
        )
    ]
    return min(found, default=(a.num_attention_heads, a.num_key_value_heads))


def _changes(config: Config, settings: dict[str, Any]) -> list[str]:
    """One line with the settings that are smaller than in the config. The mesh has a line of its own."""
    values, changes = config.model_dump(), []
    for key, value in settings.items():
        section: Any = values
        for part in key.split("."):
            section = section[part]
        about_mesh = key.startswith("cluster.") or key.endswith(
            ("_parallel_size", "_parallel_sizes", "global_batch_size")
        )
        if section != value and section is not None and not about_mesh:
            changes.append(f"{key.rpartition('.')[2]} {section} → {value}")
    return [", ".join(changes)] if changes else []
