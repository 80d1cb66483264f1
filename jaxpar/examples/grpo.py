"""Reinforcement learning on the mesh: answers are sampled, rewarded, and trained on with GRPO.

    python -m jaxpar.examples.grpo 20

An answer is rewarded for the share of its tokens that are below 4: by chance, that is a quarter. Sampling runs the whole sequence
once for each new token, which is enough for a toy. For more, hand `trainer.export_params()` to an engine.
"""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

import jaxpar

VOCAB, PROMPT, ANSWER, GROUP = 16, 4, 12, 8

CONFIG: dict[str, Any] = {
    "cluster": {"num_nodes": 1, "num_gpus_per_node": 8},
    "runner": {"seq_length": PROMPT + ANSWER, "output_dir": "results", "experiment_name": "grpo"},
    "algorithm": {
        "loss_type": "actor",
        "adv_type": "grpo",
        "group_size": GROUP,
        "n_minibatches": 2,
        "kl_beta": 0.001,
    },
    "actor": {
        "micro_batch_size": 4,
        "global_batch_size": 32,
        "model": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB,
            "make_vocab_size_divisible_by": VOCAB, "max_position_embeddings": PROMPT + ANSWER, "initializer_range": 0.1,
            "precision": "fp32", "pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2,
        },
        "optim": {"lr": 0.002, "weight_decay": 0.0},
    },
}  # fmt: skip


def sample(trainer: jaxpar.Trainer, prompts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[rows, PROMPT] → [rows, PROMPT + ANSWER]; as many rows as a global batch has."""
    rows, tokens = len(prompts), np.pad(prompts, ((0, 0), (0, ANSWER)))
    all_tokens = np.broadcast_to(np.arange(VOCAB), (*tokens.shape, VOCAB))
    for place in range(PROMPT, PROMPT + ANSWER):
        found = trainer.statistics({"tokens": tokens, "targets": tokens}, candidates=all_tokens)
        log_probs = np.asarray(found.candidates)[:, place - 1]
        tokens[:, place] = (log_probs + rng.gumbel(size=(rows, VOCAB))).argmax(1)
    return tokens


def rollouts(actor: jaxpar.Actor, trainer: jaxpar.Trainer, rng: np.random.Generator) -> Iterator[jaxpar.Rollout]:
    batch = trainer.config.actor.global_batch_size
    for _ in range(actor.num_rollouts // batch):
        prompts = np.repeat(rng.integers(0, VOCAB, (batch // GROUP, PROMPT)), GROUP, axis=0)
        for tokens in sample(trainer, prompts, rng):
            yield jaxpar.Rollout(tokens, PROMPT, reward=(tokens[PROMPT:] < 4).mean())


def train(steps: int, overrides: dict[str, Any] | None = None) -> tuple[list[float], list[float]]:
    """(mean reward of each step, loss of each minibatch). `overrides`: settings of actor.model."""
    actor_settings = {**CONFIG["actor"], "model": {**CONFIG["actor"]["model"], **(overrides or {})}}
    trainer = jaxpar.Trainer(jaxpar.config_from_dict({**CONFIG, "actor": actor_settings}))
    actor, rng, rewards, losses = jaxpar.Actor(trainer), np.random.default_rng(0), list[float](), list[float]()
    for step in range(steps):
        metrics, minibatches = actor.train(list(rollouts(actor, trainer, rng)))
        rewards.append(metrics["rollout/reward_scores"])
        losses += [minibatch["loss"] for minibatch in minibatches]
        print(f"step {step + 1}: reward {rewards[-1]:.3f}, kl {minibatches[-1]['actor/kl_loss']:.4f}")
    return rewards, losses


if __name__ == "__main__":
    train(int(sys.argv[1]))
