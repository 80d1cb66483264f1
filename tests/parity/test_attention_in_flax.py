"""`flax_attention` in Flax's own layers, against the same layers with Flax's own attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from support import QUICK, TOLERANCE, relative_error

from jaxpar.attention import flax_attention, zigzag_order

BATCH, SEQ, HEADS, EMBED, CP = 2, 16, 4, 24, 2
CAUSAL = functools.partial(flax_attention, causal=True)


@functools.cache
def arrays():
    """Input, gradient of the output, and the document of each token."""
    rng = np.random.default_rng(2)
    x, grad = (jnp.asarray(rng.normal(size=(BATCH, SEQ, EMBED)), jnp.float32) for _ in range(2))
    return x, grad, jnp.asarray((rng.random((BATCH, SEQ)) < 0.2).cumsum(-1), jnp.int32)


def mask_of(segments):
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return nn.make_causal_mask(segments) * same


def linen(**arguments):
    """(layer function, parameters), with arguments of the layer and of its call."""
    build = functools.partial(nn.MultiHeadDotProductAttention, num_heads=HEADS, dropout_rate=0.0, deterministic=True)
    params = build().init(jax.random.key(0), arrays()[0])

    def apply(params, x, attention_fn=None, **call):
        layer = build(**({"attention_fn": attention_fn} if attention_fn else {}), **arguments)
        return layer.apply(params, x, **call)

    return apply, params


def in_nnx(**arguments):
    layer = nnx.MultiHeadAttention(
        HEADS, EMBED, EMBED, use_bias=False, decode=False, rngs=nnx.Rngs(0), keep_rngs=False, **arguments
    )
    graph, params = nnx.split(layer)

    def apply(params, x, attention_fn=None, **call):
        layer = nnx.merge(graph, params)
        if attention_fn is not None:
            layer.attention_fn = attention_fn
        return layer(x, **call)

    return apply, params


def with_gradients(apply, params, x, grad, **call):
    output, backward = jax.vjp(functools.partial(apply, **call), params, x)
    return output, *backward(grad)


LAYERS = pytest.mark.parametrize("make", [linen, in_nnx], ids=["linen", "nnx"])


def assert_close(actual, wanted):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert np.abs(one - other).max() <= TOLERANCE * max(1, np.abs(other).max())
    assert relative_error(actual[0], wanted[0]) < TOLERANCE


@functools.cache
def expected(make):
    apply, params = make()
    x, grad, segments = arrays()
    return with_gradients(apply, params, x, grad, mask=mask_of(segments))


@LAYERS
def test_one_device(make):
    apply, params = make()
    x, grad, segments = arrays()
    attend = functools.partial(CAUSAL, segment_ids=segments)
    assert_close(with_gradients(apply, params, x, grad, attention_fn=attend), expected(make))


@LAYERS
@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
def test_the_sequence_split_over_two_ranks(make, order):
    apply, params = make()

    def run(params, x, grad, segments):
        attend = functools.partial(CAUSAL, segment_ids=segments, axis="seq", order=order)
        local = jax.tree.map(lambda p: jax.lax.pcast(p, "seq", to="varying"), params)
        output, param_grads, x_grad = with_gradients(apply, local, x, grad, attention_fn=attend)
        return output, jax.lax.psum(param_grads, "seq"), x_grad

    split = P(None, "seq")
    spread = jax.shard_map(
        run,
        mesh=Mesh(np.array(jax.devices()[:CP]), ("seq",)),
        in_specs=(P(), split, split, split),
        out_specs=(split, P(), split),
    )
    index = zigzag_order(SEQ, CP) if order == "zigzag" else np.arange(SEQ)
    inputs = params, *(x[:, index] for x in arrays())
    output, param_grads, x_grad = jax.jit(spread).lower(*inputs).compile(compiler_options=QUICK)(*inputs)
    back = lambda x: x[:, np.argsort(index)]  # noqa: E731
    assert_close((back(output), param_grads, back(x_grad)), expected(make))


@LAYERS
def test_without_order(make):
    """As Flax's attention without a mask. In nnx, is_causal=True is heard."""
    apply, params = make()
    x, *_ = arrays()
    attend = functools.partial(flax_attention, causal=False)
    assert_close([apply(params, x, attention_fn=attend)], [apply(params, x)])
    causal = [apply(params, x, mask=nn.make_causal_mask(x[..., 0]))]
    if make is in_nnx:
        assert_close([apply(params, x, attention_fn=flax_attention, is_causal=True)], causal)
        with pytest.raises(ValueError, match="nnx says is_causal=False, which is also what it says if nobody told it"):
            apply(params, x, attention_fn=flax_attention)
        with pytest.raises(ValueError, match="causal=False in functools.partial, but is_causal=True from nnx"):
            apply(params, x, attention_fn=attend, is_causal=True)
    else:
        assert_close([apply(params, x, attention_fn=flax_attention)], causal)


def test_any_number_of_batch_dimensions():
    apply, params = linen()
    x = arrays()[0]
    attend = functools.partial(apply, params, attention_fn=CAUSAL)
    wanted = attend(x)
    np.testing.assert_allclose(attend(x[None, :, None])[0, :, 0], wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(attend(x[0]), wanted[0], rtol=1e-5, atol=1e-6)


def test_the_layers_dtype_is_that_of_the_output():
    query, key = (jnp.ones((1, 4, 2, 8), dtype) for dtype in (jnp.bfloat16, jnp.float32))
    assert flax_attention(query, key, key).dtype == jnp.float32  # as Flax promotes
    assert flax_attention(query, key, key, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    apply, params = linen(dtype=jnp.bfloat16)
    assert apply(params, arrays()[0], attention_fn=CAUSAL).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("layer", "call", "message"),
    [
        ({}, {"mask": np.ones((1, 1, SEQ, SEQ))}, r"a mask is an array .* causal=True, window=, segment_ids="),
        ({"dropout_rate": 0.5, "deterministic": False}, {"rngs": {"dropout": jax.random.key(1)}}, "dropout of attention"),
        ({"precision": "highest"}, {}, "takes no precision"),
        ({}, {"sow_weights": True}, "sow_weights is not supported"),
        ({"qk_attn_weights_einsum_cls": lambda: jnp.einsum, "attn_weights_value_einsum_cls": lambda: jnp.einsum}, {},
         "einsum_cls is not supported"),
    ],
    ids=["mask", "dropout", "precision", "weights", "einsum"],
)  # fmt: skip
def test_what_flax_has_and_this_attention_does_not(layer, call, message):
    apply, params = linen(**layer)
    with pytest.raises(ValueError, match=message):
        apply(params, arrays()[0], attention_fn=CAUSAL, **call)


def test_other_things_that_it_does_not_have():
    x = jnp.ones((1, 4, 2, 8))
    with pytest.raises(ValueError, match="a bias is an array"):
        flax_attention(x, x, x, bias=jnp.zeros((1, 2, 4, 4)))
    for name in ("qk_attn_weights_einsum", "attn_weights_value_einsum"):
        with pytest.raises(ValueError, match=f"{name}_cls is not supported"):
            flax_attention(x, x, x, **{name: jnp.einsum})
    with pytest.raises(ValueError, match="2 queries, 4 keys and 4 values"):
        flax_attention(x[:, :2], x, x, causal=False)
    assert flax_attention(x, x, x, dropout_rate=0.5, deterministic=True).shape == x.shape
