"""The records that finished runs leave, and whether the runs may be compared."""

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dvn_cli.errors import InputError
from dvn_cli.files import LARGEST_RECORD, read_bytes, run_record
from dvn_cli.store.file import is_trained, read_checkpoint, read_run

MAY_DIFFER = {"threads", "save_every"}, {"path", "load", "workers", "on_bad_image"}
"""Keys of a recipe and of a task's data that `data.spec.MAY_DIFFER` marks, which would take torch to ask."""

_APART = {"scenario", "scale", "setting", "method", "seed"} | MAY_DIFFER[0]
"""Keys of a recipe in which runs that are compared may differ."""


class _Loose(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


Count = Annotated[int, Field(ge=0, le=2**53)]


class Keys(_Loose):
    """Of a resolved recipe, the keys that say where its run belongs; the others are extra."""

    scenario: str | None = None
    scale: str = "full"
    setting: str = "paper"
    method: str = "dvn"
    seed: Count
    tasks: list[dict[str, Any]]


class Result(_Loose):
    """What a network made of the test images, see `evaluation.measure.Row`."""

    task: Count = Field(ge=1)
    name: str
    level: Count = Field(ge=1)
    units: list[Count] = Field(min_length=1)
    params: Count
    density: float
    top1: float
    images: Count | None = None


class Epoch(_Loose):
    """What an epoch gave: accuracy on validation images in per cent, by task and level."""

    epoch: Count
    validation: list[list[float | None]] | None


class Record(_Loose):
    """What `dvn train` writes beside a checkpoint, see `training.session`."""

    recipe: Keys
    versions: dict[str, str]
    device: str
    stored: Count | None = None
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
        is_folder = os.path.isdir(path)
        files = sorted(path.glob("*.run.json")) if is_folder else [path]
        for file in files:
            run = _read(file)
            if run.recipe.scenario != name:
                if not is_folder:
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
    beside = run_record(file)
    given = file if file.suffix == ".safetensors" or beside.exists() else None  # a checkpoint may have any name
    path = file if given is None else beside
    if not os.path.exists(file):
        raise InputError(f"there is no '{file}': give runs' records (NAME.run.json), checkpoints, or folders of them")
    if not os.path.exists(path):
        raise InputError(f"there is no record of the run of '{file}': '{path}' is missing")
    try:
        record = Record.model_validate(json.loads(read_bytes(path, LARGEST_RECORD)))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or "JSON"
        raise InputError(f"'{path}' is no record of a run: {where}: {problem['msg'].lower()}") from None
    except (ValueError, RecursionError):
        raise InputError(f"'{path}' is no record of a run: it is not JSON") from None
    if given is not None and is_trained(given):
        read_run(read_checkpoint(given))
    return Run(path, record, {(result.task, result.level): result for result in record.test}, given)


# Whether runs may be compared


def check_alike(method: str, runs: Sequence[Run]) -> None:
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


def differences(by_method: Mapping[str, Sequence[Run]]) -> Iterator[str]:
    """What else methods differ in, such as `epochs: dvn 200, baseline 100`."""
    recipes = {method: _compared(runs[0].recipe) for method, runs in by_method.items() if runs}
    for key in sorted({key for recipe in recipes.values() for key in recipe}):
        values = {method: recipe.get(key) for method, recipe in recipes.items()}
        if len({repr(value) for value in values.values()}) > 1:
            yield f"{key}: " + ", ".join(f"{method} {value}" for method, value in values.items())


def _compared(recipe: Keys) -> dict[str, Any]:
    """The keys, dotted, in which runs of one row must not differ."""
    flat = _flat({key: value for key, value in recipe.model_dump().items() if key not in _APART})
    return {key: value for key, value in flat if not (".data." in key and key.rpartition(".")[2] in MAY_DIFFER[1])}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        yield path, value
        return
    for key, entry in value.items():
        yield from _flat(entry, f"{path}.{key}" if path else str(key))
