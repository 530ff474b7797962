"""The order in which a task takes the units (section 3.2 of the paper)."""

from collections.abc import Collection


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
