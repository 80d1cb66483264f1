"""The pipeline: schedules as tables, and the engine that runs any of them. What is exported here needs no jax."""

from jaxpar.pipeline.check import IDLE, ScheduleError
from jaxpar.pipeline.schedule import SCHEDULES, Schedule, build_schedule

__all__ = ["IDLE", "SCHEDULES", "Schedule", "ScheduleError", "build_schedule"]
