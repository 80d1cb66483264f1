"""Advantages: how much better an answer's token was than expected, from the rewards of whole answers.

Each function takes the answers' tokens padded to one length, as numpy arrays, and returns float32 [rollouts, answer], 0 outside of
the mask. Names and constants are RLinf's (`rlinf/algorithms/advantages.py`). An answer's reward comes with its last token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from jaxpar.config import ConfigError
from jaxpar.config.errors import did_you_mean, one_of
from jaxpar.config.keys import ADVANTAGES as KEYS
from jaxpar.config.keys import Algorithm


@dataclass(frozen=True)
class Answers:
    """What advantages are made of. Rollouts of one prompt, `algorithm.group_size` of them, follow one another.

    Attributes:
      rewards: [rollouts], float.
      mask: [rollouts, answer], the tokens to train on.
      values: [rollouts, answer], float, what a critic expected of the rest of the answer; None without a critic.
      kl: [rollouts, answer], float, an estimate of KL(π_old, π_ref); None without a reference.
    """

    rewards: Float[np.ndarray, " rollouts"]
    mask: Bool[np.ndarray, "rollouts answer"]
    values: Float[np.ndarray, "rollouts answer"] | None = None
    kl: Float[np.ndarray, "rollouts answer"] | None = None

    @property
    def last(self) -> Bool[np.ndarray, "rollouts answer"]:
        """The last token of each answer that has any."""
        return self.mask & (np.cumsum(self.mask, 1) == self.mask.sum(1, keepdims=True))


def grpo(answers: Answers, algorithm: Algorithm) -> np.ndarray:
    """Group relative (Shao et al., 2024, arXiv:2402.03300, section 4.1.2): (reward - mean) / (std + 1e-6) within the group, the same
    for each token; std with one degree of freedom less."""
    groups = _groups(answers.rewards, algorithm.group_size)
    scores = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-6)
    return np.where(answers.mask, scores.reshape(-1, 1), 0)


def gae(answers: Answers, algorithm: Algorithm) -> np.ndarray:
    """Generalized advantage estimation (Schulman et al., 2016, arXiv:1506.02438, equation 16), from the critic's values:

        δ_t = r_t + gamma V_{t+1} - V_t        A_t = δ_t + gamma · gae_lambda · A_{t+1}

    Without a critic, the answer's reward at each of its tokens. With `normalize_advantages`, minus their mean and divided by
    their standard deviation, over all tokens."""
    mask, rewards = answers.mask, np.where(answers.last, answers.rewards[:, None], 0.0)
    has_critic = answers.values is not None
    gamma, decay = (algorithm.gamma, algorithm.gamma * algorithm.gae_lambda) if has_critic else (1.0, 1.0)
    values = answers.values if answers.values is not None else np.zeros(mask.shape)
    advantages, after, value_after = np.zeros(mask.shape), np.zeros(len(mask)), np.zeros(len(mask))
    for t in reversed(range(mask.shape[1])):  # tokens outside of the mask are passed over
        delta = rewards[:, t] + gamma * value_after - values[:, t]
        after = np.where(mask[:, t], delta + decay * after, after)
        value_after = np.where(mask[:, t], values[:, t], value_after)
        advantages[:, t] = after
    return _normalized(advantages, mask, algorithm)


def reinpp(answers: Answers, algorithm: Algorithm) -> np.ndarray:
    """REINFORCE++ (Hu et al., 2025, arXiv:2501.03262): the sum of the rewards from a token on, of which `reinpp_kl_beta` times the KL
    to the reference is taken off, normalized over all tokens. `use_reinpp_baseline` first takes off the group's mean reward."""
    rewards, mask = answers.rewards, answers.mask
    if algorithm.use_reinpp_baseline:
        groups = _groups(rewards, algorithm.group_size)
        rewards = (groups - groups.mean(1, keepdims=True)).ravel()
    each = np.where(answers.last, rewards[:, None], 0.0)
    if algorithm.reinpp_kl_beta:
        assert answers.kl is not None
        each -= algorithm.reinpp_kl_beta * np.where(mask, answers.kl, 0)
    returns = each[:, ::-1].cumsum(1)[:, ::-1]
    valid = returns[mask]
    return np.where(mask, (returns - valid.mean()) / np.sqrt(max(valid.var(), 1e-8)), 0)


def raw(answers: Answers, algorithm: Algorithm) -> np.ndarray:
    """The answer's reward at each of its tokens; with `normalize_advantages` as in `gae`."""
    return _normalized(np.where(answers.mask, answers.rewards[:, None], 0.0), answers.mask, algorithm)


ADVANTAGES: dict[str, Callable[[Answers, Algorithm], np.ndarray]] = {
    "grpo": grpo,
    "gae": gae,
    "reinpp": reinpp,
    "raw": raw,
}
assert ADVANTAGES.keys() == KEYS.keys()


def advantages_of(answers: Answers, algorithm: Algorithm) -> Float[np.ndarray, "rollouts answer"]:
    """Those that `algorithm.adv_type` names.

    Raises:
      ConfigError: the number of rollouts is no multiple of the group's size, or no token is trained on.
    """
    if not answers.mask.any():
        raise ConfigError("rollouts: no answer has a token to train on")
    return ADVANTAGES[algorithm.adv_type](answers, algorithm).astype(np.float32)


def check_algorithm(algorithm: Algorithm) -> None:
    """Raises ConfigError if there are no such advantages, or the group is too small for them."""
    name, problems = algorithm.adv_type, list[str]()
    if name not in ADVANTAGES:
        problems.append(
            f"algorithm.adv_type: {name} is not supported{did_you_mean(name, tuple(ADVANTAGES))}: {one_of(tuple(ADVANTAGES))}"
        )
    in_groups = name == "grpo" or (name == "reinpp" and algorithm.use_reinpp_baseline)
    if in_groups and algorithm.group_size < 2:
        problems.append(
            f"algorithm.group_size: {algorithm.group_size}, but adv_type {name} compares the answers to one prompt: set 2 or more"
        )
    if problems:
        raise ConfigError(problems)


def _groups(rewards: np.ndarray, size: int) -> np.ndarray:
    if len(rewards) % size:
        raise ConfigError(
            f"rollouts: {len(rewards)} are not a multiple of algorithm.group_size: {size}: give all answers to a prompt, one "
            f"after another"
        )
    return rewards.reshape(-1, size)


def _normalized(advantages: np.ndarray, mask: np.ndarray, algorithm: Algorithm) -> np.ndarray:
    """RLinf's `safe_normalize`: the standard deviation has one degree of freedom less, and 1e-5 is added to it."""
    valid = advantages[mask]
    if algorithm.normalize_advantages and len(valid) > 1:
        advantages = (advantages - valid.mean()) / (valid.std(ddof=1) + 1e-5)
    return np.where(mask, advantages, 0)
