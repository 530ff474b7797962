"""The tasks of a partition that knows no data yet."""

from typing import Any

from dvn_cli.store.metadata import Task
from dvn_cli.units.order import paper_order


def default_tasks(
    units: int,
    classes: int,
    input_size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    **resize: Any,
) -> list[Task]:
    """Returns the tasks of a partition that knows no data yet: one for each unit, by the paper's order, at every level.

    Args:
        resize: how images are brought to their size, as the fields of `Task` say; by default as those do.
    """
    names = tuple(str(number) for number in range(classes))
    levels = tuple(range(1, units + 1))
    return [
        Task(f"task{number}", names, input_size, mean, std, tuple(paper_order(number, units)), levels, **resize)
        for number in range(1, units + 1)
    ]
