"""Settings composed at random against one device. Hours of it: `python -m tests.compositions`, see tests/README.md."""

import collections

import jax
import numpy as np
import pytest
from compositions import running
from compositions.drawing import FEATURES, NEEDS, Case, draw
from compositions.running import run
from support import slow

from jaxpar.config import ConfigError, config_from_dict

# Between them, 22 of the 29 features, four kinds of schedules and every stage of ZeRO. The others are about two minutes.
COVERING = (868, 98, 899, 315)
SECOND = np.array([[1], [1 + 1e-4]], np.float32)  # of two layers, changed


@pytest.mark.parametrize("number", [*COVERING, *slow(*range(2000, 2020))])
def test_a_case_is_that_of_one_device(number):
    case = draw(number)
    try:
        result = run(case)
    finally:
        jax.clear_caches()
    assert result.kind != "WRONG", f"python -m tests.compositions --case {number}: {case}: {result}"


def test_what_is_drawn():
    """Each feature and most pairs of them occur, and few cases are refused."""
    cases = [draw(number) for number in range(300)]
    counts = collections.Counter(name for case in cases for name in case.features)
    assert min(counts[name] for name in FEATURES) > 8 and NEEDS.keys() <= FEATURES.keys()
    pairs = {(a, b) for case in cases for a in case.features for b in case.features if a < b}
    assert len(pairs) > 250
    refused = [case for case in cases if is_refused(case)]
    assert 3 < len(refused) < 30
    assert draw(5) == draw(5) != draw(6)


def is_refused(case: Case) -> bool:
    try:
        config = config_from_dict(case.values())
        sizes = config.mesh_sizes(case.settings["cluster.num_gpus_per_node"])
        config.check_train(sizes, None if case.model else config.architecture())
    except ConfigError:
        return True
    return False


@pytest.mark.parametrize(("mistake", "where"), [
    (lambda loss, grads: (loss * np.float32(1.001), grads), "loss"),
    (lambda loss, grads: (loss, grads | {"head": grads["head"] * np.float32(1.001)}), "head"),
    (lambda loss, grads: (loss, grads | {"layers/w": grads["layers/w"] * SECOND}), "layers/w[1]"),
    (lambda loss, grads: (loss, grads | {"unused": np.full(2, 1e-30, np.float32)}), "unused"),
    (lambda loss, grads: (loss, grads | {"head": grads["head"] * np.nan}), "head"),
], ids=["loss", "a gradient", "one layer", "a gradient of zero", "not finite"])  # fmt: skip
def test_a_wrong_number_is_seen(mistake, where):
    rng = np.random.default_rng(0)
    grads = {"layers/w": rng.normal(size=(2, 5)), "head": rng.normal(size=3), "unused": np.zeros(2)}
    right = np.float32(2), {name: x.astype(np.float32) for name, x in grads.items()}
    errors = running.relative_errors(mistake(*right), right)
    assert [name for name, error in errors.items() if not error <= 5e-5] == [where]
    assert not any(running.relative_errors(right, right).values())
