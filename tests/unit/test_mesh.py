"""Where each device stands in the mesh."""

import jax
import numpy as np
import pytest

from jaxpar.config import ConfigError, MeshSizes, config_from_dict
from jaxpar.parallel.mesh import AXES, build_mesh, cross_host_warning, device_grid


def test_names_and_their_order():
    mesh = build_mesh(MeshSizes(dp=2, pp=2, tp=2, sp=1, cp=2))
    assert mesh.axis_names == AXES == ("dp", "pp", "tp", "sp", "cp")
    assert dict(mesh.shape) == {"dp": 2, "pp": 2, "tp": 2, "sp": 1, "cp": 2}
    assert mesh.devices.shape == (2, 2, 2, 1, 2)
    assert {d.id for d in mesh.devices.flat} == {d.id for d in jax.devices()}


def test_the_tensor_group_is_fastest_then_cp_dp_pp():
    grid = device_grid(MeshSizes(dp=3, pp=5, tp=2, sp=1, cp=4))
    assert grid.shape == (3, 5, 2, 1, 4)
    strides = {
        "tp": grid[0, 0, 1, 0, 0],
        "cp": grid[0, 0, 0, 0, 1],
        "dp": grid[1, 0, 0, 0, 0],
        "pp": grid[0, 1, 0, 0, 0],
    }
    assert strides == {"tp": 1, "cp": 2, "dp": 8, "pp": 24}
    assert sorted(grid.flat) == list(range(120))
    sequence = device_grid(MeshSizes(dp=3, pp=5, tp=1, sp=2, cp=4))
    assert np.array_equal(sequence[:, :, 0, :, :], grid[:, :, :, 0, :])  # the same devices with SP on and off


def test_the_mesh_follows_the_grid():
    mesh = build_mesh(MeshSizes(dp=2, pp=2, tp=1, sp=2, cp=2))
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    assert ids[0, 0, 0, :, 0].tolist() == [0, 1]
    assert ids[0, 0, 0, 0, :].tolist() == [0, 2]
    assert ids[:, 0, 0, 0, 0].tolist() == [0, 4]
    assert ids[0, :, 0, 0, 0].tolist() == [0, 8]


def test_from_a_config():
    config = config_from_dict({"actor": {"model": {
        "tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2}}})  # fmt: skip
    assert tuple(build_mesh(config).shape.values()) == (4, 1, 1, 2, 2)
    assert tuple(build_mesh(config, jax.devices()[:4]).shape.values()) == (1, 1, 1, 2, 2)


def test_wrong_number_of_devices():
    with pytest.raises(ConfigError) as caught:
        build_mesh(MeshSizes(dp=3, pp=2, tp=1, sp=1, cp=1))
    assert str(caught.value) == "mesh dp 3 x pp 2 x tp 1 x sp 1 x cp 1 = 6 devices, but there are 16"


def test_a_tensor_group_inside_one_host_is_no_warning():
    for tensor in (1, 2, 4, 8):
        assert cross_host_warning(MeshSizes(dp=16 // tensor, pp=1, tp=tensor, sp=1, cp=1), 8) is None
        assert cross_host_warning(MeshSizes(dp=16 // tensor, pp=1, tp=1, sp=tensor, cp=1), 8) is None


def test_a_tensor_group_that_crosses_hosts_names_them():
    warning = cross_host_warning(MeshSizes(dp=1, pp=1, tp=16, sp=1, cp=1), 8)
    assert warning and "tensor group of 16 devices crosses hosts [0, 1]" in warning
    assert "tensor_model_parallel_size" in warning and "8 devices" in warning
    # Groups of 6 on hosts of 8: 0-5, 6-11, 12-17, 18-23. The second and the third cross hosts.
    warning = cross_host_warning(MeshSizes(dp=4, pp=1, tp=1, sp=6, cp=1), 8)
    assert warning and "crosses hosts [0, 1] (and 1 more groups do)" in warning
