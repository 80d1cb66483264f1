"""Long sequences, compiled for H100s: what grows with the sequence, what never exists, which transfers are hidden."""

import re

import pytest
from support import array_shapes
from test_compile import compile_, needs_plugin, traffic

ONE_NODE = "llama3_8b_1node_128k.yaml"  # TP 4, cp 2, 131,072 tokens
LAYERS, MICROBATCHES = 32, 2


@needs_plugin
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "xla"])
def test_131072_tokens_on_eight(tmp_path, backend):
    hlo = tmp_path / "program.hlo"
    report = compile_(
        tmp_path,
        ONE_NODE,
        f"actor.model.attention_backend={backend}",
        f"actor.global_batch_size={MICROBATCHES}",
        "--hlo",
        hlo,
    )
    text = hlo.read_text()
    assert report["memory"]["fits"]
    # No scores: a rank has 65,536 tokens in two chunks, more than the widest other dimension, and no array has two such
    # dimensions.
    assert not [shape for shape in array_shapes(text) if sum(n >= 131072 // 4 for n in shape) > 1]
    used = {choice.partition(":")[0] for choice in report["attention"]}
    assert used == {"tokamax" if backend == "auto" else "plain JAX"}
    # Keys and values go once around the ring of two for the forward pass, and once for the backward pass: attention does
    # not run again. Their gradients go there, with a kernel as it made them, in bfloat16, and back.
    key_value, hops = 2 * 65536 * 2 * 128, LAYERS * MICROBATCHES
    sent = traffic(report, "collective-permute", {"cp"})[1] - 2 * hops * 4 * 65536  # segment ids
    assert sent == 2 * hops * key_value * 2 + hops * key_value * ((2 if backend == "auto" else 4) + 2)
    # The first transfer runs while the local blocks are computed (in loops or in kernels).
    computation = next(
        c for c in re.split(r"\n(?=%)", text) if re.search(r"collective-permute-start[.\d]* = .*bf16\[2,1,", c)
    )
    start = re.search(r"= .*bf16\[2,1,.* collective-permute-start\(", computation)
    between = computation[start.end() : computation.index("collective-permute-done(", start.end())]
    assert re.search(r" while\(|mosaic_gpu_v2", between)


@needs_plugin
@pytest.mark.slow
def test_a_million_tokens_and_twice_as_many_on_twice_the_ring(tmp_path):
    peaks = []
    for doubling in (1, 2):
        report = compile_(
            tmp_path,
            "llama3_8b_8nodes_1m.yaml",
            f"cluster.num_nodes={8 * doubling}",
            f"runner.seq_length={1048576 * doubling}",
            f"actor.model.context_parallel_size={8 * doubling}",
            "actor.global_batch_size=1",
        )
        assert report["memory"]["fits"]
        peaks.append(report["memory"]["peak"])
    assert peaks[1] == pytest.approx(peaks[0], rel=0.05)
