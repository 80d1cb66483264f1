"""A loss, an optimizer, batches and a hook of one's own in one run: the built-in decoder learns to count in steps of 1, 2 or 3.

    python -m jaxpar.examples.everything results

The run stops when the model is sure enough. Started again, it goes on where it was, with the batch that comes next.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpar

VOCAB, ROWS, SEQ, MAX_STEPS = 16, 16, 16, 300


def focal(tokens: jaxpar.TokenStatistics, batch: Any) -> Any:
    """The focal loss (Lin et al., 2017, arXiv:1708.02002) of each token, and a metric."""
    p = jnp.exp(tokens.log_probs)
    return -((1 - p) ** 2) * tokens.log_probs, {"confidence": p}


class Counting:
    """An endless iterator whose position a checkpoint can hold."""

    def __init__(self) -> None:
        self._next = 0

    def __iter__(self) -> "Counting":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(self._next)
        self._next += 1
        first, stride = rng.integers(0, VOCAB, (ROWS, 1)), rng.integers(1, 4, (ROWS, 1))
        rows = (first + stride * np.arange(SEQ + 1)) % VOCAB
        return {"tokens": rows[:, :-1], "targets": rows[:, 1:]}

    def get_state(self) -> dict[str, int]:
        return {"next": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        self._next = state["next"]


class StopWhenSure(jaxpar.Hook):
    """Ends the run when the mean of the probabilities of the targets is high enough."""

    def __init__(self, confidence: float):
        self._confidence = confidence

    def step(self, row: dict[str, Any]) -> Any:
        return jaxpar.STOP if row["confidence"] > self._confidence else None


def config(folder: str, **sizes: Any) -> jaxpar.Config:
    model = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": SEQ, "precision": "fp32"}  # fmt: skip
    return jaxpar.config_from_dict({
        "cluster": {"num_gpus_per_node": 8},
        "runner": {"seq_length": SEQ, "max_steps": MAX_STEPS, "output_dir": folder, "experiment_name": "everything", "resume_dir": "auto"},
        "actor": {"micro_batch_size": 2, "global_batch_size": ROWS, "model": {**model, **sizes}},
    })  # fmt: skip


def train(folder: str, confidence: float = 0.8, **sizes: Any) -> None:
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.lion(1e-3))
    trainer = jaxpar.Trainer(config(folder, **sizes), objective=focal, optimizer=optimizer)
    trainer.fit(Counting(), hooks=[StopWhenSure(confidence)])


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # simulated devices, where there is no GPU
    train(sys.argv[1], tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True)
