"""How the tables of a scenario are shown: on the terminal, and as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from dvn_cli import report
from dvn_cli.paper.figures import Scenario
from dvn_cli.paper.tables import OURS, Cell, Cost, Table, Units


def as_json(
    name: str,
    scenario: Scenario,
    tables: Sequence[Table],
    costs: Sequence[Sequence[Cost]],
    measured: Sequence[Mapping[str, Any] | None],
) -> dict[str, Any]:
    """Returns the tables of a scenario as `dvn bench --json` shows them; the arguments are those of `show`."""
    return {
        "scenario": name,
        "title": scenario.title,
        "source": scenario.source,
        "tables": [
            table.to_dict() | {"costs": [cost.to_dict() for cost in of], "measured": document}
            for table, of, document in zip(tables, costs, measured, strict=True)
        ],
    }


def show(
    console: Console,
    name: str,
    tables: Sequence[Table],
    costs: Sequence[Sequence[Cost]],
    measured: Sequence[Mapping[str, Any] | None],
) -> None:
    """Prints the tables of a scenario.

    Args:
        name: of the scenario.
        costs: of the networks of each table.
        measured: how the times of each table were measured, if they were.
    """
    for number, (table, of, document) in enumerate(zip(tables, costs, measured, strict=True)):
        if number:
            console.print()
        title = f"{name.upper()}, {table.scenario.title}; scale {table.scale}, setting {table.setting}"
        console.print(Text(title, "bold"))
        report.show(console, accuracy_table(table))
        console.print()
        for line in notes(table):
            console.print(line)
        if of:
            console.print()
            report.show(console, cost_table(of))
            console.print(cost_note(table, document))


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
        "top-1 in %, mean±standard deviation over seeds, of a single run with its 95 % CI (Wilson); bold: the best of "
        "those with as many units; stored: parameters of all networks of a method together, of its other rows too",
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
