"""Processes that were given different runs, or of which one finds a mistake."""

import re
import time

import pytest
from runs import QUICKSTART, SMALL, layout, start_ranks, train_command

import jaxpar
from jaxpar.run.agreement import _differences, given_to_this_process

RUN = [*SMALL, *layout("dp4"), "runner.max_steps=3", "actor.global_batch_size=8"]


def run_two(*args):
    """(exit codes, outputs, seconds) of one run as two processes, see `start_ranks`."""
    began = time.monotonic()
    processes = start_ranks(*args)
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    return [process.returncode for process in processes], outputs, time.monotonic() - began


SETTINGS = [
    "actor.optim.lr=0.002",
    "actor.optim.weight_decay=0.2",
    "actor.optim.adam_beta1=0.8",
    "actor.optim.clip_grad=0.5",
    "actor.optim.zero_stage=3",
    "actor.optim.optimizer=lion",
    "actor.optim.overlap_grad_reduce=False",
    "actor.seed=7",
    "actor.global_batch_size=16",
    "actor.model.precision=bf16",
    "actor.model.rope_theta=500.0",
    "actor.model.sliding_window=8",
    "actor.model.rms_norm_eps=0.001",
    "actor.model.num_hidden_layers=2",
    "actor.model.recompute_granularity=full",
    "actor.model.attention_backend=xla",
    "actor.lr_sched.min_lr=0.0001",
    "actor.lr_sched.lr_decay_style=constant",
    "data.seed=5",
    "data.shuffle=False",
    "data.reset_attention_mask=False",
    "data.num_workers=1",
    "runner.max_steps=4",
    "runner.save_interval=2",
    "runner.seq_length=64",
    "runner.experiment_name=other",
    "runner.check_replicas_interval=1",
]


def test_every_difference_is_named():
    """What the comparison says, without processes: the settings that differ, the environment, the files."""
    base = given_to_this_process(jaxpar.load_config(QUICKSTART, RUN))
    for setting in SETTINGS:
        other = given_to_this_process(jaxpar.load_config(QUICKSTART, [*RUN, setting]))
        name = setting.split("=")[0]
        assert base != other, setting
        (line,) = [
            x for x in _differences({0: base, 1: base, 2: other}) if x.startswith(f"{name} differs between the ")
        ]
        assert "on process 0, 1, " in line and "on process 2" in line
    assert _differences({0: base, 1: dict(base)}) == []
    many = {0: {str(i): 0 for i in range(40)}, 1: {str(i): 1 for i in range(40)}}
    assert len(_differences(many)) == 13


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "variables", "named"),
    [
        ("actor.optim.lr=0.002", {}, r"actor\.optim\.lr differs .* 0\.003 on process 0, 0\.002 on process 1"),
        ("actor.model.num_hidden_layers=2", {}, r"actor\.model\.num_hidden_layers differs .* on process 0, 2 on process 1"),
        ("actor.seed=7", {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}, r"JAX_DEFAULT_MATMUL_PRECISION differs .* not given"),
        ("data.train_data_paths=[/no/such.jsonl]", {}, r"file /no/such.jsonl differs .* \"No such file or directory\" on process 1"),
    ],
)  # fmt: skip
def test_processes_with_different_runs_do_not_train(tmp_path, setting, variables, named):
    commands = [train_command(tmp_path, *RUN), train_command(tmp_path, *RUN, setting)]
    codes, outputs, seconds = run_two(commands, (), ({}, variables))
    assert codes == [2, 2] and seconds < 60, (codes, outputs)
    for output in outputs:
        assert re.search(f"error: {named}", output) and "Traceback" not in output, output
        assert "step 1/" not in output


@pytest.mark.exhaustive
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_difference_between_two_processes(tmp_path, setting):
    codes, outputs, seconds = run_two([train_command(tmp_path, *RUN), train_command(tmp_path, *RUN, setting)])
    assert codes == [2, 2] and seconds < 60, (codes, outputs)
    for output in outputs:
        assert f"error: {setting.partition('=')[0]} differs" in output and "step 1/" not in output, output


def data_of(folder, is_wrong):
    """A file that is wrong has the same size: only the process that opens it sees it."""
    text = '{"text": "some words of text"}\n' * 400
    (folder / "data.jsonl").write_text(text.replace('"text"', "'text'") if is_wrong else text)
    return ["data.train_data_paths=[data.jsonl]"]


def model_of(folder, is_wrong):
    (folder / "mine.py").write_text("build = 5\n" if is_wrong else "from jaxpar.examples.gpt2 import build\n")
    return ["--model", "mine.py:build"]


@pytest.mark.slow
@pytest.mark.parametrize(("given", "word"), [(data_of, "data.jsonl"), (model_of, "mine.py:build")])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_that_one_process_finds_ends_both(tmp_path, rank, given, word):
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
    commands = [train_command(tmp_path / "out", *RUN, *given(folder, n == rank)) for n, folder in enumerate(folders)]
    codes, outputs, seconds = run_two(commands, folders)
    assert codes == [2, 2] and seconds < 60, (codes, outputs)
    assert re.search(rf"error: .*{word}", outputs[rank]), outputs
    assert re.search(r"error: .*(process \d.* stopped|stopped with an error)", outputs[1 - rank]), outputs
