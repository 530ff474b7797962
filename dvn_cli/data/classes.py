"""Which classes a task has, of those that its source has."""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dvn_cli.data.spec import DataSpec
from dvn_cli.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Selection:
    """The classes of a task.

    Attributes:
        names: In the order of the labels. Two classes of one name are two.
        members: For each the indices of the source's classes that it is made of.
    """

    names: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]

    def relabelled(self, count: int) -> np.ndarray:
        """For each of the source's `count` classes the task's label, or -1."""
        new = np.full(count, -1, dtype=np.int64)
        for label, members in enumerate(self.members):
            new[list(members)] = label
        return new


def select(spec: DataSpec, names: Sequence[str], absent: Collection[str] = ()) -> Selection:
    """Chooses the classes that a task has.

    Args:
        spec: Whose `classes` or `groups` say which.
        names: Of the source's classes.
        absent: Names that may be asked for although the source lacks them: they are made of nothing.

    Raises:
        InputError: There is no such class, more than one may be meant, or one is named twice.
    """
    known = _Names(names)
    if spec.groups is not None:
        groups = {new: known.find(old, absent) for new, old in spec.groups.items()}
        selection = Selection(
            tuple(groups), tuple(tuple(index for _, index in old if index is not None) for old in groups.values())
        )
    else:
        chosen = list(zip(names, range(len(names)), strict=True))
        found = chosen if spec.classes is None else known.find(spec.classes, absent)
        selection = Selection(
            tuple(name for name, _ in found), tuple(() if index is None else (index,) for _, index in found)
        )
    twice = _twice(index for members in selection.members for index in members)
    if twice is not None:
        raise InputError(f"class '{names[twice]}' is named twice")
    return selection


def resolved(spec: DataSpec, names: Sequence[str]) -> DataSpec:
    """Returns the same with the names of the classes that its groups are made of, in place of indices and ranges.

    Classes that share their name with another stay what they were.
    """
    if spec.groups is None:
        return spec
    selection = select(spec, names)
    groups = {
        new: [names[index] for index in members]
        for new, members in zip(selection.names, selection.members, strict=True)
    }
    counts = Counter(names)
    if any(counts[name] > 1 for old in groups.values() for name in old):
        return spec
    return spec.model_copy(update={"groups": groups})


def corresponding(names: Sequence[str], others: Sequence[str]) -> list[int]:
    """For each of `others` the index of the class of its name, or -1.

    Two classes of one name are told apart by their places where both have the same list; elsewhere they have none.
    """
    if list(names) == list(others):
        return list(range(len(names)))
    counts, other_counts = Counter(names), Counter(others)
    index = {name: place for place, name in enumerate(names)}
    return [index[name] if counts[name] == other_counts[name] == 1 else -1 for name in others]


def few(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, in quotes, and how many more there are."""
    shown = ", ".join(f"'{name if len(name) <= 40 else name[:39] + '…'}'" for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


class _Names:
    """The names of a source's classes, to look up what a recipe says."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.places: dict[str, list[int]] = {}
        for place, name in enumerate(names):
            self.places.setdefault(name, []).append(place)
        self.of_value: dict[float, str] = {}
        for name in self.places:
            value = number_in(name)
            if value is not None:
                self.of_value.setdefault(value, name)
        self.all_numbers = all(number_in(name) is not None for name in self.places)
        self.has_ranges = any(_RANGE.fullmatch(name) for name in self.places)

    def find(self, asked: int | str | Sequence[int | str], absent: Collection[str]) -> list[tuple[str, int | None]]:
        """Names and indices of the classes asked for, in the order given; no index of an absent one."""
        found: list[tuple[str, int | None]] = []
        for item in [asked] if isinstance(asked, int | str) else asked:
            text = str(item)
            match = _RANGE.fullmatch(text)
            if text in self.places:
                found.append((text, self._only(text)))
            elif text in absent and (isinstance(item, str) or self.all_numbers):
                found.append((text, None))
            elif isinstance(item, int):
                index = self._numbered(item)
                found.append((self.names[index], index))
            elif match and not self.has_ranges:
                found += self._range(text, match[1], match[2], absent)
            else:
                raise self._no_class(text)
        return found

    def _only(self, name: str) -> int:
        places = self.places[name]
        if len(places) > 1:
            raise InputError(
                f"{len(places)} classes are named '{name}': choose by index, {' or '.join(map(str, places[:5]))}"
            )
        return places[0]

    def _numbered(self, number: int) -> int:
        """The index that a number is which no class has for its name."""
        if number in self.of_value:
            name = self.of_value[number]
            raise InputError(f"no class is named '{number}', one is named '{name}': if it is meant, write '{name}'")
        if number < 0 or (self.all_numbers and not self._counted):
            raise self._no_class(str(number))
        if number >= len(self.names):
            raise InputError(f"no classes '{number}': they are numbered 0 to {len(self.names) - 1}")
        return number

    def _range(self, text: str, first: str, last: str, absent: Collection[str]) -> list[tuple[str, int | None]]:
        """The classes of a range: of names where all names are numbers, else of indices."""
        start, stop = int(first), int(last)
        if start > stop or stop - start >= len(self.names) + len(absent):
            raise InputError(f"no classes '{text}': {self._there_are()}")
        numbers = range(start, stop + 1)
        if self.all_numbers:
            if self._counted and stop >= len(self.names):
                raise InputError(f"no classes '{text}': {self._there_are()}")
            width = len(first) if first.startswith("0") and len(first) > 1 else 0
            return [found for number in numbers for found in self.find(_item(number, width), absent)]
        if stop >= len(self.names) or text != f"{start}-{stop}":
            raise InputError(f"no classes '{text}': {self._there_are()}")
        for number in numbers:
            name = self.of_value.get(number)
            if name is not None and self.places[name] != [number]:
                raise InputError(
                    f"'{text}' may mean a class by its name, '{name}', and others by index: list names, in quotes"
                )
        return [(self.names[number], number) for number in numbers]

    @property
    def _counted(self) -> bool:
        """Whether the names are the indices."""
        return all(name == str(place) for place, name in enumerate(self.names))

    def _there_are(self) -> str:
        if not self.all_numbers or self._counted:
            return f"they are numbered 0 to {len(self.names) - 1}"
        shown = ", ".join(self.names[:8]) + (", ..." if len(self.names) > 8 else "")
        return f"there are {len(self.names)}: {shown}"

    def _no_class(self, text: str) -> InputError:
        value = number_in(text)
        hint = did_you_mean(text, self.places) if value is None else ""
        if value is not None and value in self.of_value:
            hint = f"; did you mean '{self.of_value[value]}'?"
        elif _INDEX.fullmatch(text) and not self.all_numbers and int(text) < len(self.names):
            hint = f"; without quotes it is the index of '{self.names[int(text)]}'"
        shown = ", ".join(self.names[:8]) + (", ..." if len(self.names) > 8 else "")
        return InputError(f"no class '{text}'{hint}; there are {len(self.names)}: {shown}")


_INDEX = re.compile(r"0|[1-9][0-9]*")
_RANGE = re.compile(r"([0-9]+)-([0-9]+)")


def is_range(text: str) -> bool:
    """Whether a text reads as a range, which it may be all the same as it may be a name."""
    return _RANGE.fullmatch(text) is not None


def _item(number: int, width: int) -> int | str:
    return f"{number:0{width}}" if width else number


def number_in(name: str) -> float | None:
    """The number that a name is, however it is written; None of other names."""
    for read in (int, float, lambda text: int(text, 0)):
        with contextlib.suppress(ValueError):
            value = read(name)
            return value if isinstance(value, int) or math.isfinite(value) else None
    return None


def _twice(indices: Iterator[int]) -> int | None:
    seen: set[int] = set()
    for index in indices:
        if index in seen:
            return index
        seen.add(index)
    return None
