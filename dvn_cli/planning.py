"""A level for each task: the most accuracy for the bytes of networks that hold what they share once.

Networks that are in memory together hold an element once, whichever of them have it. Elements that the same levels have
are one block; the bytes of some networks are those of the blocks that any of them has, and of what each has of its own.
"""

import math
import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import pairwise, product

import numpy as np

from dvn_cli.budget import KnownLevel, in_words, known_networks, missing_record, unread_record
from dvn_cli.errors import DvnError, InputError
from dvn_cli.store.file import ITEM_SIZE, Header
from dvn_cli.store.lookup import find_task
from dvn_cli.store.metadata import CheckpointMetadata, TaskLevel
from dvn_cli.store.shapes import source
from dvn_cli.store.slicing import cut, slice_size

TIE = 1e-6
"""Per cent of accuracy that all bytes together are worth: of equally accurate plans the smaller one is taken."""


@dataclass(frozen=True)
class Holdings:
    """What networks hold, in bytes; levels count from 0 here.

    Attributes:
        blocks: bytes of each, integer (blocks,).
        first: the lowest level of each task that has a block, past its last where none has, integer (blocks, tasks).
        own: for each task what its levels have that no other task has, integer (levels,) each.
    """

    blocks: np.ndarray
    first: np.ndarray
    own: Sequence[np.ndarray]

    def together(self, levels: Sequence[int]) -> int:
        """Returns the bytes of one network of each task, what they share counted once."""
        held = (self.first <= np.asarray(levels)).any(1)
        return int(self.blocks[held].sum()) + sum(int(own[level]) for own, level in zip(self.own, levels, strict=True))


@dataclass(frozen=True)
class Plan:
    """A level for each task.

    Attributes:
        levels: one a task, in their order.
        bytes: of their tensors together, what they share counted once.
        accuracy: their weighted mean, per cent.
    """

    levels: tuple[KnownLevel, ...]
    bytes: int
    accuracy: float

    @property
    def networks(self) -> list[TaskLevel]:
        """The networks, by task and level."""
        return [TaskLevel(task, each.level) for task, each in enumerate(self.levels, 1)]


def plan(
    header: Header[CheckpointMetadata],
    budget: float,
    weights: Mapping[str, float] | None = None,
    results: Sequence[str | os.PathLike[str]] = (),
) -> Plan:
    """Chooses the levels of all tasks whose recorded accuracy is the highest within a budget.

    Args:
        header: a checkpoint's.
        budget: bytes of the networks together, what they share counted once.
        weights: of tasks in the mean of accuracies, by name or number; 1 by default.
        results: see `known_networks`.

    Raises:
        InputError: of a task no accuracy is recorded, there is no such task or weight, or SciPy is missing.
        DvnError: the lowest levels do not fit; the message says what they take.
    """
    if find_spec("scipy") is None:
        raise InputError("a plan needs scipy, not installed here: pip install 'dvn[plan]'")
    tasks, known = header.metadata.tasks, []
    shares = np.ones(len(tasks))
    for name, weight in (weights or {}).items():
        if not 0 < weight < math.inf:
            raise InputError(f"the weight of a task is above 0, not {weight:g}")
        shares[find_task(tasks, name) - 1] = weight
    shares /= shares.sum()
    recorded = known_networks(header, results)
    for number, task in enumerate(tasks, 1):
        known.append([each for each in recorded[number] if each.accuracy is not None])
        if not known[-1]:
            raise missing_record("accuracy", task.name, unread=unread_record(header))
    values = [
        {each.level - 1: share * (each.accuracy or 0) for each in own} for share, own in zip(shares, known, strict=True)
    ]
    held = holdings(header)
    chosen = best_levels(values, held, budget)
    levels = [
        replace(next(each for each in own if each.level == level + 1), bytes=slice_size(header, task, level + 1))
        for task, (own, level) in enumerate(zip(known, chosen, strict=True), 1)
    ]
    accuracy = sum(own[level] for own, level in zip(values, chosen, strict=True))
    return Plan(tuple(levels), held.together(chosen), accuracy)


def holdings(header: Header[CheckpointMetadata]) -> Holdings:
    """Returns what the networks of a checkpoint hold, from its header alone."""
    metadata = header.metadata
    needs = Counter[tuple[frozenset[int], int]]()  # bytes of what takes some units and so many classes to have
    classes = sorted({0, *(len(task.classes) for task in metadata.tasks)})
    for name, entry in metadata.tensors.items():
        if (stored := header.tensors.get(f"shared/{name}")) is None:
            continue
        parts: list[list[tuple[int | None, int, int]]] = []  # of each dimension: unit, classes, indices
        for dim, (size, axis) in enumerate(zip(stored.shape, entry.axes, strict=True)):
            if (name, dim) in metadata.class_axis:
                parts.append([(None, most, min(most, size) - min(less, size)) for less, most in pairwise(classes)])
                continue
            counts = (
                [sum(stop - start for start, stop in runs) for runs in metadata.axes[axis]] if axis is not None else []
            )
            parts.append([(None, 0, size - sum(counts)), *((unit, 0, count) for unit, count in enumerate(counts, 1))])
        for element in product(*parts):
            units = frozenset(unit for unit, _, _ in element if unit is not None)
            elements = math.prod(count for _, _, count in element)
            needs[units, max((count for _, count, _ in element), default=0)] += elements * ITEM_SIZE[stored.dtype]

    first = np.empty((len(needs), len(metadata.tasks)), dtype=int)
    own = []
    for number, task in enumerate(metadata.tasks, 1):
        for block, (units, least) in enumerate(needs):
            taken = max((task.order.index(unit) + 1 for unit in units), default=0)
            first[block, number - 1] = (
                bisect_left(task.levels, taken) if least <= len(task.classes) else len(task.levels)
            )
        own.append(
            np.array(
                [
                    sum(
                        tensor.nbytes
                        for name, tensor in cut(header, number, level).items()
                        if not source(header.tensors, name, number, level).startswith("shared/")
                    )
                    for level in range(1, len(task.levels) + 1)
                ]
            )
        )
    return Holdings(np.array(list(needs.values())), first, own)


def best_levels(values: Sequence[Mapping[int, float]], held: Holdings, budget: float) -> list[int]:
    """Returns the level of each task, from 0, so that the sum of values is the highest within a budget.

    A mixed-integer linear program, solved exactly by HiGHS: one binary variable for each level of a task above its
    lowest, one for each block, and a row for each of the least pairs of these of which one takes the other.

    Args:
        values: of each task, by its levels that may be chosen, in per cent.
        held: what the networks hold; more from level to level.
        budget: bytes.

    Raises:
        DvnError: not even the lowest levels fit.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    usable = [sorted(own) for own in values]
    lowest = [levels[0] for levels in usable]
    least = held.together(lowest)
    if least > budget:
        raise DvnError(
            f"no plan has at most {in_words('bytes', budget)}: the lowest levels of all tasks hold "
            f"{in_words('bytes', least)} ({least:,} bytes) together"
        )
    first = np.column_stack([np.searchsorted(levels, held.first[:, task]) for task, levels in enumerate(usable)])
    optional = (first > 0).all(1) & (first < [len(levels) for levels in usable]).any(1)
    blocks, which = np.unique(first[optional], axis=0, return_inverse=True)
    steps = [(task, place) for task, levels in enumerate(usable) for place in range(1, len(levels))]
    if not steps:
        return lowest
    tasks, places = np.array(steps).T
    rises = [(usable[task][place - 1], usable[task][place]) for task, place in steps]
    gain = [values[task][after] - values[task][before] for task, (before, after) in zip(tasks, rises, strict=True)]
    more = [held.own[task][after] - held.own[task][before] for task, (before, after) in zip(tasks, rises, strict=True)]
    gains = np.concatenate([gain, np.zeros(len(blocks))])
    sizes = np.concatenate([more, np.bincount(which.reshape(-1), held.blocks[optional], len(blocks))])

    takes = np.zeros((len(sizes),) * 2, dtype=bool)  # [a, b]: where a is held, b is
    takes[: len(steps), : len(steps)] = (tasks[:, None] == tasks) & (places[:, None] > places)
    takes[: len(steps), len(steps) :] = places[:, None] >= blocks[:, tasks].T
    takes[len(steps) :, len(steps) :] = (blocks <= blocks[:, None]).all(2) & ~np.eye(len(blocks), dtype=bool)
    steps_between = takes.astype(np.float32)
    takes &= steps_between @ steps_between == 0  # the rest follows
    taking, taken = np.nonzero(takes)
    rows = np.zeros((len(taking), len(sizes)))
    rows[range(len(taking)), taken], rows[range(len(taking)), taking] = 1, -1

    worth = TIE / max(sizes.sum(), 1) * sizes - gains
    constraints = [LinearConstraint(rows, 0), LinearConstraint(sizes / budget, ub=(budget - least) / budget)]
    while True:
        found = milp(
            1e4 * worth,
            integrality=np.arange(len(sizes)) < len(steps),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0},
        )
        is_held = found.x[: len(steps)] > 0.5
        chosen = [levels[int(is_held[tasks == task].sum())] for task, levels in enumerate(usable)]
        if held.together(chosen) <= budget:
            return chosen
        constraints.append(
            LinearConstraint(np.pad(is_held, (0, len(blocks))), ub=is_held.sum() - 1)
        )  # by its tolerance
