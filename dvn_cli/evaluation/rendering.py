"""How accuracies are shown: in tables, as JSON and as CSV."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dvn_cli import report
from dvn_cli.evaluation.gates import Gate
from dvn_cli.evaluation.measure import Evaluation
from dvn_cli.files import atomic


def gate_as_json(judged: Gate | None) -> dict[str, Any] | None:
    """A gate as JSON has it."""
    if judged is None:
        return None
    row = judged.worst.to_dict()
    worst = {key: row[key] for key in ("task", "name", "level", "top1", "file")}
    return {"min_accuracy": judged.min_accuracy, "passed": judged.passed, "worst": worst}


def as_document(rows: Sequence[Evaluation], judged: Gate | None) -> dict[str, Any]:
    """Returns rows and their gate as the one document of `dvn eval --json`."""
    return {"results": [row.to_dict() for row in rows], "gate": gate_as_json(judged)}


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


def result_tables(rows: Sequence[Evaluation]) -> list[report.FittedTable]:
    """A row for each network, in one table, or in one for each file where several have the same task and level."""
    files = list(dict.fromkeys(row.file for row in rows))
    if len({(row.task, row.name, row.level) for row in rows}) < len(rows) and len(files) > 1:
        return [_result_table([row for row in rows if row.file == file], file) for file in files]
    return [_result_table(rows, None)]


def _result_table(rows: Sequence[Evaluation], title: str | None) -> report.FittedTable:
    columns = ("task", "level", "units", "params", "density", "top-1", "top-5", "loss", "images")
    optional = ("units", "params", "density", "images", "loss", "top-5")
    made = report.table(*columns, title=title, text=1, optional=optional)
    for row in rows:
        made.add_row(
            f"{row.task} {row.name}",
            str(row.level),
            " ".join(map(str, row.units)),
            report.short(row.params),
            report.percent(row.density),
            f"{row.top1:.2f}",
            "-" if row.top5 is None else f"{row.top5:.2f}",
            f"{row.loss:.3f}",
            str(row.images),
        )
    return made


def accuracy_table(rows: Sequence[Evaluation]) -> report.FittedTable:
    """Top-1 accuracy in per cent, a row for each task and a column for each level."""
    levels = max(row.level for row in rows)
    columns = (f"level {level}" for level in range(1, levels + 1))
    made = report.table("top-1 in %", *columns, "images", text=1, optional=("images",))
    for number in dict.fromkeys(row.task for row in rows):
        own = {row.level: row for row in rows if row.task == number}
        cells = [f"{own[level].top1:.2f}" if level in own else "" for level in range(1, levels + 1)]
        first = next(iter(own.values()))
        made.add_row(f"{number} {first.name}", *cells, str(first.images))
    return made
