"""What a run that resumes may change, and what it must say that it means."""

import json
from pathlib import Path

import pytest
from runs import QUICKSTART

import jaxpar
from jaxpar.checkpoint.manifest import versions
from jaxpar.checkpoint.same_run import HARMLESS, compare, describe

PATH = Path("results/x/checkpoints/global_step_4")
DATA = {"files": "1 files, 10 bytes", "tokens": "9 tokens, abc", "tokenizer": "byte 123"}
SHAPE = ["actor.model.sliding_window=16"]
CHANGES = [  # that mean another run
    "actor.model.rope_theta=5000.0", "actor.model.rms_norm_eps=1e-5", "actor.model.sliding_window=8", "runner.seq_length=64",
    "data.seed=7", "data.shuffle=False", "data.text_key=body", "data.reset_attention_mask=False", "actor.optim.adam_eps=1e-6",
    "actor.optim.adam_beta2=0.9", "actor.optim.optimizer=lion", "actor.model.precision=fp16", "actor.seed=3",
    "algorithm.z_loss=0.1", "actor.optim.ema_decay=0.9",
    "actor.model.rope_scaling={rope_type: llama3, factor: 2.0, low_freq_factor: 1.0, high_freq_factor: 4.0, "
    "original_max_position_embeddings: 64}",
]  # fmt: skip
HARMLESS_CHANGES = [
    "runner.max_steps=90", "runner.save_interval=3", "runner.log_interval=7", "actor.model.pipeline_model_parallel_size=1",
    "actor.model.pipeline_schedule=gpipe", "cluster.num_gpus_per_node=4", "actor.micro_batch_size=1", "actor.optim.lr=1e-5",
    "data.num_workers=1", "runner.keep_checkpoints=2", "actor.optim.zero_stage=3",
]  # fmt: skip


def config(*overrides: str) -> jaxpar.Config:
    return jaxpar.load_config(QUICKSTART, [*SHAPE, *overrides])


def manifest(config: jaxpar.Config, data: dict | None = DATA) -> dict:
    described = describe(config.architecture(), data)
    content = {"config": config.model_dump(), "run": described, "versions": versions()}
    return json.loads(json.dumps(content))


def compared(own: jaxpar.Config, stored: dict, data: dict | None = DATA) -> tuple[list[str], list[str]]:
    return compare(PATH, stored, own, describe(own.architecture(), data))


WRITTEN = manifest(config())


def test_the_same_run_has_nothing_to_say():
    assert compared(config("runner.resume_dir=auto", "runner.experiment_name=branch"), WRITTEN) == ([], [])


@pytest.mark.parametrize("change", CHANGES)
def test_another_meaning_is_an_error_until_it_is_named(change):
    name = change.partition("=")[0]
    notes, problems = compared(config(change), WRITTEN)
    assert problems and all(problem.startswith(name) for problem in problems), problems
    assert str(PATH) in problems[0] and "runner.resume_changes" in problems[0] and name not in "".join(notes)
    notes, problems = compared(config(change, f"runner.resume_changes=[{name}]"), WRITTEN)
    assert not problems and notes[0].startswith("changed since global_step_4 was written: ") and name in notes[0]


@pytest.mark.parametrize("change", HARMLESS_CHANGES)
def test_a_harmless_change_is_a_line(change):
    name = change.partition("=")[0]
    (note,), problems = compared(config(change), WRITTEN)
    assert f"{name} " in note and " → " in note and not problems


def test_data_tokenizer_and_code():
    for key, name in (("tokens", "data"), ("tokenizer", "actor.tokenizer.tokenizer_model")):
        own = {**DATA, key: "another"}
        assert compared(config(), WRITTEN, own)[1][0].startswith(f"{name}: another, but")
        notes, problems = compared(config(f"runner.resume_changes=[{name}]"), WRITTEN, own)
        assert not problems and "another" in notes[0]
    notes, problems = compared(config(), WRITTEN, {**DATA, "files": "2 files"})
    assert not problems and "data files 1 files, 10 bytes → 2 files" in notes[0]
    older = {**WRITTEN, "run": {**WRITTEN["run"], "code": "older"}, "versions": {**versions(), "jax": "0.9"}}
    notes, problems = compared(config(), older)
    assert not problems and "code older → " in notes[0] and "versions.jax 0.9 → " in notes[0]


def test_what_one_of_the_two_does_not_know_is_not_compared():
    own = config("data.seed=7", "data.train_data_paths=[]")
    assert compared(own, WRITTEN, data=None) == ([], [])  # given batches
    old = {key: value for key, value in WRITTEN.items() if key != "run"}
    notes, problems = compared(config("actor.model.rope_theta=5000.0"), old)
    assert len(problems) == 1 and "does not say with which data" in notes[0]
    del old["config"]["runner"]["resume_changes"]  # a setting that jaxpar did not have then, at its default now
    assert not compared(config(), old)[1]


def test_an_architecture_may_come_from_elsewhere(tmp_path):
    """The settings differ, and what they say does not; and the other way round."""
    fields = config().architecture()
    assert fields is not None
    own = compare(PATH, WRITTEN, config("actor.model.model_type=qwen2"), describe(fields, DATA))
    assert own == ([], [])


def test_a_name_that_has_not_changed_is_said():
    notes, _ = compared(config("runner.resume_changes=[actor.model.rope_theat]"), WRITTEN)
    assert notes == ["runner.resume_changes: actor.model.rope_theat: nothing of that name has changed"]


def test_each_pattern_is_of_a_setting():
    from fnmatch import fnmatch

    from jaxpar.run.agreement import flat

    names = {*flat(jaxpar.Config().model_dump()), "code", "data files", "versions.jax", "cluster.xla_flags"}
    assert not [p for p in HARMLESS if not any(fnmatch(name, p) for name in names)]
