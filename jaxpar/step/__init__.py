"""One training step: loss and gradients on any mesh, the optimizer, and the state that a step advances."""

from jaxpar.step.forward import build_evaluate, build_statistics
from jaxpar.step.loss_and_grads import StepSetup, build_loss_and_grads, build_loss_metrics_and_grads
from jaxpar.step.train_step import State, build_train_step, init_state, state_shardings

__all__ = [
    "State",
    "StepSetup",
    "build_evaluate",
    "build_loss_and_grads",
    "build_loss_metrics_and_grads",
    "build_statistics",
    "build_train_step",
    "init_state",
    "state_shardings",
]
