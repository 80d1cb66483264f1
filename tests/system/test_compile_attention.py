"""What computes attention in programs for GPUs, compiled by XLA's real GPU compiler: without a GPU, the calls are there."""

import functools
import json
import re
import subprocess
import sys
from typing import NamedTuple

import pytest
import yaml
from support import ROOT
from test_compile import needs_plugin

from jaxpar.attention.names import CORE_ATTENTION

pytestmark = [needs_plugin, pytest.mark.slow]

CONFIG = {
    "cluster": {"num_gpus_per_node": 4},
    "runner": {"seq_length": 2048, "max_steps": 10, "output_dir": "results", "experiment_name": "small"},
    "data": {"train_data_paths": ["/data/train"]},
    "actor": {
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "model": {
            "model_type": "mistral", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 1024,
            "sliding_window": None, "precision": "bf16",
        },
        "optim": {"lr": 3.0e-4},
        "tokenizer": {"tokenizer_model": "/models/tokenizer.json"},
    },
}  # fmt: skip
UNPACKED, WINDOW = "data.reset_attention_mask=false", "actor.model.sliding_window=300"
FLOAT32 = "actor.model.precision=fp32"
EXCHANGES = {
    "one rank": "",
    "p2p": "actor.model.context_parallel_size=4 actor.model.cp_comm_type=p2p",
    "all_gather": "actor.model.context_parallel_size=4 actor.model.cp_comm_type=all_gather",
    "a2a": "actor.model.context_parallel_size=4 actor.model.cp_comm_type=a2a",
    "a2a+p2p": "actor.model.context_parallel_size=4 actor.model.cp_comm_type=a2a+p2p "
    "actor.model.hierarchical_context_parallel_sizes=[2,2]",
}
KINDS = {"packed": "", "packed window": WINDOW, "window": f"{UNPACKED} {WINDOW}", "unpacked": UNPACKED}


class Found(NamedTuple):
    """In one program: calls of tokamax's and cuDNN's kernels, and products of attention in plain JAX."""

    choices: dict[str, str]
    tokamax: int
    cudnn: int
    plain: int


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A function (GPU, *settings) → Found for each of the settings, compiled in one process."""

    @functools.cache
    def compile_all(gpu: str, *settings: str) -> list[Found]:
        folder = tmp_path_factory.mktemp("programs")
        (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
        command = [sys.executable, ROOT / "tests/tools/gpu_programs.py", gpu, folder / "config.yaml", folder, *settings]
        result = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert result.returncode == 0, result.stderr[-3000:]
        choices = json.loads(result.stdout.splitlines()[-1])
        return [look((folder / f"{n}.hlo").read_text(), one) for n, one in enumerate(choices)]

    return compile_all


def look(text: str, choices: dict[str, str]) -> Found:
    lines = text.splitlines()
    attention = [line for line in lines if re.search(f'op_name="[^"]*{CORE_ATTENTION}', line)]
    return Found(
        choices,
        sum("mosaic_gpu_v2" in line and bool(re.search("tokamax_(for|back)ward", line)) for line in attention),
        sum('custom_call_target="__cudnn$fmhaSoftmax' in line for line in attention),
        sum(bool(re.search(r' dot\(|custom_call_target="__cublas', line)) for line in attention),
    )


def kernels(found: Found) -> set[str]:
    return {choice.partition(":")[0] for choice in found.choices}


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_on_an_h100_a_kernel_computes_every_block(programs, exchange):
    """Whatever travels, whatever is masked; forward and backward."""
    found = dict(
        zip(KINDS, programs("h100", *(f"{EXCHANGES[exchange]} {kind}" for kind in KINDS.values())), strict=True)
    )
    for kind, program in found.items():
        assert not program.plain and "plain JAX" not in kernels(program), (kind, program)
        assert (program.tokamax >= 3) == ("tokamax" in kernels(program)), (kind, program)  # backward takes two
        assert (program.cudnn >= 2) == ("cuDNN" in kernels(program)), (kind, program)
    assert kernels(found["packed"]) == kernels(found["packed window"]) == {"tokamax"}
    assert kernels(found["unpacked"]) == {"cuDNN"}
    # Across ranks, the blocks of a window are shifted.
    assert kernels(found["window"]) == {"cuDNN" if exchange in ("one rank", "a2a") else "tokamax"}


def test_float32_is_plain_jax_and_says_so(programs):
    (found,) = programs("h100", FLOAT32)
    assert found.plain >= 7 and not found.tokamax and not found.cudnn  # so `plain` sees what it should
    assert found.choices == {
        "plain JAX: causal blocks with documents in float32": "cuDNN and tokamax cannot: float32 is not bfloat16 or "
        "float16; set actor.model.precision: bf16"
    }


@pytest.mark.parametrize("gpu", ["a100-80g", "b200"])
def test_on_other_gpus_cudnn_computes_rows_of_one_document(programs, gpu):
    """And plain JAX packed ones, with the reason."""
    packed, unpacked = programs(gpu, "", UNPACKED)
    assert unpacked.cudnn >= 2 and not unpacked.plain and kernels(unpacked) == {"cuDNN"}
    assert packed.plain >= 7 and not packed.tokamax
    ((choice, why),) = packed.choices.items()
    assert choice == "plain JAX: causal blocks with documents in bfloat16"
    assert why.startswith("cuDNN cannot: documents; tokamax cannot: the devices are not GPUs of NVIDIA's Hopper")
    assert "set data.reset_attention_mask: false" in why
