"""A task: what it tells apart, what its images are, and in which order it takes the units."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dvn_cli.units.order import paper_order


@dataclass(frozen=True)
class Task:
    """One task of a checkpoint, as its metadata describes it.

    Attributes:
        name: by which commands may call it.
        classes: names, in the order of the labels.
        input_size: height and width of its images in pixels.
        mean: per channel, of pixels in 0..1; subtracted from the images.
        std: per channel, of pixels in 0..1; divides them.
        order: all units, by number from 1, in the order in which the task takes them.
        levels: for each level how many units it has, ascending.
        data: where its images come from (`data.DataSpec` as JSON); None where nobody said.
        interpolation, crop_pct, crop_mode: how they are brought to their size, see `data.resize.Resize`.
    """

    name: str
    classes: tuple[str, ...]
    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    order: tuple[int, ...]
    levels: tuple[int, ...]
    data: Mapping[str, Any] | None = None
    interpolation: str = "bilinear"
    crop_pct: float | None = None
    crop_mode: str = "center"

    def kept(self, level: int) -> tuple[int, ...]:
        """The units of a level, from 1, by number from 1, ascending."""
        return tuple(sorted(self.order[: self.levels[level - 1]]))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> "Task":
        lists = {key: tuple(value) for key, value in entry.items() if isinstance(value, list)}
        return cls(**{**entry, **lists})


def default_tasks(
    units: int,
    classes: int,
    input_size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    **resize: Any,
) -> list[Task]:
    """The tasks of a partition that knows no data yet: one for each unit, by the paper's order, at every level.

    Args:
        resize: how images are brought to their size, as the fields of `Task` say; by default as those do.
    """
    names = tuple(str(number) for number in range(classes))
    levels = tuple(range(1, units + 1))
    return [
        Task(f"task{number}", names, input_size, mean, std, tuple(paper_order(number, units)), levels, **resize)
        for number in range(1, units + 1)
    ]
