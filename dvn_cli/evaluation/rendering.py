"""How accuracies are shown: in tables, as JSON and as CSV."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dvn_cli import report
from dvn_cli.evaluation.gates import Gate
from dvn_cli.evaluation.measure import Row
from dvn_cli.files import atomic
from dvn_cli.tasks import Task


def as_json(row: Row) -> dict[str, Any]:
    """A row as JSON has it: accuracies in per cent, density a share, and null for a loss that is not finite."""
    result = row.result
    return {
        "task": row.task,
        "name": row.name,
        "level": row.level,
        "units": list(row.units),
        "params": row.params,
        "density": row.density,
        "top1": result.top1,
        "top5": result.top5,
        "loss": result.loss if math.isfinite(result.loss) else None,
        "images": result.images,
        "file": row.file,
    }


def gate_as_json(judged: Gate | None) -> dict[str, Any] | None:
    """A gate as JSON has it."""
    if judged is None:
        return None
    row = as_json(judged.worst)
    worst = {key: row[key] for key in ("task", "name", "level", "top1", "file")}
    return {"min_accuracy": judged.min_accuracy, "passed": judged.passed, "worst": worst}


def as_document(rows: Sequence[Row], judged: Gate | None) -> dict[str, Any]:
    """Returns rows and their gate as the one document of `dvn eval --json`."""
    return {"results": [as_json(row) for row in rows], "gate": gate_as_json(judged)}


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Writes what `as_document` returned, as JSON or, the rows alone, as CSV, whichever the file's name ends with.

    Raises:
        InputError, DvnError: as `atomic`.
    """
    text = io.StringIO()
    if path.suffix == ".json":
        json.dump(document, text, indent=2)
    else:
        rows = [row | {"units": " ".join(map(str, row["units"]))} for row in document["results"]]
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with atomic(path) as file:
        file.write(text.getvalue().encode())


def result_tables(rows: Sequence[Row]) -> list[report.FittedTable]:
    """A row for each network, in one table, or in one for each file where several have the same task and level."""
    files = list(dict.fromkeys(row.file for row in rows))
    if len({(row.task, row.name, row.level) for row in rows}) < len(rows) and len(files) > 1:
        return [_result_table([row for row in rows if row.file == file], file) for file in files]
    return [_result_table(rows, None)]


def _result_table(rows: Sequence[Row], title: str | None) -> report.FittedTable:
    columns = ("task", "level", "units", "params", "density", "top-1", "top-5", "loss", "images")
    optional = ("units", "params", "density", "images", "loss", "top-5")
    made = report.table(*columns, title=title, text=1, optional=optional)
    for row in rows:
        result = row.result
        made.add_row(
            f"{row.task} {row.name}",
            str(row.level),
            " ".join(map(str, row.units)),
            report.short(row.params),
            report.percent(row.density),
            f"{result.top1:.2f}",
            "-" if result.top5 is None else f"{result.top5:.2f}",
            f"{result.loss:.3f}",
            str(result.images),
        )
    return made


def accuracy_table(tasks: Sequence[Task], rows: Sequence[Row]) -> report.FittedTable:
    """Top-1 accuracy in per cent, a row for each task and a column for each level."""
    levels = max(row.level for row in rows)
    columns = (f"level {level}" for level in range(1, levels + 1))
    made = report.table("top-1 in %", *columns, "images", text=1, optional=("images",))
    for number, task in enumerate(tasks, 1):
        own = {row.level: row.result for row in rows if row.task == number}
        if own:
            cells = [f"{own[level].top1:.2f}" if level in own else "" for level in range(1, levels + 1)]
            made.add_row(f"{number} {task.name}", *cells, str(next(iter(own.values())).images))
    return made
