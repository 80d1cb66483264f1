"""Partition specs from dimension names, at rest and during a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support import DECODER, make_mesh

from jaxpar.config import ConfigError
from jaxpar.models import Decoder, FunctionalModel
from jaxpar.parallel.placement import LayerPlacement
from jaxpar.parallel.sharding import BATCH_SPEC, EXPLICIT_RULES, RULES, layout_tree, param_layout

SIXTEEN = {"dp": 2, "pp": 2, "tp": 2, "sp": 1, "cp": 2}
ONE = dict.fromkeys(SIXTEEN, 1)


def layout(shape, dims, mesh=SIXTEEN, explicit=True, zero_stage=1, num_chunks=1):
    return param_layout("layers/w", shape, dims, mesh, explicit=explicit, zero_stage=zero_stage, num_chunks=num_chunks)


def axes(spec) -> list[tuple[str, ...]]:
    """Each entry as a tuple of axes, in whichever form PartitionSpec stores it."""
    return [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in spec]


@pytest.mark.parametrize(
    ("dims", "compute"),
    [
        (("embed", "heads", "head_dim"), [(), ("tp", "sp"), ()]),
        (("embed", "kv_heads", "head_dim"), [(), ("tp", "sp"), ()]),
        (("heads", "head_dim", "embed"), [("tp", "sp"), (), ()]),
        (("layers", "embed", "mlp"), [("pp",), (), ("tp", "sp")]),
        (("layers", "mlp", "embed"), [("pp",), ("tp", "sp"), ()]),
        (("layers", "embed"), [("pp",), ()]),
        (("vocab", "embed"), [("pp", "tp", "sp"), ()]),
        ((None, "embed"), [(), ()]),
    ],
)
def test_the_table(dims, compute):
    assert axes(layout((16,) * len(dims), dims).compute_spec) == compute


def test_an_automatic_model_keeps_the_vocabulary_on_every_stage():
    assert axes(layout((16, 16), ("vocab", "embed"), explicit=False).compute_spec) == [("tp", "sp"), ()]
    assert {word for word in RULES if RULES[word] != EXPLICIT_RULES[word]} == {"vocab"}


def test_the_batch():
    assert P("dp", "cp") == BATCH_SPEC


def test_at_rest_the_first_local_dimension_that_divides_is_split_over_dp_and_cp():
    found = layout((64, 8, 16), ("embed", "heads", "head_dim"))
    assert axes(found.rest_spec) == [("dp", "cp"), ("tp", "sp"), ()] and found.gather == (("dp", "cp"), 0)
    found = layout((64, 256), ("embed", "mlp"))  # although mlp is larger on each device, at 128
    assert axes(found.rest_spec) == [("dp", "cp"), ("tp", "sp")] and found.gather == (("dp", "cp"), 0)
    found = layout((62, 48), ("embed", "mlp"))  # 62 does not divide by 4
    assert axes(found.rest_spec) == [(), ("tp", "sp", "dp", "cp")] and found.gather == (("dp", "cp"), 1)
    found = layout((6, 6), ("embed", "mlp"))  # neither do 6 and 3
    assert axes(found.rest_spec) == [("dp",), ("tp", "sp")] and found.gather == (("dp",), 0)


def test_layers_at_rest():
    dims = ("layers", "embed", "mlp")
    found = layout((16, 64, 96), dims)  # 8 on a stage
    assert axes(found.rest_spec) == [("pp", "dp", "cp"), (), ("tp", "sp")] and found.gather == (("dp", "cp"), 0)
    for stage in (2, 3):  # gathered or reduced layer by layer
        found = layout((16, 64, 96), dims, zero_stage=stage)
        assert axes(found.rest_spec) == [("pp",), ("dp", "cp"), ("tp", "sp")] and found.gather == (("dp", "cp"), 1)
    assert found.stages is None


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("layers", "chunks"), [(16, 2), (7, 1), (7, 3)])
def test_layers_that_move_lie_in_order_at_rest(layers, chunks, zero_stage):
    found = layout((layers, 64, 96), ("layers", "embed", "mlp"), zero_stage=zero_stage, num_chunks=chunks)
    placement, dimension = found.stages
    assert placement == LayerPlacement(layers, 2, chunks)
    assert axes(found.compute_spec) == [("pp",), (), ("tp", "sp")]
    at_rest = axes(found.rest_spec)
    assert at_rest[0] == () and dimension == 1  # pp splits another dimension
    assert at_rest[1:] == [("dp", "cp", "pp") if zero_stage else ("pp",), ("tp", "sp")]


def test_layers_that_move_where_no_other_dimension_divides():
    found = layout((7, 5), ("layers", "embed"), zero_stage=1)
    assert axes(found.rest_spec) == [(), ()] and found.gather is None and found.stages == (LayerPlacement(7, 2), None)


def test_at_rest_where_only_one_axis_divides():
    found = layout((9, 2), (None, None), {**ONE, "dp": 4, "cp": 3})
    assert axes(found.rest_spec) == [("cp",), ()] and found.gather == (("cp",), 0)
    found = layout((8, 3), (None, None), {**ONE, "dp": 4, "cp": 6})  # the larger axis does not divide
    assert axes(found.rest_spec) == [("dp",), ()]
    found = layout((7, 5), (None, None), {**ONE, "dp": 4, "cp": 6})
    assert found.gather is None and found.rest_spec == found.compute_spec


def test_without_zero_or_replicas_rest_is_compute():
    for found in (
        layout((64, 96), ("embed", "mlp"), zero_stage=0),
        layout((64, 96), ("embed", "mlp"), {**ONE, "tp": 4, "pp": 2}),
    ):
        assert found.gather is None and found.rest_spec == found.compute_spec


def test_repeated_kv_heads():
    four = {**ONE, "tp": 4}
    found = layout((64, 2, 8), ("embed", "kv_heads", "head_dim"), four)
    assert axes(found.compute_spec) == [(), (), ()] and found.repeated == (1, ("tp", "sp"))
    assert layout((64, 2, 8), ("embed", "kv_heads", "head_dim"), four, explicit=False).repeated is None
    assert layout((64, 4, 8), ("embed", "kv_heads", "head_dim"), four).repeated is None
    with pytest.raises(ConfigError, match=r"'kv_heads' of 3 does not divide by tp 4 x sp 1 = 4"):
        layout((64, 3, 8), ("embed", "kv_heads", "head_dim"), four)
    with pytest.raises(ConfigError, match=r"'heads' of 2 does not divide by tp 4 x sp 1 = 4"):
        layout((64, 2, 8), ("embed", "heads", "head_dim"), four)


def test_errors_name_the_parameter():
    for shape, dims, message in [
        ((4, 8), None, r"layers/w \[4, 8\] has no dimension names.*nnx.with_partitioning"),
        ((4, 8), ("embed",), r"layers/w \[4, 8\] has 2 dimensions but 1 names \('embed',\)"),
        ((4, 8), ("embed", "mpl"), r"layers/w \[4, 8\]: unknown dimension name 'mpl': did you mean 'mlp'\?"),
        ((4, 8), ("embed", "q"), r"unknown dimension name 'q': known: .*head_dim.*vocab"),
        ((4, 7), ("embed", "mlp"), r"layers/w \[4, 7\]: dimension 'mlp' of 7 does not divide by tp 2 x sp 1 = 2"),
    ]:
        with pytest.raises(ConfigError, match=message):
            layout(shape, dims)


def test_all_problems_at_once():
    shapes = {"a": jax.ShapeDtypeStruct((4,), jnp.float32), "b": {"c": jax.ShapeDtypeStruct((3, 4), jnp.float32)}}
    with pytest.raises(ConfigError) as caught:
        layout_tree(
            shapes, {"a": ("embd",), "b": {"c": ("mlp", None)}}, make_mesh((1, 1, 2, 1, 1)), explicit=True, zero_stage=1
        )
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["parameter a [4]", "parameter b/c [3, 4]"]


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_bytes_are_those_that_jax_stores(zero_stage):
    mesh, model = make_mesh((2, 2, 1, 2, 2)), FunctionalModel(Decoder(DECODER))
    layouts = layout_tree(model.shapes, model.dims, mesh, explicit=True, zero_stage=zero_stage)
    for found, shape in zip(jax.tree.leaves(layouts), jax.tree.leaves(model.shapes), strict=True):
        sharding = jax.sharding.NamedSharding(mesh, found.rest_spec)
        stored = np.prod(sharding.shard_shape(shape.shape)) * 4
        assert found.bytes_per_device(mesh.shape) == stored == 2 * found.bytes_per_device(mesh.shape, itemsize=2)
    total = sum(found.bytes_per_device(mesh.shape) for found in jax.tree.leaves(layouts))
    whole = sum(np.prod(shape.shape) * 4 for shape in jax.tree.leaves(model.shapes))
    assert whole / 16 <= total < (1.1 * whole / 16 if zero_stage else whole / 2)
