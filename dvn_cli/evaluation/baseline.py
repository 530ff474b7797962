"""A baseline: which images each network told right, to compare other networks with on the very same images."""

import base64
import hashlib
import itertools
import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch

from dvn_cli.data import Split
from dvn_cli.errors import InputError
from dvn_cli.evaluation.gates import Check, Named, Verdict
from dvn_cli.evaluation.intervals import change_interval, images_needed
from dvn_cli.evaluation.measure import Evaluation, Loaded
from dvn_cli.files import atomic, read_bytes
from dvn_cli.store.lookup import matching_tasks
from dvn_cli.store.metadata import Number, Task
from dvn_cli.store.schema import checked, loads, parse

LIBRARIES = ("dvn", "torch", "torchvision", "timm", "pillow", "numpy")
"""Whose versions a baseline notes: another one may decode images, or compute, otherwise."""

LARGEST = 64 << 20
"""Bytes of a baseline."""


@dataclass(frozen=True)
class BaselineNetwork:
    """What a network made of the images.

    Attributes:
        level: from 1.
        params: elements of its parameters.
        sha256: of its tensors, and of what normalises its images.
        top1: in per cent.
        right: a bit for each image, 1 where it was told right; the first image has the highest bit of the first byte.
            In base 64.
    """

    level: Number
    params: int
    sha256: str
    top1: float
    right: str

    def bits(self, images: int) -> np.ndarray:
        """Which of the images were told right, bool (N,)."""
        return np.unpackbits(np.frombuffer(base64.b64decode(self.right), np.uint8), count=images).astype(bool)


@dataclass(frozen=True)
class BaselineTask:
    """A task's images, and its networks.

    Attributes:
        number: of the task, from 1.
        name: of the task, by which it is found again.
        classes: names, in the order of the labels.
        images: how many there are.
        images_sha256: of their size and pixels as they are evaluated, 8 bits each, in order.
        labels_sha256: of their labels.
        networks: of its levels.
    """

    number: Number
    name: str
    classes: tuple[str, ...]
    images: Number
    images_sha256: str
    labels_sha256: str
    networks: tuple[BaselineNetwork, ...]

    def __post_init__(self) -> None:
        for network in self.networks:
            try:
                whole = len(base64.b64decode(network.right, validate=True)) == -(-self.images // 8)
            except ValueError:
                whole = False
            if not whole or abs(100 * network.bits(self.images).mean() - network.top1) > 1e-6:
                raise InputError(f"'right' of level {network.level} of task '{self.name}' is not what its top1 says")


@dataclass(frozen=True)
class Baseline:
    """What `--save-baseline` writes, as JSON.

    Attributes:
        format: of the file.
        versions: of Python and the libraries.
        tasks: with their networks.
    """

    format: Annotated[int, range(1, 2)]
    kind: Literal["baseline"]
    versions: dict[str, str]
    tasks: tuple[BaselineTask, ...]


def check_distinct(networks: Sequence[Named]) -> None:
    """Raises InputError where two networks have the task's name and the level in common: a baseline holds one."""
    names = [(network.name, network.level) for network in networks]
    for name, level in names:
        if names.count((name, level)) > 1:
            raise InputError(f"a baseline has one network of each task and level: '{name}', {level} is there twice")


def save(path: Path, loaded: Sequence[Loaded], rows: Sequence[Evaluation]) -> None:
    """Writes a baseline.

    Args:
        path: where to.
        loaded: what was evaluated.
        rows: what came of it, in the same order.

    Raises:
        InputError, DvnError: as `atomic`.
    """
    tasks: dict[str, dict[str, Any]] = {}
    digests = Digests()
    for row, task, split, opened in _evaluated(loaded, rows):
        images_sha256, labels_sha256 = digests.of(split)
        entry = tasks.setdefault(
            row.name,
            {
                "number": row.task,
                "name": row.name,
                "classes": task.classes,
                "images": row.images,
                "images_sha256": images_sha256,
                "labels_sha256": labels_sha256,
                "networks": [],
            },
        )
        right = base64.b64encode(np.packbits(_right(row)).tobytes()).decode()
        entry["networks"].append(
            BaselineNetwork(row.level, row.params, opened.sha256(row.task, row.level), row.top1, right)
        )
    made = [BaselineTask(**{**entry, "networks": tuple(entry["networks"])}) for entry in tasks.values()]
    content = checked(Baseline(1, "baseline", _versions(), tuple(made)))
    with atomic(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def read(path: str | os.PathLike[str]) -> Baseline:
    """Reads what `save` wrote.

    Raises:
        InputError: it is missing or no baseline.
    """
    try:
        return parse(Baseline, loads(read_bytes(path, LARGEST)))
    except (InputError, ValueError) as error:
        said = str(error)
        raise InputError(said if str(path) in said else f"'{path}' is no baseline: {said}") from None


def compare(
    baseline: Baseline,
    loaded: Sequence[Loaded],
    rows: Sequence[Evaluation],
    tolerance: float,
    task: str | None = None,
    level: int | None = None,
) -> list[Check]:
    """Compares networks with those of a baseline that have their task, by name, and level.

    Args:
        baseline: what to compare with.
        loaded: what was evaluated.
        rows: what came of it, in the same order.
        tolerance: points of accuracy that may be lost.
        task, level: only networks of these are asked for.

    Raises:
        InputError: as `asked_for`.
    """
    evaluated: dict[tuple[str, int], list[tuple[Evaluation, Task, Split, Loaded]]] = {}
    for one in _evaluated(loaded, rows):
        evaluated.setdefault((one[0].name, one[0].level), []).append(one)
    title, digests = f"change >= {-tolerance:g}", Digests()
    checks = []
    for entry, network in asked_for(baseline, task, level):
        found = evaluated.get((entry.name, network.level), [])
        for row, now, split, opened in found:
            key = Named(row.task, row.name, row.level)
            other = _difference(baseline, entry, row.images, now, split, digests)
            if other is not None:
                checks.append(Check("baseline", key, row.file, title, other, "failed"))
            else:
                before, after = network.bits(entry.images), _right(row)
                same = (before == after).all() and network.sha256 == opened.sha256(row.task, row.level)
                checks.append(_paired(key, row, title, tolerance, before, after, bool(same)))
        if not found:
            key, gone = Named(entry.number, entry.name, network.level), "it is gone: the baseline has it"
            checks.append(Check("baseline", key, None, title, gone, "failed"))
    return checks


def asked_for(
    baseline: Baseline, task: str | None = None, level: int | None = None
) -> list[tuple[BaselineTask, BaselineNetwork]]:
    """Returns the networks of a baseline that have a task, by its name or number there, and a level; all by default.

    Raises:
        InputError: nothing would be compared, or `task` is the number of one task and the name of another.
    """
    named = [(entry.number, entry.name) for entry in baseline.tasks]
    asked = named if task is None else matching_tasks(named, task)
    found = [
        (entry, network)
        for entry in baseline.tasks
        for network in entry.networks
        if (entry.number, entry.name) in asked and level in (None, network.level)
    ]
    if not found:
        parts = [f"task '{task}'"] * (task is not None) + [f"level {level}"] * (level is not None)
        of = f" of {', '.join(parts)}" if parts else ""
        raise InputError(f"the baseline has no network{of}: nothing would be compared")
    return found


def decide(interval: tuple[float, float], tolerance: float) -> Verdict:
    """Judges a change by its interval, in points: too few images have told where it is on both sides of the bound."""
    low, high = interval
    return "failed" if high < -tolerance else "passed" if low >= -tolerance else "undecided"


def missing(baseline: Baseline, networks: Sequence[Named]) -> list[str]:
    """Says, in lines, which networks a baseline lacks."""
    there = {(entry.name, network.level) for entry in baseline.tasks for network in entry.networks}
    lacking = [network for network in networks if (network.name, network.level) not in there]
    return [f"task '{network.name}', level {network.level} is not in the baseline" for network in lacking]


def _paired(
    network: Named, row: Evaluation, title: str, tolerance: float, before: np.ndarray, after: np.ndarray, same: bool
) -> Check:
    images, gained, lost = len(after), int((after & ~before).sum()), int((before & ~after).sum())
    change = 100 * (gained - lost) / images
    low, high = interval = (0.0, 0.0) if same else change_interval(gained, lost, images)
    verdict = decide(interval, tolerance)
    found = f"{change:+.2f} points ({low:+.2f} to {high:+.2f}), {gained} gained, {lost} lost"
    if same:
        found = "the same network: no image flips"
    needed = images_needed(change, interval, -tolerance, images) if verdict == "undecided" else None
    if verdict == "undecided":
        found += f"; {f'about {needed:,}' if needed else 'no number of'} images would do, not {images:,}"
    figures = {
        "tolerance": tolerance,
        "change": change,
        "interval": [low, high],
        "gained": gained,
        "lost": lost,
        "images": images,
        "images_needed": needed,
    }
    return Check("baseline", network, row.file, title, found, verdict, low + tolerance, figures)


def _difference(
    baseline: Baseline, entry: BaselineTask, images: int, task: Task, split: Split, digests: "Digests"
) -> str | None:
    """What prevents a comparison: other classes, labels or images."""
    if task.classes != entry.classes:
        return f"its {len(task.classes)} classes are not the baseline's {len(entry.classes)}, or in another order"
    if images != entry.images:
        return f"there are {images:,} images, {entry.images:,} in the baseline"
    images_sha256, labels_sha256 = digests.of(split)
    if labels_sha256 != entry.labels_sha256:
        return "the labels of the images are not the baseline's"
    if images_sha256 != entry.images_sha256:
        now = _versions()
        then = [f"{name} {old}, now {now.get(name)}" for name, old in baseline.versions.items() if now.get(name) != old]
        return "the images are not the baseline's" + (f" (it was made by {', '.join(then)})" if then else "")
    return None


class Digests:
    """SHA-256 of images and of labels, each split's reckoned once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[str, str]] = {}

    def of(self, split: Split) -> tuple[str, str]:
        """Returns the digests of a split, which lives as long as this."""
        if id(split) not in self._known:
            images, labels = hashlib.sha256(repr(split.shape).encode()), hashlib.sha256()
            for pixels, positions in split.read(torch.arange(len(split)).split(256)):
                images.update(pixels.contiguous().numpy().data)
                labels.update(split.labels[positions].numpy().astype("<i8").data)
            self._known[id(split)] = images.hexdigest(), labels.hexdigest()
        return self._known[id(split)]


def _evaluated(
    loaded: Sequence[Loaded], rows: Sequence[Evaluation]
) -> Iterator[tuple[Evaluation, Task, Split, Loaded]]:
    """Yields each row with its task, its images, and what it was opened from."""
    opened_from = itertools.chain.from_iterable([opened] * len(opened.networks) for opened in loaded)
    for row, opened in zip(rows, opened_from, strict=True):
        yield row, opened.header.metadata.numbered_tasks[row.task], opened.splits[row.task], opened


def _right(row: Evaluation) -> np.ndarray:
    assert row.predicted is not None  # it was evaluated, not read from a record
    assert row.labels is not None
    return (row.predicted == row.labels).numpy()


def _versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()}
