"""The order in which a task takes the units: the paper's (section 3.2), or one that follows how tasks agree."""

import itertools
import math
from collections.abc import Collection, Sequence


def paper_order(task: int, units: int) -> list[int]:
    """The order of units of a task, by the paper's rule.

    (i) Unit `task` comes first; (ii) then a unit adjacent to those taken; (iii) of two adjacent ones the lower number.
    A task with a greater number than there are units starts again from unit 1.

    Args:
        task: number of the task, from 1.
        units: how many units there are.

    Returns:
        All units, by number from 1: `paper_order(3, 4)` is `[3, 2, 1, 4]`.
    """
    first = (task - 1) % units + 1
    return [*range(first, 0, -1), *range(first + 1, units + 1)]


def order_beside(used: Collection[int], units: int) -> list[int]:
    """The order of units of a task that leaves those of earlier tasks as they are.

    Its own, the first free one, comes first, then the used ones, adjacent ones before others, then all that are free.

    Args:
        used: by earlier tasks, by number from 1; not all of them.
        units: how many units there are.

    Returns:
        All units, by number from 1: `order_beside({1, 3}, 4)` is `[2, 1, 3, 4]`.
    """
    own = next(unit for unit in range(1, units + 1) if unit not in used)
    return sorted(paper_order(own, units), key=lambda unit: unit != own and unit not in used)


def learned_orders(affinity: Sequence[Sequence[float]], units: int) -> list[list[int]]:
    """The orders of units of tasks that share the more of their lower levels the better they agree.

    Tasks are joined into as many groups as there are units, those that agree most first (average linkage), and each
    group starts with a unit of its own. A task then adds the unit whose group agrees with it most, and so on; a unit
    without a group comes after those of groups that agree with it, and before those in conflict. Of equal ones the
    lower number comes first.

    Args:
        affinity: of each task with each, above 0 where they agree, below where they are in conflict; symmetric.
        units: how many units there are.

    Returns:
        All units, by number from 1, for each task.
    """

    def agreement(ours: Sequence[int], theirs: Sequence[int]) -> float:
        return sum(affinity[i][j] for i in ours for j in theirs) / (len(ours) * len(theirs))

    groups = [[task] for task in range(len(affinity))]
    while len(groups) > units:
        one, other = max(itertools.combinations(groups, 2), key=lambda pair: agreement(*pair))
        one += other
        groups.remove(other)
    orders = []
    for task in range(len(affinity)):
        agrees = [math.inf if task in group else agreement([task], group) for group in groups]
        agrees += [0.0] * (units - len(groups))
        orders.append(sorted(range(1, units + 1), key=lambda unit: -agrees[unit - 1]))
    return orders
