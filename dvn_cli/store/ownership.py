"""Which indices of which tensor a set of units has: the one place that says so."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Run = tuple[int, int]
"""Indices from a start up to but without a stop."""

Axis = tuple[tuple[Run, ...], ...]
"""For each unit the runs of a dimension's indices that it owns."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Assignment:
    """What each unit owns of a backbone's tensors, and what a network of some units therefore has of them.

    Attributes:
        units: how many units there are.
        axes: distinct ways in which dimensions are divided: for each unit the runs of indices that it owns. Indices in
            no unit's runs belong to all.
        tensors: for each tensor of the backbone its dimensions' numbers in `axes`; None: not divided.
        classes: (name, dimension) that hold the classes of the classifier, one index each.
    """

    units: int
    axes: tuple[Axis, ...]
    tensors: Mapping[str, tuple[int | None, ...]]
    classes: tuple[tuple[str, int], ...]
    _along: dict[tuple[int, frozenset[int], int], list[Run]] = field(default_factory=dict, compare=False, repr=False)

    def runs(self, name: str, shape: Sequence[int], units: Iterable[int], classes: int) -> list[list[Run]]:
        """Returns for each dimension of a tensor the runs of indices that a network has, as long as they can be.

        Args:
            name: of the tensor.
            shape: of the whole tensor.
            units: of the network, by number from 1.
            classes: of its classifier, the first ones of the tensor's.
        """
        present, found = frozenset(units), []
        for dim, (size, axis) in enumerate(zip(shape, self.tensors[name], strict=True)):
            runs = [(0, size)] if axis is None else self._runs_along(axis, present, size)
            if (name, dim) in self.classes:
                runs = [(start, min(stop, classes)) for start, stop in runs if start < classes]
            found.append(runs)
        return found

    def _runs_along(self, axis: int, units: frozenset[int], size: int) -> list[Run]:
        key = (axis, units, size)
        if key not in self._along:
            runs, position = [], 0
            for start, stop in [*sorted(self._absent(axis, units)), (size, size)]:
                if position < start:
                    runs.append((position, start))
                position = max(position, stop)
            self._along[key] = runs
        return self._along[key]

    def _absent(self, axis: int, units: Collection[int]) -> list[Run]:
        return [run for unit, runs in enumerate(self.axes[axis], 1) if unit not in units for run in runs]

    def shape(self, name: str, shape: Sequence[int], units: Iterable[int], classes: int) -> Shape:
        """Returns the shape of what a network has of a tensor; arguments as `runs`."""
        return tuple(sum(stop - start for start, stop in runs) for runs in self.runs(name, shape, units, classes))

    def whole_shape(self, name: str, shape: Sequence[int], units: Collection[int], classes: int) -> Shape:
        """Returns the shape of the whole tensor of which a network has so much: the inverse of `shape`.

        Of a dimension that holds classes it is so much of it as those tell.
        """
        sizes = list(shape)
        for dim, axis in enumerate(self.tensors[name]):
            for start, stop in self._absent(axis, units) if axis is not None else ():
                limit = classes if (name, dim) in self.classes else stop
                sizes[dim] += max(min(stop, limit) - start, 0)
        return tuple(sizes)

    def owned_counts(self, units: Iterable[int]) -> list[int]:
        """Returns for each of the axes how many of its indices some units own."""
        numbers = list(units)
        return [sum(stop - start for unit in numbers for start, stop in axis[unit - 1]) for axis in self.axes]

    def shared_elements(self, name: str, shape: Sequence[int], owned: Sequence[int]) -> int:
        """Returns how many elements of a tensor belong to no unit; `owned`: see `owned_counts`."""
        axes = self.tensors[name]
        return math.prod(size - (0 if axis is None else owned[axis]) for size, axis in zip(shape, axes, strict=True))
