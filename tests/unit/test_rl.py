"""Advantages against loops over the equations, and how rollouts lie in rows."""

import math

import numpy as np
import pytest

from jaxpar.config import ConfigError, config_from_dict
from jaxpar.config.keys import Algorithm
from jaxpar.rl.advantages import Answers, advantages_of, check_algorithm
from jaxpar.rl.rollouts import Rollout, check_rollouts

RNG = np.random.default_rng(0)
LENGTHS = [3, 5, 1, 4, 5, 2, 2, 3]
MASK = np.arange(6) < np.array(LENGTHS)[:, None]
MASK[1, 2] = False  # a tool's output
REWARDS = RNG.normal(size=8)
VALUES, KL = RNG.normal(size=MASK.shape), RNG.random(MASK.shape)


def trained(row):
    return [t for t in range(MASK.shape[1]) if MASK[row, t]]


def normalized(found, extra):
    valid = [found[r][t] for r in range(8) for t in trained(r)]
    mean = sum(valid) / len(valid)
    std = math.sqrt(sum((x - mean) ** 2 for x in valid) / (len(valid) - 1)) + extra
    return [[(found[r][t] - mean) / std if MASK[r, t] else 0 for t in range(6)] for r in range(8)]


def test_grpo():
    found = advantages_of(Answers(REWARDS, MASK), Algorithm(adv_type="grpo", group_size=4))
    for group in range(2):
        rewards = [REWARDS[4 * group + i] for i in range(4)]
        mean = sum(rewards) / 4
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 3)
        for i in range(4):
            expected = np.where(MASK[4 * group + i], (rewards[i] - mean) / (std + 1e-6), 0)
            np.testing.assert_allclose(found[4 * group + i], expected, rtol=1e-6)


@pytest.mark.parametrize("critic", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_gae(critic, normalize):
    algorithm = Algorithm(adv_type="gae", gamma=0.9, gae_lambda=0.8, normalize_advantages=normalize)
    found = advantages_of(Answers(REWARDS, MASK, VALUES if critic else None), algorithm)
    expected = [[0.0] * 6 for _ in range(8)]
    for row in range(8):
        tokens = trained(row)
        for place, t in enumerate(tokens):
            if not critic:
                expected[row][t] = REWARDS[row]
                continue
            for k, later in enumerate(tokens[place:]):  # the sum of (γλ)^k δ
                last = later == tokens[-1]
                after = 0 if last else VALUES[row, tokens[tokens.index(later) + 1]]
                delta = (REWARDS[row] if last else 0) + 0.9 * after - VALUES[row, later]
                expected[row][t] += (0.9 * 0.8) ** k * delta
    np.testing.assert_allclose(found, normalized(expected, 1e-5) if normalize else expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_reinpp(baseline, beta):
    algorithm = Algorithm(adv_type="reinpp", group_size=4, use_reinpp_baseline=baseline, reinpp_kl_beta=beta)
    found = advantages_of(Answers(REWARDS, MASK, kl=KL), algorithm)
    returns = np.zeros(MASK.shape)
    for row in range(8):
        group = REWARDS[row // 4 * 4 : row // 4 * 4 + 4]
        reward = REWARDS[row] - (sum(group) / 4 if baseline else 0)
        for t in trained(row):
            returns[row, t] = reward - beta * sum(KL[row, later] for later in trained(row) if later >= t)
    valid = returns[MASK]
    expected = np.where(MASK, (returns - valid.mean()) / valid.std(), 0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_raw():
    found = advantages_of(Answers(REWARDS, MASK), Algorithm(adv_type="raw", normalize_advantages=False))
    np.testing.assert_allclose(found, np.where(MASK, REWARDS[:, None], 0), rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"adv_type": "grop", "group_size": 4}, "adv_type: grop is not supported.*did you mean"),
        ({"adv_type": "grpo"}, "group_size: 1, but adv_type grpo compares"),
        ({"adv_type": "reinpp", "use_reinpp_baseline": True}, "group_size: 1, but adv_type reinpp"),
    ],
)
def test_settings_that_are_wrong(settings, problem):
    with pytest.raises(ConfigError, match=problem):
        check_algorithm(Algorithm(**settings))


def test_groups_must_be_whole():
    with pytest.raises(ConfigError, match="8 are not a multiple of algorithm.group_size: 3"):
        advantages_of(Answers(REWARDS, MASK), Algorithm(group_size=3))
    with pytest.raises(ConfigError, match="no answer has a token"):
        advantages_of(Answers(REWARDS, MASK & False), Algorithm(group_size=4))


@pytest.mark.parametrize(
    ("rollout", "problem"),
    [
        (Rollout([1, 2, 3], 3, 1.0), "number 1 has 3 tokens, of which prompt_length: 3"),
        (Rollout(range(10), 3, 1.0), "number 1 has 10 tokens, but a row has room for 8 \\+ 1"),
        (Rollout([1, 2, 3], 1, 1.0, log_probs=[0.0]), "number 1: log_probs is \\[1\\], but the answer has 2"),
    ],
)
def test_rollouts_that_are_wrong(rollout, problem):
    with pytest.raises(ConfigError, match=problem):
        check_rollouts([Rollout(range(9), 1, 0.0), rollout], 8)


def test_settings_of_other_advantages_are_a_note():
    settings = {"loss_type": "actor", "adv_type": "grpo", "group_size": 4, "normalize_advantages": True, "gamma": 0.9}
    (note,) = [n for n in config_from_dict({"algorithm": settings}).notes if n.startswith("algorithm")]
    assert note == "algorithm: gamma, normalize_advantages have no effect with adv_type grpo"
    other = config_from_dict({"algorithm": {**settings, "adv_type": "gae"}}).notes
    assert "algorithm: group_size has no effect with adv_type gae" in other
