"""Tables of what came of models: CSV files with a row for each dataclass."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

Row = TypeVar("Row")


def read(path: Path, kind: type[Row]) -> list[Row]:
    """Returns the rows of a file, none where there is no file."""
    if not path.exists():
        return []
    types: dict[str, Any] = {each.name: each.type for each in fields(kind)}  # type: ignore[arg-type]
    with path.open(newline="") as file:
        return [kind(**{name: of(entry[name]) for name, of in types.items()}) for entry in csv.DictReader(file)]


def write(path: Path, rows: Sequence[Any]) -> None:
    """Replaces the rows of a file."""
    path.unlink(missing_ok=True)
    append(path, rows)


def append(path: Path, rows: Sequence[Any]) -> None:
    """Adds rows to a file."""
    with path.open("a", newline="") as file:
        for row in rows:
            writer = csv.DictWriter(file, list(asdict(row)))
            if not file.tell():
                writer.writeheader()
            writer.writerow(asdict(row))
