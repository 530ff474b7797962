"""The figures of a scenario, as PNG and SVG: accuracy over epochs, or over the parameters of the networks."""

import io
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvn_cli.errors import InputError
from dvn_cli.files import atomic
from dvn_cli.paper.tables import Row, Table
from dvn_cli.training.methods import METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's colours, which colour-blind people can tell apart, without the yellow that is lost on white.
_COLOURS = ("#0072B2", "#000000", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLES = dict(zip(METHODS, zip(_COLOURS, "osD^vPX", strict=True), strict=True))
_OTHER = ("#888888", "*")
"""Colour and marker of each method, and of those that this dvn does not know."""

_DASHES = ((0, ()), (0, (4, 2)), (0, (1, 1.5)), (0, (4, 1.5, 1, 1.5)))
"""Of lines over epochs: of the most units, and of ever fewer."""

_LOOK: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "dvn",  # the same figure is the same bytes
    "svg.fonttype": "none",
}


def write(name: str, tables: Sequence[Table], folder: Path) -> list[Path]:
    """Writes the figure of each table, `NAME-SCALE-SETTING.png` and `.svg`, and returns the files.

    Raises:
        InputError: matplotlib is missing, there is nothing to draw, or the folder cannot be written.
        DvnError: as `atomic`.
    """
    try:
        import matplotlib
    except ImportError:
        raise InputError("plots need matplotlib: pip install 'dvn[plot]'") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to the folder '{folder}': {error.strerror}") from None
    written = []
    for table in tables:
        with matplotlib.rc_context(_LOOK):
            figure = draw(table)
            for suffix, metadata in (("png", {}), ("svg", {"Date": None})):
                opened = io.BytesIO()
                figure.savefig(opened, format=suffix, dpi=200, metadata=metadata)
                written.append(folder / f"{name}-{table.scale}-{table.setting}.{suffix}")
                with atomic(written[-1]) as file:
                    file.write(opened.getvalue())
    return written


def draw(table: Table) -> "Figure":
    """The figure of a table: a panel for each task."""
    from matplotlib.figure import Figure

    count, over_epochs = len(table.tasks), table.scenario.figure == "epochs"
    columns = 2 if count == 4 else count
    figure = Figure(figsize=(3.3 * columns, 2.6 * -(-count // columns) + 0.7), layout="constrained")
    panels = figure.subplots(-(-count // columns), columns, squeeze=False)
    lines: dict[str, Any] = {}
    for task, (panel, name) in enumerate(zip(panels.flat, table.tasks, strict=True), 1):
        panel.set_title(name)
        lines |= dict((_over_epochs if over_epochs else _over_parameters)(panel, table, task))
    if not lines:
        raise InputError("there is nothing to draw: no run held out images for validation (tasks.*.data.validation)")
    for panel in panels[-1]:
        panel.set_xlabel("epoch" if over_epochs else "parameters of the network, millions")
    for panel in panels[:, 0]:
        panel.set_ylabel(f"accuracy on {'validation' if over_epochs else 'test'} images, %")
    shown = sorted(lines) if over_epochs else list(lines)  # a method's lines beneath one another
    methods = {label.partition(",")[0] for label in shown}
    for columns in range(min(len(methods), 4), 0, -1):  # as many as there is room for
        handles = [lines[label] for label in shown]
        legend = figure.legend(handles, shown, loc="outside lower center", ncols=columns)
        figure.draw_without_rendering()
        if legend.get_window_extent().width <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    return figure


def _over_epochs(panel: "Axes", table: Table, task: int) -> Iterator[tuple[str, Any]]:
    """A line for each network: the mean of its runs."""
    most = max(units for row in table.rows for units in row.units if units is not None)
    for row in table.rows:
        points = _validation(row, task)
        if points:
            units = row.units[task - 1] or 0
            (line,) = panel.plot(
                list(points),
                list(points.values()),
                color=_STYLES.get(row.method, _OTHER)[0],
                linestyle=_DASHES[(most - units) % len(_DASHES)],
                marker="." if len(points) == 1 else "",
                linewidth=1.4,
            )
            yield f"{row.method}, {units} unit{'s' * (units > 1)}", line
    panel.locator_params(axis="x", integer=True)


def _validation(row: Row, task: int) -> dict[int, float]:
    """The mean accuracy of the runs by epoch, of the epochs in which it was measured."""
    values: dict[int, list[float]] = {}
    for run in row.runs:
        for entry in run.record.epochs:
            levels = (entry.validation or [])[task - 1 : task]
            for value in levels[0][(row.level or 0) - 1 : row.level] if levels else []:
                if value is not None:
                    values.setdefault(entry.epoch, []).append(value)
    return {epoch: statistics.mean(of) for epoch, of in sorted(values.items())}


def _over_parameters(panel: "Axes", table: Table, task: int) -> Iterator[tuple[str, Any]]:
    """A line for each method, from its smallest network to its largest, with the deviation over seeds as bars."""
    points: dict[str, list[tuple[float, float, float]]] = {}
    for row in table.rows:
        cell, params = row.cells[task - 1], row.params[task - 1]
        if cell is not None and params is not None:
            points.setdefault(row.method, []).append((params / 1e6, cell.mean, cell.std or 0.0))
    for method, of in points.items():
        sizes, means, deviations = zip(*sorted(of), strict=True)
        colour, marker = _STYLES.get(method, _OTHER)
        yield (
            method,
            panel.errorbar(
                sizes, means, deviations, color=colour, marker=marker, markersize=5, linewidth=1.4, capsize=2.5
            ),
        )
    panel.set_xlim(left=0)
