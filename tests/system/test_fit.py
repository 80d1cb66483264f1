"""`Trainer.fit` with batches and hooks of one's own: the same losses from every kind of source, positions, stops and errors."""

import functools
import importlib.util
import sys
from pathlib import Path

import grain
import numpy as np
import pytest
from runs import QUICKSTART, SMALL, assert_same_state, layout, losses, metrics, start_ranks
from support import make_mesh, slow

import jaxpar
from jaxpar.checkpoint.manifest import read_manifest
from jaxpar.parallel.batch import BatchLayout
from jaxpar.run.sources import StatefulIterator

ROWS, SEQ = 16, 32


def batch(step: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(step).integers(0, 258, (ROWS, SEQ))
    return {"tokens": tokens, "targets": np.roll(tokens, -1, 1)}


def trainer(folder: Path, *overrides: str, name: str = "one") -> jaxpar.Trainer:
    run = [f"runner.output_dir={folder}", "runner.resume_dir=auto", "runner.max_epochs=1", *SMALL, *layout(name)]
    return jaxpar.Trainer(jaxpar.load_config(QUICKSTART, [*run, *overrides]))


def fit(folder: Path, batches, *overrides: str, name: str = "one", **arguments) -> jaxpar.Trainer:
    one = trainer(folder, *overrides, name=name)
    one.fit(batches, **arguments)
    return one


def dataset(steps: int) -> grain.MapDataset:
    return grain.MapDataset.range(1, steps + 1).map(batch)


def loader(steps: int) -> grain.DataLoader:
    return grain.DataLoader(
        data_source=range(1, steps + 1),
        sampler=grain.samplers.SequentialSampler(steps),
        operations=[_Batch()],
    )


class _Batch(grain.transforms.Map):
    def map(self, element):
        return batch(int(element))


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """The losses of ten steps of `train_step`, and the trainer, for a layout."""

    @functools.cache
    def train(name: str = "one") -> tuple[list[float], jaxpar.Trainer]:
        one = trainer(tmp_path_factory.mktemp(name), "runner.max_steps=10", "runner.resume_dir=null", name=name)
        return [float(one.train_step(batch(step))["loss"]) for step in range(1, 11)], one

    return train


SOURCES = {
    "dataset": dataset,
    "iter_dataset": lambda steps: dataset(steps).to_iter_dataset(),
    "loader": loader,
    "function": lambda _: batch,
    "iterator": lambda steps: map(batch, range(1, steps + 1)),
    "list": lambda steps: [batch(step) for step in range(1, steps + 1)],
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("dataset", "two"),
        ("function", "one"),
        ("iterator", "one"),
        ("loader", "one"),
        *slow(("iter_dataset", "one"), ("list", "one"), *((kind, "all") for kind in SOURCES)),
    ],
)
def test_five_and_five_steps_are_bitwise_ten(tmp_path, by_hand, kind, name, capsys):
    steps = "runner.max_steps=10" if kind == "function" else "runner.max_steps=12"
    fit(tmp_path, SOURCES[kind](10), "runner.max_steps=5", name=name)
    output = capsys.readouterr().out
    assert ("get_state" in output) == (kind in ("iterator", "list"))
    position = read_manifest(tmp_path / "quickstart/checkpoints/global_step_5")["data"]
    assert position["batch"] == 5 and ("state" in position) == (kind in ("dataset", "iter_dataset", "loader"))
    halves = fit(tmp_path, SOURCES[kind](10), steps, name=name)  # the end of the batches ends the run
    expected, whole = by_hand(name)
    assert losses(tmp_path) == expected
    assert_same_state(halves, whole)
    assert (tmp_path / "quickstart/checkpoints/global_step_10").is_dir()
    assert ("the run stops: its batches have ended" in capsys.readouterr().out) == (kind != "function")


class Recorder(jaxpar.Hook):
    """Notes what it is called with."""

    def __init__(self, stop_at: int = 0, fail_in: str = ""):
        self.calls, self.rows, self._stop_at, self._fail_in = [], [], stop_at, fail_in

    def _note(self, name, *args):
        self.calls.append((name, *args))
        if name == self._fail_in:
            raise KeyError("broken")

    def start(self, run):
        self.run = run
        self._note("start", run.step, run.last_step)

    def begin(self, step):
        self._note("begin", step)

    def dispatched(self, step):
        self._note("dispatched", step)
        assert self.run.step == step

    def step(self, row):
        self._note("step", row["step"])
        self.rows.append(row)
        row["twice"] = 2 * row["loss"]
        return jaxpar.STOP if row["step"] == self._stop_at else None

    def evaluation(self, step, loss):
        self._note("evaluation", step)
        assert loss == self.rows[-1]["val_loss"]

    def save(self, step, folder):
        self._note("save", step, folder.name)

    def end(self):
        self._note("end")
        assert (self.run.config.output_path / "metrics.jsonl").exists()


def test_what_a_hook_sees(tmp_path, by_hand):
    hook = Recorder()
    run = ["runner.max_steps=3", "runner.val_check_interval=2", "runner.save_interval=2"]
    fit(tmp_path, batch, *run, hooks=[hook], eval_batches=[batch(1)])
    steps = [[("begin", step), ("dispatched", step)] for step in (1, 2, 3)]
    assert hook.calls == [
        ("start", 0, 3), *steps[0], ("begin", 2), ("step", 1), ("dispatched", 2), ("step", 2), ("evaluation", 2),
        ("save", 2, "global_step_2"), *steps[2], ("step", 3), ("save", 3, "global_step_3"), ("end",),
    ]  # fmt: skip
    assert metrics(tmp_path) == hook.rows and all(row["twice"] == 2 * row["loss"] for row in metrics(tmp_path))


def test_a_hook_stops_the_run(tmp_path, by_hand, capsys):
    hook = Recorder(stop_at=2)
    fit(tmp_path, batch, "runner.max_steps=10", hooks=[hook])
    assert losses(tmp_path) == by_hand()[0][:3]  # step 2 is reported when step 3 has been given to the devices
    assert hook.calls[-2:] == [("save", 3, "global_step_3"), ("end",)]
    output = capsys.readouterr().out
    assert "the run stops: Recorder asks for it" in output and "done: step 3" in output
    fit(tmp_path, batch, "runner.max_steps=10")
    assert losses(tmp_path) == by_hand()[0]


@pytest.mark.parametrize(
    ("method", "done"), [("start", 0), ("step", 2), *slow(("begin", 1), ("save", 10), ("end", 10))]
)
def test_an_error_of_a_hook_ends_the_run_saved(tmp_path, by_hand, method, done):
    hook, other = Recorder(fail_in=method), Recorder()
    with pytest.raises(jaxpar.HookError, match=rf"^hook Recorder\.{method}: KeyError: 'broken'$") as caught:
        fit(tmp_path, batch, "runner.max_steps=10", hooks=[hook, other])
    assert isinstance(caught.value.__cause__, KeyError)
    assert (tmp_path / f"quickstart/checkpoints/global_step_{done}").is_dir() == (done > 0)
    assert hook.calls[-1] == ("end",) and (other.calls[-1:] == [("end",)]) == (done > 0)
    if done:
        assert losses(tmp_path) == by_hand()[0][:done]


def test_an_error_of_the_batches_ends_the_run_saved(tmp_path, by_hand):
    def short(step):
        return batch(step) if step < 3 else {key: array[:8] for key, array in batch(step).items()}

    with pytest.raises(
        ValueError, match=r"batch: tokens is \(8, 32\), but a global batch has the shape .* \(16, 32\)$"
    ):
        fit(tmp_path, short, "runner.max_steps=10")
    assert losses(tmp_path) == by_hand()[0][:2]
    assert (tmp_path / "quickstart/checkpoints/global_step_2").is_dir()
    with pytest.raises(ValueError, match="batches: gave a int, expected a dict of arrays"):
        fit(tmp_path, lambda step: step, "runner.max_steps=10")


def test_evaluation_of_given_batches(tmp_path):
    run = ["runner.max_steps=2", "runner.val_check_interval=1", "runner.limit_val_batches=2"]
    run += ["actor.optim.lr=1e-30", "actor.lr_sched.min_lr=0"]  # so that all losses are of the same parameters
    fit(tmp_path, batch, *run, eval_batches=lambda: map(batch, range(1, 9)))
    mean = np.mean(losses(tmp_path))
    np.testing.assert_allclose([row["val_loss"] for row in metrics(tmp_path)], [mean] * 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "overrides", "words"),
    [
        ({"batches": batch}, ["runner.max_steps=-1", "actor.lr_sched.lr_decay_iters=9"], "a function of the step has no end"),
        ({"batches": batch(0)}, [], "batches: a dict, expected an iterable of global batches"),
        ({"batches": [batch(0)]}, ["runner.max_epochs=2"], "max_epochs: 2, but batches that are given are read once"),
        ({"batches": batch, "hooks": [Recorder]}, [], "hooks: the class Recorder is not an instance of a jaxpar.Hook"),
        ({"batches": batch, "eval_batches": [batch(0)]}, [], "runner.val_check_interval is not"),
        ({"batches": batch, "eval_batches": iter([])}, ["runner.val_check_interval=1"], "an iterator can be read only once"),
        ({"batches": batch, "eval_batches": 3}, ["runner.val_check_interval=1"], "eval_batches: a int, expected"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path, arguments, overrides, words):
    with pytest.raises(jaxpar.ConfigError) as caught:
        trainer(tmp_path, "runner.max_steps=2", *overrides).fit(**arguments)
    assert words in str(caught.value)


def test_resuming_from_another_kind_of_source(tmp_path, capsys):
    fit(tmp_path, None, "runner.max_steps=1")
    fit(tmp_path, dataset(3), "runner.max_steps=2")
    assert (
        "position is in data.train_data_paths: an iterator with a state starts with the first batch"
        in capsys.readouterr().out
    )
    assert read_manifest(tmp_path / "quickstart/checkpoints/global_step_2")["data"]["state"] == {"next_index": 1}
    with pytest.raises(jaxpar.ConfigError, match=r"batches: ended after 0, but the checkpoint is after batch 1"):
        fit(tmp_path / "b", iter([batch(1)]), "runner.max_steps=1")
        fit(tmp_path / "b", iter([]), "runner.max_steps=2")


@pytest.mark.slow
def test_a_model_with_inputs_trains(tmp_path):
    from jaxpar.examples import vit

    rng, config = np.random.default_rng(0), vit.config(tensor_model_parallel_size=2, context_parallel_size=2)
    config = config.model_copy(
        update={"runner": config.runner.model_copy(update={"output_dir": str(tmp_path), "max_steps": 3})}
    )
    jaxpar.Trainer(config, vit.build()).fit(lambda step: vit.images(rng, 32))
    assert len(losses(tmp_path, "jaxpar")) == 3


class WithState:
    """An iterator whose state no other process can take."""

    def __init__(self, give, rank: int = 0):
        self._give, self._rank, self._step = give, rank, 0

    def __iter__(self):
        return self

    def __next__(self):
        self._step += 1
        return self._give(self._step)

    def get_state(self):
        return {"rank": self._rank, "step": self._step}

    def set_state(self, state):
        assert state["rank"] == self._rank, state
        self._step = state["step"]


def test_positions_of_another_number_of_processes():
    source = StatefulIterator(WithState(batch), None, is_own=False)
    states = [{"rank": rank, "step": 3} for rank in range(2)]
    with pytest.raises(
        jaxpar.ConfigError, match="a position for each of 2 processes, which differ, and this run has 1"
    ):
        source.set_state({"batch": 3, "state": None, "states": states})
    with pytest.raises(jaxpar.ConfigError, match="set_state does not take the position in the checkpoint: {'rank': 1"):
        source.set_state({"batch": 3, "state": states[1]})
    source.set_state({"batch": 3, "state": states[0]})
    assert source.get_state() == {"source": source.kind, "batch": 3, "state": states[0]}


def test_a_process_may_give_its_own_rows_alone():
    layout = BatchLayout(ROWS, SEQ, make_mesh((2, 1, 1, 1, 2)))
    layout.rows = list(range(8, 16))  # as on the second of two processes
    whole, own = batch(1), {key: array[8:] for key, array in batch(1).items()}
    for left, right in zip(layout.own_rows(whole).items(), layout.own_rows(own).items(), strict=True):
        assert left[0] == right[0]
        np.testing.assert_array_equal(left[1], right[1])
    layout.own_rows({**own, "loss_mask": np.zeros((8, SEQ))})  # the other process's rows may have weights
    words = r"tokens is \(4, 32\), but .* \(16, 32\), and this process's rows of it \(8, 32\)"
    with pytest.raises(ValueError, match=words):
        layout.own_rows({key: array[:4] for key, array in own.items()})
    with pytest.raises(ValueError, match=r"targets is \(16, 32\)"):
        layout.own_rows({**own, "targets": whole["targets"]})


def test_weights_and_biases(tmp_path, monkeypatch):
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(jaxpar.ConfigError, match=r"wandb is not installed: pip install 'jaxpar\[wandb\]'"):
            fit(tmp_path, batch, "runner.max_steps=1", "runner.logger.logger_backends=[wandb]")
        return
    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps in (1, 2):
        fit(tmp_path, batch, f"runner.max_steps={steps}", "runner.logger.logger_backends=[wandb]")
    folder = tmp_path / "quickstart"
    runs = list(folder.glob(f"wandb/offline-run-*-{(folder / 'wandb_id').read_text()}"))
    assert len(runs) == 2 and all(list(run.glob("*.wandb")) for run in runs)


TWO = """
import sys; sys.path.insert(0, {tests!r})
import jax, jaxpar
from system.test_fit import *

rank = jax.process_index
def own(step):
    rows = one.program.batch_layout.rows
    assert len(rows) == ROWS // 2
    return {{key: array[rows] for key, array in batch(step).items()}}

class OnOne(Recorder):
    def step(self, row):
        return super().step(row) if rank() == 1 else None

folder = Path({folder!r})
run = ["cluster.num_nodes=2", "cluster.num_gpus_per_node=4", "runner.max_steps=4", "runner.val_check_interval=2"]
for name, give in [("own", own), ("whole", batch)]:
    one = trainer(folder / name, *run)
    one.fit(give, eval_batches=lambda: map(give, (100, 101)))
one = trainer(folder / "positions", *run)
one.fit(grain.MapDataset.range(1, 4 + rank()).map(own))  # ends with the shorter one
for steps in (2, 4):
    one = trainer(folder / "own_states", *run[:2], f"runner.max_steps={{steps}}")
    one.fit(WithState(own, rank()))
one = trainer(folder / "stopped", *run)
one.fit(batch, hooks=[OnOne(stop_at=1)])
one = trainer(folder / "failed", *run)
try:
    one.fit(batch, hooks=[OnOne(fail_in="step")])
except jaxpar.ConfigError as error:
    print("caught", error)
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    script = TWO.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path))
    processes = start_ranks([[sys.executable, "-c", script]] * 2)
    output = [process.communicate(timeout=500)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], output
    assert len(losses(tmp_path / "own")) == 4 and losses(tmp_path / "own") == losses(tmp_path / "whole")
    assert [row.get("val_loss") for row in metrics(tmp_path / "own")] == [
        row.get("val_loss") for row in metrics(tmp_path / "whole")
    ]
    assert losses(tmp_path / "own_states") == losses(tmp_path / "own")
    assert losses(tmp_path / "positions") == losses(tmp_path / "own")[:3]
    assert len(losses(tmp_path / "stopped")) == len(losses(tmp_path / "failed")) == 2
    assert "caught process 1 ended the run with an error: see its output" in output[0]
    assert "caught hook OnOne.step: KeyError: 'broken'" in output[1]
