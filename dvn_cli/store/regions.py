"""Parts of tensors: what they have in common, what one has that another lacks, and where it lies in a third."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dvn_cli.store.ownership import Run, Shape

Runs = tuple[Run, ...]


@dataclass(frozen=True)
class Region:
    """A part of a tensor, which is a choice of indices along each dimension.

    Attributes:
        runs: for each dimension the runs of the indices, as long as they can be.
        whole: shape of the tensor.
    """

    runs: tuple[Runs, ...]
    whole: Shape

    @classmethod
    def of(cls, runs: Iterable[Iterable[Run]], whole: Shape) -> "Region":
        """Returns a region; that of a tensor without dimensions is one of a tensor of shape (1,)."""
        return cls(tuple(map(tuple, runs)), whole) if whole else cls((((0, 1),),), (1,))

    @property
    def positions(self) -> list[np.ndarray]:
        """For each dimension the indices."""
        return list(map(_positions, self.runs, self.whole))

    @property
    def shape(self) -> Shape:
        """The shape of the part."""
        return tuple(map(_count, self.runs))

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    def __le__(self, other: "Region") -> bool:
        """Tells whether another part of the same tensor has all of this one."""
        return not any(self._along(np.greater, other))

    def __and__(self, other: "Region") -> "Region":
        """Returns what both have of the same tensor."""
        return Region(self._along(np.logical_and, other), self.whole)

    def __or__(self, other: "Region") -> "Region":
        """Returns the smallest part of the same tensor that has all of both."""
        return Region(self._along(np.logical_or, other), self.whole)

    def __sub__(self, other: "Region") -> "list[Region]":
        """Returns what another part of the same tensor lacks, as regions that are apart."""
        both, more = (self & other).runs, self._along(np.greater, other)
        return [
            Region((*both[:dim], runs, *self.runs[dim + 1 :]), self.whole)
            for dim, runs in enumerate(more)
            if runs and all(both[:dim])
        ]

    def within(self, other: "Region") -> "Region":
        """Returns where in another part, which has all of this one, it lies."""
        return Region(self._along(_chosen, other), other.shape)

    def _along(self, operation: Callable[[np.ndarray, np.ndarray], np.ndarray], other: "Region") -> tuple[Runs, ...]:
        dims = zip(self.runs, other.runs, self.whole, strict=True)
        return tuple(_combined(operation, own, theirs, size) for own, theirs, size in dims)


def runs_of(mask: np.ndarray) -> Runs:
    """Returns the runs of the indices at which a mask, shape (size,), is true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return tuple((start, stop) for start, stop in edges.reshape(-1, 2).tolist())


# A network has many tensors, of which most are divided along the same few dimensions.


@functools.lru_cache(maxsize=1 << 12)
def _mask(runs: Runs, size: int) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    for start, stop in runs:
        mask[start:stop] = True
    return mask


@functools.lru_cache(maxsize=1 << 12)
def _positions(runs: Runs, size: int) -> np.ndarray:
    return np.flatnonzero(_mask(runs, size))


@functools.lru_cache(maxsize=1 << 14)
def _combined(operation: Callable[[np.ndarray, np.ndarray], np.ndarray], own: Runs, theirs: Runs, size: int) -> Runs:
    return runs_of(operation(_mask(own, size), _mask(theirs, size)))


def _chosen(own: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return own[theirs]


@functools.lru_cache(maxsize=1 << 12)
def _count(runs: Runs) -> int:
    return sum(stop - start for start, stop in runs)


def joined(regions: Iterable[Region]) -> list[Region]:
    """Returns regions of a tensor that have all of some others, each of which lies within one of them.

    Two become one wherever that is not larger, and all where the sum would be larger than the smallest that has all.
    """
    found = list(dict.fromkeys(regions))
    found = [one for one in found if not any(one != other and one <= other for other in found)]
    while len(found) > 1:
        pairs = ((one | other, one, other) for one, other in itertools.combinations(found, 2))
        both, one, other = min(pairs, key=lambda pair: pair[0].elements - pair[1].elements - pair[2].elements)
        if both.elements > one.elements + other.elements:
            break
        found = [each for each in found if each not in (one, other)] + [both]
    whole = functools.reduce(Region.__or__, found)
    return found if sum(each.elements for each in found) < whole.elements else [whole]


def outer_index(positions: Sequence[np.ndarray]) -> Any:
    """Returns what an array is indexed by to choose indices along each dimension; a view wherever they are runs."""
    parts = [
        slice(int(along[0]), int(along[-1]) + 1) if len(along) and along[-1] - along[0] + 1 == len(along) else along
        for along in positions
    ]
    several = sum(isinstance(part, np.ndarray) for part in parts) > 1
    return np.ix_(*positions) if several else tuple(parts)
