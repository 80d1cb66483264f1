"""Loss and every gradient of the built-in decoder's train step, on every mesh, against one device."""

import dataclasses
import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import (
    DECODER,
    FEW_KV_HEADS,
    GLOBAL_BATCH,
    SEQ,
    VOCAB,
    Step,
    assert_parity,
    check_step,
    collectives,
    decoder_case,
    equal_trees,
    make_batch,
    mesh_id,
    product_of,
    reference,
    relative_error,
    slow,
)

from jaxpar.attention import AttentionSettings, blockwise, reference_attention, zigzag_order
from jaxpar.backward.recompute import Recompute
from jaxpar.models import Decoder, FunctionalModel, TokenInfo
from jaxpar.models import decoder as decoder_module
from jaxpar.parallel.batch import number_documents
from jaxpar.step import loss_and_grads

# dp, pp, cp; tp and sp
ALL_OF_TWO = product_of((1, 2), (1, 2), (1, 2), ((1, 1), (2, 1), (1, 2)), rest=pytest.mark.slow)
FOURS = [
    (1, 4, 1, 1, 4), (1, 4, 1, 4, 1), (1, 1, 4, 1, 4), *slow((1, 4, 4, 1, 1), (1, 1, 1, 4, 4)),
    *slow((1, 4, 1, 1, 1), (1, 1, 1, 1, 4), (1, 1, 4, 1, 1), (1, 1, 1, 4, 1)),
]  # fmt: skip


def test_valid_tokens_of_the_batch_are_uneven():
    mask = make_batch()["loss_mask"]
    by_dp, by_cp = mask.reshape(2, -1).sum(-1), mask.reshape(GLOBAL_BATCH, 4, SEQ // 4).sum((0, 2))
    by_microbatch = mask.reshape(2, 6, -1).sum(-1)
    assert by_dp[0] != by_dp[1] and len(set(by_cp)) == 4
    assert len(set(by_microbatch.ravel())) > 6 and by_microbatch.min() == 0


@pytest.mark.parametrize(("dp", "pp", "cp", "tensor"), ALL_OF_TWO)
def test_two_of_each(dp, pp, cp, tensor):
    check_step(decoder_case(DECODER), (dp, pp, *tensor, cp))


@pytest.mark.parametrize("sizes", FOURS, ids=mesh_id)
def test_four(sizes):
    check_step(decoder_case(DECODER), sizes)


@pytest.mark.parametrize(
    "sizes", [(2, 2, 1, 4, 1), (1, 2, 4, 1, 2), *slow((1, 1, 4, 1, 1), (1, 1, 1, 4, 1))], ids=mesh_id
)
def test_repeated_kv_heads_tied_embeddings_sliding_window(sizes):
    check_step(decoder_case(FEW_KV_HEADS), sizes)


@pytest.mark.parametrize(
    ("sizes", "num_microbatches", "schedule"),
    [
        ((1, 4, 1, 1, 1), 3, "1f1b"),  # fewer microbatches than stages
        ((2, 4, 1, 2, 1), 6, "gpipe"),  # not a multiple of the stages
        ((1, 1, 1, 1, 1), 1, "1f1b"),
        *slow(
            ((1, 2, 1, 1, 1), 1, "1f1b"),
            ((1, 4, 1, 1, 1), 3, "gpipe"),
            ((2, 2, 1, 2, 2), 6, "gpipe"),
            ((1, 2, 2, 1, 2), 12, "gpipe"),
            ((1, 4, 1, 1, 2), 12, "1f1b"),
        ),
    ],
)
def test_schedules_and_numbers_of_microbatches(sizes, num_microbatches, schedule):
    check_step(decoder_case(DECODER), sizes, num_microbatches=num_microbatches, schedule=schedule)


# Six layers do not divide by four, so some stages have one layer more than others.
SIX_LAYERS = dataclasses.replace(DECODER, num_hidden_layers=6, padded_vocab_size=264)
GRID = [
    # sizes, microbatches, chunks: M a multiple of P, not a multiple, fewer; with tensor, context and data parallelism
    ((2, 2, 1, 2, 2), 6, 1), ((2, 2, 2, 1, 2), 3, 2), ((1, 2, 1, 2, 2), 3, 3), ((1, 2, 1, 2, 2), 1, 2),
    ((1, 4, 1, 2, 2), 6, 1), ((2, 4, 1, 2, 1), 6, 1), ((1, 4, 2, 1, 2), 3, 1), ((2, 3, 1, 1, 2), 3, 2),
]  # fmt: skip
RECOMPUTE = [
    Recompute(), Recompute("selective"), Recompute("full", "uniform", 1), Recompute("full", "uniform", 2), Recompute("full", "block", 1)
]  # fmt: skip


def check_schedule(sizes, num_microbatches, num_chunks, schedule, recompute, zero_stage=1):
    case = decoder_case(SIX_LAYERS)
    options = {"num_microbatches": num_microbatches, "num_chunks": num_chunks, "zero_stage": zero_stage}
    check_step(case, sizes, schedule=schedule, recompute=recompute, **options)


@pytest.mark.parametrize(
    ("cell", "schedule", "recompute"),
    [
        (0, "zb1p", RECOMPUTE[0]), (2, "interleaved_1f1b", RECOMPUTE[4]), *slow((4, "zb1p", RECOMPUTE[3])),
        (6, "gpipe", RECOMPUTE[1]), (7, "interleaved_1f1b", RECOMPUTE[0]),
        *slow((1, "zb1p", RECOMPUTE[1]), (3, "interleaved_1f1b", RECOMPUTE[2]), (5, "1f1b", RECOMPUTE[0]),
              (7, "zb1p", RECOMPUTE[4])),
    ],
)  # fmt: skip
def test_schedules(cell, schedule, recompute):
    check_schedule(*GRID[cell], schedule, recompute)


SCHEDULES = ["gpipe", "1f1b", "interleaved_1f1b", "zb1p"]


@pytest.mark.parametrize(
    ("schedule", "cell", "recompute"),
    [
        # A quarter of the cases covers every pair of values of two arguments.
        pytest.param(
            schedule, cell, recompute, marks=pytest.mark.slow if (i + j + k) % 4 == 0 else pytest.mark.exhaustive
        )
        for (i, schedule), (j, cell), (k, recompute) in itertools.product(
            enumerate(SCHEDULES), enumerate(GRID), enumerate(RECOMPUTE)
        )
    ],
    ids=str,
)
def test_every_schedule_size_and_recompute(schedule, cell, recompute):
    if schedule == "interleaved_1f1b" and cell[2] == 1:
        schedule = "eager_1f1b"
    check_schedule(*cell, schedule, recompute)


@pytest.mark.parametrize("recompute", [*slow(*RECOMPUTE[1:3]), RECOMPUTE[3]], ids=str)
def test_recompute_without_a_pipeline(recompute):
    check_step(decoder_case(DECODER), (2, 1, 2, 1, 1), recompute=recompute)


ALL_BUT_ATTENTION = Recompute("selective", modules=("layernorm", "linear_qkv", "linear_proj", "mlp"))
MLP, PROJECTIONS = (Recompute("selective", modules=names) for names in (("mlp",), ("linear_qkv", "linear_proj")))


@pytest.mark.parametrize(
    ("arch", "sizes", "recompute", "options"),
    [
        (SIX_LAYERS, (1, 2, 1, 2, 2), ALL_BUT_ATTENTION, {"schedule": "zb1p", "num_microbatches": 3}),
        (SIX_LAYERS, (2, 2, 2, 1, 1), MLP, {"schedule": "interleaved_1f1b", "num_chunks": 2, "num_microbatches": 2}),
        (FEW_KV_HEADS, (2, 1, 1, 2, 2), PROJECTIONS, {"zero_stage": 3}),
        *slow(
            (DECODER, (1, 2, 1, 1, 2), ALL_BUT_ATTENTION, {"schedule": "interleaved_1f1b", "num_chunks": 2}),
            (SIX_LAYERS, (1, 4, 2, 1, 1), MLP, {"schedule": "zb1p"}),
            (SIX_LAYERS, (1, 4, 1, 1, 2), PROJECTIONS, {"schedule": "gpipe"}),
        ),
    ],
    ids=str,
)  # fmt: skip
def test_recompute_modules(arch, sizes, recompute, options):
    check_step(decoder_case(arch), sizes, recompute=recompute, **options)


@pytest.mark.parametrize(
    ("sizes", "zero_stage", "num_chunks", "schedule"),
    [
        ((2, 2, 1, 2, 2), 3, 1, "zb1p"), ((2, 2, 2, 1, 1), 3, 2, "interleaved_1f1b"), ((2, 4, 1, 1, 2), 2, 1, "gpipe"),
        *slow(((3, 2, 1, 1, 2), 3, 1, "1f1b"), ((2, 2, 1, 2, 2), 2, 1, "1f1b"), ((2, 1, 1, 1, 4), 3, 1, "1f1b")),
    ],
)  # fmt: skip
def test_zero_stages(sizes, zero_stage, num_chunks, schedule):
    case = decoder_case(SIX_LAYERS)
    options = {"num_microbatches": 2, "zero_stage": zero_stage, "num_chunks": num_chunks, "schedule": schedule}
    check_step(case, sizes, **options)


@pytest.mark.parametrize(
    ("arch", "sizes", "options"),
    [
        (DECODER, (1, 2, 2, 1, 1), {"schedule": "zb1p", "recompute": Recompute(offload=True)}),
        (SIX_LAYERS, (2, 1, 1, 1, 1), {"zero_stage": 3, "recompute": Recompute("full", "uniform", 2, offload=True)}),
    ],
    ids=str,
)
def test_offloaded_activations(arch, sizes, options):
    check_step(decoder_case(arch), sizes, **options)


def test_zero_3_without_overlap():
    check_step(
        decoder_case(SIX_LAYERS), (2, 1, 1, 1, 1), zero_stage=3, overlap_param_gather=False, overlap_grad_reduce=False
    )


@pytest.mark.parametrize(
    ("arch", "sizes", "options"),
    [
        (DECODER, (1, 1, 1, 4, 1), {"recompute": RECOMPUTE[1]}),
        (DECODER, (2, 2, 1, 2, 2), {"schedule": "zb1p", "zero_stage": 3}),
        (FEW_KV_HEADS, (1, 2, 1, 4, 1), {"num_chunks": 2, "schedule": "interleaved_1f1b", "recompute": RECOMPUTE[3]}),
        *slow(
            (FEW_KV_HEADS, (2, 1, 1, 2, 1), {"zero_stage": 3, "recompute": RECOMPUTE[4]}),
            (SIX_LAYERS, (1, 4, 1, 2, 1), {"schedule": "zb1p", "recompute": RECOMPUTE[2]}),
            (DECODER, (1, 1, 1, 4, 2), {"schedule": "gpipe", "zero_stage": 2}),
        ),
    ],
    ids=str,
)
def test_tp_comm_overlap(arch, sizes, options):
    case = decoder_case(arch)
    case = dataclasses.replace(case, model=FunctionalModel(Decoder(arch, tp_comm_overlap=True)))
    check_step(case, sizes, **options)


@pytest.mark.parametrize("zero_stage", [*slow(2), 3])
def test_zero_with_repeated_kv_heads_and_tied_embeddings(zero_stage):
    check_step(decoder_case(FEW_KV_HEADS), (2, 2, 1, 4, 1), zero_stage=zero_stage, num_microbatches=3)


@pytest.mark.parametrize(("sizes", "options"), [
    ((2, 2, 1, 2, 2), {}),
    *slow(((1, 2, 2, 1, 1), {"schedule": "zb1p", "num_chunks": 2}), ((2, 1, 1, 1, 1), {"zero_stage": 3})),
], ids=str)  # fmt: skip
def test_losses_in_parts_of_the_tokens(sizes, options, monkeypatch):
    monkeypatch.setattr(loss_and_grads, "MAX_LOGITS_BYTES", 2048)
    check_step(decoder_case(DECODER), sizes, **options)


@pytest.mark.parametrize(
    ("arch", "sizes", "options"),
    [
        (DECODER, (2, 2, 1, 2, 2), {"schedule": "zb1p"}),
        *slow((DECODER, (4, 1, 1, 1, 1), {"num_microbatches": 3})),
        (FEW_KV_HEADS, (2, 2, 2, 1, 1), {"num_chunks": 2}),
        (FEW_KV_HEADS, (2, 1, 1, 2, 1), {"recompute": Recompute("full", "uniform", 1)}),  # logits are not kept
    ],
    ids=str,
)
def test_embedding_and_head_in_parts_of_the_vocabulary(arch, sizes, options, monkeypatch):
    monkeypatch.setattr(loss_and_grads, "MAX_VOCABULARY_BYTES", 4096)
    case = decoder_case(arch)
    step = Step(case.model, sizes, zero_stage=3, **options)
    assert_parity(*step(case.params, case.batch), case.loss, case.grads)
    whole = 64 * 256 // (sizes[1] * sizes[2] * sizes[3])  # this device's share of the embedding
    gathered = [c.size for c in collectives(step.jaxpr, step.mesh.shape) if c.kind == "all-gather" and "dp" in c.axes]
    assert whole not in gathered and whole // sizes[0] // sizes[4] not in gathered
    found = step.evaluate(case.params, case.batch)
    assert relative_error(found["token_losses"], reference_token_losses(case)) < 1e-5


def reference_token_losses(case):
    batch, params = case.batch, case.params
    info = TokenInfo(batch["positions"], batch["segment_ids"])
    x = case.model.embed(params, batch["tokens"], info)
    for index in range(case.model.num_layers):
        x = case.model.block(jax.tree.map(lambda p, i=index: p[i], params["layers"]), x, info)
    log_probs = jax.nn.log_softmax(case.model.head(params, x)[..., :VOCAB])
    return -np.take_along_axis(np.asarray(log_probs), batch["targets"][..., None], -1)[..., 0]


@pytest.mark.parametrize(("sizes", "options", "logits_bytes"), [
    ((2, 2, 1, 2, 2), {"schedule": "gpipe"}, 2048), ((1, 4, 2, 1, 1), {"schedule": "zb1p"}, 2**29),
    ((1, 2, 1, 1, 2), {"num_chunks": 2, "num_microbatches": 3}, 2048), ((2, 1, 1, 1, 1), {"zero_stage": 3}, 2**29),
    *slow(
        ((2, 2, 1, 2, 2), {"schedule": "gpipe"}, 2**29), ((1, 4, 2, 1, 1), {"schedule": "zb1p"}, 2048),
        ((1, 2, 1, 1, 2), {"num_chunks": 2, "num_microbatches": 3}, 2**29), ((2, 1, 1, 1, 1), {"zero_stage": 3}, 2048),
    ),
], ids=str)  # fmt: skip
def test_evaluation_gives_the_loss_of_each_token(sizes, options, logits_bytes, monkeypatch):
    monkeypatch.setattr(loss_and_grads, "MAX_LOGITS_BYTES", logits_bytes)
    case = decoder_case(DECODER)
    found = Step(case.model, sizes, **options).evaluate(case.params, case.batch)
    assert relative_error(found["token_losses"], reference_token_losses(case)) < 1e-5
    assert found["tokens"] == case.batch["loss_mask"].sum()
    assert relative_error(found["loss"] / found["tokens"], case.loss) < 1e-5


@pytest.mark.parametrize("sizes", [(2, 2, 1, 2, 2), *slow((2, 1, 2, 1, 2))], ids=mesh_id)
def test_without_zero(sizes):
    check_step(decoder_case(DECODER), sizes, zero_stage=0)


def test_several_tiles_of_scores(monkeypatch):
    monkeypatch.setattr(blockwise, "MAX_TILE", 4)
    check_step(decoder_case(DECODER), (1, 2, 1, 2, 2))


@pytest.mark.parametrize(
    ("settings", "sizes", "arch"),
    [
        (AttentionSettings("all_gather"), (1, 2, 1, 2, 4), DECODER),
        *slow(
            (AttentionSettings("all_gather"), (2, 1, 2, 1, 2), FEW_KV_HEADS),
            (AttentionSettings("a2a"), (1, 2, 1, 2, 4), DECODER),
        ),
        (AttentionSettings("a2a"), (1, 2, 2, 1, 4), FEW_KV_HEADS),  # one kv head per device, for four ranks
        *slow((AttentionSettings("a2a+p2p", 2), (1, 2, 1, 2, 4), DECODER)),
        (AttentionSettings("a2a+p2p", 2), (2, 1, 2, 1, 4), FEW_KV_HEADS),
    ],
)
def test_kinds_of_context_parallelism(settings, sizes, arch):
    check_step(decoder_case(arch), sizes, settings)


@pytest.mark.parametrize("sizes", [(1, 2, 1, 1, 4), *slow((1, 1, 1, 2, 4))], ids=mesh_id)
def test_a_cp_rank_without_valid_tokens(sizes):
    case = decoder_case(DECODER)
    step, order = Step(case.model, sizes), zigzag_order(SEQ, 4)
    for masked in (order[SEQ // 4 : SEQ // 2], order):  # the second rank's tokens; all tokens
        batch = {**case.batch, "loss_mask": case.batch["loss_mask"].copy()}
        batch["loss_mask"][:, masked] = 0
        batch["segment_ids"] = batch["segment_ids"].copy()
        batch["segment_ids"][:, masked] = np.arange(len(masked)) + 1000  # and no other token to attend to
        batch["segment_ids"] = number_documents(batch["segment_ids"])  # the tokens behind them are another document
        loss, grads = step(case.params, batch)
        if masked is order:
            assert loss == 0 and not any(g.any() for g in jax.tree.leaves(grads))
        else:
            table = lambda params: params["embed"]["table"]  # noqa: E731
            with mock.patch.object(decoder_module, "attention", reference_attention):
                assert_parity(loss, grads, *reference(case.model, case.params, batch, table=table))


def test_a_dimension_that_divides_by_one_axis_only():
    # At rest, mlp 96 is split over dp 3 and cp 2, but embed 64 only over cp. Its gradients are still reduced over dp.
    check_step(decoder_case(DECODER), (3, 2, 1, 1, 2), num_microbatches=2)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        *slow(((1, 1, 1, 1, 1), {})),
        ((2, 2, 1, 2, 2), {}),
        ((2, 1, 1, 2, 2), {"zero_stage": 3}),  # from stage 2 on, products give gradients in float32
        *slow(((2, 2, 2, 1, 1), {"zero_stage": 2, "schedule": "zb1p"}), ((2, 1, 1, 1, 1), {"zero_stage": 2})),
    ],
    ids=str,
)
def test_bfloat16_is_near_float32(sizes, options):
    """bfloat16 has 8 bits, 0.4% per rounding. Over 4 layers, all gradients together stay within 3% of float32, and those of
    each parameter within 8%."""
    case = decoder_case(DECODER)
    loss, grads = Step(case.model, sizes, compute_dtype=jnp.bfloat16, **options)(case.params, case.batch)
    assert all(g.dtype == np.float32 for g in jax.tree.leaves(grads))
    flat, expected = (np.concatenate([g.ravel() for g in jax.tree.leaves(tree)]) for tree in (grads, case.grads))
    assert relative_error(loss, case.loss) < 5e-3
    assert 1e-4 < relative_error(flat, expected) < 3e-2
    errors = jax.tree.map(relative_error, grads, case.grads)
    assert max(jax.tree.leaves(errors)) < 8e-2, errors


@pytest.fixture(scope="module")
def initial_params():
    model = FunctionalModel(Decoder(DECODER))
    return model, jax.device_get(jax.jit(model.init, static_argnums=0)(5))


@pytest.mark.parametrize(
    ("sizes", "zero_stage"),
    [
        ((1, 4, 1, 4, 1), 2), ((2, 2, 2, 1, 2), 3),
        *slow(((16, 1, 1, 1, 1), 1), ((2, 2, 1, 2, 2), 1), ((1, 4, 1, 1, 4), 1), ((2, 2, 1, 2, 2), 0)),
    ],
)  # fmt: skip
def test_initial_weights_are_bitwise_the_same_on_every_mesh(initial_params, sizes, zero_stage):
    model, expected = initial_params
    step = Step(model, sizes, num_microbatches=1, zero_stage=zero_stage)
    assert equal_trees(step.initial_params(model, 5), expected)


def test_initial_weights_differ_between_layers_parts_and_seeds(initial_params):
    model, params = initial_params
    for one, other in itertools.combinations(range(4), 2):
        for name in ("query", "key", "value", "output"):
            weight = params["layers"]["attention"][name]
            assert abs(np.corrcoef(weight[one].ravel(), weight[other].ravel())[0, 1]) < 0.1
    gate, up = params["layers"]["mlp"]["gate"], params["layers"]["mlp"]["up"]
    assert abs(np.corrcoef(gate.ravel(), up.ravel())[0, 1]) < 0.1
    other_seed = jax.device_get(jax.jit(model.init, static_argnums=0)(6))
    assert not np.allclose(other_seed["embed"]["table"], params["embed"]["table"])


def test_initial_weights_of_a_layer_do_not_depend_on_the_number_of_layers(initial_params):
    _, params = initial_params
    model = FunctionalModel(Decoder(dataclasses.replace(DECODER, num_hidden_layers=2)))
    shallow = jax.device_get(jax.jit(model.init, static_argnums=0)(5))
    for name in ("query", "key", "value"):  # the scale of the output projection does depend on it, by design
        assert np.array_equal(shallow["layers"]["attention"][name], params["layers"]["attention"][name][:2])
    assert np.array_equal(shallow["embed"]["table"], params["embed"]["table"])
