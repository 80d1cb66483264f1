"""Text and tables that the commands print."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import PartitionSpec
from rich.table import Table

from jaxpar.attention import choice_lines
from jaxpar.config import Config, MeshSizes
from jaxpar.parallel.mesh import AXES, device_grid

if TYPE_CHECKING:
    from jaxpar.measure.bench import Comparison, Measurement
    from jaxpar.measure.compile import Report
    from jaxpar.measure.roofline import Roofline
    from jaxpar.program import Program


MAX_DEVICES_SHOWN = 4096


def training_lines(program: "Program", config: Config) -> list[str]:
    """The head of a training run: mesh, devices, model, schedule."""
    where = "simulated on the CPU" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    blueprint, schedule = program.blueprint, program.blueprint.schedule
    bubble = f", bubble {schedule.bubble_fraction():.1%}" if blueprint.sizes.pp > 1 else ""
    trained = f", {blueprint.num_trained:,} trained" if blueprint.num_trained < blueprint.num_params else ""
    up_to = "up to " if config.runner.enable_dynamic_batch_size else ""
    return [
        f"mesh: {mesh_line(blueprint.sizes)}, {where}",
        f"model: {blueprint.num_params:,} parameters in {config.actor.model.precision}{trained}; "
        f"{up_to}{schedule.num_microbatches} microbatches a step, schedule {schedule.name}{bubble}",
    ]


def report_lines(report: "Report") -> list[str]:
    """What a compiled step needs, with bytes and FLOPs of one device."""
    memory = report.memory
    gib = {key: value / 2**30 for key, value in vars(memory).items()}
    verdict = "fits" if memory.fits else "does not fit"
    lines = [
        f"memory: {verdict}, peak {gib['peak']:.1f} of {gib['capacity']:.1f} GiB a device "
        f"(arguments {gib['arguments']:.1f}, temporaries {gib['temporaries']:.1f})"
    ]
    if report.host_bytes:
        lines.append(f"memory of the host: {report.host_bytes / 2**30:.1f} GiB a device")
    if not memory.fits:
        lines.append(report.advice)
    lines.append(f"FLOPs: {report.flops:.4g} executed")
    if report.model_flops and report.flops:
        lines[-1] += f", {report.model_flops:.4g} useful ({report.model_flops / report.flops:.1%})"
    elif report.model_flops is None:
        lines[-1] += "; how many are useful is not known for your own model"
    if report.roofline:
        lines.append(_least_time(report.roofline))
    lines += choice_lines(report.attention)
    lines.append(f"bubble: {report.bubble_fraction:.1%}")
    lines.append(f"compiled in {report.compile_seconds:.1f} s")
    return lines + [f"not counted: {text}" for text in report.uncounted]


def report_tables(report: "Report", num_operations: int) -> list[Table]:
    """Collectives, the least time by kind of work, and the costliest operations if any are asked for."""
    tables = [collective_table(report)]
    if report.roofline:
        tables.append(roofline_table(report.roofline))
        tables += [operation_table(report.roofline, num_operations)] * bool(num_operations)
    return tables


def _least_time(roofline: "Roofline") -> str:
    exposed = roofline.exposed
    links = ", ".join(f"{link} {exposed[link]:.3g} of {seconds:.3g} s" for link, seconds in roofline.links.items())
    mfu = "" if roofline.mfu_at_most is None else f"; MFU at most {roofline.mfu_at_most:.1%}"
    return (
        f"least time: {roofline.seconds:.3g} s = {roofline.chip_seconds:.3g} s on the chip + {sum(exposed.values()):.3g} s of "
        f"exposed transfers ({links}){mfu}; "
        f"{roofline.launches:,.0f} launches, {roofline.hbm_bytes / 1e9:,.0f} GB through memory"
    )


def roofline_table(roofline: "Roofline") -> Table:
    """The least time of a step by kind of work."""
    table = Table("work", title="least time of a step, on each device", title_justify="left")
    for column in ("seconds", "TFLOP", "GB", "launches"):
        table.add_column(column, justify="right")
    for work in roofline.by_kind:
        table.add_row(
            work.kind,
            f"{work.seconds:.3f}",
            f"{work.flops / 1e12:,.0f}",
            f"{work.bytes / 1e9:,.0f}",
            f"{work.count:,.0f}",
        )
    return table


def operation_table(roofline: "Roofline", number: int) -> Table:
    """The costliest operations, with the source lines that made them."""
    table = Table(
        "seconds", "times", "work", "source", "operation", title=f"the {number} costliest", title_justify="left"
    )
    for one in roofline.operations[:number]:
        name = "/".join(one.name.split("/")[-3:])
        table.add_row(f"{one.seconds:.3f}", f"{one.count:,.0f}", one.kind, one.source or "?", name)
    return table


def attention_lines(reports: "Mapping[str, Report]") -> list[str]:
    """What computes the attention of several layouts. Layouts that are alike share a line."""
    layouts: dict[str, list[str]] = {}
    for layout, report in reports.items():
        for line in choice_lines(report.attention):
            layouts.setdefault(line, []).append(layout)
    return [line if len(names) == len(reports) else f"{', '.join(names)}: {line}" for line, names in layouts.items()]


def report_table(reports: "Mapping[str, Report]", device: str) -> Table:
    """What several layouts need, side by side."""
    count = next(iter(reports.values())).devices
    table = Table("layout", title=f"one step on {count} of {device}; memory and FLOPs a device", title_justify="left")
    for column in (
        "peak GB",
        "fits",
        "arguments GB",
        "temporaries GB",
        "FLOPs",
        "useful",
        "bubble",
        "least s",
        "compiled in s",
    ):
        table.add_column(column, justify="right")
    # The fastest first, by the least time of its program.
    for layout, report in sorted(reports.items(), key=lambda item: item[1].roofline.seconds if item[1].roofline else 0):
        gb = {key: f"{value / 1e9:.1f}" for key, value in vars(report.memory).items()}
        useful = f"{report.model_flops / report.flops:.1%}" if report.model_flops and report.flops else "?"
        table.add_row(
            layout,
            gb["peak"],
            "yes" if report.memory.fits else "no",
            gb["arguments"],
            gb["temporaries"],
            f"{report.flops:.3g}" + ("*" if report.uncounted else ""),
            useful,
            f"{report.bubble_fraction:.1%}",
            f"{report.roofline.seconds:.2f}" if report.roofline else "?",
            f"{report.compile_seconds:.0f}",
        )
    if any(report.uncounted for report in reports.values()):
        table.caption = "* not everything could be counted: compile that layout alone to see what is missing"
    return table


def collective_table(report: "Report") -> Table:
    """Collectives by kind and mesh axes, and for GPUs how long their transfers take and how much of that is exposed."""
    table = Table("collective", "axes", title="collectives a step", title_justify="left")
    for column in ("count", "GiB a device", *["seconds", "exposed seconds"] * bool(report.roofline)):
        table.add_column(column, justify="right")
    for kind, axes in dict.fromkeys((c.kind, c.axes) for c in report.collectives):
        counted = [c for c in report.collectives if (c.kind, c.axes) == (kind, axes)]
        cells = [f"{sum(c.count for c in counted):,}", f"{sum(c.bytes for c in counted) / 2**30:.3f}"]
        if report.roofline:
            timed = [t for t in report.roofline.transfers if (t.kind, t.axes) == (kind, axes)]
            cells += [f"{sum(t.seconds for t in timed):.3f}", f"{sum(t.exposed_seconds for t in timed):.3f}"]
        table.add_row(kind, " ".join(axes) or "?", *cells)
    return table


def measurement_lines(m: "Measurement") -> list[str]:
    """What the train step of a config costs."""
    ms = {name: 1000 * seconds for name, seconds in m.step_seconds.items()}
    why = "the useful FLOPs of your own model are" if m.model_flops is None else "the peak of this device is"
    mfu = f"MFU unknown ({why} not known)" if m.mfu is None else f"MFU {m.mfu:.1%}"
    peak = "" if m.measured_peak is None else f"; measured peak {m.measured_peak / 2**30:.2f} GiB"
    gib = {key: value / 2**30 for key, value in vars(m.memory).items()}
    return [
        f"step: {ms['median']:,.1f} ms (median of {m.steps}; 10% below {ms['p10']:,.1f}, 10% above {ms['p90']:,.1f})",
        f"rate: {m.tokens_per_second:,.0f} tokens/s, {m.tokens_per_second / m.devices:,.0f} a device; {mfu}",
        f"memory of a device: arguments {gib['arguments']:.2f}, temporaries {gib['temporaries']:.2f}, compiled peak "
        f"{gib['peak']:.2f} GiB{peak}",
        f"FLOPs of a device: {m.flops:.4g} executed"
        + (f", {m.model_flops:.4g} useful ({m.model_flops / m.flops:.1%})" if m.model_flops and m.flops else ""),
        f"loss: {m.loss:.4f} after {m.steps} steps; compiled in {m.compile_seconds:.1f} s",
        *choice_lines(m.attention),
    ]


def comparison_table(rows: "list[Comparison]", base: str) -> Table:
    """Layouts side by side, with each figure divided by that of the row `base` in brackets."""
    table = Table("layout", title="one step; in brackets: divided by plain JAX", title_justify="left")
    for column in ("microbatches", "CPU seconds", "wall seconds", "temporaries, MB a device", "TFLOP in all", "loss"):
        table.add_column(column, justify="right")
    one = next(row for row in rows if row.name == base)

    def cell(value: float, base: float, form: str) -> str:
        return f"{value:{form}} ({value / base:.2f})" if base else f"{value:{form}}"

    for row in rows:
        table.add_row(
            row.name,
            "-" if row.microbatches is None else str(row.microbatches),
            cell(row.cpu_seconds, one.cpu_seconds, ".2f"),
            cell(row.wall_seconds, one.wall_seconds, ".2f"),
            cell(row.temporaries / 1e6, one.temporaries / 1e6, ".1f"),
            cell(row.flops / 1e12, one.flops / 1e12, ".4f"),
            f"{row.loss:.6f}",
        )
    return table


def mesh_line(sizes: MeshSizes) -> str:
    return "  ".join(f"{axis} {size}" for axis, size in sizes.as_dict().items()) + f"  = {sizes.num_devices} devices"


def device_table(sizes: MeshSizes, devices_per_host: int) -> Table:
    """The mesh coordinates of each device of each host, up to eight devices in a line; of many hosts, the first ones."""
    grid = device_grid(sizes)
    coordinates = np.stack(np.unravel_index(np.argsort(grid, axis=None), grid.shape), axis=-1)
    per_line = min(8, devices_per_host)
    title = f"coordinates ({' '.join(AXES)}) of each device"
    table = Table("host", "devices", *[f"+{i}" for i in range(per_line)], title=title, title_justify="left")
    num_hosts = -(-sizes.num_devices // devices_per_host)
    shown = min(num_hosts, max(1, MAX_DEVICES_SHOWN // devices_per_host))
    for host in range(shown):
        end = min((host + 1) * devices_per_host, sizes.num_devices)
        for first in range(host * devices_per_host, end, per_line):
            cells = [" ".join(map(str, coordinates[d])) for d in range(first, min(first + per_line, end))]
            table.add_row(str(host), f"{first}…{min(first + per_line, end) - 1}", *cells)
    if shown < num_hosts:
        table.add_row("…", f"and {num_hosts - shown:,} more hosts")
    return table


def parameter_table(layouts: Any, mesh_shape: Mapping[str, int]) -> Table:
    """Shape, split and bytes on each device of every parameter."""
    table = Table("parameter", "shape", "dimensions", "split in a step", "split at rest", title_justify="left")
    table.add_column("bytes a device", justify="right")
    table.title = "parameters (bytes: the float32 copy at rest; Adam's moments take twice as much again)"
    layouts = jax.tree.leaves(layouts)
    if frozen := [layout for layout in layouts if not layout.trained]:
        table.title += f"; frozen ones are in {jax.numpy.dtype(frozen[0].dtype)} and have no moments"
    for layout in layouts:
        table.add_row(
            layout.name + " (frozen)" * (not layout.trained),
            " x ".join(map(str, layout.shape)),
            " ".join(dim or "-" for dim in layout.dims),
            _spec(layout.compute_spec),
            _spec(layout.rest_spec),
            f"{layout.bytes_per_device(mesh_shape):,}",
        )
    count = sum(math.prod(layout.shape) for layout in layouts)
    total = sum(layout.bytes_per_device(mesh_shape) for layout in layouts)
    table.add_section()
    trained = sum(math.prod(layout.shape) for layout in layouts if layout.trained)
    some = f", {trained:,} trained" if trained < count else ""
    table.add_row("all", f"{count:,} numbers{some}", "", "", "", f"{total:,}")
    return table


def checkpoint_lines(path: Path, manifest: Mapping[str, Any]) -> list[str]:
    """What the manifest of a checkpoint says."""
    mesh = "  ".join(f"{axis} {size}" for axis, size in manifest["mesh"].items())
    files = [file for file in path.rglob("*") if file.is_file()]
    lines = [
        f"{path}: complete, step {manifest['step']}, written {manifest['written']}",
        f"mesh: {mesh}, {manifest['processes']} processes; any other mesh can read it",
        f"data: {manifest['data']['batch']} global batches of {manifest['data']['global_batch_size']} sequences read",
        f"size: {sum(file.stat().st_size for file in files):,} bytes in {len(files)} files, compressed",
        "versions: " + ", ".join(f"{name} {version}" for name, version in manifest["versions"].items()),
    ]
    if manifest["val_loss"] is not None:
        lines.insert(1, f"validation loss: {manifest['val_loss']:.6f}")
    return lines


def checkpoint_table(manifest: Mapping[str, Any]) -> Table:
    """Every parameter, and one line for each other part of the state."""
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


def _spec(spec: PartitionSpec) -> str:
    def word(entry: Any) -> str:
        return "-" if not entry else entry if isinstance(entry, str) else "+".join(entry)

    return " ".join(word(entry) for entry in spec) or "-"
