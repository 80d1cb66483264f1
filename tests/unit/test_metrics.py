"""The metrics of a step: useful FLOPs, and the metrics file."""

import json
import math
from types import SimpleNamespace

from jaxpar.config import Architecture
from jaxpar.models.flops import model_flops_per_token
from jaxpar.run.metrics import MetricsFile

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


def test_steps_after_the_first_are_written_again_and_torn_lines_dropped(tmp_path):
    metrics = MetricsFile(tmp_path)
    metrics.start(SimpleNamespace(step=0))
    for step in (1, 2, 3):
        metrics.step({"step": step, "loss": float("nan") if step == 2 else 1.0})
    metrics.end()
    with metrics.path.open("a") as file:
        file.write('{"step": 4, "lo')
    again = MetricsFile(tmp_path)
    again.start(SimpleNamespace(step=2))
    again.step({"step": 3, "loss": 0.5})
    again.end()
    rows = [json.loads(line) for line in again.path.read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": "nan"}, {"step": 3, "loss": 0.5}]
