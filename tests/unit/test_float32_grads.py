"""Gradients of parameters in float32 from the products that make them. Parity runs in float32, where there is nothing to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.backward import in_float32, take_apart
from jaxpar.backward.recompute import Recompute


def integers(key: int, *shape: int) -> jax.Array:
    """Of -1, 0, 1: all products and sums below are exact in bfloat16, so that two ways to compute them agree to the bit."""
    return jnp.asarray(np.random.default_rng(key).integers(-1, 2, shape), jnp.bfloat16)


PARAMS = {
    "product": integers(1, 4, 6),  # [embed, mlp]
    "transposed": integers(2, 4, 6),  # used as [mlp, embed]
    "heads": integers(3, 4, 2, 3),  # a product whose result has two dimensions for it
    "heads back": integers(4, 2, 3, 4),
    "used twice": integers(5, 4, 4),
    "bias": integers(6, 4),
    "scale": integers(7, 4),
    "unused": integers(8, 3),
    "tokens first": integers(9, 4, 4),  # the two sides of its gradient's product are summed over other dimensions
    "tokens first, left": integers(12, 4, 4),
}


def block(params, x, info):
    wide = jnp.einsum("bse,em->bsm", x, params["product"])
    x = x + jnp.einsum("bsm,em->bse", wide, params["transposed"])
    heads = jnp.einsum("bse,ehd->bshd", x, params["heads"])
    x = x + jnp.einsum("bshd,hde->bse", heads, params["heads back"])
    turned = jnp.moveaxis(x, 0, 1)  # [seq, batch, embed]
    x = x + jnp.einsum("sbe,ef->bsf", turned, params["tokens first"])
    x = x + jnp.einsum("ef,sbe->bsf", params["tokens first, left"], turned)
    x = x @ params["used twice"] + x @ params["used twice"].T
    return x * params["scale"] + params["bias"]


def alone(block):
    """A block without auxiliary outputs, as the engine calls it."""
    return lambda *args: (block(*args), None)


X, Y_GRAD = integers(10, 1, 2, 4), integers(11, 1, 2, 4)


def gradients(dtype):
    wide = jax.tree.map(lambda a: a.astype(dtype), (PARAMS, X, Y_GRAD))
    return jax.vjp(lambda params, x: block(params, x, None), *wide[:2])[1](wide[2])


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("again", [(), "full"])
def test_a_block(again, split):
    pullback = take_apart(alone(block), PARAMS, X, None, again=again, split=split, float32_grads=True)
    _, _, kept = pullback.forward(PARAMS, X, None)
    names = sorted(PARAMS)
    if split:
        early, x_grad, pending = pullback.input_grad(kept, PARAMS, None, Y_GRAD)
        found = {names[i]: grad for i, grad in (early | pullback.weight_grad(kept, PARAMS, None, pending)).items()}
    else:
        found, x_grad = pullback.grads(kept, PARAMS, None, Y_GRAD)
    expected, expected_x = gradients(jnp.float32)
    assert x_grad.dtype == jnp.bfloat16 and jnp.array_equal(x_grad, expected_x)
    for name in names:
        assert jnp.array_equal(found[name], expected[name]), name
        assert (found[name].dtype == jnp.float32) == (name != "unused"), name


def test_sums_are_not_rounded():
    """257 is not a number of bfloat16: the gradient of a weight that 257 tokens use is 257 in float32, and 256 otherwise."""
    params, x = {"w": jnp.ones((1, 1), jnp.bfloat16)}, jnp.ones((1, 257, 1), jnp.bfloat16)
    function = lambda params, x, info: x @ params["w"]  # noqa: E731
    for float32_grads, total in ((True, 257), (False, 256)):
        pullback = take_apart(alone(function), params, x, None, again=(), float32_grads=float32_grads)
        _, _, kept = pullback.forward(params, x, None)
        assert pullback.grads(kept, params, None, x)[0]["w"] == total


def test_a_function_that_is_differentiated_by_hand():
    backward = jax.vjp(lambda params, x: block(params, x, None), PARAMS, X)[1]
    found, x_grad = in_float32(backward, Y_GRAD)
    expected, expected_x = gradients(jnp.float32)
    assert jnp.array_equal(x_grad, expected_x)
    assert all(jnp.array_equal(found[name], expected[name]) for name in PARAMS)
    assert found["transposed"].dtype == jnp.float32


def test_nothing_changes_in_float32():
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (PARAMS, X, Y_GRAD))
    programs = [
        take_apart(alone(block), *wide[:2], None, again=Recompute().layer_runs(1)[0].again, float32_grads=on)
        for on in (True, False)
    ]
    kept = programs[0].forward(*wide[:2], None)[2]
    found = [one.grads(kept, wide[0], None, wide[2]) for one in programs]
    assert jax.tree.all(jax.tree.map(jnp.array_equal, *found))
