"""Which of a stage's networks a step trains."""

import random

from dvn_cli.store.metadata import TaskLevel
from dvn_cli.training.methods import Stage
from dvn_cli.training.recipe import Recipe


def networks_of_step(stage: Stage, recipe: Recipe, done: float, number: int) -> tuple[TaskLevel, ...]:
    """Returns the networks that a step trains, in the stage's order.

    They depend on nothing else, so that every process, and a run that is resumed, has the same.

    Args:
        stage: the part of the run.
        recipe: says how many levels are trained, and from when on.
        done: the share of the stage that is behind it, in 0..1.
        number: of the step in the stage, from 1, by which levels are drawn: for all tasks alike, so that there are few
            choices.
    """
    draw = random.Random(f"{recipe.seed} {number}").random()
    chosen: set[TaskLevel] = set()
    for task in {network.task for network in stage.trained}:
        levels = sorted((network for network in stage.trained if network.task == task), reverse=True)
        if recipe.unlock is not None and task in stage.tasks:
            levels = levels[: 1 + int(done / recipe.unlock * (len(levels) - 1))]
        if recipe.levels_per_step == "sandwich" and len(levels) > 2:
            levels = [levels[0], levels[1 + int(draw * (len(levels) - 2))], levels[-1]]
        chosen.update(levels)
    return tuple(network for network in stage.trained if network in chosen)
