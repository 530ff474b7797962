"""Which unit owns which indices of which tensor."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dvn_cli.errors import InputError
from dvn_cli.graph.labels import Labeller
from dvn_cli.store.metadata import Rule
from dvn_cli.store.ownership import Assignment, Axis
from dvn_cli.store.regions import runs_of
from dvn_cli.units.widths import Worth, by_worth

SHARED = -1  # in place of a unit's number (from 0): kept by all
CLASS = -2  # a class of the classifier: kept by the tasks that have it

EVEN = Rule()


@dataclass(frozen=True)
class CoupledGroup:
    """Channels that play the same part in the same tensors, divided among the units together.

    Attributes:
        channels: how many there are; what only goes together, as the dimensions of a head, counts as one.
        places: (name, dimension) of the tensors that they are indices of.
        sizes: channels of each unit; empty when they stay shared by all.
        is_stream: whether a sum couples what several layers make, as in a residual stream; otherwise it is inner.
    """

    channels: int
    places: tuple[tuple[str, int], ...]
    sizes: tuple[int, ...]
    is_stream: bool

    def is_whole_stream(self, rule: Rule) -> bool:
        """Tells whether it stays shared because it is no inner group."""
        return self.is_stream and rule.divide == "inner"


def assign(
    labeller: Labeller,
    names: Sequence[str],
    rule: Rule = EVEN,
    scores: Sequence[np.ndarray] = (),
    worth: Worth | None = None,
) -> tuple[Assignment, list[CoupledGroup]]:
    """Divides each coupled group among the units, as evenly as can be where nothing else is said.

    Channels that occur in the same dimensions of the same tensors, equally often, form a group; of m channels each of k
    units gets m/k (see `Rule`). Fewer than k stay shared, and so does what no parameter makes (positions, the input,
    tables).

    Args:
        names: the tensors to say it of, among the labeller's sources.
        rule: how channels are assigned.
        scores: how much channels matter, by their labels. A group takes the first score that is not zero for all of its
            channels; without any score each unit has consecutive channels.
        worth: of channels, for units that are as wide as it says rather than even. Groups of which it says nothing, as
            no layer reads them, are even.
    """
    roots = labeller.coupled.roots()
    eligible = labeller.coupled.produced()
    eligible[0] = False
    class_roots = np.unique(roots[labeller.output.numpy()]) if labeller.output is not None else np.zeros(0, np.int64)
    eligible[class_roots] = False

    # A channel's signature is the sum of a number for each place it occurs at: those with equal ones are a group.
    places = [(name, dim) for name in names for dim in range(len(labeller.sources[name]))]
    numbers = np.random.default_rng(0).integers(1, 2**62, size=len(places), dtype=np.int64)
    signature = np.zeros(len(roots), dtype=np.int64)
    first = np.full(len(roots), -1, dtype=np.int64)
    together = np.ones(len(roots), dtype=np.int64)  # neighbouring indices that are one channel: those of a head
    seen: dict[int, np.ndarray] = {}
    start = 0
    for place, (name, dim) in enumerate(places):
        found = roots[labeller.sources[name][dim].numpy()]
        np.add.at(signature, found, numbers[place])
        starts = np.flatnonzero(np.diff(found, prepend=-1))
        np.maximum.at(together, found[starts], np.diff(starts, append=len(found)))
        unseen = first[found] < 0
        order = np.arange(start, start + len(found))
        first[found[unseen][::-1]] = order[unseen][::-1]
        start += len(found)
        seen[place] = found[eligible[found]]

    unit = np.full(len(roots), SHARED, dtype=np.int64)
    candidates = np.unique(roots[eligible[roots]])
    candidates = candidates[first[candidates] >= 0]
    candidates = candidates[np.argsort(first[candidates], kind="stable")]
    alike: dict[int, list[int]] = {}
    for root in candidates.tolist():
        alike.setdefault(int(signature[root]), []).append(root)
    where: dict[int, list[tuple[str, int]]] = {}
    for place, found_roots in seen.items():
        for key in np.unique(signature[found_roots]).tolist():
            where.setdefault(key, []).append(places[place])
    summed = labeller.coupled.summed()
    is_stream = {key: bool(summed[members].any()) for key, members in alike.items()}
    divided = {
        key: members
        for key, members in alike.items()
        if len(members) >= labeller.units and (rule.divide == "all" or not is_stream[key])
    }
    steps = {
        key: rule.round_to // math.gcd(rule.round_to, *together[members].tolist()) for key, members in divided.items()
    }
    sizes = {key: _sizes(len(members), labeller.units, steps[key]) for key, members in divided.items()}
    if worth is not None:
        known = [
            key
            for key, members in divided.items()
            if len(members) >= labeller.units * steps[key] and worth.score[members].any() and worth.cost[members[0]]
        ]
        scores_of = [worth.score[divided[key]] for key in known]
        costs_of = [worth.cost[divided[key][0]] for key in known]
        found = by_worth(scores_of, costs_of, [steps[key] for key in known], labeller.units)
        sizes |= zip(known, found, strict=True)
    lead = np.zeros(labeller.units)
    for key, members in divided.items():
        of_members = [score[members] for score in scores]
        score = next(filter(np.any, of_members), of_members[-1] if of_members else None)
        unit[members] = _assigned(rule, score, sizes[key], lead)
    groups = [
        CoupledGroup(len(members), tuple(where[key]), tuple(map(int, sizes.get(key, ()))), is_stream[key])
        for key, members in alike.items()
    ]
    return _collect(labeller, names, unit[roots]), groups


def _sizes(count: int, units: int, step: int) -> np.ndarray:
    """Channels of each unit: multiples of `step`, the last unit with the rest, if each can have one; else any number.

    Either way they are as even as can be.
    """
    blocks = count // step
    if blocks < units:
        blocks, step = count, 1
    sizes = np.bincount(np.arange(blocks) * units // blocks, minlength=units) * step
    sizes[-1] += count - sizes.sum()
    return sizes


def _assigned(rule: Rule, score: np.ndarray | None, sizes: np.ndarray, lead: np.ndarray) -> np.ndarray:
    """The unit of each channel of a group; `lead` as in `_dealt`."""
    if score is not None and rule.assign == "importance":
        return _dealt(score, sizes, lead)
    unit = np.repeat(np.arange(len(sizes)), sizes)
    if score is not None and rule.assign == "sorted":
        unit[np.argsort(-score, kind="stable")] = unit.copy()
    return unit


def _dealt(score: np.ndarray, sizes: np.ndarray, lead: np.ndarray) -> np.ndarray:
    """The unit of each channel: from the strongest to the weakest in rounds, in which the unit that lags comes first.

    A unit of more channels has its turns in as many equal intervals, so each has its share of strong and of weak ones.

    Args:
        score: of each channel, how much it matters.
        sizes: channels of each unit.
        lead: for each unit by what share of a group it is ahead of the others so far; updated.
    """
    count = len(score)
    share = score / (score.sum() or 1)
    unit = np.empty(count, dtype=np.int64)
    taken = np.zeros(len(sizes))
    for channel in np.argsort(-score, kind="stable"):
        turn = (taken + 0.5) / sizes
        first = int(np.where(turn <= turn.min() + 1 / count, lead, np.inf).argmin())
        unit[channel] = first
        taken[first] += 1
        lead[first] += share[channel] - 1 / count
    return unit


def _collect(labeller: Labeller, names: Sequence[str], unit: np.ndarray) -> Assignment:
    axes: list[Axis] = []
    number: dict[str, int] = {}
    tensors: dict[str, list[int | None]] = {}
    for name in names:
        tensors[name] = []
        for vector in labeller.sources[name]:
            owner = unit[vector.numpy()]
            if (owner == SHARED).all():
                tensors[name].append(None)
                continue
            axis = tuple(runs_of(owner == u) for u in range(labeller.units))
            key = repr(axis) + f"/{len(owner)}"
            if key not in number:
                number[key] = len(axes)
                axes.append(axis)
            tensors[name].append(number[key])
    by_name = {name: tuple(along) for name, along in tensors.items()}
    return Assignment(labeller.units, tuple(axes), by_name, tuple(class_dimensions(labeller, names)))


def class_dimensions(labeller: Labeller, names: Iterable[str]) -> list[tuple[str, int]]:
    """Returns the dimensions of some tensors, as names and numbers, that hold the classes of the classifier."""
    find = labeller.coupled.find
    output = np.zeros(0, np.int64) if labeller.output is None else find(labeller.output).numpy()
    return [
        (name, dim)
        for name in names
        for dim, vector in enumerate(labeller.sources[name])
        if np.isin(find(vector).numpy(), output).any()
    ]


def unit_of_labels(labeller: Labeller, assignment: Assignment) -> Tensor:
    """For each label the unit that owns its channel (from 0), `SHARED` or `CLASS`: the assignment, back on the graph.

    Raises:
        InputError: the assignment does not fit the graph, as when a library's new version built another backbone.
    """
    roots = torch.from_numpy(labeller.coupled.roots())
    unit = torch.full((len(roots),), SHARED)
    owners = []
    for name, axes in assignment.tensors.items():
        sources = labeller.sources.get(name, [])  # of a tensor that the graph has no use for none
        if sources and len(axes) != len(sources):
            raise InputError(f"the backbone has no such tensor as {name}: its library may have changed since")
        for dim, axis in enumerate(axes if sources else ()):
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
        if name in labeller.sources:
            unit[roots[labeller.sources[name][dim]]] = CLASS
    return unit[roots]


def label_mask(labeller: Labeller, unit: Tensor, units: Sequence[int], classes: int) -> Tensor:
    """Tells for each label whether its channel is in the network of some units.

    Args:
        unit: from `unit_of_labels`.
        units: of the network, by number from 1.
        classes: of its classifier, the first ones of the backbone's.
    """
    mask = torch.isin(unit, torch.tensor([SHARED, *(u - 1 for u in units)]))
    if labeller.output is not None:
        output = labeller.coupled.find(labeller.output)
        mask[unit == CLASS] = False
        mask[torch.isin(torch.from_numpy(labeller.coupled.roots()), output[:classes])] = True
    return mask
