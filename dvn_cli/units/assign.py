"""Which unit owns which indices of which tensor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dvn_cli.errors import InputError
from dvn_cli.graph.labels import Labeller

Runs = list[list[int]]  # [start, stop) of indices, in order

SHARED = -1  # in place of a unit's number (from 0): kept by all
CLASS = -2  # a class of the classifier: kept by the tasks that have it


@dataclass(frozen=True)
class Bucket:
    """Classes of coupled channels that play the same part, divided among the units together.

    Attributes:
        channels: how many classes there are.
        places: (name, dimension) of the tensors that they are indices of.
        sizes: channels of each unit; empty when they stay shared by all.
    """

    channels: int
    places: tuple[tuple[str, int], ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Assignment:
    """What each unit owns.

    Attributes:
        units: how many units there are.
        axes: distinct ways in which dimensions are divided: for each unit the runs of indices that it owns. Indices in
            no unit's runs belong to all.
        tensors: for each tensor of the backbone its dimensions' numbers in `axes`; None: not divided.
        classes: (name, dimension) that hold the classes of the classifier, one index each.
    """

    units: int
    axes: list[list[Runs]]
    tensors: dict[str, list[int | None]]
    classes: list[tuple[str, int]]


def assign(labeller: Labeller, names: Sequence[str]) -> tuple[Assignment, list[Bucket]]:
    """Divides each class of coupled channels evenly among the units, in runs as long as can be.

    Classes that occur in the same dimensions of the same tensors, equally often, form a bucket; a bucket of m classes
    in k units gives each m/k consecutive ones (as even as can be). Fewer than k stay shared, and so does what no
    parameter makes (positions, the input, tables).

    Args:
        names: the tensors to say it of, among the labeller's sources.
    """
    roots = labeller.classes.roots()
    eligible = labeller.classes.produced()
    eligible[0] = False
    class_roots = np.unique(roots[labeller.output.numpy()]) if labeller.output is not None else np.zeros(0, np.int64)
    eligible[class_roots] = False

    # A class's signature is the sum of a number for each place it occurs at, so equal ones are one bucket.
    places = [(name, dim) for name in names for dim in range(len(labeller.sources[name]))]
    numbers = np.random.default_rng(0).integers(1, 2**62, size=len(places), dtype=np.int64)
    signature = np.zeros(len(roots), dtype=np.int64)
    first = np.full(len(roots), -1, dtype=np.int64)
    seen: dict[int, list[int]] = {}
    start = 0
    for place, (name, dim) in enumerate(places):
        found = roots[labeller.sources[name][dim].numpy()]
        np.add.at(signature, found, numbers[place])
        unseen = first[found] < 0
        order = np.arange(start, start + len(found))
        first[found[unseen][::-1]] = order[unseen][::-1]
        start += len(found)
        seen[place] = [int(r) for r in np.unique(found[eligible[found]])]

    unit = np.full(len(roots), SHARED, dtype=np.int64)
    candidates = np.unique(roots[eligible[roots]])
    candidates = candidates[first[candidates] >= 0]
    candidates = candidates[np.argsort(first[candidates], kind="stable")]
    groups: dict[int, list[int]] = {}
    for root in candidates.tolist():
        groups.setdefault(int(signature[root]), []).append(root)
    where: dict[int, list[tuple[str, int]]] = {}
    for place, found_roots in seen.items():
        for key in {int(signature[r]) for r in found_roots}:
            where.setdefault(key, []).append(places[place])
    buckets = []
    for key, members in groups.items():
        count, sizes = len(members), ()
        if count >= labeller.units:
            share = np.arange(count) * labeller.units // count
            unit[members] = share
            sizes = tuple(np.bincount(share, minlength=labeller.units).tolist())
        buckets.append(Bucket(count, tuple(where[key]), sizes))
    return _collect(labeller, names, unit[roots], class_roots), buckets


def _collect(labeller: Labeller, names: Sequence[str], unit: np.ndarray, class_roots: np.ndarray) -> Assignment:
    axes: list[list[Runs]] = []
    number: dict[str, int] = {}
    tensors: dict[str, list[int | None]] = {}
    classes = []
    for name in names:
        tensors[name] = []
        for dim, vector in enumerate(labeller.sources[name]):
            owner = unit[vector.numpy()]
            if np.isin(labeller.classes.find(vector).numpy(), class_roots).any():
                classes.append((name, dim))
            if (owner == SHARED).all():
                tensors[name].append(None)
                continue
            axis = [_runs(owner == u) for u in range(labeller.units)]
            key = repr(axis) + f"/{len(owner)}"
            if key not in number:
                number[key] = len(axes)
                axes.append(axis)
            tensors[name].append(number[key])
    return Assignment(labeller.units, axes, tensors, classes)


def _runs(mask: np.ndarray) -> Runs:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return edges.reshape(-1, 2).tolist()


def unit_of_labels(labeller: Labeller, assignment: Assignment) -> Tensor:
    """For each label the unit that owns its class (from 0), `SHARED` or `CLASS`: the assignment, back on the graph.

    Raises:
        InputError: the assignment does not fit the graph, as when a library's new version built another backbone.
    """
    roots = torch.from_numpy(labeller.classes.roots())
    unit = torch.full((len(roots),), SHARED)
    owners = []
    for name, axes in assignment.tensors.items():
        for dim, axis in enumerate(axes):
            found = roots[labeller.sources[name][dim]]
            owner = torch.full((len(found),), SHARED)
            for number, runs in enumerate(assignment.axes[axis] if axis is not None else []):
                for start, stop in runs:
                    owner[start:stop] = number
            unit[found[owner != SHARED]] = owner[owner != SHARED]
            owners.append((name, found, owner))
    for name, found, owner in owners:
        if not torch.equal(unit[found], owner):
            raise InputError(f"the units of {name} do not fit the backbone: its library may have changed since")
    for name, dim in assignment.classes:
        unit[roots[labeller.sources[name][dim]]] = CLASS
    return unit[roots]


def kept_labels(labeller: Labeller, unit: Tensor, kept: Sequence[int], classes: int) -> Tensor:
    """For each label whether its class is in the network of some units.

    Args:
        unit: from `unit_of_labels`.
        kept: numbers of the units kept, from 1.
        classes: how many classes of the classifier are kept, from the first.
    """
    keep = torch.isin(unit, torch.tensor([SHARED, *(u - 1 for u in kept)]))
    if labeller.output is not None:
        output = labeller.classes.find(labeller.output)
        keep[unit == CLASS] = False
        keep[torch.isin(torch.from_numpy(labeller.classes.roots()), output[:classes])] = True
    return keep


def axes_by_name(tensors: Mapping[str, Any]) -> dict[str, list[int | None]]:
    return {name: list(entry["axes"]) for name, entry in tensors.items()}
