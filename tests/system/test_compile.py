"""Every config in configs/, compiled for its cluster of H100s by XLA's real GPU compiler, without a GPU."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpar.config import load_config
from jaxpar.measure.hlo.count import KINDS
from jaxpar.measure.hlo.parse import Computation, Module

CONFIGS = Path(__file__).parents[2] / "configs"
JAXPAR = Path(sys.executable).parent / "jaxpar"
CLUSTER_CONFIGS = sorted(path.name for path in CONFIGS.glob("*node*.yaml"))
FULL_RECOMPUTE = [
    "actor.model.recompute_granularity=full", "actor.model.recompute_method=uniform", "actor.model.recompute_num_layers=1",
]  # fmt: skip
NO_OVERLAP = ["actor.optim.overlap_param_gather=false", "actor.optim.overlap_grad_reduce=false"]
IN_EVERY_RUN = {"llama3_70b_16nodes_8k.yaml"}

needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="jax's CUDA plugin is not installed: pip install -e '.[compile]'",
)

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install -e '.[tpu]'"
)


def compile_(tmp_path: Path, name: str, *overrides: str) -> dict:
    report = tmp_path / "report.json"
    result = subprocess.run(
        [JAXPAR, "compile", CONFIGS / name, *overrides, "--json", report],
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},  # the time to compile is measured
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    assert "not counted" not in result.stdout
    return json.loads(report.read_text())


@needs_plugin
@pytest.mark.slow
def test_lora_needs_little_more_memory_than_the_frozen_weights_and_activations(tmp_path):
    report = compile_(tmp_path, "llama3_8b_1node_lora.yaml")
    weights = 2 * 8_030_261_248  # in bf16
    adapters = 83_886_080 * (12 / 8 + 2 + 4)  # float32 and moments over 8 devices, a bf16 copy, sums of gradients
    numbers = 4 * 4096 + 2 * 1024 + 2 * 14336 + 7 * 32  # kept of a token in a layer
    activations = 32 * 8192 * (2 * numbers + 4 * (32 + 2))  # beside them sums of attention and norms in float32
    assert report["memory"]["peak"] <= 1.1 * (weights + adapters + activations)
    full = compile_(tmp_path, "llama3_8b_1node_lora.yaml", "actor.model.is_lora=False", "actor.optim.zero_stage=3")
    assert 0.6 < report["flops"] / full["flops"] < 0.8


def traffic(report: dict, kind: str, axes: set[str]) -> tuple[int, int]:
    """Executions and bytes per step of all collectives of one kind over exactly these axes."""
    found = [c for c in report["collectives"] if c["kind"] == kind and set(c["axes"]) == axes]
    return sum(c["count"] for c in found), sum(c["bytes"] for c in found)


@pytest.mark.parametrize("name", CLUSTER_CONFIGS)
def test_a_shipped_config_is_sound(name):
    config = load_config(CONFIGS / name)
    sizes, architecture = config.prepare_train(config.num_configured_devices())
    assert architecture is not None
    assert sizes.num_devices == 8 * config.cluster.num_nodes
    assert sizes.tensor <= 8  # the tensor group stays on NVLink


@needs_plugin
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in IN_EVERY_RUN else pytest.mark.slow) for n in CLUSTER_CONFIGS]
)
def test_a_shipped_config_compiles_and_fits(tmp_path, name):
    report = compile_(tmp_path, name)
    keys = [
        "devices",
        "mesh",
        "compile_seconds",
        "bubble_fraction",
        "flops",
        "model_flops",
        "memory",
        "collectives",
        "roofline",
        "attention",
    ]
    assert list(report) == keys
    assert report["attention"] and not [choice for choice in report["attention"] if "plain JAX" in choice]
    assert list(report["memory"]) == ["arguments", "outputs", "aliased", "temporaries", "peak", "capacity", "fits"]
    assert math.prod(report["mesh"].values()) == report["devices"]
    assert report["memory"]["fits"]
    roofline = report["roofline"]
    assert roofline["chip_seconds"] == pytest.approx(
        sum(w["seconds"] for w in roofline["by_kind"] if w["kind"] not in KINDS)
    )
    exposed, links = roofline["exposed"], roofline["links"]
    assert roofline["seconds"] == pytest.approx(roofline["chip_seconds"] + sum(exposed.values()))
    assert all(0 <= exposed[link] <= links[link] <= roofline["seconds"] for link in ("nvlink", "network"))
    # Every collective of the counter has its seconds.
    found = {(t["kind"], tuple(t["axes"])) for t in roofline["transfers"]}
    assert found == {(c["kind"], tuple(c["axes"])) for c in report["collectives"]}
    assert all(0 <= t["exposed_seconds"] <= t["seconds"] for t in roofline["transfers"])
    # The counter walks the same program by itself.
    assert sum(roofline["product_flops"].values()) == pytest.approx(report["flops"], rel=1e-6)
    assert report["model_flops"] / roofline["mfu_at_most"] == pytest.approx(roofline["seconds"] * 989.4e12)
    assert (roofline["links"]["network"] > 0) == (report["devices"] > 8)
    assert 0.3 < report["model_flops"] / report["flops"] < 1


@needs_plugin
@pytest.mark.slow
def test_gradients_are_reduced_once_a_step_whatever_the_microbatches(tmp_path):
    """Llama-3-8B on one node, TP 4, dp 2: float32 gradients of a quarter of the parameters, none of them in a loop."""
    size = 4 * 8_030_261_248 // 4
    for batch in (8, 64):  # 4 and 32 microbatches
        report = compile_(tmp_path, "llama3_8b_1node_8k.yaml", f"actor.global_batch_size={batch}")
        _, scattered = traffic(report, "reduce-scatter", {"dp"})
        assert scattered == pytest.approx(size, rel=1e-3)
        calls = sum(c["count"] for c in report["collectives"] if "dp" in c["axes"])
        assert calls < 30  # combined by XLA; per microbatch or layer there would be hundreds
        _, gathered = traffic(report, "all-gather", {"dp"})
        assert gathered == pytest.approx(size / 2, rel=1e-3)  # in bfloat16


@needs_plugin
@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_collectives_are_megatrons_minimum(tmp_path, sequence_parallel):
    """The program for H100s, without recompute, has two per layer forward and two backward. The backward pass has two
    more gathers for the sequences that are not kept, as in Megatron-LM (Korthikanti et al., 2022, section 4.2.2)."""
    report = compile_(
        tmp_path,
        "llama3_8b_1node_8k.yaml",
        f"actor.model.sequence_parallel={sequence_parallel}",
        "actor.global_batch_size=8",
        "runner.seq_length=2048",
    )
    layers, microbatches = 32, 4
    outside = 4 * microbatches + 8  # embedding and head, and collectives that run once per step
    kinds = ("all-gather", "reduce-scatter") if sequence_parallel else ("all-reduce",)
    for kind in kinds:
        calls, _ = traffic(report, kind, {"sp" if sequence_parallel else "tp"})
        again = 2 * layers * microbatches if kind == "all-gather" else 0  # XLA combines some of them
        assert 4 * layers * microbatches <= calls <= 4 * layers * microbatches + again + outside, kind


@needs_plugin
@pytest.mark.slow
@pytest.mark.parametrize("settings", [FULL_RECOMPUTE, []], ids=["full recompute", "no recompute"])
def test_tp_comm_overlap_hides_what_the_tensor_group_sends(tmp_path, settings):
    whole, pieces = (
        compile_(tmp_path, "llama3_8b_1node_8k.yaml", f"actor.model.tp_comm_overlap={on}", *settings)
        for on in ("false", "true")
    )

    def sent(report: dict) -> tuple[float, float]:
        found = [t for t in report["roofline"]["transfers"] if t["axes"] == ["sp"]]
        return sum(t["seconds"] for t in found), sum(t["exposed_seconds"] for t in found)

    (_, exposed_whole), (seconds, exposed) = sent(whole), sent(pieces)
    assert exposed < 0.25 * seconds and exposed < 0.4 * exposed_whole
    assert pieces["flops"] == whole["flops"]
    assert pieces["memory"]["peak"] < 1.01 * whole["memory"]["peak"]
    assert pieces["roofline"]["chip_seconds"] < 1.04 * whole["roofline"]["chip_seconds"]


@needs_plugin
@pytest.mark.slow
@pytest.mark.alone
def test_compile_time_does_not_grow_with_the_cluster(tmp_path):
    """Llama-3-70B takes at most 1.3 times as long for 1,024 H100s as for 128. A busy machine gets a second try."""
    name, times = "llama3_70b_16nodes_8k.yaml", []
    for _ in range(2):
        small = compile_(tmp_path, name)
        large = compile_(tmp_path, name, "--nodes", "128", "actor.global_batch_size=1024")
        assert (small["devices"], large["devices"]) == (128, 1024)
        assert large["mesh"] == {**small["mesh"], "dp": 32}
        times.append((small["compile_seconds"], large["compile_seconds"]))
        if times[0][1] <= 1.3 * times[0][0]:
            break
    small_seconds, large_seconds = (min(column) for column in zip(*times, strict=True))
    assert small_seconds < 120
    assert large_seconds <= 1.3 * small_seconds


@needs_plugin
@pytest.mark.slow
def test_llama3_8b_takes_at_most_0_7_of_maxtexts_memory(tmp_path):
    """On 64 H100s, with the README's command. The peak GB of MaxText 0.2.5 are from the design document, for the same
    layouts and with a flash kernel."""
    maxtext = {
        "sp8,dp8": 31.6, "sp8,pp4,dp2,microbatches=8": 22.2, "sp8,pp4,dp2,microbatches=32": 12.0,
        "cp8,dp8,zero=3": 41.0, "dp64,zero=3": 8.9,
    }  # fmt: skip
    # With ZeRO-3's overlap, which is on by default, dp 64 takes 7.4 GB: 0.83.
    options = ["--nodes", "8", *NO_OVERLAP, *FULL_RECOMPUTE]
    reports = compile_(tmp_path, "llama3_8b_1node_8k.yaml", *maxtext, *options)
    assert list(reports) == list(maxtext)
    assert [report["mesh"]["pp"] for report in reports.values()] == [1, 4, 4, 1, 1]
    ratios = {layout: reports[layout]["memory"]["peak"] / 1e9 / peak for layout, peak in maxtext.items()}
    assert max(ratios.values()) <= 0.7, ratios


@needs_plugin
@pytest.mark.slow
def test_zero_stages_take_what_the_paper_says(tmp_path):
    """For N parameters on n devices, here with float32 gradients: 2N + 4N + 12N/n bytes, 2N + 16N/n and 18N/n
    (Rajbhandari et al., 2020, arXiv:1910.02054, section 5; figure 1 with K = 12). The activations of 512 tokens are
    small beside it."""
    short = ["runner.seq_length=512", "actor.global_batch_size=8", *FULL_RECOMPUTE]
    reports = compile_(tmp_path, "llama3_8b_1node_8k.yaml", "dp8,zero=1", "dp8,zero=2", "dp8,zero=3", *short)
    numbers, devices = 8.03e9, 8
    for report, formula in zip(
        reports.values(),
        (6 * numbers + 12 * numbers / devices, 2 * numbers + 16 * numbers / devices, 18 * numbers / devices),
        strict=True,
    ):
        assert report["memory"]["peak"] == pytest.approx(formula, rel=0.1)
    sent = [
        {kind: traffic(report, kind, {"dp"})[1] / numbers for kind in ("reduce-scatter", "all-gather")}
        for report in reports.values()
    ]
    # Gradients are sent once, in float32; parameters once, in bfloat16, and in stage 3 again for the backward pass.
    assert [s["reduce-scatter"] for s in sent] == pytest.approx([4, 4, 4], rel=0.01)
    assert [s["all-gather"] for s in sent] == pytest.approx([2, 2, 4], rel=0.05)


@needs_plugin
@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 2])
def test_offloaded_activations_wait_in_the_hosts_memory(tmp_path, stages):
    """Llama-3-8B without recompute: what the layers keep for the backward pass, 97 MB each at TP 8, is on no GPU, but for
    three of 32 layers: one in use, one that arrives, one that leaves."""
    whole = ["actor.model.tensor_model_parallel_size=8", "actor.global_batch_size=8"]
    whole += [f"actor.model.pipeline_model_parallel_size={stages}", "--nodes", str(stages)]
    hlo = tmp_path / "step.hlo"
    kept, offloaded = (
        compile_(
            tmp_path, "llama3_8b_1node_8k.yaml", *whole, f"actor.model.offload_activations={on}", "--hlo", str(hlo)
        )
        for on in ("false", "true")
    )
    assert offloaded["flops"] == kept["flops"]
    assert offloaded["memory"]["peak"] < kept["memory"]["peak"] - 2.8e9
    text = hlo.read_text()
    assert "dynamic-update-slice-start" in text and "dynamic-slice-start" in text
    # The host does not fill the buffers. "S(5)" is XLA's name for host memory.
    assert all("AllocateBuffer" in line for line in text.splitlines() if "S(5)} custom-call(" in line)
    assert "AllocateBuffer" in text and 'execution_thread="host"' not in text


@needs_plugin
@pytest.mark.slow
def test_offloaded_moments_are_on_no_gpu(tmp_path):
    """Adam's two float32 moments per parameter are split over eight GPUs, and fetched once activations are freed."""
    there, offloaded = (
        compile_(tmp_path, "llama3_8b_1node_8k.yaml", f"actor.optim.optimizer_cpu_offload={on}")["memory"]
        for on in ("false", "true")
    )
    moments = 2 * 4 * 8.03e9 / 8
    assert there["arguments"] - offloaded["arguments"] == pytest.approx(moments, rel=0.01)
    assert there["peak"] - offloaded["peak"] > 0.95 * moments


@needs_plugin
@pytest.mark.slow
def test_zero_3_sends_while_it_computes(tmp_path):
    """In XLA's order of the GPU instructions, there are matrix products between the start and the end of a transfer."""
    short = [
        "actor.optim.zero_stage=3",
        "actor.model.tensor_model_parallel_size=1",
        "actor.model.sequence_parallel=false",
    ]
    compile_(tmp_path, "llama3_8b_1node_8k.yaml", *short, "--hlo", str(tmp_path / "step.hlo"))
    module, beside = Module((tmp_path / "step.hlo").read_text()), {}
    for computation in module.computations.values():
        instructions = list(computation.instructions.values())
        if not any("mosaic_gpu_v2" in i.attributes for i in instructions):
            continue  # not a layer: a layer has attention
        for start, end in transfers(computation):
            between = instructions[start:end]
            products = sum("__cublas$" in i.attributes or "gemm" in i.attributes for i in between)
            beside.setdefault(instructions[start].opcode, {}).setdefault(computation.name, []).append(products)
    assert len(beside["all-gather-start"]) >= 2, beside  # forward and backward
    assert len(beside["reduce-scatter-start"]) >= 1, beside
    assert all(sum(found) > 3 for loops in beside.values() for found in loops.values()), beside


def transfers(computation: Computation) -> list[tuple[int, int]]:
    """(index of the start, index of the end) of each transfer."""
    instructions = list(computation.instructions.values())
    return [
        (
            at,
            next(
                j for j, end in enumerate(instructions) if end.operands[:1] == (start.name,) and "-done" in end.opcode
            ),
        )
        for at, start in enumerate(instructions)
        if start.opcode in ("all-gather-start", "reduce-scatter-start")
    ]


@needs_libtpu
@pytest.mark.slow
def test_a_tpu_slice(tmp_path):
    report = compile_(tmp_path, "quickstart.yaml", "--tpu", "v5e:4x4")
    assert report["devices"] == 16
    assert report["memory"]["capacity"] == 16 * 2**30 and report["memory"]["fits"]
    assert 0.5 < report["model_flops"] / report["flops"] < 1
    # Two per layer forward and two backward, for two layers and four microbatches, plus those in the bubble. XLA for
    # TPU spreads some of them over several fusions; with each of these counted, there would be 127.
    gathers, _ = traffic(report, "all-gather", {"sp"})
    assert 32 <= gathers < 64
