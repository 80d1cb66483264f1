"""Trees of parameters of which some are trained and the others are frozen.

A tree of something that only trained parameters have (gradients, moments) has None at the frozen ones. For jax, None is an
empty subtree, so that optax and `jax.tree.map` pass over it.
"""

from collections.abc import Callable
from typing import Any

import jax


def partition(tree: Any, like: Any) -> tuple[Any, Any]:
    """(the trained leaves of `tree`, the frozen ones), each with None in the place of the others.

    Args:
      like: a tree with None at the frozen leaves, such as gradients.
    """
    trained = jax.tree.map(lambda x, y: None if y is None else x, tree, like)
    frozen = jax.tree.map(lambda x, y: x if y is None else None, tree, like)
    return trained, frozen


def merge(some: Any, others: Any) -> Any:
    """The inverse of `partition`: the leaves of `some`, and where it has None, those of `others`."""
    return jax.tree.map(lambda x, y: y if x is None else x, some, others, is_leaf=lambda x: x is None)


def trained_layouts(layouts: Any) -> Any:
    """A tree of `ParamLayout` with None at the frozen parameters."""
    return jax.tree.map(lambda layout: layout if layout.trained else None, layouts)


def vjp(function: Callable, params: Any, like: Any, *args: Any, has_aux: Any = False) -> Any:
    """`jax.vjp(function, params, *args)`, but the gradient of `params` has None at the frozen leaves, and nothing is computed
    for them.

    Args:
      like: as in `partition`.
    """
    trained, frozen = partition(params, like)
    return jax.vjp(lambda trained, *args: function(merge(trained, frozen), *args), trained, *args, has_aux=has_aux)
