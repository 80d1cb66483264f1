"""Text and tables for people: what `jaxpar mesh` and `jaxpar schedule` print, and the head of a training run."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import PartitionSpec
from rich.table import Table
from rich.text import Text

from jaxpar.config import MeshSizes
from jaxpar.mesh import AXES, device_grid
from jaxpar.pipeline.schedule import IDLE, Schedule

if TYPE_CHECKING:
    from jaxpar.compile import Report


def report_lines(report: "Report") -> list[str]:
    """What a compiled step needs, in words; bytes and FLOPs a device."""
    memory = report.memory
    gib = {key: value / 2**30 for key, value in vars(memory).items()}
    verdict = "fits" if memory.fits else "does not fit"
    lines = [
        f"memory: {verdict}, peak {gib['peak']:.1f} of {gib['capacity']:.1f} GiB a device "
        f"(arguments {gib['arguments']:.1f}, temporaries {gib['temporaries']:.1f})"
    ]
    if not memory.fits:
        lines.append(
            "try: actor.model.recompute_granularity=full recompute_method=uniform recompute_num_layers=1, a larger "
            "pipeline_model_parallel_size, tensor_model_parallel_size with sequence_parallel, or context_parallel_size, "
            "or a smaller actor.micro_batch_size"
        )
    lines.append(f"FLOPs: {report.flops:.4g} executed")
    if report.model_flops and report.flops:
        lines[-1] += f", {report.model_flops:.4g} useful ({report.model_flops / report.flops:.1%})"
    lines.append(f"bubble: {report.bubble_fraction:.1%}")
    lines.append(f"compiled in {report.compile_seconds:.1f} s")
    return lines + [f"not counted: {text}" for text in report.uncounted]


def collective_table(report: "Report") -> Table:
    table = Table("collective", "axes", title="collectives a step", title_justify="left")
    for column in ("count", "GiB a device"):
        table.add_column(column, justify="right")
    for c in report.collectives:
        table.add_row(c.kind, " ".join(c.axes) or "?", f"{c.count:,}", f"{c.bytes / 2**30:.3f}")
    return table


def mesh_line(sizes: MeshSizes) -> str:
    return "  ".join(f"{axis} {size}" for axis, size in sizes.as_dict().items()) + f"  = {sizes.num_devices} devices"


def device_table(sizes: MeshSizes, devices_per_host: int) -> Table:
    """Which host and device holds which mesh coordinate; one line for up to eight devices of a host."""
    coordinates = np.empty((sizes.num_devices, len(AXES)), int)
    grid = device_grid(sizes)
    for coordinate in np.ndindex(grid.shape):
        coordinates[grid[coordinate]] = coordinate
    per_line = min(8, devices_per_host)
    title = f"coordinates ({' '.join(AXES)}) of each device"
    table = Table("host", "devices", *[f"+{i}" for i in range(per_line)], title=title, title_justify="left")
    for host in range(-(-sizes.num_devices // devices_per_host)):
        end = min((host + 1) * devices_per_host, sizes.num_devices)
        for first in range(host * devices_per_host, end, per_line):
            cells = [" ".join(map(str, coordinates[d])) for d in range(first, min(first + per_line, end))]
            table.add_row(str(host), f"{first}…{min(first + per_line, end) - 1}", *cells)
    return table


def parameter_table(layouts: Any, mesh_shape: Mapping[str, int]) -> Table:
    """Shape, split and bytes a device of every parameter: float32 master weights and Adam's two moments at rest."""
    table = Table("parameter", "shape", "dimensions", "split in a step", "split at rest", title_justify="left")
    table.add_column("bytes a device", justify="right")
    table.title = "parameters (bytes: one float32 master copy at rest; Adam's moments are twice as much again)"
    layouts = jax.tree.leaves(layouts)
    for layout in layouts:
        table.add_row(
            layout.name,
            " x ".join(map(str, layout.shape)),
            " ".join(dim or "-" for dim in layout.dims),
            _spec(layout.compute_spec),
            _spec(layout.rest_spec),
            f"{layout.bytes_per_device(mesh_shape):,}",
        )
    count = sum(math.prod(layout.shape) for layout in layouts)
    total = sum(layout.bytes_per_device(mesh_shape) for layout in layouts)
    table.add_section()
    table.add_row("all", f"{count:,} numbers", "", "", "", f"{total:,}")
    return table


def schedule_lines(schedule: Schedule, width: int) -> list[Text]:
    """The table, a line for each stage, cut into blocks that fit `width` characters."""
    digits = len(str(schedule.num_microbatches - 1))
    columns: list[list[Text]] = []
    for segment in schedule.segments:
        for tick in range(schedule.num_ticks)[segment.ticks]:
            slots = [("F", schedule.forward, "green")] * segment.forward + [
                ("B", schedule.backward, "blue")
            ] * segment.backward
            columns += [
                [_cell(name, table[tick, s], digits, style) for s in range(schedule.num_stages)]
                for name, table, style in slots
            ]
    label = len(f"stage {schedule.num_stages - 1} ")
    per_block = max(1, (width - label) // (digits + 2))
    lines = []
    for start in range(0, len(columns), per_block):
        for stage in range(schedule.num_stages):
            line = Text(f"stage {stage}".ljust(label))
            for column in columns[start : start + per_block]:
                line.append(column[stage])
                line.append(" ")
            lines.append(line)
        lines.append(Text())
    return lines[:-1]


def schedule_summary(schedule: Schedule) -> list[str]:
    """Bubble and memory, in words."""
    stages, microbatches = schedule.num_stages, schedule.num_microbatches
    idle, total = stages - 1, microbatches + stages - 1
    return [
        f"{schedule.name}: {stages} stages, {microbatches} microbatches, {schedule.num_ticks} ticks",
        f"bubble: {schedule.bubble_fraction():.1%} of the time ((P-1)/(M+P-1) = {idle}/{total} = {idle / total:.1%})",
        "microbatches in flight: " + ", ".join(f"stage {s}: {n}" for s, n in enumerate(schedule.in_flight)),
    ]


def checkpoint_lines(path: Path, manifest: Mapping[str, Any]) -> list[str]:
    """A checkpoint's manifest, in words."""
    mesh = "  ".join(f"{axis} {size}" for axis, size in manifest["mesh"].items())
    files = [file for file in path.rglob("*") if file.is_file()]
    lines = [
        f"{path}: complete, step {manifest['step']}, written {manifest['written']}",
        f"mesh: {mesh}, {manifest['processes']} processes; any other can read it",
        f"data: {manifest['data']['batch']} global batches of {manifest['data']['global_batch_size']} sequences read",
        f"size: {sum(file.stat().st_size for file in files):,} bytes in {len(files)} files, compressed",
        "versions: " + ", ".join(f"{name} {version}" for name, version in manifest["versions"].items()),
    ]
    if manifest["val_loss"] is not None:
        lines.insert(1, f"validation loss: {manifest['val_loss']:.6f}")
    return lines


def checkpoint_table(manifest: Mapping[str, Any]) -> Table:
    """Every parameter, and in one line each the other parts of the state."""
    table = Table("parameter", "shape", "type", title="state", title_justify="left")
    table.add_column("bytes", justify="right")
    others: dict[str, list[int]] = {}
    for name, described in manifest["tree"].items():
        dtype, _, shape = described[:-1].partition("[")
        sizes = [int(size) for size in shape.split(",") if size]
        size = math.prod(sizes) * np.dtype(dtype).itemsize
        part, _, rest = name.partition("/")
        if part == "params":
            table.add_row(rest, " x ".join(map(str, sizes)), dtype, f"{size:,}")
        else:
            others.setdefault(part, []).append(size)
    table.add_section()
    for part, bytes_ in others.items():
        table.add_row(part, f"{len(bytes_)} arrays", "", f"{sum(bytes_):,}")
    return table


def _cell(slot: str, microbatch: int, digits: int, style: str) -> Text:
    if microbatch == IDLE:
        return Text("." * (digits + 1), style="dim")
    return Text(f"{slot}{microbatch}".ljust(digits + 1), style=style)


def _spec(spec: PartitionSpec) -> str:
    def word(entry: Any) -> str:
        return "-" if not entry else entry if isinstance(entry, str) else "+".join(entry)

    return " ".join(word(entry) for entry in spec) or "-"
