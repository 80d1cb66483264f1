"""Which tokens each cp rank holds, and how the config's settings reach attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import make_mesh

from jaxpar.attention import AttentionSettings, Backend, zigzag_order
from jaxpar.config import ConfigError, config_from_dict
from jaxpar.parallel.batch import BatchLayout, number_documents
from jaxpar.program import Program


def test_each_rank_has_an_early_and_a_late_chunk():
    order = zigzag_order(16, 4)
    assert order.tolist() == [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
    assert zigzag_order(5, 1).tolist() == [0, 1, 2, 3, 4]
    # Every rank has the same number of (query, key) pairs that causal attention allows.
    pairs = (order + 1).reshape(4, -1).sum(-1)
    assert pairs.max() == pairs.min()
    with pytest.raises(ValueError, match="20 tokens cannot be cut into 2 .*20 / 8 = 2.50"):
        zigzag_order(20, 4)


def test_a_batch_is_placed_once_and_whole():
    batch = BatchLayout(4, 16, make_mesh((2, 1, 1, 1, 4)))
    rows = np.arange(64).reshape(4, 16)
    placed = batch.put_on_mesh({"tokens": rows})["tokens"]
    assert np.array_equal(placed, rows[:, batch.order])
    for shard in placed.addressable_shards:
        row, column = (index.start or 0 for index in shard.index)
        assert np.array_equal(shard.data[0], row * 16 + batch.order[column : column + 4])


def program(**model) -> Program:
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8, vocab_size=256)
    actor = {"micro_batch_size": 1, "global_batch_size": 1, "optim": {"lr": 1e-3}}
    values = {"runner": {"seq_length": 64, "max_steps": 1}, "actor": {**actor, "model": {**sizes, **model}}}
    return Program(config_from_dict(values), jax.devices()[: model.get("context_parallel_size", 1)])


def test_the_config_reaches_attention():
    hierarchical = dict(context_parallel_size=8, cp_comm_type="a2a+p2p", hierarchical_context_parallel_sizes=[2, 4])
    assert program().blueprint.attention == AttentionSettings("p2p", 1, Backend("auto"))
    assert program(**hierarchical).blueprint.attention == AttentionSettings("a2a+p2p", 2, Backend("auto"))
    with pytest.raises(ConfigError, match="attention_backend: cudnn is for GPUs, but the devices are of cpu"):
        program(attention_backend="cudnn")


def test_documents_are_numbered_in_their_order():
    ids = np.array([[1, 1, 2, 2, 0, 0], [5, 5, 5, 5, 5, 5], [0, 7, 7, 0, 3, 0]])
    assert number_documents(ids).tolist() == [[0, 0, 1, 1, 2, 2], [0] * 6, [0, 1, 1, 2, 3, 4]]


def test_a_document_in_two_parts_is_refused():
    layout = BatchLayout(2, 4, make_mesh((1, 1, 1, 1, 1)))
    batch = {"tokens": np.zeros((2, 4), int), "targets": np.zeros((2, 4), int)}
    split = [[0, 1, 2, 0], [1, 1, 1, 1]]
    layout.own_rows({**batch, "segment_ids": split, "loss_mask": [[0, 1, 1, 0], [1, 1, 1, 1]]})  # 0 is padding
    with pytest.raises(ValueError, match="row 0 has document 0 in 2 separate parts"):
        layout.own_rows({**batch, "segment_ids": split})  # 0 is trained on
    with pytest.raises(ValueError, match="row 1 has document 4 in 2 separate parts"):
        layout.own_rows({**batch, "segment_ids": [[0, 1, 2, 2], [4, 5, 4, 4]]})


def test_documents_that_attention_would_ignore_are_refused():
    layout = BatchLayout(1, 4, make_mesh((1, 1, 1, 1, 1)), within_documents=False)
    batch = {"tokens": np.zeros((1, 4), int), "targets": np.zeros((1, 4), int)}
    layout.own_rows(batch)
    for one in (layout, layout.resized(2)):
        shape = one.shape
        with pytest.raises(ValueError, match="segment_ids are given, but data.reset_attention_mask is False"):
            one.own_rows({key: np.zeros(shape, int) for key in ("tokens", "targets", "segment_ids")})


def test_batches_that_would_train_on_something_wrong_are_refused():
    layout, tokens = BatchLayout(2, 3, make_mesh((1, 1, 1, 1, 1))), np.ones((2, 3), int)
    batch = {"tokens": tokens, "targets": tokens}

    def refused(**changed: object) -> str:
        with pytest.raises(ValueError, match="batch: ") as caught:
            layout.own_rows({**batch, **changed})
        return str(caught.value).removeprefix("batch: ")

    for key in ("tokens", "targets", "segment_ids", "positions"):
        assert refused(**{key: np.ones((2, 3))}) == f"{key} is float64, expected an integer dtype"
        assert refused(**{key: np.ones((2, 3), bool)}) == f"{key} is bool, expected an integer dtype"
    assert refused(tokens=[[0, 1, 2], [3, -1, -5]]) == (
        "tokens: row 1, token 1 is -1, which is not a token (2 such entries in all)"
    )
    assert "row 0, token 2 is -100, which is not a token: where there is no" in refused(targets=[[0, 1, -100], [1] * 3])
    for weight in (-1.0, np.nan, np.inf):
        assert refused(loss_mask=[[1, 1, 1], [1, 1, weight]]).startswith(
            f"loss_mask: row 1, token 2 is {weight}, which"
        )
    assert refused(loss_mask=np.full((2, 3), "1")) == "loss_mask is <U1, expected a float, integer or bool dtype"
    assert refused(loss_mask=np.zeros((2, 3))) == "loss_mask is 0 everywhere, so nothing would be trained on"
    assert refused(loss_mask=np.full((2, 3), 0.125)).startswith("loss_mask has a sum of 0.75, but")
    layout.own_rows({**batch, "loss_mask": np.zeros((2, 3))}, trained=False)
    for dtype in (bool, np.int8, np.float16, jnp.bfloat16):
        rows = layout.own_rows({**batch, "loss_mask": np.eye(2, 3).astype(dtype)})
        assert rows["loss_mask"].dtype == np.float32 and rows["loss_mask"].sum() == 2
