"""Weights that a user gives: a tree or a function, split as they are read."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import user_models
from jax.sharding import NamedSharding
from support import equal_trees, make_mesh, random_params

from jaxpar.config import ConfigError
from jaxpar.models import FunctionalModel
from jaxpar.models.weights import given_params, named_params
from jaxpar.parallel.sharding import layout_tree

GPT = FunctionalModel(user_models.GPT())


def on_mesh(*sizes: int, zero_stage: int = 1) -> Any:
    mesh = make_mesh(sizes)
    layouts = layout_tree(GPT.shapes, GPT.dims, mesh, explicit=GPT.explicit, zero_stage=zero_stage)
    return jax.tree.map(lambda layout: NamedSharding(mesh, layout.rest_spec), layouts)


@functools.cache
def weights() -> Any:
    return random_params(GPT)


def one_of(tree: Any, path: str) -> np.ndarray:
    """What a user's function returns: layers/3/norm1/scale is layer 3 of layers/norm1/scale."""
    part, _, rest = path.partition("/")
    if part != "layers":
        return named_params(tree)[path]
    layer, _, rest = rest.partition("/")
    return named_params(tree)[f"layers/{rest}"][int(layer)]


@pytest.mark.parametrize("sizes", [(2, 2, 1, 2, 2), (1, 1, 4, 1, 1), (1, 1, 1, 1, 1)])
def test_a_tree_and_a_function_give_the_same_bits(sizes):
    shardings, calls = on_mesh(*sizes), []

    def function(path: str) -> np.ndarray:
        calls.append(path)
        return one_of(weights(), path)

    for source in (weights(), function, jax.tree.map(jnp.asarray, weights())):
        params = given_params(source, GPT.shapes, shardings)
        assert equal_trees(params, weights())
        assert jax.tree.map(lambda x: x.sharding, params) == shardings
    # Once for each layer, although several devices hold parts of it.
    layers = [
        f"layers/{layer}/{name[7:]}" for name in named_params(weights()) if name[:7] == "layers/" for layer in range(4)
    ]
    assert sorted(calls) == sorted([*layers, *(name for name in named_params(weights()) if name[:7] != "layers/")])


def test_other_dtypes_become_float32():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights())
    expected = jax.tree.map(lambda x: np.asarray(x, np.float32), half)
    shardings = on_mesh(1, 2, 1, 2, 1)
    for source in (half, lambda path: one_of(half, path), jax.device_put(half, shardings)):
        assert equal_trees(given_params(source, GPT.shapes, shardings), expected)


def test_the_users_arrays_stay_valid_when_the_first_state_takes_the_weights():
    shardings = on_mesh(1, 2, 1, 2, 1)
    for own in (jax.device_put(weights(), shardings), jax.device_put(weights(), jax.devices()[0])):
        params = given_params(own, GPT.shapes, shardings)
        jax.jit(lambda x: jax.tree.map(lambda y: y * 0, x), donate_argnums=0)(params)
        assert equal_trees(own, weights())


def test_all_problems_of_a_tree_are_reported_at_once():
    tree = jax.tree.map(lambda x: x, weights())
    layers = tree["layers"]
    layers["querry"] = layers.pop("query")
    tree["head"]["norm"]["scale"] = np.ones(3, np.float32)
    tree["embed"]["tokens"]["embedding"] = weights()["embed"]["tokens"]["embedding"].astype(np.int8)
    layers["up"]["bias"] = 0.0
    with pytest.raises(ConfigError) as caught:
        given_params(tree, GPT.shapes, on_mesh(1, 1, 1, 1, 1))
    unknown = "is unknown (did you mean layers/query/{0}?): the model has no such parameter"
    assert sorted(caught.value.problems) == sorted([
        f"params: layers/querry/kernel {unknown.format('kernel')}",
        f"params: layers/querry/bias {unknown.format('bias')}",
        "params: layers/query/kernel [4, 64, 8, 8] is missing",
        "params: layers/query/bias [4, 8, 8] is missing",
        "params: head/norm/scale is [3], expected [64]",
        "params: embed/tokens/embedding is int8, expected a float dtype",
        "params: layers/up/bias is a float, expected an array [4, 96]",
    ])  # fmt: skip


def test_all_problems_of_a_function_are_reported_at_once():
    def function(path: str) -> Any:
        if path.endswith("up/bias"):
            return {}[path]
        value = one_of(weights(), path)
        return value.T if path.endswith("layers/2/up/kernel") else value

    with pytest.raises(ConfigError) as caught:
        given_params(function, GPT.shapes, on_mesh(1, 2, 1, 2, 1))
    assert sorted(caught.value.problems) == [
        "params: layers/0/up/bias (and 3 more layers) [96] is missing: the function raised KeyError",
        "params: layers/2/up/kernel is [96, 64], expected [64, 96]",
    ]
