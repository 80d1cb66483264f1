"""The counter, on programs for which the right answer is known."""

import functools
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from support import QUICK

from jaxpar.config import MeshSizes, config_from_dict
from jaxpar.measure.hlo import Collective, attention_flops, count
from jaxpar.measure.hlo.groups import MeshAxes, device_groups, parse_groups
from jaxpar.parallel.batch import DTYPES
from jaxpar.parallel.mesh import AXES, build_mesh, device_grid
from jaxpar.pipeline.tick_scope import scope_name, taken_fraction
from jaxpar.program import Program

N = 16
PRODUCT = 2 * N**3  # FLOPs of one [N, N] by [N, N]


def compiled(function, *shapes, dtype=jnp.float32):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)).compile()


def counted(function, *shapes):
    return count(compiled(function, *shapes).as_text())


def without_trip_counts(text: str) -> str:
    stripped = re.sub(r'"known_(trip_count|init_step|induction_variable)":\{[^}]*\},?', "", text)
    assert stripped != text
    return stripped


# --- FLOPs and control flow ---


def test_products():
    assert counted(lambda x, y: x @ y, (8, 32), (32, 48)).flops == 2 * 8 * 32 * 48
    batched = counted(lambda x, y: jnp.einsum("bhqd,bhkd->bhqk", x, y), (2, 3, 8, 16), (2, 3, 32, 16))
    assert batched.flops == 2 * 2 * 3 * 8 * 32 * 16
    fused = counted(lambda x, y, z: jax.nn.relu(x @ y + z) @ y, (N, N), (N, N), (N,))
    assert fused.flops == 2 * PRODUCT
    assert fused.uncounted == [] and fused.collectives == [] and fused.kernel_flops == 0


@pytest.mark.parametrize(
    "options",
    [
        dict(window_strides=(1, 1), padding="SAME"),
        dict(window_strides=(2, 3), padding=((2, 0), (1, 4)), rhs_dilation=(2, 1)),
        dict(window_strides=(1, 1), padding=((2, 1), (0, 3)), lhs_dilation=(3, 2)),
        dict(window_strides=(1, 1), padding="SAME", feature_group_count=4),
    ],
    ids=["padded", "strided", "dilated", "grouped"],
)
def test_convolutions_as_xla_counts_them(options):
    kernel = (3, 5, 8 // options.get("feature_group_count", 1), 16)
    function = functools.partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)
    # The lowered program has no loops, and its convolutions are not calls yet, so XLA can count it.
    lowered = jax.jit(function).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in [(2, 9, 11, 8), kernel]))
    assert count(lowered.as_text("hlo")).flops == lowered.cost_analysis()["flops"]


def nested_scans(x):
    def inner(x, _):
        return jnp.sin(x @ x), None

    def outer(x, _):
        return lax.scan(inner, x, None, length=5)[0] @ x, None

    return lax.scan(outer, x, None, length=3)[0]


def test_nested_loops_multiply():
    text = compiled(nested_scans, (N, N)).as_text()
    assert count(text).flops == 3 * (5 + 1) * PRODUCT
    # Without XLA's own trip counts, the conditions of the loops give the same.
    again = count(without_trip_counts(text))
    assert again.flops == 3 * (5 + 1) * PRODUCT and again.uncounted == []


@pytest.mark.parametrize(
    "start, more, step, trips",
    [
        (0, lambda i: i < 7, 1, 7),
        (0, lambda i: i <= 7, 1, 8),
        (3, lambda i: i < 10, 4, 2),
        (10, lambda i: i > 0, -3, 4),
        (10, lambda i: i >= 1, -3, 4),
        (0, lambda i: i != 12, 4, 3),
        (5, lambda i: i < 5, 1, 0),
    ],
)
def test_trip_counts_from_conditions(start, more, step, trips):
    def loop(x):
        return lax.while_loop(lambda c: more(c[0]), lambda c: (c[0] + step, jnp.sin(c[1] @ c[1])), (start, x))[1]

    # Straight from jax, before XLA has looked at the loop.
    text = jax.jit(loop).lower(jax.ShapeDtypeStruct((N, N), jnp.float32)).as_text("hlo")
    assert "known_trip_count" not in text
    result = count(text)
    assert result.flops == trips * PRODUCT and result.uncounted == []


def test_a_loop_that_depends_on_data_counts_once_and_says_so():
    result = counted(lambda x: lax.while_loop(lambda x: x.sum() > 0, lambda x: jnp.sin(x @ x), x), (N, N))
    assert result.flops == PRODUCT
    assert len(result.uncounted) == 1 and "its trip count depends on data" in result.uncounted[0]


def test_the_most_expensive_branch_of_a_conditional_counts():
    result = counted(
        lambda x: lax.switch(
            x.astype(int)[0, 0], [lambda x: x, lambda x: jnp.sin(x @ x) @ x, lambda x: jnp.sin(x @ x)], x
        ),
        (N, N),
    )
    assert result.flops == 2 * PRODUCT and result.uncounted == []


def test_a_conditional_counts_as_often_as_it_is_taken():
    def in_some_ticks(x):
        with jax.named_scope(scope_name(3, 7)):
            return lax.cond(x[0, 0] > 0, lambda x: jnp.sin(x @ x), lambda x: x, x)

    text = compiled(in_some_ticks, (N, N)).as_text()
    assert count(text).flops == PRODUCT
    assert count(text, taken=taken_fraction).flops == PRODUCT * 3 / 7
    assert taken_fraction(f"jit(f)/{scope_name(3, 7)}/cond") == Fraction(3, 7)
    assert taken_fraction(f"jit(f)/{scope_name(3, 7)}/inner/cond") is None


def test_gradient_of_a_scan_is_two_more_products():
    def loss(weights, x):
        return lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, weights)[0].sum()

    assert counted(jax.grad(loss), (6, N, N), (N, N)).flops == 3 * 6 * PRODUCT

    def recomputed(weights, x):
        body = jax.checkpoint(lambda x, w: (jnp.sin(x @ w), None))
        return lax.scan(body, x, weights)[0].sum()

    assert counted(jax.grad(recomputed), (6, N, N), (N, N)).flops == 4 * 6 * PRODUCT


# --- Collectives ---

SIZES = MeshSizes(dp=2, pp=2, tp=1, sp=2, cp=2)  # 16 devices, not in the order of their ids


def collectives(function, sizes=SIZES):
    # check_vma: any collective must be counted, even if no spec describes its result.
    mapped = jax.shard_map(function, mesh=build_mesh(sizes), in_specs=P(), out_specs=P(), check_vma=False)
    return count(compiled(mapped, (N, N)).as_text(), device_grid(sizes))


def test_the_mesh_is_permuted():
    assert device_grid(SIZES).ravel().tolist() != list(range(16))


BYTES = N * N * 4
OVER = [("dp",), ("pp",), ("sp",), ("cp",), ("dp", "cp"), ("pp", "sp"), ("dp", "pp", "sp", "cp")]


@pytest.mark.parametrize("over", OVER, ids="+".join)
def test_collectives_find_their_axes(over):
    ways = 2 ** len(over)
    assert collectives(lambda x: lax.psum(x, over)).collectives == [
        Collective("all-reduce", over, 1, BYTES, "f32", False)
    ]
    assert collectives(lambda x: lax.all_gather(x, over, tiled=True)).collectives == [
        Collective("all-gather", over, 1, ways * BYTES, "f32", False)
    ]
    assert collectives(lambda x: lax.psum_scatter(x, over, tiled=True)).collectives == [
        Collective("reduce-scatter", over, 1, BYTES, "f32", False)
    ]
    assert collectives(lambda x: lax.all_to_all(x, over, 0, 0, tiled=True)).collectives == [
        Collective("all-to-all", over, 1, BYTES, "f32", False)
    ]


@pytest.mark.parametrize("axis", ["dp", "pp", "sp", "cp"])
def test_permutes_find_their_axis(axis):
    sizes = MeshSizes(**{**dict(dp=2, pp=1, tp=1, sp=2, cp=1), "pp": 1, axis: 4})
    sizes = MeshSizes(**{**sizes.as_dict(), "dp" if axis != "dp" else "cp": 16 // (4 * (1 if axis == "sp" else 2))})
    ring = [(i, (i + 1) % 4) for i in range(4)]
    for pairs in (ring, ring[:-1], ring[::-1], [(0, 1), (1, 0)]):
        result = collectives(lambda x, pairs=pairs: lax.ppermute(x, axis, pairs), sizes=sizes)
        assert result.collectives == [Collective("collective-permute", (axis,), 1, BYTES, "f32", False)]


def test_collectives_in_loops():
    def ring(x):
        def turn(x, _):
            return jnp.sin(lax.ppermute(x, "cp", [(0, 1), (1, 0)]) + lax.psum(x @ x, "sp")), None

        return lax.psum(lax.scan(turn, x, None, length=9)[0], "sp")

    result = collectives(ring)
    assert result.flops == 9 * PRODUCT
    assert set(result.collectives) == {
        Collective("collective-permute", ("cp",), 9, 9 * BYTES, "f32", True),
        Collective("all-reduce", ("sp",), 9, 9 * BYTES, "f32", True),
        Collective("all-reduce", ("sp",), 1, BYTES, "f32", False),
    }


def test_branches_that_differ_in_collectives_are_reported():
    def branches(x):
        return lax.cond(lax.axis_index("pp") == 0, lambda x: lax.psum(x, "sp"), lambda x: jnp.sin(x), x)

    result = collectives(branches)
    assert result.collectives == [Collective("all-reduce", ("sp",), 1, BYTES, "f32", False)]
    assert len(result.uncounted) == 1 and "branches differ in collectives" in result.uncounted[0]


def test_a_group_of_one_sends_nothing():
    assert collectives(lambda x: lax.psum(lax.all_gather(x, "tp", tiled=True), "tp")).collectives == []
    lines = "%y = f32[4] all-reduce(%x), replica_groups={{0},{1}}, channel_id=1, use_global_device_ids=true\n"
    assert count(snippet(lines + "ROOT %z = f32[4] collective-permute(%y), source_target_pairs={{0,0},{1,1}}", 2)).collectives == []  # fmt: skip


def test_groups_that_match_no_axes_are_reported():
    line = "ROOT %y = f32[4] all-reduce(%x), channel_id=1, replica_groups={{0,3},{1,2}}, use_global_device_ids=true"
    result = count(snippet(line, 4), np.arange(4).reshape(2, 2), ("a", "b"))
    assert result.collectives == [Collective("all-reduce", (), 1, 16, "f32", False)]
    assert result.uncounted == ["all-reduce in groups of 2 that match no axes of the mesh (1 time per step)"]


def test_groups_in_an_unknown_notation_are_reported():
    result = count(snippet("ROOT %y = f32[4] all-reduce(%x), channel_id=1, replica_groups=everybody", 4))
    assert result.collectives == [] and "all-reduce y: its groups are in an unknown notation" in result.uncounted[0]


def test_a_mesh_of_another_size_is_an_error():
    text = compiled(lambda x: x @ x, (N, N)).as_text()
    with pytest.raises(ValueError, match="but the program is for 1 devices"):
        count(text, device_grid(SIZES))
    with pytest.raises(ValueError, match="not the text of an HLO module"):
        count("module @jit_f {}")


@pytest.mark.parametrize(
    "text, groups",
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("{}", []),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("[4,2]<=[2,2,2]T(1,2,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=2,'b'=1,'c'=2] {'a','c'}", [[0, 1, 2, 3]]),
        ("mesh['a'=1,'b'=4], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2, 1, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", [[3, 1], [2, 0]]),
        ("mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("mesh['a'=8] {'a':(1)2,'a':(4)2}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
    ],
)
def test_notations_of_groups(text, groups):
    assert [list(group) for group in parse_groups(text)] == groups


def test_numbering_of_group_members():
    read = functools.partial(device_groups, replicas=2, partitions=3)
    assert read([], channel=True, global_ids=True, pairs=False) == [(0, 1, 2, 3, 4, 5)]
    assert read([(0, 4)], channel=True, global_ids=True, pairs=False) == [(0, 4)]
    assert read([(0, 1)], channel=False, global_ids=False, pairs=False) == [(0, 3), (1, 4), (2, 5)]
    assert read([(0,), (1,)], channel=True, global_ids=False, pairs=False) == [(0, 1, 2), (3, 4, 5)]
    assert read([(0, 2)], channel=True, global_ids=False, pairs=True) == [(0, 2), (3, 5)]


def test_axes_of_groups_and_pairs():
    mesh = MeshAxes((2, 1, 3), ("a", "b", "c"))
    assert mesh.of_groups([(0, 1, 2), (3, 5, 4)]) == ("c",)
    assert mesh.of_groups([(3, 0), (1, 4), (2, 5)]) == ("a",)
    assert mesh.of_groups([tuple(range(6))]) == ("a", "c")
    assert mesh.of_groups([(0, 1), (2, 3), (4, 5)]) == ()
    assert mesh.of_pairs([(0, 1), (1, 2), (4, 5)]) == ("c",)
    assert mesh.of_pairs([(0, 3), (1, 5)]) == ("a", "c")
    assert mesh.of_pairs([(0, 9)]) == ()


# --- What XLA for GPU writes (jax 0.10.2, H100), shortened ---


def snippet(lines: str, devices: int = 8, parameter: str = "f32[4]{0}") -> str:
    body = "\n".join(f"  {line}" for line in lines.splitlines())
    return f"""HloModule jit_f, is_scheduled=true, num_partitions={devices}

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}}

%wrapped (p: f32[4]) -> f32[4] {{
  %p = f32[4]{{0}} parameter(0)
  ROOT %all-to-all.1 = f32[4]{{0}} all-to-all(%p), channel_id=3, replica_groups={{{{0,1,2,3,4,5,6,7}}}}, dimensions={{0}}
}}

ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = {parameter} parameter(0)
{body}
}}
"""


GROUPS = "channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true"  # over the first axis of 2 × 4


@pytest.mark.parametrize(
    "lines, expected",
    [
        (
            f"%s = ((bf16[1,8]{{1,0}}, bf16[3]{{0}}), (bf16[2,8]{{1,0}}, bf16[6]{{0}})) all-gather-start(%b, %c), {GROUPS}, dimensions={{0}}\n"
            "ROOT %d = (bf16[2,8]{1,0}, bf16[6]{0}) all-gather-done(%s)",
            Collective("all-gather", ("a",), 1, 2 * (8 + 3) * 2, "bf16", False),
        ),
        (
            f"%s = ((f32[6]{{0}}, /*index=1*/f32[4]{{0}}), (f32[3]{{0}}, f32[2]{{0}})) reduce-scatter-start(%e, %x), {GROUPS}, dimensions={{0}}, to_apply=%add\n"
            "ROOT %d = (f32[3]{0}, f32[2]{0}) reduce-scatter-done(%s)",
            Collective("reduce-scatter", ("a",), 1, (6 + 4) * 4, "f32", False),
        ),
        (
            f'%s = f32[4]{{0:T(8,128)}} all-reduce-start(%x), {GROUPS}, to_apply=%add, metadata={{op_name="jit(f)/psum, to_apply=%x"}}\n'
            "ROOT %d = f32[4]{0:T(8,128)} all-reduce-done(%s)",
            Collective("all-reduce", ("a",), 1, 16, "f32", False),
        ),
        (
            "%s = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=2, source_target_pairs={{0,1},{1,2},{2,3},{4,5},{5,6},{6,7}}\n"
            "ROOT %d = f32[4]{0} collective-permute-done(%s)",
            Collective("collective-permute", ("b",), 1, 16, "f32", False),
        ),
        (
            "%s = ((f32[4]{0}), f32[4]{0}, s32[]) async-start(%x), calls=%wrapped\n"
            "%u = ((f32[4]{0}), f32[4]{0}, s32[]) async-update(%s)\n"
            "ROOT %d = f32[4]{0} async-done(%u)",
            Collective("all-to-all", ("a", "b"), 1, 16, "f32", False),
        ),
        (  # XLA for TPU (libtpu 0.0.42), which puts each line except the calls into a fusion of its own
            f'%a = f32[8]{{0}} all-gather(%x), {GROUPS}, dimensions={{0}}, frontend_attributes={{chain_id="2"}}\n'
            '%s = (f32[4]{0}, f32[8]{0}, u32[]) custom-call(%a), custom_call_target="AsyncCollectiveStart"\n'
            f'%m = f32[8]{{0}} all-gather(%x), {GROUPS}, dimensions={{0}}, frontend_attributes={{chain_id="2"}}\n'
            f'%z = f32[8]{{0}} all-gather(%x), {GROUPS}, dimensions={{0}}, frontend_attributes={{chain_id="2"}}\n'
            'ROOT %d = f32[8]{0} custom-call(%x, %z), custom_call_target="AsyncCollectiveDone"',
            Collective("all-gather", ("a",), 1, 32, "f32", False),
        ),
    ],
    ids=["all-gather", "reduce-scatter", "all-reduce", "collective-permute", "async", "chain"],
)
def test_asynchronous_collectives_count_once(lines, expected):
    parts = "%b = bf16[1,8]{1,0} broadcast(%x)\n%c = bf16[3]{0} broadcast(%x)\n%e = f32[6]{0} broadcast(%x)\n"
    result = count(snippet(parts + lines), np.arange(8).reshape(2, 4), ("a", "b"))
    assert result.collectives == [expected] and result.uncounted == []


def call(target: str, results: str, operands: list[str], config: str, name: str = "jit(f)/x") -> str:
    values = [f"%o{i} = {shape} broadcast(%x)" for i, shape in enumerate(operands)]
    names = ", ".join(f"%o{i}" for i in range(len(operands)))
    root = f'ROOT %r = {results} custom-call({names}), custom_call_target="{target}", metadata={{op_name="{name}"}}, backend_config={config}'
    return snippet("\n".join([*values, root]), 1)


@pytest.mark.parametrize("target", ["__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8"])
def test_cublas(target):
    config = (
        '{"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],'
        '"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}'
    )
    operands = ["bf16[4,512,1024]{2,1,0}", "bf16[4,1024,256]{2,1,0}", "f32[]"]
    result = count(call(target, "(bf16[4,512,256]{2,1,0}, s8[33554432]{0})", operands, config))
    assert result.flops == 2 * 4 * 512 * 256 * 1024
    assert result.uncounted == [] and result.kernel_flops == 0


def cudnn_config(mask: str) -> str:
    return (
        '{"cudnn_fmha_backend_config": {"algorithm": {"tuning_knobs": {"17": "1"}}, "intermediate_tensor_shape": '
        '{"element_type": "BF16", "dimensions": ["2", "8", "1024", "512"], "tuple_shapes": []}, '
        f'"mask_type": "{mask}"' + "}}"
    )


def test_cudnn_attention():
    query, key, stats = "bf16[2,1024,8,128]{3,2,1,0}", "bf16[2,512,2,128]{3,2,1,0}", "f32[2,8,1024]{2,1,0}"
    pairs = 2 * 8 * 1024 * 512
    forward = f"({query}, {stats}, u8[0]{{0}})"
    backward = f"({query}, {key}, {key}, u8[0]{{0}})"
    full = count(call("__cudnn$fmhaSoftmax", forward, [query, key, key], cudnn_config("NO_MASK")))
    assert full.flops == full.kernel_flops == 2 * 2 * pairs * 128 and full.uncounted == []
    causal = count(call("__cudnn$fmhaSoftmax", forward, [query, key, key], cudnn_config("CAUSAL")))
    assert causal.flops == 2 * pairs * 128
    operands = [query, key, key, stats, query, query]
    back = count(call("__cudnn$fmhaSoftmaxBackward", backward, operands, cudnn_config("PADDING_CAUSAL")))
    assert back.flops == 2.5 * causal.flops


def test_pallas_kernels_by_name_and_shapes():
    query, key = "bf16[2,1024,8,64]{3,2,1,0}", "bf16[2,512,8,64]{3,2,1,0}"
    config = r'{debug = false, grid_x = 8 : i32, ir = "ML\EFR\0D(\7B, calls=%x", name = "NAME", num_warps = 4 : i32}'
    triton = functools.partial(call, "__gpu$xla.gpu.triton", query, [query, key, key])
    forward = count(triton(config.replace("NAME", "mha_forward")))
    assert forward.flops == forward.kernel_flops == 4 * 2 * 8 * 1024 * 512 * 64
    assert forward.uncounted == [
        "kernel mha_forward (__gpu$xla.gpu.triton): counted without a mask, because its call does not show one (1 time per step)"
    ]
    assert count(triton(config.replace("NAME", "mha_backward"))).flops == 2.5 * forward.flops
    assert count(triton(config.replace("NAME", "mha_preprocess_backward"))).uncounted == []
    # A user's own kernel. The call shows no name, but jax's scope does.
    own = {"my_kernel": lambda operands, results: attention_flops(results[0].size, 1, 1, causal=True)}
    text = triton("{}", "jit(f)/transpose(jvp(my_kernel))/pallas_call")
    assert count(text, kernels=own).flops == 2 * 2 * 1024 * 8 * 64
    assert count(text, kernels=own).uncounted == []
    unknown = count(text)
    assert unknown.flops == 0
    assert unknown.uncounted == ["kernel my_kernel (__gpu$xla.gpu.triton): its FLOPs are not known (1 time per step)"]


def test_tokamax_attention():
    query, key, row = "bf16[1024,8,64]{2,1,0}", "bf16[512,4,64]{2,1,0}", "f32[8,1024]{1,0}"

    def flops(scope, results, *more, batch="", value=key):
        shapes = [x.replace("[", f"[{batch}", 1) for x in (query, key, value, *more)]
        found = count(call("mosaic_gpu_v2", results, shapes, "{}", f"jit(f)/{scope}/jit(kernel_call)/x/mpmd_map"))
        assert found.uncounted == [] and found.flops == found.kernel_flops
        return found.flops

    product = 2 * 8 * 1024 * 512 * 64
    assert flops("tokamax_forward", f"({query}, {row}, {row})") == 2 * product
    assert flops("tokamax_forward_causal", f"({query}, {row}, {row})") == product
    assert flops("tokamax_forward", f"({query}, {row}, {row})", batch="3,") == 6 * product
    assert flops("transpose(jvp(tokamax_backward))", query, query, row) == 3 * product  # dq
    assert flops("transpose(jvp(tokamax_backward))", f"({query}, {query})", query, row) == 4 * product  # dk, dv
    wide, output = (x.replace("64]", "128]") for x in (key, query))  # a product with it counts twice
    assert flops("tokamax_forward", f"({output}, {row}, {row})", value=wide) == (1 + 2) * product
    assert flops("tokamax_backward", query, output, row, value=wide) == (2 + 2) * product
    assert flops("tokamax_backward", f"({query}, {output})", output, row, value=wide) == (2 + 2 * 2) * product
    other = count(call("mosaic_gpu_v2", query, [query, key, key], "{}", "jit(f)/mine/mpmd_map"))
    assert other.flops == 0 and other.uncounted == [
        "custom call mosaic_gpu_v2: its FLOPs are not known (1 time per step)"
    ]


def test_unknown_calls_are_reported_and_harmless_ones_are_not():
    assert count(call("mine", "f32[4]", ["f32[4]"], "{}")).uncounted == [
        "custom call mine: its FLOPs are not known (1 time per step)"
    ]
    assert count(call("__gpu$TopK", "f32[4]", ["f32[4]"], "{}")).uncounted == []
    estimate = '{"custom_call_config": {"cost_estimate":{"flops":"1234","transcendentals":0}}}'
    assert count(call("tpu_custom_call", "f32[4]", ["f32[4]"], estimate)).flops == 1234


# --- jaxpar's own train step ---

LAYERS, EMBED, MLP, VOCAB, HEADS, KV_HEADS, HEAD_DIM, SEQ = 4, 64, 96, 256, 8, 4, 8, 32


@functools.cache
def train_step(devices: int, global_batch: int, tensor=1, sequence=False, pipeline=1, context=1, recompute=False):
    model = dict(
        precision="fp32",
        model_type="llama",
        hidden_size=EMBED,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCAB,
        tensor_model_parallel_size=tensor,
        sequence_parallel=sequence,
        pipeline_model_parallel_size=pipeline,
        context_parallel_size=context,
    )
    if recompute:
        model |= dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    config = config_from_dict(
        {
            "cluster": {"num_nodes": 1},
            "runner": {"seq_length": SEQ, "max_steps": 2},
            "actor": {"micro_batch_size": 1, "global_batch_size": global_batch, "model": model, "optim": {"lr": 1e-3}},
        }
    )
    program = Program(config, jax.devices()[:devices])
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        program.state_shapes,
        program.state_shardings,
    )
    batch = {
        key: jax.ShapeDtypeStruct(program.batch_layout.shape, dtype, sharding=program.batch_layout.sharding)
        for key, dtype in DTYPES.items()
    }
    text = program.train_step.lower(state, batch).compile(compiler_options=QUICK).as_text()
    return program, count(text, device_grid(MeshSizes(**program.mesh.shape)), AXES, taken=taken_fraction)


def layer_flops(global_batch: int, products: int = 3) -> tuple[int, int]:
    """FLOPs of a global batch on all devices: (all layers' products with weights, one product of attention)."""
    weights = EMBED * (HEADS + 2 * KV_HEADS) * HEAD_DIM + HEADS * HEAD_DIM * EMBED + 3 * EMBED * MLP
    tokens = global_batch * SEQ
    return products * 2 * LAYERS * weights * tokens, 2 * LAYERS * tokens * SEQ * HEADS * HEAD_DIM


def head_flops(global_batch: int) -> int:
    return 6 * EMBED * VOCAB * global_batch * SEQ


# Attention has two products forward and five backward: scores are not kept, so query·key is recomputed.
ATTENTION = 7


@pytest.mark.parametrize(
    "layout", [{}, dict(tensor=2), dict(tensor=2, sequence=True), dict(tensor=4, sequence=True)], ids=str
)
def test_executed_flops_of_a_train_step(layout):
    weights, attention = layer_flops(16)
    _, result = train_step(4, 16, **layout)
    assert result.flops * 4 == weights + ATTENTION * attention + head_flops(16)
    assert result.uncounted == []


def test_executed_flops_with_recompute():
    weights, attention = layer_flops(16, products=4)
    # The forward pass is recomputed except for the layer's last product, whose output is not needed.
    weights -= 2 * LAYERS * EMBED * MLP * 16 * SEQ
    _, result = train_step(1, 16, recompute=True)
    # Attention's two forward products are recomputed; its backward pass shares one of them, query·key.
    assert result.flops == weights + (ATTENTION + 2 - 1) * attention + head_flops(16)


def test_executed_flops_of_a_pipeline_include_its_bubble():
    weights, attention = layer_flops(16)
    _, result = train_step(4, 16, pipeline=2)
    microbatches, stages = 8, 2
    executed = (weights + ATTENTION * attention) * (microbatches + stages - 1) // microbatches
    assert result.flops * 4 == executed + head_flops(16)


def sums(result, kind, axes):
    found = [c for c in result.collectives if (c.kind, c.axes) == (kind, axes)]
    return sum(c.count for c in found), sum(c.bytes for c in found)


@pytest.mark.parametrize("global_batch", [16, 64])
def test_gradients_travel_once_a_step_whatever_the_microbatches(global_batch):
    program, result = train_step(4, global_batch, context=2)
    assert sums(result, "reduce-scatter", ("dp", "cp"))[1] == program.blueprint.num_params * 4
    assert sums(result, "all-gather", ("dp", "cp"))[1] == program.blueprint.num_params * 4
    assert not any(c.in_loop for c in result.collectives if set(c.axes) & {"dp"})


def test_tensor_parallel_collectives_are_megatrons():
    microbatches, activations = 8, SEQ * EMBED * 4
    _, result = train_step(4, 16, tensor=2)
    # Two per layer forward and two backward; one for the embedding; one for the gradient of the head's input; two in
    # the loss, of a few numbers per token. (Bytes are not compared: on GPUs XLA adds the gradients from query, key and
    # value before it sends them; on CPUs it sends them separately, in one call.)
    calls = LAYERS * 4 + 2
    assert sum(c.count for c in result.collectives if c.axes == ("tp",) and c.in_loop) == microbatches * (calls + 2)

    _, result = train_step(4, 16, tensor=2, sequence=True)
    # The two gathered sequences of a layer are not kept for the gradient of the weights; they are gathered again.
    for kind, again in (("all-gather", 2 * LAYERS), ("reduce-scatter", 0)):
        times = microbatches * (calls + again)
        assert sums(result, kind, ("sp",)) == (times, times * activations)
