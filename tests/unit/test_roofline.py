"""The least time of programs whose answer is known."""

import contextlib
import importlib.util
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import pytest

from jaxpar.hardware import GPUS
from jaxpar.measure.compile import gpu_devices, too_large
from jaxpar.measure.roofline import roofline

H100 = GPUS["h100"]
PEAK, MEMORY, NVLINK, NETWORK = H100.peak_flops, H100.memory_bandwidth, H100.nvlink_bandwidth, H100.network_bandwidth

needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="jax's CUDA plugin is not installed: pip install -e '.[compile]'",
)


def program(entry: str, *computations: str, devices: int = 1) -> str:
    head = f"HloModule jit_f, is_scheduled=true, replica_count=1, num_partitions={devices}\n\n"
    return head + "\n\n".join([*computations, "ENTRY %main (x: f32[8]) -> f32[8] {\n" + entry + "\n}"]) + "\n"


def read(text: str, devices: int = 1, per_node: int = 8, **options):
    return roofline(text, H100, range(devices), per_node, **options)


def kinds(found) -> dict[str, tuple[float, float, float, float]]:
    return {work.kind: (work.seconds, work.flops, work.bytes, work.count) for work in found.by_kind}


@pytest.mark.parametrize(
    ("dtype", "peak", "itemsize"), [("bf16", PEAK, 2), ("f32", PEAK / 2, 4), ("f8e4m3fn", 2 * PEAK, 1)]
)
@pytest.mark.parametrize(("m", "n", "k"), [(4096, 4096, 4096), (16, 16, 4096)])
def test_a_product_takes_its_flops_or_its_bytes(dtype, peak, itemsize, m, n, k):
    found = read(
        program(
            f"  %a = {dtype}[{m},{k}]{{1,0}} parameter(0)\n  %b = {dtype}[{k},{n}]{{1,0}} parameter(1)\n"
            f"  ROOT %c = {dtype}[{m},{n}]{{1,0}} dot(%a, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"
        )
    )
    flops, moved = 2 * m * n * k, (m * k + k * n + m * n) * itemsize
    assert kinds(found) == {f"products {dtype}": (max(flops / peak, moved / MEMORY), flops, moved, 1)}
    assert found.product_flops == {dtype: flops}
    assert (found.seconds, found.chip_seconds, found.launches, found.hbm_bytes) == (
        max(flops / peak, moved / MEMORY), max(flops / peak, moved / MEMORY), 1, moved,
    )  # fmt: skip


def test_mfu_is_of_the_least_time():
    text = program("  %x = f32[8]{0} parameter(0)\n  ROOT %y = f32[8]{0} negate(%x)")
    assert read(text).mfu_at_most is None
    assert read(text, model_flops=1e3).mfu_at_most == pytest.approx(1e3 / (64 / MEMORY * PEAK))


FUSED = """%fused (p: f32[100,8], i: s32[]) -> f32[8] {
  %p = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,8]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,8}
  %flat = f32[8]{0} bitcast(%row)
  ROOT %out = f32[8]{0} exponential(%flat)
}"""


@pytest.mark.parametrize(
    "call",
    [
        "  ROOT %y = f32[8]{0} fusion(%x, %i), kind=kLoop, calls=%fused",
        "  %s = ((f32[100,8]{1,0}, s32[]), f32[8]{0}, u32[]) fusion-start(%x, %i), kind=kLoop, calls=%fused\n"
        "  ROOT %y = f32[8]{0} fusion-done(%s)",
    ],
    ids=["sync", "async"],
)
def test_of_a_large_array_the_slice_counts(call):
    found = read(program("  %x = f32[100,8]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n" + call, FUSED))
    assert kinds(found) == {"other kernels": (pytest.approx((32 + 4 + 32) / MEMORY), 0, 32 + 4 + 32, 1)}


def test_a_kernel_that_reads_a_slice_where_it_lies_is_that_kernel():
    """XLA's dynamic_slice_fusion: the fusion is a call of cuBLAS, and not some kernel of its bytes."""
    fused = """%sliced (p: bf16[16,64,64], i: s32[]) -> bf16[64,64] {
  %p = bf16[16,64,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = bf16[1,64,64]{2,1,0} dynamic-slice(%p, %i, %zero, %zero), dynamic_slice_sizes={1,64,64}
  %flat = bf16[64,64]{1,0} bitcast(%one)
  ROOT %out = bf16[64,64]{1,0} custom-call(%flat, %flat), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
}"""
    entry = "  %x = bf16[16,64,64]{2,1,0} parameter(0)\n  %i = s32[] parameter(1)\n"
    found = read(program(entry + "  ROOT %y = bf16[64,64]{1,0} fusion(%x, %i), kind=kCustom, calls=%sliced", fused))
    assert found.product_flops == {"bf16": 2 * 64**3}
    assert [work.kind for work in found.by_kind] == ["products bf16"]


def test_a_copy_reads_and_writes_once():
    for copy in (
        "  ROOT %y = f32[8]{0} copy(%x)",
        "  %s = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%x)\n  ROOT %y = f32[8]{0} copy-done(%s)",
    ):
        found = read(program("  %x = f32[8]{0} parameter(0)\n" + copy))
        assert kinds(found) == {"copies": (64 / MEMORY, 0, 64, 1)}


def test_an_update_in_place_writes_the_slice():
    update = """%update (p: f32[100,8], u: f32[1,8], i: s32[]) -> f32[100,8] {
  %p = f32[100,8]{1,0} parameter(0)
  %u = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %out = f32[100,8]{1,0} dynamic-update-slice(%p, %u, %i, %zero)
}"""
    found = read(
        program(
            "  %x = f32[100,8]{1,0} parameter(0)\n  %u = f32[1,8]{1,0} parameter(1)\n  %i = s32[] parameter(2)\n"
            "  ROOT %y = f32[100,8]{1,0} fusion(%x, %u, %i), kind=kLoop, calls=%update",
            update,
        )
    )
    assert kinds(found) == {"copies": (pytest.approx((32 + 4 + 32) / MEMORY), 0, 32 + 4 + 32, 1)}


LOOP = """%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8]{0} get-tuple-element(%t), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %y = f32[8]{0} exponential(%x)
  ROOT %r = (s32[], f32[8]{0}) tuple(%next, %y)
}

%condition (t: (s32[], f32[8])) -> pred[] {
  %t = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}"""


def test_a_loop_multiplies():
    found = read(
        program(
            "  %x = f32[8]{0} parameter(0)\n  %zero = s32[] constant(0)\n  %t = (s32[], f32[8]{0}) tuple(%zero, %x)\n"
            "  %w = (s32[], f32[8]{0}) while(%t), condition=%condition, body=%body\n"
            "  ROOT %y = f32[8]{0} get-tuple-element(%w), index=1",
            LOOP,
        )
    )
    by_name = {operation.name: operation for operation in found.operations}
    assert by_name["y"].count == 7 and by_name["y"].bytes == 7 * 64


@pytest.mark.parametrize(("fraction", "count"), [(None, 1), (Fraction(1, 4), 0.25)])
def test_a_conditional_takes_its_costliest_branch_as_often_as_is_known(fraction, count):
    branches = [
        f"%{name} (x: f32[{size}]) -> f32[8] {{\n  %x = f32[{size}]{{0}} parameter(0)\n"
        f'  ROOT %y_{name} = f32[8]{{0}} custom-call(%x), custom_call_target="work"\n}}'
        for name, size in (("cheap", 8), ("costly", 800))
    ]
    entry = (
        "  %p = pred[] parameter(0)\n  %a = f32[800]{0} parameter(1)\n  %b = f32[8]{0} parameter(2)\n"
        "  ROOT %c = f32[8]{0} conditional(%p, %a, %b), true_computation=%costly, false_computation=%cheap"
    )
    found = read(program(entry, *branches), taken=lambda name: fraction)
    assert [(o.name, o.count, o.bytes) for o in found.operations] == [("y_costly", count, count * (3200 + 32))]


def collective(kind: str, groups: str, operand: int, result: int) -> str:
    return program(
        f"  %x = f32[{operand}]{{0}} parameter(0)\n"
        f"  ROOT %y = f32[{result}]{{0}} {kind}(%x), channel_id=1, {groups}, use_global_device_ids=true",
        devices=16,
    )


ALL, INSIDE, ACROSS = "[1,16]<=[16]", "[2,8]<=[16]", "[8,2]<=[2,8]T(1,0)"


@pytest.mark.parametrize(
    ("kind", "groups", "operand", "nvlink", "network"),
    [
        # Of n devices each receives (n-1)/n of the data; of m nodes (m-1)/m of it comes from outside, for all of a node.
        ("all-gather", INSIDE, 1000, 7 / 8 * 32_000, 0),
        ("all-gather", ACROSS, 1000, 0, 1 / 2 * 8_000),
        ("all-gather", ALL, 1000, (15 / 16 - 1 / 16) * 64_000, 1 / 16 * 64_000),
        ("reduce-scatter", INSIDE, 8000, 7 / 8 * 32_000, 0),
        ("all-reduce", INSIDE, 8000, 2 * 7 / 8 * 32_000, 0),
        ("all-reduce", ACROSS, 8000, 0, 2 * 1 / 2 * 32_000),
        ("all-to-all", INSIDE, 8000, 7 / 8 * 32_000, 0),
    ],
)
def test_transfers_take_their_links(kind, groups, operand, nvlink, network):
    found = read(collective(kind, f"replica_groups={groups}", operand, operand), devices=16)
    assert found.links == {"nvlink": pytest.approx(nvlink / NVLINK), "network": pytest.approx(network / NETWORK)}
    assert found.chip_seconds == 0 and found.hbm_bytes == 0
    assert found.seconds == max(found.links.values())
    assert found.launches == 1


def test_a_permute_leaves_a_node_if_any_pair_does():
    ring = "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"
    text = program(
        f"  %x = f32[1000]{{0}} parameter(0)\n  ROOT %y = f32[1000]{{0}} collective-permute(%x), channel_id=1, {ring}",
        devices=4,
    )
    assert read(text, 4, 4).links == {"nvlink": 4000 / NVLINK, "network": 0}
    assert read(text, 4, 2).links == {"nvlink": 0, "network": 4000 / NETWORK}
    # Places are places in the mesh; their devices may stand elsewhere.
    assert roofline(text, H100, [0, 2, 1, 3], 2).links["network"] == 4000 / NETWORK


def test_groups_of_one_send_nothing():
    assert read(collective("all-reduce", "replica_groups=[16,1]<=[16]", 8, 8), devices=16).seconds == 0


@contextlib.contextmanager
def source_lines():
    """Programs keep their source lines, which conftest.py leaves out for the sake of the compile cache."""
    limit = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 10)
    yield
    jax.config.update("jax_traceback_in_locations_limit", limit)


@needs_plugin
def test_a_program_that_xla_compiled_for_an_h100():
    """A loop over products, its figures from the shapes, and the line of this file that made the product."""

    def f(x, weights):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, weights)[0]

    line = f.__code__.co_firstlineno + 2
    (device,) = gpu_devices("h100", 1, 1)
    place = jax.sharding.SingleDeviceSharding(device)
    tokens, size, layers = 4096, 2048, 5
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in ((tokens, size), (layers, size, size))
    ]
    with source_lines():
        lowered = jax.jit(f).lower(*shapes)
    found = read(lowered.compile(compiler_options={"xla_gpu_autotune_level": 0}).as_text())
    flops = layers * 2 * tokens * size * size
    assert found.product_flops == {"bf16": flops}
    assert kinds(found)["products bf16"][0] >= flops / PEAK
    # Each layer reads its weights and x and writes the product; tanh reads and writes at least as much again.
    least = layers * (size * size + 2 * tokens * size) * 2
    assert least <= found.hbm_bytes <= 3 * least
    (product,) = [operation for operation in found.operations if operation.flops]
    assert product.count == layers
    assert product.source.endswith(f"test_roofline.py:{line}")


def test_a_tpu_program_that_is_too_large():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 18.06G of "
        "15.75G hbm. Exceeded hbm capacity by 2.31G."
    )
    found = too_large(message)
    assert found is not None and found.startswith("does not fit: needs 18.1 of 15.8 GiB a device; try: ")
    assert too_large("INTERNAL: something else") is None


def test_least_times_are_finite_for_every_gpu():
    for gpu in GPUS.values():
        assert all(0 < gpu.peak(dtype) < math.inf for dtype in ("bf16", "f16", "f32", "f8e4m3fn"))
        assert gpu.network_bandwidth < gpu.nvlink_bandwidth < gpu.memory_bandwidth
    assert GPUS["a100-80g"].peak("f8e4m3fn") == GPUS["a100-80g"].peak("bf16")  # Ampere has no 8-bit floats
