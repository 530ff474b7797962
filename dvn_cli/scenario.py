"""The paper's tables from the records that finished runs leave, with the paper's own figures beside them.

A table is of one scenario, one scale and one setting. A row is a method and how many units its networks have; its runs
are of one recipe and differ in their seed alone.
"""

import functools
import itertools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from rich.text import Text

from dvn_cli import report
from dvn_cli.errors import InputError, did_you_mean

Units = tuple[int | None, ...]
"""How many units each task's network has, task 1 first; None where a task has none."""

OURS = "dvn"
"""The method that the others are compared with."""

_APART = {"scenario", "scale", "setting", "method", "seed", "threads"}
"""Keys of a recipe in which runs that are compared may differ; besides these, where the images lie."""


# The paper


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figures(_Strict):
    """A row of a table of the paper: accuracies in per cent, and the parameters that are stored."""

    method: str
    units: int | tuple[int, ...]
    accuracy: tuple[float, ...]
    average: float | None = None
    stored: int | None = None


class Network(_Strict):
    """What the paper says of the cost of a network: milliseconds an image, density in per cent."""

    units: int
    params: int
    ms: float
    density: float | None = None
    speedup: float | None = None


class Times(_Strict):
    """The networks of which the paper gives times, those of one task."""

    source: str
    device: str | None = None
    task: int
    networks: tuple[Network, ...]


class Scenario(_Strict):
    """One of the paper's scenarios; `paper.yaml` says what its keys mean."""

    title: str
    source: str
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    average: bool = False
    rows: tuple[Figures, ...] = ()
    times: Times | None = None
    figure: Literal["epochs", "parameters"]


@functools.cache
def scenarios() -> Mapping[str, Scenario]:
    """The paper's scenarios by name."""
    text = Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8")
    return TypeAdapter(dict[str, Scenario]).validate_python(yaml.safe_load(text))


def find(name: str) -> Scenario:
    """The scenario of a name.

    Raises:
        InputError: there is none.
    """
    known = scenarios()
    if name not in known:
        raise InputError(f"no scenario '{name}'{did_you_mean(name, known) or '; the paper has ' + ', '.join(known)}")
    return known[name]


# Runs


class _Loose(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


class Keys(_Loose):
    """Of a resolved recipe, the keys that say where its run belongs; the others are extra."""

    scenario: str | None = None
    scale: str = "full"
    setting: str = "paper"
    method: str = "dvn"
    seed: int
    tasks: list[dict[str, Any]]


class Result(_Loose):
    """What a network made of the test images, see `evaluation.Row`."""

    task: int = Field(ge=1)
    name: str
    level: int = Field(ge=1)
    units: list[int] = Field(min_length=1)
    params: int
    density: float
    top1: float


class Epoch(_Loose):
    """What an epoch gave: accuracy on validation images in per cent, by task and level."""

    epoch: int
    validation: list[list[float | None]] | None


class Record(_Loose):
    """What `dvn train` writes beside a checkpoint, see `training.session`."""

    recipe: Keys
    versions: dict[str, str]
    device: str
    stored: int | None = None
    epochs: list[Epoch]
    test: list[Result] = []


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: of its record.
        results: on the test images, by number of task and level.
        checkpoint: its networks, where it was given by them.
    """

    path: Path
    record: Record
    results: Mapping[tuple[int, int], Result]
    checkpoint: Path | None = None

    @property
    def recipe(self) -> Keys:
        return self.record.recipe


def read(name: str, paths: Sequence[Path]) -> list[Run]:
    """Reads the runs of a scenario.

    Args:
        name: of the scenario.
        paths: records, checkpoints with their record beside them, and folders of records, of which those of other
            scenarios are left out.

    Raises:
        InputError: a file that is missing or no run's record, a run of something else, or no run at all.
    """
    runs: dict[Path, Run] = {}
    others = 0
    for path in paths:
        files = sorted(path.glob("*.run.json")) if path.is_dir() else [path]
        for file in files:
            run = _read(file)
            if run.recipe.scenario != name:
                if not path.is_dir():
                    is_of = f"of {run.recipe.scenario}" if run.recipe.scenario else "of no scenario"
                    raise InputError(f"the run of '{file}' is {is_of}, not of {name}")
                others += 1
                continue
            if not run.results:
                raise InputError(
                    f"'{run.path}' has no accuracies on test images: its run was interrupted while it measured them; "
                    "run it again"
                )
            if run.path.resolve() not in runs or run.checkpoint is not None:
                runs[run.path.resolve()] = run
    if not runs:
        among = f" (runs of others: {others})" if others else ""
        raise InputError(
            f"there are no runs of {name} in {', '.join(repr(str(path)) for path in paths)}{among}: "
            f"`dvn train {name}` makes one, NAME.run.json beside its checkpoint"
        )
    return sorted(runs.values(), key=lambda run: (run.recipe.seed, str(run.path)))


def _read(file: Path) -> Run:
    given = file if file.suffix == ".safetensors" else None
    path = file if given is None else file.with_name(f"{file.stem}.run.json")
    if not file.exists():
        raise InputError(f"there is no '{file}': give runs' records (NAME.run.json), checkpoints, or folders of them")
    try:
        record = Record.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(f"there is no record of the run of '{file}': '{path}' is missing") from None
    except OSError as error:
        raise InputError(f"cannot read '{path}': {error.strerror}") from None
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or "JSON"
        raise InputError(f"'{path}' is no record of a run: {where}: {problem['msg'].lower()}") from None
    except (ValueError, RecursionError):
        raise InputError(f"'{path}' is no record of a run: it is not JSON") from None
    return Run(path, record, {(result.task, result.level): result for result in record.test}, given)


# Tables


@dataclass(frozen=True)
class Cell:
    """Top-1 accuracy in per cent: its mean, sample standard deviation (None of one run), and of how many runs."""

    mean: float
    std: float | None
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Cell | None":
        if not values:
            return None
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.std is None else f"{self.mean:.1f}±{self.std:.1f}"


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
        _check_alike(method, of)
        lacking = [str(seed) for seed in seeds if seed not in [run.recipe.seed for run in of]]
        if not of:
            missing.append(f"{method}, no run")
        elif lacking:
            missing.append(f"{method}, seed{'s' * (len(lacking) > 1)} {' '.join(lacking)}")
    rows = [row for method, of in by_method.items() for row in _rows(scenario, method, of)]
    return Table(scenario, scale, setting, tasks, tuple(rows), tuple(missing), tuple(_differences(by_method)))


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
                tuple(Cell.of([result.top1 for result in of if result is not None]) for of in found),
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


# Whether runs may be compared


def _check_alike(method: str, runs: Sequence[Run]) -> None:
    """Raises InputError for runs of a method that are more than seeds of one another."""
    for one, two in itertools.pairwise(runs):
        if one.recipe.seed == two.recipe.seed:
            raise InputError(f"'{one.path}' and '{two.path}' are both {method} with seed {one.recipe.seed}: give one")
        first, second = _compared(one.recipe), _compared(two.recipe)
        for key in sorted(first.keys() | second.keys()):
            if first.get(key) != second.get(key):
                raise InputError(
                    f"'{one.path}' and '{two.path}' are both {method} but have {key}={first.get(key)} and "
                    f"{second.get(key)}: give runs of one recipe"
                )


def _differences(by_method: Mapping[str, Sequence[Run]]) -> Iterator[str]:
    """What else methods differ in, such as `epochs: dvn 200, baseline 100`."""
    recipes = {method: _compared(runs[0].recipe) for method, runs in by_method.items() if runs}
    for key in sorted({key for recipe in recipes.values() for key in recipe}):
        values = {method: recipe.get(key) for method, recipe in recipes.items()}
        if len({repr(value) for value in values.values()}) > 1:
            yield f"{key}: " + ", ".join(f"{method} {value}" for method, value in values.items())


def _compared(recipe: Keys) -> dict[str, Any]:
    """The keys, dotted, in which runs of one row must not differ."""
    content = {key: value for key, value in recipe.model_dump().items() if key not in _APART}
    flat = dict(_flat(content))
    return {key: value for key, value in flat.items() if not (key.startswith("tasks.") and key.endswith(".data.path"))}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        yield path, value
        return
    for key, entry in value.items():
        yield from _flat(entry, f"{path}.{key}" if path else str(key))


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


# Showing


def accuracy_table(table: Table) -> report.FittedTable:
    """A line for each row, and beneath it one with the paper's figures."""
    average = table.scenario.average
    made = report.table("method", "units", text=2, optional=("runs", "stored"))
    for name in (*table.tasks, *["average"] * average):
        made.add_column(Text(name), justify="right", overflow="fold")
    for name in ("stored", "runs"):
        made.add_column(name, justify="right", no_wrap=True)
    for row in table.rows:
        cells = [
            Text("-" if column.cell is None else str(column.cell), style="bold" if table.is_best(column) else "")
            for column in table.columns(row)
        ]
        made.add_row(row.method, _units(row.units), *cells, _count(row.stored), str(len(row.runs) or "-"))
        if row.paper is not None:
            figures = [_printed(figure) for figure in (*row.paper.accuracy, *[row.paper.average] * average)]
            made.add_row(f"  {table.scenario.source}", "", *figures, _count(row.paper.stored), "", style="dim")
    return made


def _units(units: Units) -> str:
    shown = ["-" if unit is None else str(unit) for unit in units]
    return shown[0] if len(set(shown)) == 1 else ", ".join(shown)


def _count(count: int | None) -> str:
    return "-" if count is None else report.short(count)


def _printed(figure: float | None) -> str:
    """A figure of the paper with the decimals that it has there: one, of averages sometimes two."""
    return _number(figure, ".2f").removesuffix("0")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def notes(table: Table) -> list[str]:
    """What is to be known of a table, in lines."""
    runs = table.runs
    rows = [row for row in table.rows if row.method == OURS and row.runs] or table.rows  # da_cnn has layers more
    pairs = [pair for row in rows for pair in zip(row.units, row.params, strict=True)]
    sizes = {
        unit: max(size for other, size in pairs if other == unit and size is not None)
        for unit, size in pairs
        if unit is not None and size is not None
    }
    devices = [run.record.device for run in runs]
    versions = {
        library: ", ".join(
            dict.fromkeys(run.record.versions[library] for run in runs if library in run.record.versions)
        )
        for library in ("dvn", "torch", "timm", "python")
    }
    seeds = sorted({run.recipe.seed for run in runs})
    lines = [
        "top-1 in %, mean±standard deviation over seeds; bold: the best of those with as many units; stored: "
        "parameters of all networks of a method together, of its other rows too",
        "parameters by units: " + ", ".join(f"{unit}: {report.short(size)}" for unit, size in sorted(sizes.items())),
        f"{len(runs)} run{'s' * (len(runs) > 1)}, seed{'s' * (len(seeds) > 1)} {' '.join(map(str, seeds))}, on "
        + ", ".join(f"{device} ({devices.count(device)})" for device in dict.fromkeys(devices))
        + "; "
        + ", ".join(f"{library} {which}" for library, which in versions.items() if which),
    ]
    if not table.scenario.rows:
        lines.append(f"the paper's accuracies ({table.scenario.source}) are not at hand")
    elif table.scale != "full":
        lines.append(f"{table.scenario.source} is of the full scale, these runs are of scale {table.scale}")
    if [_plain(name) for name in table.tasks] != [_plain(name) for name in table.scenario.tasks]:
        lines.append(f"these are not the paper's tasks by name: it has {', '.join(table.scenario.tasks)}")
    lines += [f"differs: {difference}" for difference in table.differences]
    if table.missing:
        lines.append(f"missing: {'; '.join(table.missing)}")
    for one in table.ahead:
        lines.append(
            f"{OURS} does not win: {one.column}, {one.units} unit{'s' * (one.units > 1)}: {one.method} "
            f"{_precise(one.cell)}, {OURS} {_precise(one.ours)}"
        )
    return lines


def _plain(name: str) -> str:
    """A name as it compares: CIFAR-10 is cifar10."""
    return "".join(filter(str.isalnum, name.lower()))


def _precise(cell: Cell) -> str:
    return f"{cell.mean:.2f}" if cell.std is None else f"{cell.mean:.2f}±{cell.std:.2f}"


def cost_table(costs: Sequence[Cost]) -> report.FittedTable:
    """What the networks cost, each figure with the paper's beside it."""
    made = report.table("units", "params", "paper", "density", "paper", "ms", "paper", "speed-up", "paper")
    for cost in costs:
        said = {} if cost.paper is None else cost.paper.model_dump()
        made.add_row(
            str(cost.units),
            _count(cost.params),
            _count(said.get("params")),
            _number(cost.density, ".1f"),
            _number(said.get("density"), ".1f"),
            _number(cost.ms, ".2f"),
            _number(said.get("ms"), ".2f"),
            _number(cost.speedup, ".1f"),
            _number(said.get("speedup"), ".1f"),
        )
    return made


def cost_note(table: Table, measured: Mapping[str, Any] | None) -> str:
    """What is to be known of `cost_table`; `measured`: how dvn's times were, if they were."""
    times = table.scenario.times
    assert times is not None
    paper = f"the paper's are from {times.source}" + (f", on {times.device}" if times.device else "")
    of = f"networks of {table.tasks[times.task - 1]}; density in %, ms an image"
    if measured is None:
        return f"{of}; {paper}. A run of {OURS} that is given by its checkpoint is timed"
    size, threads = measured["batch_size"], measured["threads"]
    cores = f", threads: {threads}" if measured["device"] == "cpu" else ""
    return f"{of} at batch size {size} on {measured['device_name']}{cores}, torch {measured['torch']}; {paper}"
