"""`jaxpar train | mesh | schedule`: reads the command line, prints, and turns errors into one line and an exit code."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from jaxpar.config import Config, ConfigError, load_config

if TYPE_CHECKING:
    from jaxpar.trainer import Trainer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Five-axis parallel training of large Transformers with JAX.",
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file's.")
]


@app.command(epilog="Example: jaxpar train configs/quickstart.yaml runner.max_steps=20 actor.optim.lr=1e-3")
def train(
    config_path: ConfigPath,
    overrides: Overrides = None,
    verbose: Annotated[bool, typer.Option(help="Show the XLA and NCCL settings, each with its reason.")] = False,
) -> None:
    """Train a model. Ctrl-C saves; the same command goes on where it was if runner.resume_dir is auto."""
    config = load_config(config_path, overrides or ())
    from jaxpar import xla

    settings = xla.apply(config.cluster.xla_flags)
    if verbose:
        print("\n".join(settings))
    from jaxpar.trainer import Interrupted, Trainer  # after the config is known to be good: jax takes seconds to load

    trainer = Trainer(config)
    _print_head(trainer, config)
    try:
        trainer.fit()
    except Interrupted as stop:
        again = "run the same command to go on" if config.runner.resume_dir else "set runner.resume_dir=auto to go on"
        _error(f"{stop}: {again}")
        raise typer.Exit(128 + stop.signal) from None


@app.command(epilog="Example: jaxpar mesh configs/quickstart.yaml actor.model.context_parallel_size=4")
def mesh(config_path: ConfigPath, overrides: Overrides = None) -> None:
    """Show the mesh, which device holds which coordinate, and every parameter's shape, split and bytes."""
    config = load_config(config_path, overrides or ())
    from jaxpar import xla

    xla.apply(config.cluster.xla_flags)
    from jax.sharding import AbstractMesh

    from jaxpar import display, runtime
    from jaxpar.mesh import cross_host_warning
    from jaxpar.models import Decoder, FunctionalModel
    from jaxpar.sharding import layout_tree

    console = _console()
    count, source = runtime.num_devices_to_show(config)
    sizes = config.mesh_sizes(count)
    per_host = count // config.cluster.num_nodes
    console.print(f"mesh: {display.mesh_line(sizes)}  ({source})", highlight=False)
    console.print(display.device_table(sizes, per_host))
    _notes(console, config.notes + [w for w in [cross_host_warning(sizes, per_host)] if w])
    try:
        architecture = config.architecture()
    except ConfigError as error:
        _notes(console, [f"no parameters are shown: {problem}" for problem in error.problems])
        return
    if architecture is None:
        _notes(console, ["no parameters are shown: actor.model describes no model (model_path or hidden_size, …)"])
        return
    model = FunctionalModel(Decoder(architecture))
    chunks = config.actor.model.virtual_pipeline_model_parallel_size or 1
    abstract = AbstractMesh(tuple(sizes.as_dict().values()), tuple(sizes.as_dict()))
    layouts = layout_tree(
        model.shapes, model.dims, abstract, explicit=True, zero_stage=config.zero_stage, num_chunks=chunks
    )
    console.print(display.parameter_table(layouts, abstract.shape))


@app.command(
    "compile",
    epilog="Example: jaxpar compile configs/quickstart.yaml cluster.num_nodes=2 --gpu h100 --json report.json",
)
def compile_(
    config_path: ConfigPath,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="a100-40g, a100-80g, h100, h200 or b200.")] = "h100",
    tpu: Annotated[str | None, typer.Option(help="A TPU slice instead, such as v5e:4x4.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Default: cluster.num_nodes.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="Default: cluster.num_gpus_per_node, or 8.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    hlo_file: Annotated[Path | None, typer.Option("--hlo", help="Write the optimized program here.")] = None,
    verbose: Annotated[bool, typer.Option(help="Show the XLA flags, each with its reason.")] = False,
) -> None:
    """Compile the train step for a whole cluster without having it; say what it needs and whether it fits."""
    counts = [f"cluster.num_nodes={nodes}"] * bool(nodes) + [f"cluster.num_gpus_per_node={gpus_per_node}"] * bool(
        gpus_per_node
    )
    config = load_config(config_path, [*(overrides or ()), *counts])
    from jaxpar import xla
    from jaxpar.targets import GPUS, TPU_MEMORY

    if tpu is None and gpu not in GPUS:
        raise ConfigError(f"--gpu: {gpu!r} is none of: {', '.join(GPUS)}")
    # There is no GPU to try kernels on.
    flags = xla.apply({"xla_gpu_autotune_level": 0, **config.cluster.xla_flags}) if tpu is None else []
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxpar import display
    from jaxpar.compile import compile_step, gpu_devices, tpu_devices

    console = _console()
    if verbose:
        console.print("\n".join(flags), highlight=False)
    if tpu:
        devices, capacity = tpu_devices(tpu), TPU_MEMORY.get(tpu.partition(":")[0], 0)
    else:
        devices = gpu_devices(gpu, config.cluster.num_nodes, config.cluster.num_gpus_per_node or 8)
        capacity = GPUS[gpu].memory
    console.print(f"mesh: {display.mesh_line(config.mesh_sizes(len(devices)))}, {tpu or gpu}", highlight=False)
    _notes(console, config.notes)
    report = compile_step(config, devices, capacity)
    for line in display.report_lines(report):
        console.print(line, highlight=False)
    console.print(display.collective_table(report))
    if json_file:
        json_file.write_text(json.dumps(report.to_json(), indent=2) + "\n")
    if hlo_file:
        hlo_file.write_text(report.hlo)


@app.command(epilog="Example: jaxpar schedule 1f1b --stages 4 --microbatches 8")
def schedule(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A schedule: gpipe or 1f1b.")],
    stages: Annotated[int, typer.Option(help="Pipeline stages (pipeline_model_parallel_size).")] = 4,
    microbatches: Annotated[int, typer.Option(help="global_batch_size / (micro_batch_size x dp).")] = 8,
) -> None:
    """Draw a pipeline schedule; say its bubble and how many microbatches each stage holds."""
    from jaxpar import display
    from jaxpar.pipeline.schedule import build_schedule

    console = _console()
    table = build_schedule(name, stages, microbatches)
    for line in display.schedule_lines(table, console.width):
        console.print(line, no_wrap=True, crop=False, overflow="ignore")
    for text in display.schedule_summary(table):
        console.print(text, highlight=False)


def main() -> None:
    """Entry point: a user's mistake is an error on standard error and exit code 2, never a traceback."""
    # jaxlib's own notices (topology, unused flags) would tear the progress bar.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from jaxpar.pipeline.schedule import ScheduleError

    try:
        app()
    except ConfigError as error:
        for problem in error.problems:
            _error(problem)
        sys.exit(2)
    except ScheduleError as error:
        _error(str(error))
        sys.exit(2)


def _print_head(trainer: "Trainer", config: Config) -> None:
    import jax

    from jaxpar import display

    if jax.process_index():
        return
    console = _console()
    kind = jax.devices()[0].device_kind
    where = "simulated on the CPU" if jax.default_backend() == "cpu" else kind
    program, schedule = trainer.program, trainer.program.schedule
    sizes = config.mesh_sizes(program.mesh.size)
    console.print(f"mesh: {display.mesh_line(sizes)}, {where}", highlight=False)
    bubble = f", bubble {schedule.bubble_fraction():.1%}" if sizes.pp > 1 else ""
    most = "up to " if config.runner.enable_dynamic_batch_size else ""
    console.print(
        f"model: {program.num_params:,} parameters in {config.actor.model.precision}; "
        f"{most}{schedule.num_microbatches} microbatches a step, schedule {schedule.name}{bubble}",
        highlight=False,
    )
    _notes(console, config.notes + trainer.warnings)


def _notes(console: Console, notes: list[str]) -> None:
    for note in notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def _console() -> Console:
    # Not a terminal (a log file, a pipe): wide, so that tables are not folded at 80 columns.
    return Console() if sys.stdout.isatty() else Console(width=200)


def _error(text: str) -> None:
    print(f"error: {text}", file=sys.stderr)
