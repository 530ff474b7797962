import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvn_cli.units.order import learned_orders, order_beside, paper_order


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


def matrix(tasks: int, pairs: dict[tuple[int, int], float]) -> list[list[float]]:
    """Of how tasks agree, by number from 1; two that are not said do so by 0."""
    both = {**pairs, **{(b, a): value for (a, b), value in pairs.items()}}
    return [[1.0 if a == b else both.get((a, b), 0.0) for b in range(1, tasks + 1)] for a in range(1, tasks + 1)]


@pytest.mark.parametrize(
    ("tasks", "pairs", "units", "orders"),
    [
        (4, {(1, 3): 0.5, (2, 4): 0.3, (1, 2): -0.2}, 4, [[1, 3, 4, 2], [2, 4, 3, 1], [3, 1, 2, 4], [4, 2, 1, 3]]),
        (4, {(1, 3): 0.5, (2, 4): 0.3, (1, 2): -0.2}, 2, [[1, 2], [2, 1], [1, 2], [2, 1]]),
        (2, {(1, 2): 0.1}, 4, [[1, 2, 3, 4], [2, 1, 3, 4]]),  # who agrees, then nobody's
        (2, {(1, 2): -0.1}, 4, [[1, 3, 4, 2], [2, 3, 4, 1]]),  # nobody's, then who is in conflict
        (3, {}, 3, [[1, 2, 3], [2, 1, 3], [3, 1, 2]]),
        (3, {(2, 3): 0.1}, 1, [[1], [1], [1]]),
        (4, {(1, 2): 0.9, (2, 3): 0.8, (1, 3): -0.9, (3, 4): 0.1}, 2, [[1, 2], [1, 2], [2, 1], [2, 1]]),
    ],
)
def test_tasks_that_agree_share_their_lower_levels(
    tasks: int, pairs: dict[tuple[int, int], float], units: int, orders: list[list[int]]
) -> None:
    """The last one: task 3 agrees with task 2, but not with both that are together by then."""
    assert learned_orders(matrix(tasks, pairs), units) == orders


@given(st.integers(1, 6), st.lists(st.floats(-1, 1), min_size=15, max_size=15))
def test_a_task_has_a_unit_of_its_own_where_there_are_as_many(units: int, values: list[float]) -> None:
    pairs = dict(zip(itertools.combinations(range(1, 7), 2), values, strict=True))
    orders = learned_orders(matrix(6, pairs), units)
    assert all(sorted(order) == list(range(1, units + 1)) for order in orders)
    assert {order[0] for order in orders} == set(range(1, units + 1))
