"""A guess at the dimension names of a model that has none, to be read and corrected. It is never taken by itself."""

import re
from typing import Any

import jax

from jaxpar.models.functional import FunctionalModel, UserModel

QUERY, KEY_VALUE = r"\b(q|query|q_proj|wq)\b", r"\b(k|v|key|value|k_proj|v_proj|wk|wv)\b"
OUT = r"\b(o|out|o_proj|out_proj|wo|c_proj|attn_vec_einsum)\b"
UP, DOWN = r"(up|gate|fc|wi|w1|w3|fc1|c_fc|linear1|dense1)", r"(down|wo|w2|fc2|c_proj|proj|linear2|dense2)"
POSITION = r"(pos|wpe)"


def suggest_dims(model: UserModel) -> dict[str, tuple[str | None, ...]]:
    """Prints, and returns, a guess at `dims` for every parameter without names, from its path and its shape.

    A wrong name costs speed or is refused; it gives no wrong numbers. So paste the text into your model, and correct it.
    """
    functional = FunctionalModel(model)
    width, vocab = functional.width, functional.vocab_size
    found: dict[str, tuple[str | None, ...]] = {}
    leaves = jax.tree_util.tree_leaves_with_path(functional.shapes)
    names = jax.tree.leaves(functional.dims, is_leaf=lambda x: x is None or isinstance(x, tuple))
    for (path, leaf), named in zip(leaves, names, strict=True):
        if named is not None:
            continue
        text = jax.tree_util.keystr(path, simple=True, separator="/")
        shape = leaf.shape[1:] if text.startswith("layers/") else leaf.shape
        found[re.sub(r"(?<=/)\d+(?=/)|(?<=[A-Za-z]_)\d+", "*", text)] = _guess(text.lower(), shape, width, vocab)
    print("dims = {")
    for pattern, guess in found.items():
        print(f"    {pattern!r}: {guess!r},{'' if any(guess) else '  # not recognized: never split'}")
    print("}")
    return found


def _guess(path: str, shape: tuple[int, ...], width: int, vocab: int) -> tuple[str | None, ...]:
    is_head, sizes = re.search(r"head|logits|unembed", path), list(shape)
    if len(shape) == 1:
        return ("embed",) if shape[0] == width and not re.search(UP, path.split("/")[-2]) else (None,)
    if re.search(POSITION, path):
        return tuple("embed" if i == len(shape) - 1 else None for i in range(len(shape)))
    if len(shape) == 2 and sorted(sizes) == sorted([width, vocab]) and (path.startswith("embed/") or is_head):
        return ("embed", "vocab") if sizes == [width, vocab] and is_head else ("vocab", "embed")
    heads: Any = "heads" if re.search(QUERY, path) else "kv_heads" if re.search(KEY_VALUE, path) else None
    if heads and shape[0] == width and len(shape) <= 3:
        return ("embed", heads, "head_dim")[: len(shape)]
    if heads and len(shape) == 2 and path.endswith("bias"):
        return heads, "head_dim"
    if re.search(OUT, path) and shape[-1] == width and len(shape) == 3:
        return "heads", "head_dim", "embed"
    if re.search(OUT, path) and "att" in path and len(shape) == 2 and shape[1] == width:
        return "heads", "embed"
    if len(shape) == 2 and shape[0] == width and re.search(UP, path):
        return "embed", "mlp"
    if len(shape) == 2 and shape[1] == width and re.search(DOWN, path):
        return "mlp", "embed"
    return (
        tuple("embed" if size == width else None for size in shape) if sizes.count(width) == 1 else (None,) * len(shape)
    )
