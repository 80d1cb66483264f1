"""The command line: `jaxpar train | mesh | compile | bench | check | schedule | checkpoint`. Every error is one line and an
exit code."""

import logging
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxpar import cli_measure
from jaxpar.cli_measure import (
    ConfigPath,
    ModelName,
    Overrides,
    config_notes,
    console_for_output,
    print_notes,
    user_model,
)
from jaxpar.config import ConfigError, load_config
from jaxpar.pipeline.schedule import SCHEDULES, ScheduleError, build_schedule
from jaxpar.run.terminal import steady_output

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


@app.command(epilog="Example: jaxpar train configs/quickstart.yaml runner.max_steps=20 actor.optim.lr=1e-3")
def train(
    config_path: ConfigPath,
    overrides: Overrides = None,
    model: ModelName = None,
    profile: Annotated[str | None, typer.Option(metavar="STEP:COUNT", help="Trace COUNT steps from STEP on.")] = None,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Take the experiment's folder from a run that has it; that run ends.")
    ] = False,
    elastic: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="MIN_NODES", help="Go on with fewer nodes, if at least so many are there: dp follows them."
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option(help="Show the XLA and NCCL settings and the reason for each.")] = False,
) -> None:
    """Train a model. Ctrl-C saves and stops; with runner.resume_dir: auto, the same command continues from there.

    Exit codes: 2: a mistake in the config, or a checkpoint cannot be written or read. 3: the run has gone wrong (losses or
    gradients are not finite, or replicas differ). 75: a process died or hangs, or too few nodes are there; start it again.
    128 + a signal's number: stopped by that signal, and saved.
    """
    config = load_config(config_path, overrides or ())
    from jaxpar.run import xla

    settings = xla.apply(config.cluster.xla_flags, config.cluster.deterministic)
    if verbose:
        print("\n".join(settings))
    # jax takes seconds to load, so a mistake in the config is reported before that.
    from jaxpar.run import runtime
    from jaxpar.run.member import NotEnough
    from jaxpar.run.profile import Steps
    from jaxpar.run.rendezvous import NotNeeded
    from jaxpar.run.watchdog import EXIT_CODE, Watchdog
    from jaxpar.trainer import Interrupted, NonFiniteError, ReplicaError, Trainer

    steps = Steps.parse(profile) if profile is not None else None
    notes = []
    if elastic is not None:
        try:
            config, note = runtime.start_elastic(config, elastic)
        except NotEnough as error:
            _error(f"{error}: start it again when they are there")
            raise typer.Exit(EXIT_CODE) from None
        except NotNeeded:
            print("elastic: this node was not needed; the run has ended")
            raise typer.Exit from None
        notes = [note]
    built = None
    if model is not None:  # its module may ask jax for devices, which is too early before this
        runtime.start(config)
        with Watchdog(config.runner.stall_timeout) as watchdog:  # a mistake in it on one process ends all
            watchdog.enter(0, "importing the model")
            built = user_model(model, config)
    trainer = Trainer(config, built)
    _print_head(trainer, notes + config_notes(config, model) + trainer.warnings)
    try:
        trainer.fit(profile=steps, take_over=take_over)
    except Interrupted as stop:
        how = "run the same command" if config.runner.resume_dir == "auto" else "set runner.resume_dir=auto"
        _error(f"{stop}: {how} to continue")
        raise typer.Exit(128 + stop.signal) from None
    except (NonFiniteError, ReplicaError) as error:
        _error(str(error))
        raise typer.Exit(3) from None


@app.command(epilog="Example: jaxpar mesh configs/quickstart.yaml actor.model.context_parallel_size=4")
def mesh(config_path: ConfigPath, overrides: Overrides = None, model: ModelName = None) -> None:
    """Show the mesh, which device holds which coordinate, and every parameter's shape, split and bytes."""
    config = load_config(config_path, overrides or ())
    from jaxpar.run import xla

    xla.apply(config.cluster.xla_flags, config.cluster.deterministic)
    from jaxpar import display
    from jaxpar.blueprint import Blueprint
    from jaxpar.config.checks import schedule_problems
    from jaxpar.pipeline.drawing import placement_line
    from jaxpar.run import runtime

    console = console_for_output()
    count, source = runtime.num_devices_to_show(config)
    blueprint = Blueprint(config, count, user_model(model, config))
    console.print(f"mesh: {display.mesh_line(blueprint.sizes)}  ({source})", highlight=False)
    console.print(display.device_table(blueprint.sizes, count // config.cluster.num_nodes))
    print_notes(console, config_notes(config, model) + blueprint.warnings)
    try:
        _ = blueprint.model
    except ConfigError as error:
        print_notes(console, [f"no parameters are shown: {problem}" for problem in error.problems])
        return
    console.print(display.parameter_table(blueprint.param_layouts, blueprint.mesh_shape.shape))
    if problems := list(schedule_problems(config.actor.model, blueprint.model.num_layers)):
        print_notes(console, [f"the layers are on no stages yet: {problem}" for problem in problems])
    elif blueprint.placement.is_padded:
        console.print(placement_line(blueprint.placement), highlight=False)


app.command(
    "compile",
    epilog="Example: jaxpar compile configs/quickstart.yaml cluster.num_nodes=2 --gpu h100 --json report.json",
)(cli_measure.compile_)
app.command(
    epilog="Example: jaxpar bench configs/bench_small.yaml dp8 tp2,dp4 pp4,dp2,schedule=1f1b,microbatches=8",
)(cli_measure.bench)
app.command(epilog="Example: jaxpar check configs/quickstart.yaml --model my_package.my_model:build")(cli_measure.check)


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
    console = console_for_output()
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

    console, found = console_for_output(), resolve(path)
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
    with steady_output():
        _run()


def _run() -> None:
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # a full disk shows now
    except ConfigError as error:
        for problem in error.problems:
            _error(problem)
        _leave(2)
    except ScheduleError as error:
        _error(str(error))
        sys.exit(2)
    except OSError as error:
        _error(f"{error.filename or 'a file'}: {error.strerror or error}: check space, permissions and the path")
        sys.exit(2)


def _leave(code: int) -> None:
    if "jax" in sys.modules:  # it takes seconds to load
        from jaxpar.run.watchdog import leave

        leave(code)
    sys.exit(code)


def _unraisable(what: Any) -> None:
    # After a failed write, each of TensorStore's futures says so.
    if str(what.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(what)


def _print_head(trainer: "Trainer", notes: list[str]) -> None:
    import jax

    from jaxpar import display

    if jax.process_index() == 0:
        console = console_for_output()
        for line in display.training_lines(trainer.program, trainer.config):
            console.print(line, highlight=False)
        print_notes(console, notes)


def _error(text: str) -> None:
    print(f"error: {text}", file=sys.stderr)
