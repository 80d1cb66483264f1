"""The commands that compile, time and check the train step (`jaxpar compile | bench | check`), and what all commands share."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from jaxpar.config import Config, ConfigError, load_config

if TYPE_CHECKING:
    from jaxpar.blueprint import UserModel

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/quickstart.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override the file's settings.")]
Arguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="[LAYOUT|KEY=VALUE]...", help="Layouts to compare, such as pp4,dp2; and settings."),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODULE:NAME",
        help="Your own model, such as my_package.my_model:build or my_model.py:MyModel. Default: the built-in decoder.",
    ),
]


def compile_(
    config_path: ConfigPath,
    arguments: Arguments = None,
    model: ModelName = None,
    gpu: Annotated[str, typer.Option(help="a100-40g, a100-80g, h100, h200 or b200.")] = "h100",
    tpu: Annotated[str | None, typer.Option(help="A TPU slice instead, such as v5e:4x4.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Default: cluster.num_nodes.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="Default: cluster.num_gpus_per_node, or 8.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    hlo_file: Annotated[Path | None, typer.Option("--hlo", help="Write the optimized program here.")] = None,
    where: Annotated[int, typer.Option(min=0, help="Show so many of the costliest operations, with source lines.")] = 0,
    verbose: Annotated[bool, typer.Option(help="Show the XLA flags, each with its reason.")] = False,
) -> None:
    """Compile the train step for a cluster that you need not have: what does it need, does it fit? Layouts give a table."""
    from jaxpar.measure.layouts import layout_overrides, split_arguments

    overrides, layouts = split_arguments(arguments or ())
    overrides += [f"cluster.num_nodes={nodes}"] * bool(nodes)
    overrides += [f"cluster.num_gpus_per_node={gpus_per_node}"] * bool(gpus_per_node)
    config = load_config(config_path, overrides)
    _check_compile_options(gpu, tpu, layouts, hlo_file, where)
    from jaxpar.run import xla

    flags = xla.apply_without_gpu(config.cluster.xla_flags, config.cluster.deterministic) if tpu is None else []
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxpar import display
    from jaxpar.measure.compile import compile_step, devices_to_compile_for

    console = console_for_output()
    if verbose:
        console.print("\n".join(flags), highlight=False)
    devices, capacity, kind = devices_to_compile_for(config, gpu, tpu)
    configs = {
        layout: load_config(config_path, [*overrides, *layout_overrides(layout, config, len(devices))])
        for layout in layouts
    } or {"": config}
    if len(configs) > 1:
        print_notes(console, config_notes(config, model))
        reports = {
            layout: compile_step(one, devices, capacity, kind, user_model(model, one))
            for layout, one in configs.items()
        }
        console.print(display.report_table(reports, tpu or gpu))
        for line in display.attention_lines(reports):
            console.print(line, highlight=False)
        figures: Any = {layout: report.to_json() for layout, report in reports.items()}
    else:
        (one,) = configs.values()
        console.print(f"mesh: {display.mesh_line(one.mesh_sizes(len(devices)))}, {tpu or gpu}", highlight=False)
        print_notes(console, config_notes(one, model))
        report = compile_step(one, devices, capacity, kind, user_model(model, one))
        for line in display.report_lines(report):
            console.print(line, highlight=False)
        for table in display.report_tables(report, where):
            console.print(table)
        figures = report.to_json()
        if hlo_file:
            hlo_file.write_text(report.hlo)
    if json_file:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


def check(config_path: ConfigPath, overrides: Overrides = None, model: ModelName = None) -> None:
    """Compare this layout with one device: the loss and every gradient, in float32, on simulated CPU devices.

    A large config is cut down first: at most 16 devices, a short sequence, and for the built-in decoder fewer layers and
    narrower ones. Exit codes: 0: they agree. 1: they differ. 2: a mistake in the config or in the model.
    """
    config = load_config(config_path, overrides or ())
    from jaxpar.run import xla

    xla.apply_without_gpu(config.cluster.xla_flags)
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxpar.measure.check import compare_with_one_device
    from jaxpar.measure.cut import MOST_DEVICES, cut_down
    from jaxpar.run import runtime

    runtime.simulate_devices(MOST_DEVICES)  # before the user's module can ask jax for devices
    import jax

    from jaxpar.blueprint import Blueprint
    from jaxpar.run.user_model import NamedModel

    count = config.num_configured_devices() or config.cluster.num_nodes * runtime.GPUS_PER_NODE
    own = None if model is None else NamedModel(model)
    Blueprint(config, count, own.build(config) if own else None).check()
    own_layers = own is not None and own.takes_config
    small, notes = cut_down(config, count, own_model=own is not None, own_layers=own_layers)
    devices = jax.devices()[: small.num_configured_devices()]
    report = compare_with_one_device(small, devices, own.build(small) if own else None, notes=notes, each_axis=True)
    print("\n".join(report.lines()))
    if not report.passed:
        raise typer.Exit(1)


def _check_compile_options(gpu: str, tpu: str | None, layouts: list[str], hlo_file: Path | None, where: int) -> None:
    from jaxpar.hardware import GPUS

    if tpu is None and gpu not in GPUS:
        raise ConfigError(f"--gpu: {gpu!r} is not known: choose one of {', '.join(GPUS)}")
    if (hlo_file or where) and len(layouts) > 1:
        raise ConfigError(f"--hlo and --where: for one program, but {len(layouts)} layouts are given: give one of them")
    if where and tpu:
        raise ConfigError("--where: times are known for GPUs, not for a TPU slice: leave out --where or --tpu")


def bench(
    config_path: ConfigPath,
    arguments: Arguments = None,
    model: ModelName = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps to time. Default: 20, or 3 of each layout.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Time the train step on the devices of this machine, with random tokens: step time, tokens/s, MFU and memory. With
    layouts, time each of them beside one device and beside plain data-parallel JAX."""
    from jaxpar.measure.layouts import layout_overrides, one_device, split_arguments

    overrides, layouts = split_arguments(arguments or ())
    config = load_config(config_path, overrides)
    from jaxpar.run import xla

    xla.apply(config.cluster.xla_flags)
    import jax

    from jaxpar import display
    from jaxpar.measure.bench import PLAIN, compare, measure
    from jaxpar.run import runtime

    runtime.start(config)
    devices, console, own = runtime.devices(config), console_for_output(), user_model(model, config)
    console.quiet = jax.process_index() > 0
    where = "simulated on the CPU" if jax.default_backend() == "cpu" else devices[0].device_kind
    print_notes(console, config_notes(config, model))
    if layouts:
        if jax.process_count() > 1:
            raise ConfigError(
                "jaxpar bench: layouts are compared in one process, but this is one of several: start a single process"
            )

        def on(settings: list[str]) -> Config:
            return load_config(config_path, [*overrides, *settings])

        configs = {layout: on(layout_overrides(layout, config, len(devices))) for layout in layouts}
        console.print(f"{len(devices)} devices, {where}", highlight=False)
        say = lambda text: print_notes(console, [text])  # noqa: E731
        rows = compare(configs, on(one_device(config)), devices, steps or 3, say, own)
        console.print(display.comparison_table(rows, PLAIN.format(len(devices))))
        figures: Any = [vars(row) for row in rows]
    else:
        console.print(f"mesh: {display.mesh_line(config.mesh_sizes(len(devices)))}, {where}", highlight=False)
        measured = measure(config, devices, steps or 20, own)
        for line in display.measurement_lines(measured):
            console.print(line, highlight=False)
        figures = measured.to_json()
    if json_file and jax.process_index() == 0:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


def user_model(name: str | None, config: Config) -> "UserModel | None":
    """The model that `--model` names. Call it once XLA's settings are in the environment, because it imports jax."""
    if name is None:
        return None
    from jaxpar.run.user_model import NamedModel

    return NamedModel(name).build(config)


def config_notes(config: Config, model: str | None) -> list[str]:
    """What to tell the user once. With a model of their own, nothing about the built-in decoder."""
    return config.notes if model is None else list(config.setting_notes())


def print_notes(console: Console, notes: list[str]) -> None:
    for note in notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def console_for_output() -> Console:
    # A log file or a pipe gets wide lines, so that tables are not folded at 80 columns.
    return Console() if sys.stdout.isatty() else Console(width=200)
