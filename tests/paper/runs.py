"""Records of runs that were never run, and the tables of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dvn_cli.paper import figures, records, tables
from dvn_cli.paper.tables import Row, Table, Units

PARAMS = {1: 1_853_900, 2: 7_380_276}
Networks = Sequence[Mapping[int, float]]
"""Of each task the accuracy of its networks by number of units."""

EVEN: Networks = ({1: 90.0, 2: 92.0}, {1: 70.0, 2: 73.0})
OWN: Networks = ({1: 91.0}, {2: 72.0})


def record(folder: Path, method: str, seed: int = 0, networks: Networks = EVEN, **keys: Any) -> Path:
    """The record of a run of two tasks, `tens` and `hundreds`; `keys` of its recipe, dotted ones as `a__b`."""
    recipe: dict[str, Any] = {"scenario": "j1", "method": method, "seed": seed, "epochs": 2, "threads": 1}
    recipe["tasks"] = [{"name": name, "data": {"path": f"/{seed}"}} for name in ("tens", "hundreds")]
    results = [
        {"task": task, "name": recipe["tasks"][task - 1]["name"], "level": level, "units": list(range(1, units + 1))}
        | {"params": PARAMS[units], "density": PARAMS[units] / PARAMS[max(of)], "top1": accuracy, "images": 100}
        for task, of in enumerate(networks, 1)
        for level, (units, accuracy) in enumerate(of.items(), 1)
    ]
    epochs = [
        {"epoch": epoch, "validation": [[accuracy - 10 / epoch for accuracy in of.values()] for of in networks]}
        for epoch in (1, 2)
    ]
    content = {"recipe": recipe | keys, "versions": {"dvn": "0.1.0", "torch": "2.15.0"}, "device": "cpu", "threads": 1}
    path = folder / f"{method}-{keys.get('scale', 'full')}-{seed}.run.json"
    path.write_text(json.dumps(content | {"stored": 7_500_000, "epochs": epochs, "test": results}))
    return path


def change(path: Path, to: Callable[[dict[str, Any]], object]) -> Path:
    content = json.loads(path.read_text())
    to(content)
    path.write_text(json.dumps(content))
    return path


def table(folder: Path, name: str = "j1") -> Table:
    (only,) = tables.tables(figures.find(name), records.read(name, [folder]))
    return only


def row(of: Table, method: str, units: Units) -> Row:
    return next(row for row in of.rows if (row.method, row.units) == (method, units))
