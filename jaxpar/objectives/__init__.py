"""Objectives: what a step minimizes. README.md says how to add one."""

from jaxpar.objectives.apply import as_objective, losses_and_metrics, weights_and_counts
from jaxpar.objectives.base import Asked, Batch, Max, Mean, Objective, Sum, TokenStatistics, UserObjective
from jaxpar.objectives.check import check_independence, check_objective
from jaxpar.objectives.statistics import (
    LogitSums,
    Targets,
    logits_grad,
    merge,
    over_devices,
    statistics_of,
    sums_of,
    token_statistics,
)
from jaxpar.objectives.totals import Totals, add_totals, finished, joined, start_of, totals_of

__all__ = [
    "Asked",
    "Batch",
    "LogitSums",
    "Max",
    "Mean",
    "Objective",
    "Sum",
    "Targets",
    "TokenStatistics",
    "Totals",
    "UserObjective",
    "add_totals",
    "as_objective",
    "check_independence",
    "check_objective",
    "finished",
    "joined",
    "logits_grad",
    "losses_and_metrics",
    "merge",
    "over_devices",
    "start_of",
    "statistics_of",
    "sums_of",
    "token_statistics",
    "totals_of",
    "weights_and_counts",
]
