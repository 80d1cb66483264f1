"""The metrics of a step: useful FLOPs, and the metrics file."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from jaxpar.config import Architecture
from jaxpar.models.flops import model_flops_per_token
from jaxpar.run.metrics import MetricsFile
from jaxpar.run.step_log import StepLog

LLAMA3_8B = Architecture("llama", 128256, 128256, 4096, 14336, 32, 32, 8, 128)
PARAMS = 8_030_261_248


def test_flops_of_llama3_8b_are_counted_product_by_product():
    a, seq = LLAMA3_8B, 8192
    per_layer = a.hidden_size * (a.num_attention_heads + 2 * a.num_key_value_heads) * a.head_dim  # q, k, v
    per_layer += a.num_attention_heads * a.head_dim * a.hidden_size + 3 * a.hidden_size * a.intermediate_size
    products = a.num_hidden_layers * per_layer + a.hidden_size * a.vocab_size
    scores = a.num_hidden_layers * 2 * a.num_attention_heads * a.head_dim * seq / 2  # q·k and weights·v, causal half
    norms = (2 * a.num_hidden_layers + 1) * a.hidden_size
    assert math.isclose(model_flops_per_token(a, PARAMS, seq), 6 * (products + scores + norms))


def resumed(folder, step):
    """A started `MetricsFile` of a run that goes on from a step, and what it said."""
    notes: list[str] = []
    metrics = MetricsFile(folder)
    metrics.start(SimpleNamespace(step=step, say=notes.append))
    return metrics, notes


def rows_of(metrics):
    return [json.loads(line) for line in metrics.path.read_bytes().splitlines()]


def test_steps_after_the_first_are_written_again(tmp_path):
    metrics, _ = resumed(tmp_path, 0)
    for step in (1, 2, 3):
        metrics.step({"step": step, "loss": float("nan") if step == 2 else 1.0})
    metrics.end()
    again, notes = resumed(tmp_path, 2)
    again.step({"step": 3, "loss": 0.5})
    again.end()
    assert rows_of(again) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": "nan"}, {"step": 3, "loss": 0.5}]
    assert notes == []


def test_damaged_lines_and_doubled_rows_are_dropped_with_a_note(tmp_path):
    lines = [
        b'{"step": 1}',
        b'{"step": 2, "l\xff": 0}',
        b'{"step": 2}',
        b'{"step": 3, "loss": 1}',
        b'{"step": 3, "loss": 2}',
    ]
    lines += [b"[" * 100_000, b'{"step": "4"}', b"", b"7", b'{"step": 4, "lo']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    metrics, notes = resumed(tmp_path, 3)
    metrics.step({"step": 4})
    metrics.end()
    assert rows_of(metrics) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 2}, {"step": 4}]
    assert [note.partition("metrics.jsonl: ")[2] for note in notes] == [
        "5 lines that are damaged were dropped",
        "1 rows were dropped: their steps have later ones",
    ]


def test_a_full_disk_is_named(tmp_path):
    metrics, _ = resumed(tmp_path, 0)
    metrics._file.close()
    metrics._file = open("/dev/full", "a")  # noqa: SIM115
    for write in (lambda: metrics.step({"step": 1}), metrics.end):
        with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
            write()


def test_a_batch_that_cannot_be_written_is_a_note(tmp_path):
    """The step that was skipped is no reason to end the run, and a full disk under its batch is none either."""
    (tmp_path / "skipped_batches").write_text("in the way")
    log, notes = StepLog.__new__(StepLog), []
    log._config = SimpleNamespace(output_path=tmp_path, runner=SimpleNamespace(max_skipped_steps=10))
    log._batch_layout = SimpleNamespace(resized=lambda count: SimpleNamespace(rows=range(count)))
    log._say, log._skipped_in_a_row = notes.append, 0
    log._save_skipped(3, {"tokens": np.zeros((2, 4), np.int32)})
    assert len(notes) == 1 and "its batch could not be written to" in notes[0] and "File exists" in notes[0]
