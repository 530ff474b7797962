"""Parts of tensors, against sets of places."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dvn_cli.store.regions import Region, joined, outer_index, runs_of


@st.composite
def regions(draw: st.DrawFn, count: int) -> list[Region]:
    """Some parts of one tensor, any of which may be empty."""
    whole = draw(st.lists(st.integers(0, 6), max_size=3).map(tuple))

    def part() -> Region:
        masks = [np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)), bool) for size in whole]
        return Region.of([runs_of(mask) for mask in masks], whole)

    return [part() for _ in range(count)]


def places(region: Region) -> set[tuple[int, ...]]:
    return set(itertools.product(*(along.tolist() for along in region.positions)))


@given(regions(2))
def test_what_two_have(pair: list[Region]) -> None:
    one, other = pair
    assert len(places(one)) == one.elements
    assert places(one & other) == places(one) & places(other)
    assert places(one | other) >= places(one) | places(other)
    rest = one - other
    assert sorted(place for part in rest for place in places(part)) == sorted(places(one) - places(other))
    if one.elements:
        assert (one <= other) == (places(one) <= places(other))


@given(regions(2))
def test_where_one_lies_in_another(pair: list[Region]) -> None:
    part, whole = pair[0] & pair[1], pair[1]
    numbers = np.arange(int(np.prod(whole.whole))).reshape(whole.whole)
    piece = numbers[np.ix_(*whole.positions)]
    found = piece[outer_index(part.within(whole).positions)]
    assert np.array_equal(found, numbers[np.ix_(*part.positions)])


@given(regions(5))
def test_joining(given: list[Region]) -> None:
    found = joined(given)
    assert all(any(region <= piece for piece in found) for region in given)
    assert sum(piece.elements for piece in found) <= sum(region.elements for region in dict.fromkeys(given))
    assert sum(piece.elements for piece in found) <= int(np.prod(given[0].whole))
