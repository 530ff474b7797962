"""The learning rate over a run."""

import math

from dvn_cli.training.recipe import ScheduleKeys


def factor(schedule: ScheduleKeys, done: float) -> float:
    """The share of the highest learning rate after a share of the run, `done` in 0..1."""
    if done < schedule.warmup:
        return done / schedule.warmup
    if schedule.name == "cosine":
        return (1 + math.cos(math.pi * (done - schedule.warmup) / (1 - schedule.warmup))) / 2
    if schedule.name == "step":
        return schedule.gamma ** sum(done >= milestone for milestone in schedule.milestones)
    return 1.0
