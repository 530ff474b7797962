"""How wide units are where that follows what channels are worth."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dvn_cli.backbones import BackboneSpec
from dvn_cli.dividing import partition_backbone
from dvn_cli.errors import InputError
from dvn_cli.graph.labels import Labeller
from dvn_cli.graph.trace import trace
from dvn_cli.partition import Partition
from dvn_cli.store.metadata import Rule
from dvn_cli.units import widths
from dvn_cli.units.widths import by_worth

SPEC = BackboneSpec("timm", "small", 4, 3, (8, 8))


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[np.ndarray], list[float], list[int], int]:
    """Scores, costs and steps of some groups, and a number of units that each of them has channels for."""
    units = draw(st.integers(1, 5))
    steps = draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    sizes = [draw(st.integers(units * step, units * step + 30)) for step in steps]
    worth = st.floats(0, 1000) | st.just(0.0)
    scores = [np.array(draw(st.lists(worth, min_size=size, max_size=size))) for size in sizes]
    return scores, [draw(st.floats(0.01, 100)) for _ in steps], steps, units


@settings(deadline=None)
@given(groups())
def test_every_unit_has_a_step_of_every_group(given: tuple[list[np.ndarray], list[float], list[int], int]) -> None:
    scores, _, steps, units = given
    for size, score, step in zip(by_worth(*given), scores, steps, strict=True):
        assert len(size) == units
        assert size.sum() == len(score)
        assert size.min() >= step
        assert not (size[:-1] % step).any()


@settings(deadline=None)
@given(groups())
def test_units_cost_alike_but_for_a_step_of_each_group(
    given: tuple[list[np.ndarray], list[float], list[int], int],
) -> None:
    scores, costs, steps, units = given
    sizes = by_worth(*given)
    total = sum(cost * (len(score) // step * step) for score, cost, step in zip(scores, costs, steps, strict=True))
    slack = sum(cost * step * (units + 1) for cost, step in zip(costs, steps, strict=True))
    for level in range(1, units):
        has = sum(cost * size[:level].sum() for cost, size in zip(costs, sizes, strict=True))
        assert abs(has - total * level / units) <= slack


@settings(deadline=None, max_examples=50)
@given(st.data(), st.integers(4, 9), st.integers(4, 9))
def test_no_other_first_unit_is_worth_more(data: st.DataObject, few: int, more: int) -> None:
    """Of two groups, where the first unit has what is best for its cost and every other choice that costs no more."""
    scores = [np.array(data.draw(st.lists(st.floats(0.1, 10), min_size=n, max_size=n))) for n in (few, more)]
    costs = [data.draw(st.floats(0.5, 2)) for _ in scores]
    sizes = by_worth(scores, costs, [1, 1], 2)
    best = [np.cumsum(-np.sort(-score)) for score in scores]
    first = [int(size[0]) for size in sizes]
    paid = sum(cost * n for cost, n in zip(costs, first, strict=True))
    worth = sum(total[n - 1] for total, n in zip(best, first, strict=True))
    if all(1 < n < len(score) - 1 for n, score in zip(first, scores, strict=True)):  # no bound was in the way
        for a in range(1, few):
            for b in range(1, more):
                if costs[0] * a + costs[1] * b <= paid:
                    assert best[0][a - 1] + best[1][b - 1] <= worth + 1e-9


class Unread(nn.Module):
    """Hidden channels that no layer of weights reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 24, 1), nn.Conv2d(3, 24, 1)
        self.classifier = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.stem(x) * self.head(x)).sum(1)
        return self.classifier(x.mean(2))


def test_groups_that_no_layer_reads_are_even() -> None:
    partition = partition_backbone(SPEC, 2, Rule("sorted", widths="macs"), Unread(), [torch.randn(8, 3, 8, 8)])
    assert [group.sizes for group in partition.groups if group.sizes] == [(12, 12)]


class Two(nn.Module):
    """Two residual blocks, of which the first one hardly changes anything; it works at twice the resolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 1)
        self.idle = nn.ModuleList([nn.Conv2d(8, 24, 1), nn.Conv2d(24, 8, 1)])
        self.busy = nn.ModuleList([nn.Conv2d(8, 24, 1), nn.Conv2d(24, 8, 1)])
        self.head = nn.Linear(8, 4)
        with torch.no_grad():
            self.idle[1].weight.mul_(0.01)
            self.busy[1].weight.mul_(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.idle[1](self.idle[0](x).relu())
        x = nn.functional.avg_pool2d(x, 2)
        x = x + self.busy[1](self.busy[0](x).relu())
        return self.head(x.mean((2, 3)))


def divided(follow: str, **rule: int) -> Partition:
    images = list(torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(8))
    return partition_backbone(SPEC, 2, Rule("sorted", divide="inner", widths=follow, **rule), Two(), images)


@pytest.mark.parametrize("follow", ["macs", "params"])
def test_the_first_unit_is_wide_where_the_logits_depend_on_it(follow: str) -> None:
    sizes = {group.places[0][0]: group.sizes for group in divided(follow).groups if group.sizes}
    assert set(sizes) == {"idle.0.weight", "busy.0.weight"}
    idle, busy = sizes["idle.0.weight"], sizes["busy.0.weight"]
    assert idle[0] < 12 < busy[0]
    if follow == "params":  # channels of both have as many: half of all is in each unit
        assert idle[0] + busy[0] == 24
    else:  # those of the idle block cost four times as much
        assert 4 * idle[0] + busy[0] == pytest.approx(60, abs=4)
        assert busy == (23, 1)


def test_widths_are_rounded_like_even_ones() -> None:
    sizes = [group.sizes for group in divided("params", round_to=8).groups if group.sizes]
    assert sorted(sizes) == [(8, 16), (16, 8)]


def test_costs_are_those_of_the_layers() -> None:
    traced = trace(Two().eval(), (3, 8, 8), train=False)
    labeller = Labeller(2)
    labels = labeller.run(traced)
    roots = labeller.coupled.roots()
    idle, busy = (roots[labeller.sources[f"{name}.0.weight"][0].numpy()] for name in ("idle", "busy"))
    macs = widths.macs(labeller, labels, traced)
    params = widths.params(labeller, dict(Two().named_parameters()))
    assert set(macs[idle]) == {64 * (8 + 8)}
    assert set(macs[busy]) == {16 * (8 + 8)}
    assert set(params[idle]) == set(params[busy]) == {8 + 1 + 8}


def test_what_is_not_told_is_asked_for() -> None:
    with pytest.raises(InputError, match="widths macs gives unit 1 what is worth most: assign must be sorted"):
        Rule(widths="macs")
    with pytest.raises(InputError, match="not 'mac'; did you mean 'macs'"):
        Rule("sorted", widths="mac")
    with pytest.raises(
        InputError, match="widths params is told by what trained weights make of images: give both weights and data"
    ):
        partition_backbone(SPEC, 2, Rule("sorted", widths="params"), Two())
