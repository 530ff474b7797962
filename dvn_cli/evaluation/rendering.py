"""How accuracies are shown: in tables, as JSON and as CSV."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dvn_cli import report
from dvn_cli.evaluation.gates import Gate
from dvn_cli.evaluation.intervals import top1_interval
from dvn_cli.evaluation.measure import Evaluation
from dvn_cli.files import atomic, encoded

SCHEMA_VERSION = 1
"""Of the document of `dvn eval --json`, which `eval.schema.json` describes; it rises when a key goes or changes."""


def gate_as_json(gate: Gate) -> dict[str, Any] | None:
    """A gate as JSON has it; None where nothing was asked."""
    if all(check.kind == "loss" for check in gate.checks):
        return None
    floors = [check for check in gate.checks if check.kind == "min_accuracy"]
    worst = min(floors, key=lambda check: check.margin, default=None)
    return {
        "verdict": gate.verdict,
        "passed": gate.verdict == "passed",
        "min_accuracy": gate.min_accuracy,
        "worst": worst and {**worst.network._asdict(), "top1": worst.figures["top1"], "file": worst.file},
        "checks": [check.to_dict() for check in gate.checks],
    }


def as_document(rows: Sequence[Evaluation], gate: Gate, per_class: bool = False) -> dict[str, Any]:
    """Returns rows and their gate as the one document of `dvn eval --json`, and if asked the accuracy of each class."""
    results = [row.to_dict() for row in rows]
    if per_class:
        for row, result in zip(rows, results, strict=True):
            each = row.by_class()
            result["per_class"] = [{"class": name, "top1": top1, "images": count} for name, top1, count in each]
    return {"schema_version": SCHEMA_VERSION, "results": results, "gate": gate_as_json(gate)}


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Writes what `as_document` returned, as JSON or, the rows alone, as CSV, whichever the file's name ends with.

    Raises:
        InputError, DvnError: as `atomic`.
    """
    text = io.StringIO()
    if path.suffix == ".json":
        json.dump(document, text, indent=2)
    else:
        lists = ("units", "top1_interval")
        rows = [row | {key: " ".join(map(str, row[key])) for key in lists} for row in document["results"]]
        for row in rows:
            row.pop("per_class", None)  # no cell has room for it
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with atomic(path) as file:
        file.write(encoded(text.getvalue()))


def class_tables(rows: Sequence[Evaluation]) -> list[report.FittedTable]:
    """Top-1 in per cent of each class above its 95 % interval: a table for each task, with a column for each level."""
    made = []
    for file, number in dict.fromkeys((row.file, row.task) for row in rows):
        own = [row for row in rows if (row.file, row.task) == (file, number)]
        columns = (f"level {row.level}" for row in own)
        name = f"top-1 in %, 95 % CI: {number} {own[0].name}"
        made.append(report.table(name, *columns, "images", title=file, text=1))
        for each in zip(*(row.by_class() for row in own), strict=True):
            name, _, images = each[0]
            found = (top1 for _, top1, _ in each)
            cells = ("-" if t is None else f"{t:.1f}\n{report.limits(top1_interval(t, images))}" for t in found)
            made[-1].add_row(name, *cells, str(images))
    return made


def result_tables(rows: Sequence[Evaluation]) -> list[report.FittedTable]:
    """A row for each network, in one table, or in one for each file where several have the same task and level."""
    files = list(dict.fromkeys(row.file for row in rows))
    if len({(row.task, row.name, row.level) for row in rows}) < len(rows) and len(files) > 1:
        return [_result_table([row for row in rows if row.file == file], file) for file in files]
    return [_result_table(rows, None)]


def _result_table(rows: Sequence[Evaluation], title: str | None) -> report.FittedTable:
    columns = ("task", "level", "units", "params", "density", "top-1", "95 % CI", "top-5", "loss", "images")
    optional = ("units", "params", "density", "images", "loss", "top-5", "95 % CI")
    made = report.table(*columns, title=title, text=1, optional=optional)
    for row in rows:
        made.add_row(
            f"{row.task} {row.name}",
            str(row.level),
            " ".join(map(str, row.units)),
            report.short(row.params),
            report.percent(row.density),
            f"{row.top1:.2f}",
            report.limits(row.interval),
            "-" if row.top5 is None else f"{row.top5:.2f}",
            f"{row.loss:.3f}",
            str(row.images),
        )
    return made


def check_tables(rows: Sequence[Evaluation], gate: Gate) -> list[report.FittedTable]:
    """A row for each check of a gate, with its file where there are several, or no table where nothing was asked."""
    made = report.table("network", "asked", "verdict", "found", title=f"\ngate: {gate.in_words}", text=4)
    several = len({row.file for row in rows}) > 1
    for check in gate.checks:
        network = f"{check.network.task} {check.network.name}, level {check.network.level}"
        of = f" of '{check.file}'" if several and check.file else ""
        made.add_row(network + of, check.asked, check.verdict, check.found)
    return [made] if gate.checks else []


def accuracy_table(rows: Sequence[Evaluation]) -> report.FittedTable:
    """Top-1 accuracy in per cent above its 95 % interval, a row for each task and a column for each level."""
    levels = max(row.level for row in rows)
    columns = (f"level {level}" for level in range(1, levels + 1))
    made = report.table("top-1 in %, 95 % CI", *columns, "images", text=1, optional=("images",))
    for number in dict.fromkeys(row.task for row in rows):
        own = {row.level: row for row in rows if row.task == number}
        texts = {level: f"{row.top1:.2f}\n{report.limits(row.interval)}" for level, row in own.items()}
        cells = [texts.get(level, "") for level in range(1, levels + 1)]
        first = next(iter(own.values()))
        made.add_row(f"{number} {first.name}", *cells, str(first.images))
    return made
