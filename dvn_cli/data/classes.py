"""Which classes a task has, of those that its source has."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from dvn_cli.data.spec import DataSpec
from dvn_cli.errors import InputError, did_you_mean


def select(spec: DataSpec, names: Sequence[str]) -> dict[str, list[int]]:
    """Each class of the task, in order, and the indices of the source's classes that it is made of."""
    if spec.groups is not None:
        members = {name: _indices(old, names) for name, old in spec.groups.items()}
        indices = [index for group in members.values() for index in group]
    else:
        indices = list(range(len(names))) if spec.classes is None else _indices(spec.classes, names)
        members = {names[index]: [index] for index in indices}
    twice = next((index for index in indices if indices.count(index) > 1), None)
    if twice is not None:
        raise InputError(f"class '{names[twice]}' is named twice")
    if len(members) < 2:
        raise InputError(f"a task needs at least 2 classes, not {len(members)}")
    return members


def _indices(asked: str | list[int | str], names: Sequence[str]) -> list[int]:
    """Indices of classes given by name, by index or as a range of indices `first-last`, in the order given."""
    indices: list[int] = []
    for item in [asked] if isinstance(asked, str) else asked:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", str(item))
        if isinstance(item, str) and item in names:
            indices.append(names.index(item))
        elif match is None:
            few = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise InputError(f"no class '{item}'{did_you_mean(item, names)}; there are {len(names)}: {few}")
        else:
            first, last = int(match[1]), int(match[2] or match[1])
            if first > last or last >= len(names):
                raise InputError(f"no classes '{item}': they are numbered 0 to {len(names) - 1}")
            indices.extend(range(first, last + 1))
    return indices


def relabelled(selection: Mapping[str, list[int]], count: int) -> np.ndarray:
    """For each of the source's classes the task's label, or -1."""
    new = np.full(count, -1, dtype=np.int64)
    for label, members in enumerate(selection.values()):
        new[members] = label
    return new
