"""Writes the numbers of each step to Weights & Biases (https://docs.wandb.ai/ref/python)."""

import secrets
from typing import Any

from jaxpar.config import ConfigError
from jaxpar.run.hooks import Hook, Run

try:
    import wandb
except ImportError:
    raise ConfigError(
        "runner.logger.logger_backends: wandb is not installed: pip install 'jaxpar[wandb]', or remove it from the list"
    ) from None


class WandB(Hook):
    """Each number of a row becomes `train/<name>` of the project `runner.logger.project_name`, with the config.

    A run that resumes goes on as the same run of W&B, whose id is kept in `wandb_id` in the experiment's folder. W&B ignores
    steps that it has already. Where it is without a network, say WANDB_MODE=offline in the environment.
    """

    def __init__(self) -> None:
        self._wandb: Any = None

    def start(self, run: Run) -> None:
        folder = run.config.output_path
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / "wandb_id"
        if not (run.step and kept.exists()):
            kept.write_text(secrets.token_hex(4))
        self._wandb = wandb.init(
            project=run.config.runner.logger.project_name,
            name=run.config.runner.experiment_name,
            config=run.config.model_dump(),
            dir=folder,
            id=kept.read_text(),
            resume="allow",
        )

    def step(self, row: dict[str, Any]) -> None:
        numbers = {f"train/{name}": value for name, value in row.items() if name != "step" and value is not None}
        self._wandb.log(numbers, row["step"])

    def end(self) -> None:
        if self._wandb:
            self._wandb.finish()
