"""The charts of a report, as SVG within HTML: text and axes have the page's own colour, on light and on dark."""

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dvn_cli.evaluation.measure import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's colours, which colour-blind people can tell apart, those of them that are seen on white and on black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "os^DvP"
_DASHES = ((0, ()), (0, (4, 2)), (0, (1, 1.5)), (0, (4, 1.5, 1, 1.5)))
_INK = "#010203"
"""Stands for the page's colour until it is SVG."""

_LOOK: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#88888844",
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
}


def over_costs(rows: Sequence[Evaluation], costs: Mapping[tuple[str, int], float], label: str) -> str:
    """Draws accuracy with its 95 % interval over costs, and a line through the networks that no cheaper one beats.

    Args:
        rows: of all networks.
        costs: of a network by the name of its task and its level; the others are left out.
        label: of the costs.
    """
    figure, axes = _figure(label)
    for number, name in enumerate(dict.fromkeys(row.name for row in rows)):
        own = [row for row in rows if row.name == name and (name, row.level) in costs]
        points = sorted((costs[name, row.level], row.top1, *row.interval) for row in own)
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)]}
        for cost, top1, low, high in points:
            axes.plot([cost, cost], [low, high], linewidth=1, alpha=0.6, **style)
            axes.plot(cost, top1, MARKERS[number % len(MARKERS)], markersize=4, **style)
        best = [point for place, point in enumerate(points) if all(point[1] > other[1] for other in points[:place])]
        axes.plot([point[0] for point in best], [point[1] for point in best], linewidth=1.4, label=name, **style)
    axes.set_xlim(left=0)
    if max(costs.values()) >= 1000:
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(label)
    axes.set_ylabel("top-1 on test images, %")
    return _svg(figure, label)


def over_epochs(epochs: Sequence[Mapping[str, Any]], names: Sequence[str], key: str, label: str) -> str | None:
    """Draws what each epoch gave for the top and the lowest level of each task; None where no epoch gave any.

    Args:
        epochs: of the record of a run, each with lists by task and level.
        names: of the tasks.
        key: of what is drawn, such as `validation`.
        label: of the values.
    """
    figure, axes = _figure(label)
    drawn = False
    for number, name in enumerate(names):
        for level, dashes in ((-1, _DASHES[0]), (0, _DASHES[1])):
            points = list(_points(epochs, key, number, level))
            if points:
                drawn = True
                style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "linestyle": dashes}
                marker = "." if len(points) == 1 else ""
                axes.plot(*zip(*points, strict=True), marker=marker, label=name if level == -1 else None, **style)
    axes.set_xlabel("epoch (whole line: top level, broken: level 1)")
    axes.set_ylabel(label)
    axes.locator_params(axis="x", integer=True)
    return _svg(figure, label) if drawn else None


def _points(epochs: Sequence[Mapping[str, Any]], key: str, task: int, level: int) -> Iterator[tuple[int, float]]:
    for entry in epochs:
        values = (entry[key] or [])[task : task + 1]
        if values and values[0] and values[0][level] is not None:
            yield entry["epoch"], values[0][level]


def _figure(label: str) -> "tuple[Figure, Axes]":
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_LOOK):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        return figure, figure.subplots()


def _svg(figure: "Figure", label: str) -> str:
    import matplotlib

    opened = io.StringIO()
    with matplotlib.rc_context({**_LOOK, "svg.hashsalt": label}):  # the same chart is the same bytes, each has its own
        figure.axes[0].legend(fontsize=8)
        figure.savefig(
            opened, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    text = opened.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")
