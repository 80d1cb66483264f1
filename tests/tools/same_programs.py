"""Proves that a refactor changes nothing that is computed: compares the same programs, compiled in two checkouts.

    git worktree add /tmp/before main
    python tests/tools/same_programs.py /tmp/before .

One process per checkout compiles every program of the list below. The optimized HLO of both must be the same, line by
line, after metadata is removed and names are renumbered (because names in XLA contain those of Python functions). A
difference is reported with the program, the first instruction that differs, and the source line that it comes from.
Exit code 0: all are the same; 1: some differ.

Compiled programs are kept (in --cache, keyed by the contents of the checkout), so that the "before" checkout is
compiled only once. `--only WORD` selects the programs whose name contains the word.

A checkout needs these names: `jaxpar.load_config`, `jaxpar.program.Program(config, devices, model)` with `mesh`,
`state_shapes`, `state_shardings`, `train_step`, `loss_and_grads`, `evaluate`, `init`, and the command `jaxpar compile`.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
NUM_DEVICES = 16
# LLVM optimizes after the stage that is compared, so its optimization is not needed.
QUICK = {"xla_backend_optimization_level": 0}


@dataclass(frozen=True)
class Spec:
    """One program: quickstart.yaml with these settings on `devices` simulated devices.

    Attributes:
      function: the member of `Program` to compile.
      model: the name of a class in tests/user_models.py; None means the built-in decoder.
    """

    settings: tuple[str, ...] = ()
    devices: int = 1
    function: str = "train_step"
    model: str | None = None
    config: str = "quickstart.yaml"


# A smaller decoder than the quickstart's; everything on one device unless a program says otherwise.
SMALL = (
    "runner.seq_length=64",
    "runner.max_steps=20",
    "actor.micro_batch_size=1",
    "actor.global_batch_size=16",
    "actor.model.hidden_size=64",
    "actor.model.intermediate_size=96",
    "actor.model.num_attention_heads=8",
    "actor.model.num_key_value_heads=4",
)
KEYS = {
    "tensor": "actor.model.tensor_model_parallel_size",
    "sp": "actor.model.sequence_parallel",
    "pp": "actor.model.pipeline_model_parallel_size",
    "cp": "actor.model.context_parallel_size",
    "schedule": "actor.model.pipeline_schedule",
    "chunks": "actor.model.virtual_pipeline_model_parallel_size",
    "layers": "actor.model.num_hidden_layers",
    "zero": "actor.optim.zero_stage",
    "gather": "actor.optim.overlap_param_gather",
    "reduce": "actor.optim.overlap_grad_reduce",
    "comm": "actor.model.cp_comm_type",
    "groups": "actor.model.hierarchical_context_parallel_sizes",
    "window": "actor.model.sliding_window",
    "recompute": "actor.model.recompute_granularity",
    "method": "actor.model.recompute_method",
    "recompute_layers": "actor.model.recompute_num_layers",
    "precision": "actor.model.precision",
    "family": "actor.model.model_type",
}


def small(devices: int, *more: str, function: str = "train_step", model: str | None = None, **settings: Any) -> Spec:
    """A program of the small decoder. `settings` use the short names in KEYS."""
    chosen = {"tensor": 1, "sp": False, "pp": 1, "cp": 1} | settings
    lines = (*SMALL, *(f"{KEYS[name]}={value}" for name, value in chosen.items()), *more)
    return Spec(lines, devices, function, model)


def programs() -> dict[str, Spec]:
    """The programs for simulated devices, by name."""
    found = {
        "quickstart on 16 devices": Spec(devices=16),
        "quickstart on 1 device": Spec(
            tuple(f"{KEYS[name]}={value}" for name, value in {"tensor": 1, "sp": False, "pp": 1, "cp": 1}.items())
        ),
    }
    for schedule in ("gpipe", "1f1b", "eager_1f1b", "zb1p"):
        found[f"schedule {schedule}"] = small(4, pp=4, schedule=schedule)
        found[f"schedule {schedule}, uneven layers"] = small(4, pp=2, tensor=2, layers=5, schedule=schedule)
    for schedule in ("gpipe", "interleaved_1f1b", "zb1p"):
        found[f"schedule {schedule}, 2 chunks"] = small(4, pp=2, schedule=schedule, chunks=2)
    found["schedule interleaved_1f1b, 2 chunks, uneven layers"] = small(
        8, pp=2, tensor=2, sp=True, cp=2, layers=5, schedule="interleaved_1f1b", chunks=2
    )
    for stage in range(4):
        found[f"zero {stage}"] = small(4, zero=stage, **({} if stage else {"cp": 2}))
    for stage in (2, 3):
        found[f"zero {stage}, overlap off"] = small(4, zero=stage, gather=False, reduce=False)
        found[f"zero {stage}, all five axes"] = small(16, zero=stage, tensor=2, sp=True, pp=2, cp=2)
        found[f"zero {stage}, zb1p"] = small(4, zero=stage, pp=2, schedule="zb1p")
    for kind in ("p2p", "all_gather", "a2a", "a2a+p2p"):
        groups = {"groups": "[2,2]"} if kind == "a2a+p2p" else {}
        found[f"cp {kind}"] = small(4, cp=4, comm=kind, **groups)
        found[f"cp {kind}, window"] = small(4, cp=4, comm=kind, window=11, family="mistral", **groups)
    found["tensor group"] = small(4, tensor=4)
    found["tensor group, repeated kv heads"] = small(8, tensor=8, sp=True)
    found["window, tied embeddings"] = small(
        2, "actor.model.tie_word_embeddings=true", window=11, family="mistral", pp=2
    )
    found["qwen2"] = small(2, family="qwen2", tensor=2)
    found["qwen3"] = small(2, family="qwen3", tensor=2, sp=True)
    dynamic = ("runner.enable_dynamic_batch_size=true", "runner.max_tokens_per_mbs=64")
    found["dynamic batches"] = small(4, *dynamic, cp=2)
    found["recompute selective"] = small(2, recompute="selective", cp=2)
    found["recompute uniform 1"] = small(1, recompute="full", method="uniform", recompute_layers=1)
    found["recompute uniform 3"] = small(1, recompute="full", method="uniform", recompute_layers=3)
    found["recompute block 1"] = small(2, recompute="full", method="block", recompute_layers=1, pp=2)
    found["recompute uniform, zb1p"] = small(
        2, recompute="full", method="uniform", recompute_layers=1, pp=2, schedule="zb1p"
    )
    found["offload activations"] = small(2, "actor.model.offload_activations=true", pp=2)
    found["offload the optimizer"] = small(2, "actor.optim.optimizer_cpu_offload=true")
    found["bf16"] = small(4, precision="bf16", tensor=2, sp=True)
    found["bf16 gradients"] = small(4, "actor.optim.grad_reduce_dtype=bf16", precision="bf16", zero=2)
    found["fp16, dynamic scale"] = small(2, precision="fp16", pp=2)
    found["fp16, static scale"] = small(2, "actor.optim.loss_scale=1024", precision="fp16")
    axes = {"pp": 2, "tensor": 2, "cp": 2}
    found["user's model"] = small(16, model="GPT", sp=True, **axes)
    found["user's model, zero 3"] = small(8, model="GPT", zero=3, tensor=2, cp=2)
    found["user's model, zb1p"] = small(4, model="GPT", pp=2, tensor=2, schedule="zb1p")
    found["user's model in Linen"] = small(8, model="LinenGPT", **axes)
    found["user's whole model"] = small(8, model="NoStack", tensor=2, cp=2)
    for function in ("evaluate", "loss_and_grads", "init"):
        found[f"{function}"] = small(16, function=function, sp=True, **axes)
        found[f"{function}, user's model"] = small(8, function=function, model="GPT", **axes)
    found["evaluate, zero 3"] = small(8, function="evaluate", zero=3, pp=2, cp=2)
    found["evaluate, 2 chunks"] = small(4, function="evaluate", pp=2, schedule="interleaved_1f1b", chunks=2)
    return found


# Compiled for H100s by `jaxpar compile`, with XLA's GPU compiler.
CLUSTERS = {
    "h100 llama3_8b_1node_8k": ("llama3_8b_1node_8k.yaml",),
    "h100 llama3_8b_1node_8k, zero 3": (
        "llama3_8b_1node_8k.yaml", "dp8,zero=3",
    ),
    "h100 llama3_8b_1node_128k": ("llama3_8b_1node_128k.yaml",),
    "h100 llama3_70b_16nodes_8k": ("llama3_70b_16nodes_8k.yaml",),
}  # fmt: skip


# --- compile: in one process per checkout ---------------------------------------------------------------------------


def write_programs(checkout: Path, folder: Path, only: str) -> None:
    """Compiles the programs with the jaxpar of `checkout` and writes them to `folder`."""
    import jax

    import jaxpar

    assert Path(jaxpar.__file__).is_relative_to(checkout), f"{jaxpar.__file__} is not in {checkout}"
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    sys.path.insert(0, str(HERE.parents[1]))
    for name, spec in programs().items():
        file = _file(folder, name)
        if only in name and not file.exists():
            start = time.perf_counter()
            file.write_text(compile_program(checkout, spec))
            print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)


def compile_program(checkout: Path, spec: Spec) -> str:
    """The optimized program, as XLA prints it."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    import jaxpar
    from jaxpar.program import Program

    settings = [*spec.settings, f"cluster.num_gpus_per_node={spec.devices}"]
    config = jaxpar.load_config(checkout / "configs" / spec.config, settings)
    model: Any = None
    if spec.model is not None:
        import user_models

        cls = getattr(user_models, spec.model)
        model = cls if spec.model == "NoStack" else cls()
    program = Program(config, jax.devices()[: spec.devices], model)

    def shapes(tree: Any, shardings: Any) -> Any:
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    state = shapes(program.state_shapes, program.state_shardings)
    rows = config.actor.global_batch_size
    if config.runner.enable_dynamic_batch_size:
        rows = 3 * program.mesh.shape["dp"]  # a number of microbatches that no default gives
    placed = NamedSharding(program.mesh, P("dp", "cp"))
    batch = {
        key: jax.ShapeDtypeStruct((rows, config.row_length), dtype, sharding=placed)
        for key, dtype in {
            "tokens": jnp.int32, "targets": jnp.int32, "loss_mask": jnp.float32, "segment_ids": jnp.int32,
            "positions": jnp.int32,
        }.items()
    }  # fmt: skip
    arguments: tuple[Any, ...] = (None,) if spec.function == "init" else (state["params"], batch)
    if spec.function == "train_step":
        arguments = (state, batch)
    lowered = getattr(program, spec.function).lower(*arguments)
    return lowered.compile(compiler_options=QUICK).as_text()


# --- compare --------------------------------------------------------------------------------------------------------

_QUOTED = r'"(?:[^"\\]|\\.)*"'
_METADATA = re.compile(rf', metadata=\{{(?:[^{{}}"]|{_QUOTED}|\{{[^{{}}]*\}})*\}}')
_OP_NAME = re.compile(rf"op_name=({_QUOTED})")
_NAME = re.compile(r"%[\w.\-<>~]+")
# The code of a Pallas kernel is MLIR bytecode that contains source lines. It is left out, so that only the call of such
# a kernel is compared.
_KERNEL_CODE = re.compile(rf"\bir = {_QUOTED}")
_COMPUTATION = re.compile(r"^(ENTRY )?%\S+ .*\{$")
_PARAMETER = re.compile(r"(?<=[( ])([\w.\-<>~]+)(?=: )")  # in the first line of a computation, where names have no %


@dataclass
class Text:
    """The lines of a program, and the metadata of each line."""

    lines: list[str] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)


def normalized(text: str) -> Text:
    """A program without the parts that may differ between two checkouts that compute the same."""
    result, numbers = Text(), dict[str, str]()

    def renamed(found: re.Match[str]) -> str:
        return numbers.setdefault(found[0], f"%{len(numbers)}")

    started = False
    for line in text.splitlines():
        if line.startswith("HloModule"):
            # XLA's fingerprint depends on names and metadata too.
            line = re.sub(r'^HloModule [^,]+|fingerprint_before_lhs="\w*"', "", line)
        elif not started and not _COMPUTATION.match(line):
            continue  # tables of files, functions and stack frames
        else:
            started = True
        metadata = " ".join(_METADATA.findall(line))
        origin = _OP_NAME.search(metadata)
        line = _KERNEL_CODE.sub("", _METADATA.sub("", line))
        if _COMPUTATION.match(line):
            line = _PARAMETER.sub(r"%\1", line)
        result.lines.append(_NAME.sub(renamed, line))
        result.origins.append(origin[1] if origin else "")
    return result


def difference(before: str, after: str) -> str | None:
    """The first place where two programs differ, or None."""
    a, b = normalized(before), normalized(after)
    if a.lines == b.lines:
        return None
    at = next(
        (i for i, (x, y) in enumerate(zip(a.lines, b.lines, strict=False)) if x != y), min(len(a.lines), len(b.lines))
    )

    def shown(text: Text) -> str:
        if at >= len(text.lines):
            return "the program has ended"
        origin = next((o for o in reversed(text.origins[: at + 1]) if o), "")
        return f"{_around(a.lines, b.lines, at, text.lines)}\n      from {origin or 'an unknown line'}"

    lengths = f"{len(a.lines)} and {len(b.lines)} lines"
    return f"{lengths}; the first difference is in line {at + 1}:\n    - {shown(a)}\n    + {shown(b)}"


def _around(a: list[str], b: list[str], at: int, lines: list[str], width: int = 160) -> str:
    """The line that differs, cut to the part around the difference."""
    x, y = (one[at] if at < len(one) else "" for one in (a, b))
    column = next((i for i, (p, q) in enumerate(zip(x, y, strict=False)) if p != q), 0)
    start = max(0, column - width // 2)
    line = lines[at].strip() if start == 0 else "…" + lines[at][start:]
    return line[:width]


def compare(before: Path, after: Path, names: list[str]) -> Iterator[tuple[str, str | None]]:
    """Yields (name, difference or None) for each program."""
    for name in names:
        yield name, difference(*(_file(folder, name).read_text() for folder in (before, after)))


def _file(folder: Path, name: str) -> Path:
    """The file of a program. Its name depends on the specification too, so a changed program gets a new file."""
    specification = repr(programs().get(name) or CLUSTERS[name])
    word = re.sub(r"[^a-z0-9]+", "_", name.lower())
    return folder / f"{word}-{hashlib.sha256(specification.encode()).hexdigest()[:8]}.hlo"


def compiled_folder(checkout: Path, cache: Path, only: str, clusters: bool) -> Path:
    """Returns the folder with the programs of a checkout, after compiling the missing ones."""
    folder = cache / _identity(checkout)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{checkout}: programs in {folder}", flush=True)
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "JAX_PLATFORMS": "cpu",
        "PJRT_NPROC": str(4 * NUM_DEVICES),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    worker = [sys.executable, str(HERE), "--write", str(checkout), str(folder), "--only", only]
    subprocess.run(worker, env=environment, check=True, cwd="/")
    for name, arguments in CLUSTERS.items() if clusters else ():
        file = _file(folder, name)
        if only in name and not file.exists():
            config, *more = arguments
            command = ["compile", str(checkout / "configs" / config), *more, "--hlo", str(file)]
            start = time.perf_counter()
            code = "from jaxpar.cli import main; main()"
            subprocess.run(
                [sys.executable, "-c", code, *command], env=environment, check=True, cwd="/", stdout=subprocess.DEVNULL
            )
            print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
    return folder


def _identity(checkout: Path) -> str:
    """A hash of the contents of a checkout, and the jax version that compiles them."""
    from importlib import metadata

    contents = hashlib.sha256()
    for file in sorted([*(checkout / "jaxpar").rglob("*.py"), *(checkout / "configs").glob("*.yaml")]):
        contents.update(file.read_bytes())
    return f"{contents.hexdigest()[:12]}-jax{metadata.version('jax')}"


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout")
    parser.add_argument("after", type=Path, help="another checkout")
    parser.add_argument("--only", default="", help="only programs with this word in their name")
    parser.add_argument("--no-clusters", action="store_true", help="leave out the programs for GPUs")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "same_programs")
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.write:
        write_programs(options.before, options.after, options.only)
        return 0
    names = [name for name in [*programs(), *(() if options.no_clusters else CLUSTERS)] if options.only in name]
    before, after = (
        compiled_folder(checkout.resolve(), options.cache.resolve(), options.only, not options.no_clusters)
        for checkout in (options.before, options.after)
    )
    different = 0
    for name, what in compare(before, after, names):
        if what is not None:
            different += 1
            say(f"DIFFERENT {name}: {what}")
    say(f"{len(names) - different} of {len(names)} programs are the same")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
