"""Architectures of every kind in timm and torchvision: the panel, a sample of it, and its table."""

import os
import random

import panel
import pytest
import table

from dvn_cli.check import Comparison
from dvn_cli.graph.empty_init import empty_init

SMALL = 4_000_000  # parameters
SAMPLE = random.Random(0).sample(sorted(name for name, count in panel.chosen().items() if count <= SMALL), 5)


@pytest.mark.parametrize(("number", "name"), list(enumerate(SAMPLE)))
def test_narrowed_is_masked(number, name):
    """One network of each, by turns of 2 and of 4 units, in train and in eval graphs."""
    units, train = (2, 4)[number % 2], number % 4 < 2
    spec = panel.spec_of(name)
    case = Comparison(empty_init(spec.build), (spec.in_chans, *spec.input_size), modes=(train,))
    case.divide(units)
    assert any(group.sizes for group in case.groups)
    assert case.error((2,), train) < panel.TOLERANCE


@pytest.mark.parametrize("name", ["panel.csv", "panel-inner.csv"])
def test_data_check_of_the_stored_tables(name):
    """A check of the files, not of dvn: they are of today's panel, and say what README says of them."""
    rows = table.read(panel.TABLE.with_name(name), panel.Row)
    assert sorted(row.name for row in rows) == sorted(panel.chosen())
    check(rows)


def check(rows: list[panel.Row]) -> None:
    assert [row.name for row in rows if row.outcome == "wrong"] == []
    assert all(row.reason for row in rows if row.outcome == "refused")
    assert sum(row.outcome == "passed" for row in rows) >= 0.97 * len(rows)


@pytest.mark.slow
def test_panel():
    """Every network of every task, k = 2 and 4, in both graphs: hours on two cores."""
    sizes = panel.chosen()
    names = sorted(sizes, key=lambda name: -sizes[name])
    rows = list(panel.run(names, quick=False, device="cpu", limit=3600, jobs=os.cpu_count() or 1))
    print(panel.summary(rows))
    check(rows)
