"""The learning rate over a run."""

import math

from dvn_cli.training.recipe import ScheduleKeys


def factor(schedule: ScheduleKeys, done: float) -> float:
    """The share of the highest learning rate after a share of the run, `done` in 0..1."""
    if done < schedule.warmup:
        return done / schedule.warmup
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "step":
        return schedule.gamma ** sum(done >= milestone for milestone in schedule.milestones)
    rest, whole = done - schedule.warmup, 1 - schedule.warmup
    if schedule.name == "cosine":
        share = (1 + math.cos(math.pi * rest / whole)) / 2
    elif schedule.name == "tanh":
        share = (1 - math.tanh(10 * rest / whole - 7)) / 2
    else:
        share = (1 - rest / whole) ** schedule.power
    return schedule.min_factor + (1 - schedule.min_factor) * share
