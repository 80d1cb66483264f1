"""A save does not stop training: it copies the state to host memory, and the rest happens while training goes on."""

import asyncio
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint._src.serialization import jax_array_handlers
from runs import QUICKSTART, SMALL, layout, metrics, start_two
from support import make_mesh

import jaxpar
from jaxpar.checkpoint import Checkpoints
from jaxpar.checkpoint.manifest import why_torn
from jaxpar.checkpoint.orbax_handler import in_its_own_memory
from jaxpar.checkpoint.pace import Pace
from jaxpar.run.progress import Lines

SLOW_DISK = 2.5  # seconds that a write takes at least


class Watch(jaxpar.Hook):
    """Notes, when a step is given to the devices and when a save returns, which checkpoints are written by then."""

    def __init__(self):
        self.written: dict[tuple[str, int], list[int]] = {}
        self.states: dict[int, dict] = {}

    def start(self, run):
        self._trainer, self._folder = run.trainer, run.config.output_path / "checkpoints"

    def dispatched(self, step):
        self._note("step", step)

    def save(self, step, folder):
        self._note("save", step)
        self.states[step] = jax.tree.map(partial(np.array, copy=True), self._trainer.state)

    def _note(self, what, step):
        self.written[what, step] = [s for s in (2, 4, 6) if (self._folder / f"global_step_{s}").exists()]


@pytest.fixture
def slow_disk(monkeypatch):
    write = jax_array_handlers._async_serialize_replica_slices

    async def slow(*args, **kwargs):
        await asyncio.sleep(SLOW_DISK)
        return await write(*args, **kwargs)

    monkeypatch.setattr(jax_array_handlers, "_async_serialize_replica_slices", slow)


def test_steps_go_on_while_a_slow_disk_writes(tmp_path, slow_disk, capsys):
    overrides = [*SMALL, *layout("all"), "runner.save_interval=2", "runner.max_steps=7"]
    config = jaxpar.load_config(QUICKSTART, [f"runner.output_dir={tmp_path}", "runner.resume_dir=auto", *overrides])
    trainer, watch = jaxpar.Trainer(config), Watch()
    trainer.fit(hooks=[watch])
    assert watch.written == {
        ("step", 1): [], ("step", 2): [], ("save", 2): [],
        ("step", 3): [], ("step", 4): [], ("save", 4): [2],
        ("step", 5): [2], ("step", 6): [2], ("save", 6): [2, 4],
        ("step", 7): [2, 4], ("save", 7): [2, 4, 6],
    }  # fmt: skip

    # What was written seconds later is, bit for bit, the state of its step.
    checkpoints = Checkpoints(config)
    shapes, shardings = trainer.program.state_shapes, trainer.program.state_shardings
    assert sorted(watch.states) == [2, 4, 6, 7]
    for step, state in watch.states.items():
        restored, _ = checkpoints.restore(checkpoints.folder / f"global_step_{step}", shapes, shardings)
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(restored), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"step {step}: {jax.tree_util.keystr(path)}")

    waits = {
        row["step"]: (row.get("checkpoint_seconds"), row.get("checkpoint_wait_seconds")) for row in metrics(tmp_path)
    }
    assert [step for step, (copied, _) in waits.items() if copied is not None] == [3, 5, 7]
    assert waits[3][1] < 0.1 and waits[5][1] > 1 < waits[7][1]
    assert waits[5][0] < SLOW_DISK  # by then all is compiled
    # The steps' own time is without these.
    assert max(row["step_seconds"] for row in metrics(tmp_path)[2:]) < SLOW_DISK
    output = capsys.readouterr().out
    assert output.count("is too short for this disk") == 1
    assert "until the checkpoint of step 2 was written, which took" in output
    assert "runner.save_interval: 2 is too short" in output
    (line,) = [line for line in output.splitlines() if line.startswith("step 5/7")]
    assert line.endswith(f"checkpoint {sum(waits[5]):.1f} s")


def test_the_note_says_which_interval_is_long_enough(monkeypatch):
    clock = iter([0.0, 40.0, 80.0, 82.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    pace = Pace(10)
    assert pace.next_save(10, 0.0) is None
    # 10 steps took 10 s and the write 40 s.
    assert pace.next_save(20, 30.0) == (
        "step 20: training waited 30.0 s until the checkpoint of step 10 was written, which took 40.0 s: runner.save_interval: 10 is "
        "too short for this disk; with 40 there would be no wait"
    )
    assert pace.next_save(30, 30.0) is None  # it was said
    clock = iter([0.0, 40.0])
    last = Pace(10)
    last.next_save(10, 0.0)
    assert last.next_save(12, 38.0) is None  # the end of the run, not the interval


def test_a_long_save_is_in_the_progress_lines(capsys):
    row = {
        "loss": 1.0,
        "grad_norm": 1.0,
        "learning_rate": None,
        "mfu": None,
        "skipped": False,
        "tokens_per_second": 9.0,
    }
    lines = Lines(every=10)
    lines.step({**row, "step": 21, "checkpoint_seconds": 0.3, "checkpoint_wait_seconds": 0.0})
    lines.step({**row, "step": 31, "checkpoint_seconds": 0.3, "checkpoint_wait_seconds": 12.0})
    assert capsys.readouterr().out == "step 31 loss 1.0000  grad norm 1.000  9 tokens/s  checkpoint 12.3 s\n"


def test_what_is_saved_has_memory_of_its_own():
    mesh = make_mesh((2, 1, 2, 1, 2))
    state = {
        name: jax.device_put(np.arange(4096.0, dtype=np.float32), NamedSharding(mesh, spec))
        for name, spec in {"cut": P(mesh.axis_names), "replicated": P("tp")}.items()
    }
    copied = in_its_own_memory(state)
    assert not addresses(copied["cut"]) & addresses(state["cut"])
    assert copied["replicated"] is state["replicated"]  # of which Orbax makes new pieces
    np.testing.assert_array_equal(copied["cut"], state["cut"])
    assert copied["cut"].sharding == state["cut"].sharding


@pytest.mark.slow
@pytest.mark.alone
def test_a_save_stops_training_no_longer_than_a_copy(tmp_path):
    """2.1 GB on 8 devices: the save, and what the step after it takes longer than others, against one copy of all shards.
    The least of 7 measurements each, because what else the machine does can only add to them."""
    mesh = make_mesh((2, 1, 2, 1, 2))
    cut = NamedSharding(mesh, P(("dp", "tp"), "cp"))
    names = [f"w{number}" for number in range(16)]
    start = jax.jit(lambda: {name: jnp.full((4096, 8192), 1.0) for name in names}, out_shardings=cut)
    step = jax.jit(
        lambda s: {"params": jax.tree.map(lambda x: x + 1, s["params"]), "step": s["step"] + 1}, donate_argnums=0
    )
    state = {"params": start(), "step": jax.device_put(jnp.int32(1), NamedSharding(mesh, P()))}
    checkpoints = Checkpoints(
        jaxpar.load_config(QUICKSTART, [f"runner.output_dir={tmp_path}", "runner.keep_checkpoints=1"])
    )

    def copy():
        return [
            np.array(s.data, copy=True)
            for x in jax.tree.leaves(state)
            for s in x.addressable_shards
            if not s.replica_id
        ]

    figures = []
    for number in range(8):
        steps = []
        for _ in range(5):
            state, seconds = timed(step, state)
            steps.append(seconds)
        copies, copying = timed(copy)
        size = sum(x.nbytes for x in copies)
        del copies
        _, saving = timed(checkpoints.save, int(state["step"]), state, {"batch": 0})
        state, after = timed(step, state)
        _, writing = timed(checkpoints.wait)
        if number:  # the first also compiles, and is given memory that the machine has not used before
            figures.append((copying, saving, after - min(steps), writing))
    copying, saving, after, writing = (min(column) for column in zip(*figures, strict=True))
    print(
        f"{size / 1e9:.2f} GB: copy {copying:.2f} s, save {saving:.2f} s ({saving / copying:.2f} of a copy), the next step "
        f"{after:+.2f} s, writing {writing:.1f} s (the least of {len(figures)} each)"
    )
    assert size > 2e9
    assert saving <= 1.3 * copying
    assert after <= 0.5 * copying  # no copy is hidden there


@pytest.mark.slow
def test_two_processes_measure_their_saves(tmp_path):
    run = [*SMALL, *layout("two"), "runner.save_interval=1", "runner.max_steps=3"]
    outputs = [process.communicate(timeout=300)[0] for process in start_two(tmp_path, *run)]
    assert "done: step 3" in outputs[0], outputs
    assert [sorted(key for key in row if "checkpoint" in key) for row in metrics(tmp_path)] == [
        [],
        ["checkpoint_seconds", "checkpoint_wait_seconds"],
        ["checkpoint_seconds", "checkpoint_wait_seconds"],
    ]
    folder = tmp_path / "quickstart/checkpoints"
    assert [why_torn(folder / f"global_step_{step}") for step in (1, 2, 3)] == [None] * 3


def addresses(x: jax.Array) -> set[int]:
    return {shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards}


def timed(function, *args):
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return result, time.perf_counter() - start
