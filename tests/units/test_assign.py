from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dvn_cli.errors import InputError
from dvn_cli.graph.labels import Labeller
from dvn_cli.graph.trace import Traced, trace
from dvn_cli.units.assign import SHARED, Assignment, Bucket, assign, kept_labels, unit_of_labels
from dvn_cli.units.order import paper_order


class Small(nn.Module):
    """A residual block, a bottleneck of few channels, a grouped convolution, a concatenation and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 22, 3)
        self.norm = nn.BatchNorm2d(22)
        self.block = nn.Conv2d(22, 22, 3, padding=1)
        self.narrow = nn.Conv2d(22, 3, 1)
        self.wide = nn.Conv2d(3, 24, 1)
        self.grouped = nn.Conv2d(24, 24, 3, padding=1, groups=4)
        self.fc = nn.Linear(22 + 24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.block(x)
        y = self.grouped(self.wide(self.narrow(x)))
        return self.fc(torch.cat([x, y], 1).mean((2, 3)))


@cache
def traced() -> Traced:
    return trace(Small(), (3, 8, 8), False)


def divide(units: int, names: Sequence[str] | None = None) -> tuple[Labeller, Assignment, list[Bucket]]:
    labeller = Labeller(units)
    labeller.run(traced())
    return labeller, *assign(labeller, list(names or Small().state_dict().keys() & labeller.sources))


def owners(assignment: Assignment, name: str, dim: int, size: int) -> list[set[int]]:
    """The units (from 1) whose runs hold each index; all of them where no unit's do."""
    axis = assignment.tensors[name][dim]
    found: list[set[int]] = [set() for _ in range(size)]
    for unit, runs in enumerate(assignment.axes[axis] if axis is not None else [], 1):
        for start, stop in runs:
            for index in range(start, stop):
                found[index].add(unit)
    return found


def test_units_are_even_and_contiguous():
    _, assignment, buckets = divide(4)
    assert assignment.axes[assignment.tensors["stem.weight"][0]] == [[[0, 6]], [[6, 11]], [[11, 17]], [[17, 22]]]
    by_place = {place: bucket for bucket in buckets for place in bucket.places}
    assert by_place["stem.weight", 0].sizes == (6, 5, 6, 5)
    assert by_place["stem.weight", 0] == by_place["block.weight", 1] == by_place["norm.running_var", 0]
    assert by_place["narrow.weight", 0].sizes == ()  # fewer channels than units
    assert assignment.tensors["narrow.weight"] == [None, assignment.tensors["stem.weight"][0], None, None]
    assert assignment.tensors["stem.weight"][1] is None
    assert assignment.tensors["fc.weight"][0] is None
    assert set(assignment.classes) == {("fc.weight", 0), ("fc.bias", 0)}


def test_a_grouped_convolution_keeps_its_groups_whole():
    _, assignment, _ = divide(4)
    assert assignment.axes[assignment.tensors["grouped.weight"][0]] == [[[6 * u, 6 * u + 6]] for u in range(4)]
    assert assignment.tensors["grouped.weight"][1] is None


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 9))
def test_every_element_belongs_to_one_unit_or_one_pair(units):
    """Of every element of a tensor, each dimension is owned by one unit at most, and by two units in all at most."""
    _, assignment, buckets = divide(units)
    state = Small().state_dict()
    for name in assignment.tensors:
        per_dim = [owners(assignment, name, dim, size) for dim, size in enumerate(state[name].shape)]
        assert all(len(found) <= 1 for along in per_dim for found in along)
        assert sum(any(along) for along in per_dim) <= 2
        for along in per_dim:
            counts = [sum(found == {unit} for found in along) for unit in range(1, units + 1)]
            if any(along) and name != "fc.weight":
                assert max(counts) - min(counts) <= max(1, 6 * (name.startswith(("wide", "grouped"))))
    for bucket in buckets:
        assert (sum(bucket.sizes) == bucket.channels and min(bucket.sizes) >= 1) or (
            not bucket.sizes and bucket.channels < units
        )


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 8), st.data())
def test_levels_nest_and_the_last_is_everything(units, data):
    labeller, assignment, _ = divide(units)
    unit = unit_of_labels(labeller, assignment)
    order = paper_order(data.draw(st.integers(1, units)), units)
    levels = [kept_labels(labeller, unit, order[:n], 10) for n in range(1, units + 1)]
    assert bool(levels[-1].all())
    for lower, upper in pairwise(levels):
        assert bool((upper | ~lower).all())
        assert bool((upper & ~lower).any()) or not (unit >= 0).any()


def test_the_assignment_comes_back_from_a_file_and_must_fit():
    labeller, assignment, _ = divide(4)
    again = Labeller(4)
    again.run(traced())
    torch.testing.assert_close(unit_of_labels(again, assignment), unit_of_labels(labeller, assignment))
    axis = assignment.tensors["stem.weight"][0]
    other = Assignment(4, [*assignment.axes, assignment.axes[axis][::-1]], dict(assignment.tensors), [])
    other.tensors["block.weight"] = [len(assignment.axes), axis, None, None]
    with pytest.raises(InputError, match=r"the units of .* do not fit"):
        unit_of_labels(labeller, other)


def test_one_unit_shares_nothing_away():
    labeller, assignment, buckets = divide(1)
    assert all(bucket.sizes == (bucket.channels,) for bucket in buckets)
    assert bool(kept_labels(labeller, unit_of_labels(labeller, assignment), [1], 10).all())


def test_classes_that_a_task_has():
    labeller, assignment, _ = divide(2)
    unit = unit_of_labels(labeller, assignment)
    keep = kept_labels(labeller, unit, [1, 2], 4)
    assert keep[labeller.sources["fc.bias"][0]].tolist() == [True] * 4 + [False] * 6
    assert int((unit == SHARED).sum()) > 0
