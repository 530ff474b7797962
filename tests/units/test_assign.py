from collections.abc import Mapping
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dvn_cli.errors import InputError
from dvn_cli.graph.labels import Labeller
from dvn_cli.graph.trace import Traced, trace
from dvn_cli.units.assign import EVEN, SHARED, Assignment, CoupledGroup, Rule, assign, label_mask, unit_of_labels
from dvn_cli.units.order import paper_order
from dvn_cli.units.score import by_weights


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


def divide(
    units: int, rule: Rule = EVEN, weights: Mapping[str, Tensor] | None = None
) -> tuple[Labeller, Assignment, list[CoupledGroup]]:
    labeller = Labeller(units)
    labeller.run(traced())
    names = [name for name in Small().state_dict() if name in labeller.sources]
    scores = [] if weights is None else [by_weights(labeller, weights)]
    return labeller, *assign(labeller, names, rule, scores)


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
    _, assignment, groups = divide(4)
    assert assignment.axes[assignment.tensors["stem.weight"][0]] == (((0, 6),), ((6, 11),), ((11, 17),), ((17, 22),))
    by_place = {place: group for group in groups for place in group.places}
    assert by_place["stem.weight", 0].sizes == (6, 5, 6, 5)
    assert by_place["stem.weight", 0] == by_place["block.weight", 1] == by_place["norm.running_var", 0]
    assert by_place["narrow.weight", 0].sizes == ()  # fewer channels than units
    assert assignment.tensors["narrow.weight"] == (None, assignment.tensors["stem.weight"][0], None, None)
    assert assignment.tensors["stem.weight"][1] is None
    assert assignment.tensors["fc.weight"][0] is None
    assert set(assignment.classes) == {("fc.weight", 0), ("fc.bias", 0)}


def test_a_grouped_convolution_keeps_its_groups_whole():
    _, assignment, _ = divide(4)
    assert assignment.axes[assignment.tensors["grouped.weight"][0]] == tuple(((6 * u, 6 * u + 6),) for u in range(4))
    assert assignment.tensors["grouped.weight"][1] is None


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 9))
def test_every_element_belongs_to_one_unit_or_one_pair(units):
    """Of every element of a tensor, each dimension is owned by one unit at most, and by two units in all at most."""
    _, assignment, groups = divide(units)
    state = Small().state_dict()
    for name in assignment.tensors:
        per_dim = [owners(assignment, name, dim, size) for dim, size in enumerate(state[name].shape)]
        assert all(len(found) <= 1 for along in per_dim for found in along)
        assert sum(any(along) for along in per_dim) <= 2
        for along in per_dim:
            counts = [sum(found == {unit} for found in along) for unit in range(1, units + 1)]
            if any(along) and name != "fc.weight":
                assert max(counts) - min(counts) <= max(1, 6 * (name.startswith(("wide", "grouped"))))
    for group in groups:
        assert (sum(group.sizes) == group.channels and min(group.sizes) >= 1) or (
            not group.sizes and group.channels < units
        )


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 8), st.data())
def test_levels_nest_and_the_last_is_everything(units, data):
    labeller, assignment, _ = divide(units)
    unit = unit_of_labels(labeller, assignment)
    order = paper_order(data.draw(st.integers(1, units)), units)
    levels = [label_mask(labeller, unit, order[:n], 10) for n in range(1, units + 1)]
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
    tensors = {**assignment.tensors, "block.weight": (len(assignment.axes), axis, None, None)}
    other = Assignment(4, (*assignment.axes, assignment.axes[axis][::-1]), tensors, ())
    with pytest.raises(InputError, match=r"the units of .* do not fit"):
        unit_of_labels(labeller, other)


def test_one_unit_shares_nothing_away():
    labeller, assignment, groups = divide(1)
    assert all(group.sizes == (group.channels,) for group in groups)
    assert bool(label_mask(labeller, unit_of_labels(labeller, assignment), [1], 10).all())


def test_classes_that_a_task_has():
    labeller, assignment, _ = divide(2)
    unit = unit_of_labels(labeller, assignment)
    keep = label_mask(labeller, unit, [1, 2], 4)
    assert keep[labeller.sources["fc.bias"][0]].tolist() == [True] * 4 + [False] * 6
    assert int((unit == SHARED).sum()) > 0


# Multiples


class Heads(nn.Module):
    """Attention in heads of so many dimensions, with a bias for each head; the value is gated."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.heads, width = heads, heads * size
        self.embed = nn.Conv2d(3, 40, 4, 4)
        self.qkv = nn.Linear(40, 3 * width)
        self.bias = nn.Parameter(torch.zeros(heads, 1, 1))
        self.proj = nn.Linear(width, 40)
        self.gated = nn.Linear(40, 2 * 48)
        self.down = nn.Linear(48, 40)
        self.fc = nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = ((q @ k.transpose(-2, -1) + self.bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + self.proj(y)
        gate, value = self.gated(x).chunk(2, -1)
        return self.fc((x + self.down(gate.sigmoid() * value)).mean(1))


def sizes(module: nn.Module, units: int, round_to: int) -> dict[tuple[str, int], tuple[int, ...]]:
    """For each place the channels of each unit, by the group that they are in."""
    labeller = Labeller(units)
    labeller.run(trace(module, (3, 16, 16), False))
    names = [name for name in module.state_dict() if name in labeller.sources]
    _, groups = assign(labeller, names, Rule(round_to=round_to))
    return {place: group.sizes for group in groups for place in group.places}


def test_widths_are_multiples_where_there_are_enough_channels():
    found = sizes(Small(), 2, 8)
    assert found["stem.weight", 0] == (8, 14)  # what is left over is the last unit's
    assert sizes(Small(), 2, 1)["stem.weight", 0] == sizes(Small(), 2, 16)["stem.weight", 0] == (11, 11)
    assert sizes(Small(), 2, 2)["stem.weight", 0] == (12, 10)
    assert sizes(Small(), 3, 8)["stem.weight", 0] == (8, 7, 7)  # one would have none: the even rule
    assert found["narrow.weight", 0] == (2, 1)


def test_groups_and_heads_count_by_their_channels():
    assert sizes(Small(), 2, 8)["grouped.weight", 0] == (2, 2)  # groups of 6: four of them would be a multiple
    assert sizes(Small(), 2, 2)["grouped.weight", 0] == (2, 2)
    whole = sizes(Heads(6, 16), 2, 8)
    assert whole["qkv.weight", 0] == whole["proj.weight", 1] == whole["bias", 0] == (3, 3)
    assert sizes(Heads(6, 4), 2, 8)["proj.weight", 1] == (4, 2)  # two heads are 8 channels
    assert sizes(Heads(3, 20), 2, 8)["proj.weight", 1] == (8, 12)  # dimensions of every head
    assert whole["gated.weight", 0] == whole["down.weight", 1] == (24, 24)
    assert sizes(Heads(6, 16), 4, 8)["down.weight", 1] == (16, 8, 16, 8)  # gate and value are two, not neighbours


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9), st.integers(1, 20))
def test_rounding_loses_nothing(units, round_to):
    labeller, assignment, groups = divide(units, Rule(round_to=round_to))
    for group in groups:
        assert sum(group.sizes) == (group.channels if group.channels >= units else 0)
        assert min(group.sizes, default=1) >= 1
        if group.channels // round_to >= units and ("grouped.weight", 0) not in group.places:
            assert all(size % round_to == 0 for size in group.sizes[:-1])
            assert max(group.sizes) - min(group.sizes) < 2 * round_to
    assert bool(label_mask(labeller, unit_of_labels(labeller, assignment), range(1, units + 1), 10).all())


# Importance


def weights(seed: int) -> dict[str, Tensor]:
    """Parameters whose channels are of very different strength."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return {
            name: p * torch.rand([*p.shape[:1], *[1] * (p.ndim - 1)], generator=generator).pow(2)
            for name, p in Small().named_parameters()
        }


def energy(parameters: Mapping[str, Tensor]) -> Tensor:
    """Squared norm of each of the stem's channels, all that it is coupled with included, written down by hand."""
    places = [("stem.weight", 0), ("stem.bias", 0), ("norm.weight", 0), ("norm.bias", 0), ("block.weight", 0)]
    places += [("block.weight", 1), ("block.bias", 0), ("narrow.weight", 1)]
    slices = [parameters[name].movedim(dim, 0).reshape(22, -1) for name, dim in places]
    return torch.cat([*slices, parameters["fc.weight"][:, :22].T], 1).double().square().sum(1)


@pytest.mark.parametrize("units", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_every_unit_gets_its_share_of_the_strong_and_of_the_weak(units, seed):
    parameters = weights(seed)
    _, assignment, groups = divide(units, Rule("importance"), parameters)
    of_index = owners(assignment, "stem.weight", 0, 22)
    strength = energy(parameters)
    ranked = [of_index[index] for index in strength.argsort(descending=True).tolist()]
    for number in range(1, 23):  # of the strongest, however many, each has its share
        for unit in range(1, units + 1):
            count = sum(owner == {unit} for owner in ranked[:number])
            assert abs(count - number * ranked.count({unit}) / 22) <= 1
    even = divide(units)[2]
    assert [group.sizes for group in groups] == [group.sizes for group in even]


def test_importance_is_that_of_the_whole_class():
    """A channel that is weak in the layer that makes it, and strong in another that it is coupled with, is strong."""
    parameters = {name: torch.full_like(p, 0.1) for name, p in Small().named_parameters()}
    for index, name, dim in ((3, "stem.weight", 0), (9, "narrow.weight", 1), (14, "norm.weight", 0)):
        parameters[name].select(dim, index).fill_(5)
    parameters["fc.weight"][:, 17].fill_(5)
    _, assignment, _ = divide(4, Rule("importance"), parameters)
    of_index = owners(assignment, "stem.weight", 0, 22)
    assert {unit for index in (3, 9, 14, 17) for unit in of_index[index]} == {1, 2, 3, 4}


@pytest.mark.parametrize("value", [0, 1])
def test_equally_important_channels_are_dealt_in_their_order(value):
    parameters = {name: torch.full_like(p, value) for name, p in Small().named_parameters()}
    _, assignment, _ = divide(2, Rule("importance"), parameters)
    of_index = owners(assignment, "stem.weight", 0, 22)
    assert all(of_index[i : i + 2] in ([{1}, {2}], [{2}, {1}]) for i in range(0, 22, 2))
    assert divide(2, Rule("importance"), parameters)[1] == assignment


def test_units_are_equally_strong():
    """Much nearer to each other than consecutive channels are."""

    def difference(assignment: Assignment, strength: Tensor) -> float:
        first = torch.tensor([owner == {1} for owner in owners(assignment, "stem.weight", 0, 22)])
        return float((strength[first].sum() - strength[~first].sum()).abs() / strength.sum())

    even, dealt = 0.0, 0.0
    for seed in range(10):
        parameters = weights(seed)
        strength = energy(parameters)
        even += difference(divide(2)[1], strength)
        dealt += difference(divide(2, Rule("importance"), parameters)[1], strength)
    assert dealt < even / 4


def test_importance_and_multiples_together():
    _, assignment, _ = divide(2, Rule("importance", 8), weights(0))
    of_index = owners(assignment, "stem.weight", 0, 22)
    assert [of_index.count({unit}) for unit in (1, 2)] == [8, 14]
    assert of_index != sorted(of_index, key=min)


@pytest.mark.parametrize("units", [2, 3, 4])
def test_sorted_units_have_the_best_first(units):
    parameters = weights(0)
    _, assignment, groups = divide(units, Rule("sorted"), parameters)
    of_index = owners(assignment, "stem.weight", 0, 22)
    ranked = [min(of_index[index]) for index in energy(parameters).argsort(descending=True).tolist()]
    assert ranked == sorted(ranked)
    assert [group.sizes for group in groups] == [group.sizes for group in divide(units)[2]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *((("odd",), "not 'odd'"), (("importnce",), "did you mean 'importance'"), (("even", 0), "not 0")),
        (("even", 1, "iner"), "units divide all or inner coupled groups, not 'iner'; did you mean 'inner'"),
    ],
)
def test_rules_that_there_are_not(fields, message):
    with pytest.raises(InputError, match=message):
        Rule(*fields)
