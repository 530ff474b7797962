"""The paper's tables from the records that finished runs leave, with the paper's own figures beside them.

A table is of one scenario, one scale and one setting. A row is a method and how many units its networks have; its runs
are of one recipe and differ in their seed alone.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dvn_cli import report
from dvn_cli.errors import InputError
from dvn_cli.evaluation.intervals import wilson
from dvn_cli.paper.figures import Figures, Network, Scenario
from dvn_cli.paper.records import Result, Run, check_alike, differences

Units = tuple[int | None, ...]
"""How many units each task's network has, task 1 first; None where a task has none."""

OURS = "dvn"
"""The method that the others are compared with."""


@dataclass(frozen=True)
class Cell:
    """Top-1 accuracy in per cent: its mean, sample standard deviation (None of one run), and of how many runs.

    That of one run has its 95 % interval, where the number of images is known.
    """

    mean: float
    std: float | None
    runs: int
    interval: tuple[float, float] | None = None

    @classmethod
    def of(cls, values: Sequence[float], images: int | None = None) -> "Cell | None":
        if not values:
            return None
        mean, runs = statistics.mean(values), len(values)
        interval = wilson(round(mean * images / 100), images) if runs == 1 and images else None
        return cls(mean, statistics.stdev(values) if runs > 1 else None, runs, interval)

    def __str__(self) -> str:
        spread = "" if self.std is None else f"±{self.std:.1f}"
        return f"{self.mean:.1f}{spread}" + ("" if self.interval is None else f"\n{report.limits(self.interval)}")


@dataclass(frozen=True)
class Row:
    """A method, with networks of so many units.

    Attributes:
        method: of the recipe.
        units: of the network of each task; None for all where there are neither runs nor figures of the paper.
        level: of these networks in the runs, from 1; None where there are no runs.
        runs: of ascending seed.
        cells: the accuracy of each task.
        average: of the tasks' mean, where every task has a network.
        params: of the network of each task.
        stored: parameters of all networks of a run of this method together, those of other rows included.
        paper: its figures.
    """

    method: str
    units: Units
    level: int | None
    runs: tuple[Run, ...]
    cells: tuple[Cell | None, ...]
    average: Cell | None
    params: tuple[int | None, ...]
    stored: int | None
    paper: Figures | None


@dataclass(frozen=True)
class Column:
    """A row's figure in a column: of a task, or the average of the tasks, which counts as of the largest network."""

    name: str
    units: int | None
    cell: Cell | None


@dataclass(frozen=True)
class Ahead:
    """Where a method is better than `OURS` with as many units."""

    column: str
    units: int
    method: str
    cell: Cell
    ours: Cell


@dataclass(frozen=True)
class Table:
    """The runs of one scale and setting.

    Attributes:
        tasks: their names in the runs.
        rows: in the scenario's order of methods, then other methods.
        missing: what the table lacks.
        differences: keys of recipes in which methods differ, each with the methods' values.
    """

    scenario: Scenario
    scale: str
    setting: str
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    missing: tuple[str, ...]
    differences: tuple[str, ...]

    @property
    def runs(self) -> list[Run]:
        return list({run.path: run for row in self.rows for run in row.runs}.values())

    @property
    def ahead(self) -> list[Ahead]:
        """Where `OURS` does not win: the best of the other methods, by task and number of units."""
        found = []
        for (name, units), cells in self._rivals().items():
            ours, best = cells.get(OURS), max(cells, key=lambda method: cells[method].mean)
            if ours is not None and cells[best].mean > ours.mean:
                found.append(Ahead(name, units, best, cells[best], ours))
        return found

    def is_best(self, column: Column) -> bool:
        """Whether no method with as many units is better, and there are others."""
        if column.cell is None or column.units is None:
            return False
        rivals = self._rivals()[column.name, column.units]
        return len(rivals) > 1 and column.cell.mean == max(other.mean for other in rivals.values())

    def columns(self, row: Row) -> list[Column]:
        """A row's figures, of each task and, where the paper has it, of their average."""
        found = [Column(*of) for of in zip(self.tasks, row.units, row.cells, strict=True)]
        largest = max((units for units in row.units if units is not None), default=None)
        return [*found, *[Column("average", largest, row.average)] * self.scenario.average]

    def _rivals(self) -> dict[tuple[str, int], dict[str, Cell]]:
        """The figures of all methods, by column and number of units."""
        rivals: dict[tuple[str, int], dict[str, Cell]] = {}
        for row in self.rows:
            for column in self.columns(row):
                if column.units is not None and column.cell is not None:
                    rivals.setdefault((column.name, column.units), {})[row.method] = column.cell
        order = [*self.tasks, "average"]
        return dict(sorted(rivals.items(), key=lambda rival: (order.index(rival[0][0]), rival[0][1])))

    def to_dict(self) -> dict[str, Any]:
        """As `dvn bench --json` shows it."""
        return {
            "scale": self.scale,
            "setting": self.setting,
            "tasks": self.tasks,
            "rows": [
                {
                    "method": row.method,
                    "units": row.units,
                    "level": row.level,
                    "params": row.params,
                    "stored": row.stored,
                    "top1": [cell and asdict(cell) for cell in row.cells],
                    "average": row.average and asdict(row.average),
                    "seeds": [run.recipe.seed for run in row.runs],
                    "paper": row.paper and row.paper.model_dump(include={"accuracy", "average", "stored"}),
                }
                for row in self.rows
            ],
            "ahead": [asdict(one) for one in self.ahead],
            "missing": self.missing,
            "differences": self.differences,
            "runs": [
                {"record": str(run.path), "device": run.record.device, "versions": run.record.versions}
                for run in self.runs
            ],
        }


def tables(scenario: Scenario, runs: Sequence[Run]) -> list[Table]:
    """A table for each scale and setting of the runs.

    Raises:
        InputError: runs that are not of one recipe, twice the same, or not of the scenario's tasks.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.recipe.scale, run.recipe.setting), []).append(run)
    return [_table(scenario, *labels, group) for labels, group in sorted(groups.items())]


def _table(scenario: Scenario, scale: str, setting: str, runs: Sequence[Run]) -> Table:
    tasks = _task_names(scenario, runs)
    by_method: dict[str, list[Run]] = {method: [] for method in scenario.methods}
    for run in runs:
        by_method.setdefault(run.recipe.method, []).append(run)
    missing = []
    seeds = sorted({run.recipe.seed for run in runs})
    for method, of in by_method.items():
        check_alike(method, of)
        lacking = [str(seed) for seed in seeds if seed not in [run.recipe.seed for run in of]]
        if not of:
            missing.append(f"{method}, no run")
        elif lacking:
            missing.append(f"{method}, seed{'s' * (len(lacking) > 1)} {' '.join(lacking)}")
    rows = [row for method, of in by_method.items() for row in _rows(scenario, method, of)]
    return Table(scenario, scale, setting, tasks, tuple(rows), tuple(missing), tuple(differences(by_method)))


def _task_names(scenario: Scenario, runs: Sequence[Run]) -> tuple[str, ...]:
    names: dict[int, str] = {}
    for run in runs:
        for result in run.results.values():
            if names.setdefault(result.task, result.name) != result.name:
                raise InputError(
                    f"task {result.task} is '{result.name}' in '{run.path}' and '{names[result.task]}' in others: "
                    "give runs of the same tasks"
                )
        if len(scenario.tasks) != (count := max(task for task, _ in run.results)):
            raise InputError(f"'{run.path}' has {count} tasks, the scenario has {len(scenario.tasks)}")
    return tuple(names.get(task, name) for task, name in enumerate(scenario.tasks, 1))


def _rows(scenario: Scenario, method: str, runs: Sequence[Run]) -> list[Row]:
    """A method's rows, of ascending units; of runs, else of the paper, else an empty one."""
    numbers = range(1, len(scenario.tasks) + 1)
    paper: dict[Units, Figures] = {
        (row.units,) * len(numbers) if isinstance(row.units, int) else row.units: row
        for row in scenario.rows
        if row.method == method
    }
    none = (None,) * len(numbers)
    rows = []
    for level in sorted({level for run in runs for _, level in run.results}):
        found = [[run.results.get((task, level)) for run in runs] for task in numbers]
        first = [next((result for result in of if result is not None), None) for of in found]
        units = tuple(None if result is None else len(result.units) for result in first)
        whole = [of for of in zip(*found, strict=True) if None not in of]
        rows.append(
            Row(
                method,
                units,
                level,
                tuple(runs),
                tuple(
                    Cell.of([result.top1 for result in of if result is not None], None if one is None else one.images)
                    for of, one in zip(found, first, strict=True)
                ),
                Cell.of([statistics.mean(result.top1 for result in of if result is not None) for of in whole]),
                tuple(None if result is None else result.params for result in first),
                runs[0].record.stored,
                paper.pop(units, None),
            )
        )
    rows += [Row(method, units, None, (), none, None, none, None, figures) for units, figures in paper.items()]
    return sorted(rows, key=lambda row: [unit or 0 for unit in row.units]) or [
        Row(method, none, None, (), none, None, none, None, None)
    ]


# What networks cost


@dataclass(frozen=True)
class Cost:
    """A network of `OURS` beside the paper's: density in per cent, milliseconds an image; None is not known."""

    units: int
    params: int | None
    density: float | None
    ms: float | None
    speedup: float | None
    paper: Network | None

    def to_dict(self) -> dict[str, Any]:
        """As `dvn bench --json` shows it."""
        return vars(self) | {"paper": self.paper and self.paper.model_dump()}


def timed(table: Table) -> tuple[Path, int] | None:
    """The checkpoint and the task whose networks are timed: of the first run of `OURS` that was given by it."""
    times = table.scenario.times
    files = (run.checkpoint for run in table.runs if run.recipe.method == OURS and run.checkpoint is not None)
    return next(((file, times.task) for file in files), None) if times is not None else None


def costs(table: Table, measured: Mapping[int, tuple[float, float | None]]) -> list[Cost]:
    """The networks of the task that the paper has times of, by ascending number of units.

    Args:
        measured: milliseconds an image and speed-up of networks, by number of units.
    """
    times = table.scenario.times
    if times is None:
        return []
    paper = {network.units: network for network in times.networks}
    own: dict[int, Result] = {}
    for row in table.rows:
        if row.method == OURS and row.level is not None:
            result = row.runs[0].results.get((times.task, row.level))
            own |= {} if result is None else {len(result.units): result}
    found = []
    for units in sorted(paper.keys() | own.keys()):
        params, density = (own[units].params, 100 * own[units].density) if units in own else (None, None)
        ms, speedup = measured.get(units, (None, None))
        found.append(Cost(units, params, density, ms, speedup, paper.get(units)))
    return found
