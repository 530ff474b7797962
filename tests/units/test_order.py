import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvn_cli.units.order import order_beside, paper_order


def test_four_units():
    assert [paper_order(task, 4) for task in range(1, 5)] == [[1, 2, 3, 4], [2, 1, 3, 4], [3, 2, 1, 4], [4, 3, 2, 1]]


def test_more_tasks_than_units_start_again():
    assert paper_order(5, 4) == paper_order(1, 4)


@given(st.integers(1, 12), st.integers(1, 30))
def test_every_level_adds_a_neighbour(units, task):
    """(i) the task's own unit; (ii) then an adjacent one that is not there yet; (iii) the lower number of two."""
    order = paper_order(task, units)
    assert sorted(order) == list(range(1, units + 1))
    assert order[0] == (task - 1) % units + 1
    for level in range(1, units):
        low, high = min(order[:level]), max(order[:level])
        assert order[level] == (low - 1 if low > 1 else high + 1)


@pytest.mark.parametrize(
    ("used", "order"),
    [
        (set(), [1, 2, 3, 4]),
        ({1}, [2, 1, 3, 4]),
        ({1, 2}, [3, 2, 1, 4]),
        ({2}, [1, 2, 3, 4]),
        ({1, 4}, [2, 1, 4, 3]),
        ({1, 3}, [2, 1, 3, 4]),
        ({1, 2, 3}, [4, 3, 2, 1]),
    ],
)
def test_beside_units_in_use(used: set[int], order: list[int]) -> None:
    """A unit of its own, then those in use, then what is left for others."""
    assert order_beside(used, 4) == order
