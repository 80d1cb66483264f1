"""Dynamic batches in whole runs: the same losses as with plain rows, resume, metrics, and documents too long to fit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from runs import start_ranks
from user_models import EMBED, GPT

import jaxpar
from jaxpar.data import BatchOrder, DocumentCost, build_loader, load_tokenizer, open_dataset
from jaxpar.models.flops import model_flops_per_token
from jaxpar.program import Program
from jaxpar.run.evaluation import Evaluation, sample_batches

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
JAXPAR = Path(sys.executable).parent / "jaxpar"
STEPS, DOCUMENTS, LONGEST = 5, 8, 64  # optimizer steps, documents per step, tokens per row
SMALL = [
    "runner.resume_dir=auto",
    f"runner.max_steps={STEPS}",
    f"actor.global_batch_size={DOCUMENTS}",
    "actor.model.hidden_size=32",
    "actor.model.intermediate_size=48",
    "actor.model.tensor_model_parallel_size=1",
    "actor.model.sequence_parallel=False",
    "actor.lr_sched.lr_decay_iters=20",
]


def dynamic(pp: int, cp: int, dp: int) -> list[str]:
    return [
        "runner.enable_dynamic_batch_size=True",
        f"runner.max_tokens_per_mbs={LONGEST // cp}",
        f"actor.model.pipeline_model_parallel_size={pp}",
        f"actor.model.context_parallel_size={cp}",
        f"cluster.num_gpus_per_node={dp * pp * cp}",
    ]


def train(output: Path, data: Path, *overrides: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(output, data, *overrides), capture_output=True, text=True)


def command(output: Path, data: Path, *overrides: str) -> list:
    paths = [f"runner.output_dir={output}", f"data.train_data_paths=[{data}]"]
    return [JAXPAR, "train", QUICKSTART, *paths, *SMALL, *overrides]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "quickstart/metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, list[bytes]]:
    """Documents of 1 to LONGEST bytes, most of them short."""
    rng = np.random.default_rng(0)
    lengths = [*np.clip(rng.lognormal(2.7, 0.9, 46).astype(int), 1, LONGEST), LONGEST, LONGEST]
    texts = [bytes(rng.integers(97, 97 + 6, length).tolist()) for length in rng.permutation(lengths)]
    path = tmp_path_factory.mktemp("data") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text.decode()}) + "\n" for text in texts))
    return path, texts


class Numbers:
    def __len__(self):
        return 48

    def __getitem__(self, index):
        return {"number": np.array(index)}


def plain_rows(texts: list[bytes]) -> dict[str, np.ndarray]:
    """One padded row for each document."""
    batch = {
        key: np.zeros((len(texts), LONGEST), int)
        for key in ("tokens", "targets", "loss_mask", "segment_ids", "positions")
    }
    for row, text in enumerate(texts):
        tokens, size = [*text, 256], len(text)
        batch["tokens"][row, :size], batch["targets"][row, :size] = tokens[:-1], tokens[1:]
        batch["loss_mask"][row, :size] = batch["segment_ids"][row, :size] = 1
        batch["positions"][row, :size] = range(size)
    return batch


class Plain(NamedTuple):
    losses: list[float]
    tokens: list[int]
    val_loss: float  # on the same documents, after the last step


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory) -> Plain:
    """Trains on the same documents on one device, without dynamic batches."""
    one = ["pipeline_model_parallel_size=1", "context_parallel_size=1"]
    sizes = [f"runner.seq_length={LONGEST}", f"actor.micro_batch_size={DOCUMENTS}", "cluster.num_gpus_per_node=1"]
    config = jaxpar.load_config(
        QUICKSTART,
        [*SMALL, "runner.resume_dir=null", *sizes, *[f"actor.model.{size}" for size in one]],
    )
    trainer, order = jaxpar.Trainer(config), build_loader(Numbers(), BatchOrder(DOCUMENTS, seed=config.data.seed))
    losses, tokens = [], []
    for _ in range(STEPS):
        texts = [data[1][number] for number in next(order)["number"]]
        losses.append(float(trainer.train_step(plain_rows(texts))["loss"]))
        tokens.append(sum(map(len, texts)))
    order.close()
    cache = tmp_path_factory.mktemp("plain")
    samples = open_dataset([data[0]], tokenizer=load_tokenizer(None), seq_length=LONGEST, cache_dir=cache)
    return Plain(
        losses,
        tokens,
        Evaluation(trainer.program, lambda: sample_batches(trainer.program, samples, None)).loss(
            trainer.state["params"]
        ),
    )


@pytest.fixture(scope="module")
def dp2_cp2(tmp_path_factory, data) -> tuple[Path, str]:
    """A whole run of the command, and its output."""
    output = tmp_path_factory.mktemp("dp2_cp2")
    result = train(output, data[0], *dynamic(pp=1, cp=2, dp=2))
    assert result.returncode == 0, result.stderr
    return output, result.stdout


def assert_same_as_plain(output: Path, plain: Plain) -> None:
    losses, tokens, _ = plain
    np.testing.assert_allclose([row["loss"] for row in metrics(output)], losses, rtol=0, atol=1e-5)
    assert [row["tokens"] for row in metrics(output)] == tokens
    assert losses[0] - losses[-1] > 0.1


@pytest.mark.slow
def test_losses_on_dp2_cp2_are_those_of_plain_rows(dp2_cp2, plain):
    assert_same_as_plain(dp2_cp2[0], plain)


@pytest.mark.slow
def test_losses_on_dp2_pp2_cp2_are_those_of_plain_rows(tmp_path, data, plain):
    evaluation = [f"data.val_data_paths=[{data[0]}]", f"runner.val_check_interval={STEPS}"]
    result = train(tmp_path, data[0], *dynamic(pp=2, cp=2, dp=2), *evaluation)
    assert result.returncode == 0, result.stderr
    assert_same_as_plain(tmp_path, plain)
    assert metrics(tmp_path)[-1]["val_loss"] == pytest.approx(plain.val_loss, abs=1e-5)


@pytest.mark.slow
def test_each_of_two_processes_reads_the_rows_of_its_own_dp_rank(tmp_path, data, plain):
    processes = start_ranks([command(tmp_path, data[0], *dynamic(pp=1, cp=1, dp=2))] * 2)
    output = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], output
    assert_same_as_plain(tmp_path, plain)


def test_balance_and_padding_are_printed_and_logged(dp2_cp2):
    output, printed = dp2_cp2
    rows = metrics(output)
    counts = [row["num_microbatches"] for row in rows]
    assert len(set(counts)) > 1  # so several programs worked on the same state
    for row in rows:
        places = row["num_microbatches"] * 2 * LONGEST
        assert row["padding_fraction"] == pytest.approx(1 - row["tokens"] / places)
        assert 1 <= row["dp_balance"] < 1.1
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["step_seconds"])
        line = f"microbatches {row['num_microbatches']}  balance {row['dp_balance']:.3f}  padding"
        assert f"{line} {row['padding_fraction']:.1%}\n" in printed
    assert f"up to {DOCUMENTS // 2} microbatches a step" in printed


def fit(output: Path, data: Path, *overrides: str) -> jaxpar.Trainer:
    paths = [f"runner.output_dir={output}", f"data.train_data_paths=[{data}]"]
    trainer = jaxpar.Trainer(jaxpar.load_config(QUICKSTART, [*paths, *SMALL, *dynamic(pp=1, cp=2, dp=2), *overrides]))
    trainer.fit()
    return trainer


@pytest.mark.slow
def test_resume_in_the_middle_is_bitwise(tmp_path, dp2_cp2, data):
    fit(tmp_path, data[0], "runner.max_steps=2")
    halves = fit(tmp_path, data[0])
    whole = fit(dp2_cp2[0], data[0])  # all its steps are done, so it only reads the last checkpoint
    for key in ("loss", "grad_norm", "num_microbatches", "dp_balance", "padding_fraction"):
        assert [row[key] for row in metrics(tmp_path)] == [row[key] for row in metrics(dp2_cp2[0])]
    for one, other in zip(jax.tree.leaves(halves.state), jax.tree.leaves(whole.state), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_a_checkpoint_whose_position_counts_documents_is_not_read_for_sequences(dp2_cp2, data):
    with pytest.raises(jaxpar.ConfigError, match="dynamic_batch_size: False, but .* with True, .* counts documents"):
        fit(dp2_cp2[0], data[0], "runner.enable_dynamic_batch_size=False", "actor.micro_batch_size=1")


def test_what_is_balanced_are_the_flops_of_the_model():
    config = jaxpar.load_config(QUICKSTART, [*SMALL, *dynamic(pp=1, cp=2, dp=2)])
    program = Program(config, jax.devices()[:4])
    per_token = model_flops_per_token(program.blueprint.architecture, program.blueprint.num_params, 17)
    assert DocumentCost(*program.blueprint.document_flops)(np.array([17])) == [17 * per_token]
    assert program.batch_layout.shape == (DOCUMENTS, LONGEST) and program.dp_ranks == [0, 1]
    assert program.batch_layout.resized(6).rows == [*range(6)]
    model = GPT()
    program = Program(config, jax.devices()[:4], model)
    assert program.blueprint.document_flops == (6 * program.blueprint.num_params, 6 * model.num_layers * EMBED, None)


def test_a_document_over_the_budget_is_an_error_that_names_it(tmp_path, data):
    result = train(tmp_path, data[0], *dynamic(pp=1, cp=2, dp=2), "runner.max_tokens_per_mbs=30")
    too_long = [number for number, text in enumerate(data[1], start=1) if len(text) > 60]
    assert result.returncode == 2 and "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]  # a CUDA plugin prints more
    for line, number in zip(errors, too_long, strict=True):
        length = len(data[1][number - 1])
        assert f"{data[0]}, record {number} has {length + 1} tokens, of which {length} are inputs" in line
        assert "max_tokens_per_mbs * context_parallel_size = 60" in line
    assert not (tmp_path / "quickstart").exists()
