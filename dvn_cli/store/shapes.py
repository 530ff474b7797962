"""Whether a file holds the tensors that its metadata speaks of, in the shapes that follow from who owns what."""

import functools
import re
from collections.abc import Mapping
from typing import Protocol

from dvn_cli.errors import InputError
from dvn_cli.store.metadata import CheckpointMetadata, SliceMetadata
from dvn_cli.store.ownership import Shape

_NAME = re.compile(r"(?:shared|task/([1-9][0-9]{0,8})(?:/level/([1-9][0-9]{0,8}))?)/([^/]+)")

_Network = tuple[frozenset[int], int]
"""What says how narrow a network is: its units and its number of classes."""


class Described(Protocol):
    """A tensor by its dtype, as safetensors names it, and its shape."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> Shape: ...


def source(tensors: Mapping[str, object], name: str, task: int, level: int) -> str:
    """Returns which of a checkpoint's tensors a network uses: its own, its task's, or the shared one.

    Raises:
        InputError: there is none.
    """
    for candidate in (f"task/{task}/level/{level}/{name}", f"task/{task}/{name}", f"shared/{name}"):
        if candidate in tensors:
            return candidate
    raise InputError(f"it has no tensor '{name}' for task {task}, level {level}")


def check_tensors(
    metadata: CheckpointMetadata | SliceMetadata,
    tensors: Mapping[str, Described],
    whole: Mapping[str, Shape] | None = None,
) -> None:
    """Raises InputError where the tensors of a file are not those that its metadata speaks of.

    Args:
        metadata: of the file.
        tensors: of the file, by their names in it.
        whole: the shapes of the backbone's own tensors; by default those that follow from the file itself.
    """
    assignment = metadata.assignment
    parts = _of_slice(metadata, tensors) if isinstance(metadata, SliceMetadata) else _of_checkpoint(metadata, tensors)
    sizes, dtypes = dict(whole or {}), dict[str, str]()
    for file_name, (name, network) in parts.items():
        entry, shape, dtype = metadata.tensors[name], tensors[file_name].shape, tensors[file_name].dtype
        if len(shape) != len(entry.axes):
            raise InputError(f"'{file_name}' has {len(shape)} dimensions, not {len(entry.axes)}")
        if dtypes.setdefault(name, dtype) != dtype:
            raise InputError(f"'{file_name}' has dtype {dtype}, elsewhere it has {dtypes[name]}")
        if entry.trainable and dtype[0] not in "FC" and dtype != "BF16":
            raise InputError(f"'{file_name}' is trainable and of dtype {dtype}")
        if whole is None:
            own = shape if network is None else assignment.whole_shape(name, shape, *network)
            sizes[name] = tuple(map(max, own, sizes.get(name, own)))
    ends = [max((runs[-1][1] for runs in axis if runs), default=0) for axis in metadata.axes]
    for name, entry in metadata.tensors.items():
        for size, axis in zip(sizes[name], entry.axes, strict=True):
            if axis is not None and size < ends[axis]:
                raise InputError(f"'axes.{axis}' has indices up to {ends[axis]}, a dimension of '{name}' only {size}")
    for file_name, (name, network) in parts.items():
        expected = sizes[name] if network is None else assignment.shape(name, sizes[name], *network)
        if tensors[file_name].shape != expected:
            shape = tensors[file_name].shape
            raise InputError(f"{file_name} has shape {list(shape)}, not {list(expected)}")


def _of_slice(metadata: SliceMetadata, tensors: Mapping[str, Described]) -> dict[str, tuple[str, _Network | None]]:
    """Returns the name of each of a file's tensors in the backbone, and the network that it is as narrow as, if any."""
    if tensors.keys() != metadata.tensors.keys() | metadata.aliases.keys():
        raise InputError("it does not hold the tensors that its metadata lists")
    for name, first in metadata.aliases.items():
        if (tensors[name].dtype, tensors[name].shape) != (tensors[first].dtype, tensors[first].shape):
            raise InputError(f"'{name}' and '{first}' are one tensor and differ")
    network = frozenset(metadata.kept), len(metadata.task.classes)
    return {name: (name, network) for name in metadata.tensors}


def _of_checkpoint(
    metadata: CheckpointMetadata, tensors: Mapping[str, Described]
) -> dict[str, tuple[str, _Network | None]]:
    @functools.cache
    def network(number: int, level: int) -> _Network:
        task = metadata.tasks[number - 1]
        return frozenset(task.units(level)), len(task.classes)

    parts: dict[str, tuple[str, _Network | None]] = {}
    for file_name in tensors:
        match = _NAME.fullmatch(file_name)
        number, level = (int(text or 1) for text in match.groups()[:2]) if match else (0, 0)
        if match is None or match[3] not in metadata.tensors or number > len(metadata.tasks):
            raise InputError(f"its metadata does not speak of its tensor {file_name!r:.80}")
        if level > len(metadata.tasks[number - 1].levels):
            raise InputError(f"its metadata does not speak of its tensor {file_name!r:.80}")
        parts[file_name] = match[3], None if match[2] is None else network(number, level)
    for name in metadata.tensors:
        if f"shared/{name}" not in tensors:
            for number, level in metadata.networks:
                source(tensors, name, number, level)
    return parts
