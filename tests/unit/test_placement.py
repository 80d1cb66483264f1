"""Which layers each stage holds, for any number of layers, stages and chunks."""

import numpy as np
import pytest

from jaxpar.parallel.placement import NONE, LayerPlacement

SIZES = [(n, p, v) for n in (1, 2, 7, 8, 12, 30, 61) for p in (1, 2, 3, 4, 8) for v in (1, 2, 3) if n >= p * v]
for_each_size = pytest.mark.parametrize(("layers", "stages", "chunks"), SIZES)


@for_each_size
def test_each_layer_once_in_order_through_the_virtual_stages(layers, stages, chunks):
    placement = LayerPlacement(layers, stages, chunks)
    assert placement.table.shape == (stages, chunks, placement.layers_per_chunk)
    on_the_way = [layer for chunk in range(chunks) for s in range(stages) for layer in placement.table[s, chunk]]
    assert [layer for layer in on_the_way if layer != NONE] == list(range(layers))


@for_each_size
def test_stages_differ_by_one_layer_a_chunk_at_most(layers, stages, chunks):
    placement = LayerPlacement(layers, stages, chunks)
    assert (placement.counts == (placement.table != NONE).sum(-1)).all()
    assert placement.counts.sum() == layers and np.ptp(placement.counts) <= 1
    assert placement.counts.max() == placement.layers_per_chunk
    # Padding comes last, so the layers of a chunk are its first entries.
    assert (np.diff((placement.table != NONE).astype(int), axis=-1) <= 0).all()


@for_each_size
def test_padding(layers, stages, chunks):
    placement = LayerPlacement(layers, stages, chunks)
    slots = -(-layers // (stages * chunks)) * stages * chunks
    assert (placement.table == NONE).sum() == slots - layers and placement.table.size == slots
    assert placement.is_padded == (layers % (stages * chunks) != 0)
    assert placement.is_contiguous == (chunks == 1 and layers % stages == 0)


def test_thirty_layers_on_four_stages():
    assert LayerPlacement(30, 4).counts.tolist() == [[8], [8], [7], [7]]
    assert (LayerPlacement(30, 4).table == NONE).sum() == 2
    assert LayerPlacement(30, 4, 2).counts.tolist() == [[4, 4], [4, 4], [4, 3], [4, 3]]
    assert LayerPlacement(5, 2, 2).table.tolist() == [[[0, 1], [3, NONE]], [[2, NONE], [4, NONE]]]
    assert not LayerPlacement(0).is_padded
