"""The command line: `jaxpar train | mesh | compile | bench | schedule | checkpoint`. Every error is one line and an exit code."""

import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from jaxpar.config import Config, ConfigError, load_config
from jaxpar.pipeline.schedule import SCHEDULES, ScheduleError, build_schedule

if TYPE_CHECKING:
    from jaxpar.trainer import Trainer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Five-axis parallel training of large Transformers with JAX.",
)

checkpoint_app = typer.Typer(no_args_is_help=True, help="Look at checkpoints.")
app.add_typer(checkpoint_app, name="checkpoint")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/quickstart.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override the file's settings.")]
Arguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="[LAYOUT|KEY=VALUE]...", help="Layouts to compare, such as pp4,dp2; and settings."),
]


@app.command(epilog="Example: jaxpar train configs/quickstart.yaml runner.max_steps=20 actor.optim.lr=1e-3")
def train(
    config_path: ConfigPath,
    overrides: Overrides = None,
    profile: Annotated[str | None, typer.Option(metavar="STEP:COUNT", help="Trace COUNT steps from STEP on.")] = None,
    verbose: Annotated[bool, typer.Option(help="Show the XLA and NCCL settings and the reason for each.")] = False,
) -> None:
    """Train a model. Ctrl-C saves and stops; with runner.resume_dir: auto, the same command continues from there.

    Exit codes: 2: a mistake in the config, or a checkpoint cannot be written or read. 3: the run has gone wrong (losses or
    gradients are not finite, or replicas differ). 75: a process died or hangs; start it again. 128 + a signal's number:
    stopped by that signal, and saved.
    """
    config = load_config(config_path, overrides or ())
    from jaxpar.run import xla

    settings = xla.apply(config.cluster.xla_flags, config.cluster.deterministic)
    if verbose:
        print("\n".join(settings))
    # jax takes seconds to load, so a mistake in the config is reported before that.
    from jaxpar.run.profile import Steps
    from jaxpar.trainer import Interrupted, NonFiniteError, ReplicaError, Trainer

    steps = Steps.parse(profile) if profile is not None else None
    trainer = Trainer(config)
    _print_head(trainer, config)
    try:
        trainer.fit(steps)
    except Interrupted as stop:
        how = "run the same command" if config.runner.resume_dir else "set runner.resume_dir=auto"
        _error(f"{stop}: {how} to continue")
        raise typer.Exit(128 + stop.signal) from None
    except (NonFiniteError, ReplicaError) as error:
        _error(str(error))
        raise typer.Exit(3) from None


@app.command(epilog="Example: jaxpar mesh configs/quickstart.yaml actor.model.context_parallel_size=4")
def mesh(config_path: ConfigPath, overrides: Overrides = None) -> None:
    """Show the mesh, which device holds which coordinate, and every parameter's shape, split and bytes."""
    config = load_config(config_path, overrides or ())
    from jaxpar.run import xla

    xla.apply(config.cluster.xla_flags, config.cluster.deterministic)
    from jaxpar import display
    from jaxpar.blueprint import Blueprint
    from jaxpar.pipeline.drawing import placement_line
    from jaxpar.run import runtime

    console = _console()
    count, source = runtime.num_devices_to_show(config)
    blueprint = Blueprint(config, count)
    console.print(f"mesh: {display.mesh_line(blueprint.sizes)}  ({source})", highlight=False)
    console.print(display.device_table(blueprint.sizes, count // config.cluster.num_nodes))
    _notes(console, config.notes + blueprint.warnings)
    try:
        _ = blueprint.model
    except ConfigError as error:
        _notes(console, [f"no parameters are shown: {problem}" for problem in error.problems])
        return
    console.print(display.parameter_table(blueprint.param_layouts, blueprint.mesh_shape.shape))
    if blueprint.placement.is_padded:
        console.print(placement_line(blueprint.placement), highlight=False)


@app.command(
    "compile",
    epilog="Example: jaxpar compile configs/quickstart.yaml cluster.num_nodes=2 --gpu h100 --json report.json",
)
def compile_(
    config_path: ConfigPath,
    arguments: Arguments = None,
    gpu: Annotated[str, typer.Option(help="a100-40g, a100-80g, h100, h200 or b200.")] = "h100",
    tpu: Annotated[str | None, typer.Option(help="A TPU slice instead, such as v5e:4x4.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Default: cluster.num_nodes.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="Default: cluster.num_gpus_per_node, or 8.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    hlo_file: Annotated[Path | None, typer.Option("--hlo", help="Write the optimized program here.")] = None,
    where: Annotated[int, typer.Option(min=0, help="Show so many of the costliest operations, with source lines.")] = 0,
    verbose: Annotated[bool, typer.Option(help="Show the XLA flags, each with its reason.")] = False,
) -> None:
    """Compile the train step for a cluster that you need not have; say what it needs and whether it fits. Several layouts
    give a table."""
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

    console = _console()
    if verbose:
        console.print("\n".join(flags), highlight=False)
    devices, capacity, kind = devices_to_compile_for(config, gpu, tpu)
    configs = {
        layout: load_config(config_path, [*overrides, *layout_overrides(layout, config, len(devices))])
        for layout in layouts
    } or {"": config}
    if len(configs) > 1:
        _notes(console, config.notes)
        reports = {layout: compile_step(one, devices, capacity, kind) for layout, one in configs.items()}
        console.print(display.report_table(reports, tpu or gpu))
        for line in display.attention_lines(reports):
            console.print(line, highlight=False)
        figures: Any = {layout: report.to_json() for layout, report in reports.items()}
    else:
        (one,) = configs.values()
        console.print(f"mesh: {display.mesh_line(one.mesh_sizes(len(devices)))}, {tpu or gpu}", highlight=False)
        _notes(console, one.notes)
        report = compile_step(one, devices, capacity, kind)
        for line in display.report_lines(report):
            console.print(line, highlight=False)
        for table in display.report_tables(report, where):
            console.print(table)
        figures = report.to_json()
        if hlo_file:
            hlo_file.write_text(report.hlo)
    if json_file:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


def _check_compile_options(gpu: str, tpu: str | None, layouts: list[str], hlo_file: Path | None, where: int) -> None:
    from jaxpar.hardware import GPUS

    if tpu is None and gpu not in GPUS:
        raise ConfigError(f"--gpu: {gpu!r} is not known: choose one of {', '.join(GPUS)}")
    if (hlo_file or where) and len(layouts) > 1:
        raise ConfigError(f"--hlo and --where: for one program, but {len(layouts)} layouts are given: give one of them")
    if where and tpu:
        raise ConfigError("--where: times are known for GPUs, not for a TPU slice: leave out --where or --tpu")


@app.command(
    epilog="Example: jaxpar bench configs/bench_small.yaml dp8 tp2,dp4 pp4,dp2,schedule=1f1b,microbatches=8",
)
def bench(
    config_path: ConfigPath,
    arguments: Arguments = None,
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
    devices, console = runtime.devices(config), _console()
    console.quiet = jax.process_index() > 0
    where = "simulated on the CPU" if jax.default_backend() == "cpu" else devices[0].device_kind
    _notes(console, config.notes)
    if layouts:
        if jax.process_count() > 1:
            raise ConfigError(
                "jaxpar bench: layouts are compared in one process, but this is one of several: start a single process"
            )

        def on(settings: list[str]) -> Config:
            return load_config(config_path, [*overrides, *settings])

        configs = {layout: on(layout_overrides(layout, config, len(devices))) for layout in layouts}
        console.print(f"{len(devices)} devices, {where}", highlight=False)
        rows = compare(configs, on(one_device(config)), devices, steps or 3, lambda text: _notes(console, [text]))
        console.print(display.comparison_table(rows, PLAIN.format(len(devices))))
        figures: Any = [vars(row) for row in rows]
    else:
        console.print(f"mesh: {display.mesh_line(config.mesh_sizes(len(devices)))}, {where}", highlight=False)
        measured = measure(config, devices, steps or 20)
        for line in display.measurement_lines(measured):
            console.print(line, highlight=False)
        figures = measured.to_json()
    if json_file and jax.process_index() == 0:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


@app.command(epilog="Example: jaxpar schedule zb1p --stages 4 --microbatches 8 --chunks 2 --svg zb1p.svg")
def schedule(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"{', '.join(SCHEDULES)}.")],
    stages: Annotated[int, typer.Option(help="P, pipeline_model_parallel_size.")] = 4,
    microbatches: Annotated[int, typer.Option(help="M, global_batch_size / (micro_batch_size x dp).")] = 8,
    chunks: Annotated[int, typer.Option(help="V, virtual_pipeline_model_parallel_size.")] = 1,
    forward_cost: Annotated[
        float, typer.Option(help="Time of F, the forward pass of a microbatch on a stage, in any unit.")
    ] = 1.0,
    backward_cost: Annotated[float, typer.Option(help="Time of B, the gradient of the activations.")] = 1.0,
    weight_cost: Annotated[float, typer.Option(help="Time of W, the gradient of the weights.")] = 1.0,
    layers: Annotated[int | None, typer.Option(help="num_hidden_layers, to show which stage holds how many.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Write a picture here.")] = None,
) -> None:
    """Draw a pipeline schedule, with its bubble, memory and messages, and the figures that papers publish for them."""
    from jaxpar.parallel.placement import LayerPlacement
    from jaxpar.pipeline import drawing

    table = build_schedule(name, stages, microbatches, chunks)
    costs = (forward_cost, backward_cost, weight_cost)
    if not (all(0 <= cost < math.inf for cost in costs) and sum(costs) > 0):
        raise ConfigError(
            f"--forward-cost {costs[0]:g}, --backward-cost {costs[1]:g}, --weight-cost {costs[2]:g}: choose "
            "numbers of at least 0, not all of them 0"
        )
    if layers is not None and layers < stages * chunks:
        raise ConfigError(
            f"--layers: {layers} layers are too few for {stages} stages x {chunks} chunks = {stages * chunks} parts of the "
            "pipeline: lower a size so that each part has a layer"
        )
    console = _console()
    for line in drawing.terminal_lines(table, console.width):
        console.print(line, no_wrap=True, crop=False, overflow="ignore")
    for text in drawing.summary_lines(table, costs):
        console.print(text, highlight=False, markup=False)
    if layers is not None:
        console.print(drawing.placement_line(LayerPlacement(layers, stages, chunks)), highlight=False)
    if svg:
        try:
            svg.write_text(drawing.svg(table, costs))
        except OSError as error:
            raise ConfigError(f"--svg {svg}: cannot be written: {error.strerror}") from None


@checkpoint_app.command(epilog="Example: jaxpar checkpoint inspect results/quickstart/checkpoints/global_step_200")
def inspect(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="A checkpoint, or a folder of checkpoints, of which the newest is shown."),
    ],
    verify: Annotated[bool, typer.Option(help="Read all files and check their checksums.")] = False,
) -> None:
    """Show what a checkpoint holds: step, mesh, parameters, sizes, and whether it is complete."""
    from jaxpar import display
    from jaxpar.checkpoint.manifest import damages, read_manifest, resolve, why_torn

    console, found = _console(), resolve(path)
    if reason := why_torn(found):
        raise ConfigError(f"{found} is torn: {reason}: choose another checkpoint")
    for line in display.checkpoint_lines(found, read_manifest(found)):
        console.print(line, highlight=False)
    console.print(display.checkpoint_table(read_manifest(found)))
    if verify:
        if problems := list(damages(found, 0, 1)):
            raise ConfigError(problems)
        console.print("all checksums match")


def main() -> None:
    """Entry point. A user's mistake is a line on standard error and exit code 2, never a traceback."""
    # jaxlib's own notices (topology, unused flags) would break the progress bar.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Orbax logs what it then raises, with a traceback. We report it once, in words.
    for name in ("absl", "asyncio"):  # the latter speaks of tasks that Orbax gave up after the first failure
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisable
    try:
        app()
    except ConfigError as error:
        for problem in error.problems:
            _error(problem)
        sys.exit(2)
    except ScheduleError as error:
        _error(str(error))
        sys.exit(2)
    except OSError as error:
        _error(f"{error.filename or 'a file'}: {error.strerror or error}: check space, permissions and the path")
        sys.exit(2)


def _unraisable(what: Any) -> None:
    # After a failed write, each of TensorStore's futures says so.
    if str(what.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(what)


def _print_head(trainer: "Trainer", config: Config) -> None:
    import jax

    from jaxpar import display

    if jax.process_index() == 0:
        console = _console()
        for line in display.training_lines(trainer.program, config):
            console.print(line, highlight=False)
        _notes(console, config.notes + trainer.warnings)


def _notes(console: Console, notes: list[str]) -> None:
    for note in notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def _console() -> Console:
    # A log file or a pipe gets wide lines, so that tables are not folded at 80 columns.
    return Console() if sys.stdout.isatty() else Console(width=200)


def _error(text: str) -> None:
    print(f"error: {text}", file=sys.stderr)
