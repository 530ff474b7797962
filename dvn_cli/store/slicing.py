"""Single networks cut out of a checkpoint, and their counts.

Tensors are handled as unsigned integers of their item size, so every dtype is cut alike and bit for bit.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dvn_cli.errors import InputError
from dvn_cli.store.file import ITEM_SIZE, Header, StoredTensor, TensorData, is_slice, is_trained, lost_with, size, write
from dvn_cli.store.lookup import find_task
from dvn_cli.store.metadata import Calibration, CheckpointMetadata, DividedBackbone, SliceMetadata, check_level
from dvn_cli.store.ownership import Run
from dvn_cli.store.shapes import source

BLOCK = 4 << 20
"""Bytes of a tensor that are cut and written at a time: what bounds the memory that a slice takes."""


@dataclass(frozen=True)
class Counts:
    """What the file of one network holds: elements of trainable tensors, of all tensors, and the bytes of all.

    A parameter with two names is counted once, its elements and bytes as often as the file holds them.
    """

    params: int
    elements: int
    bytes: int


def cut(header: Header[CheckpointMetadata], task: int, level: int) -> dict[str, TensorData]:
    """Returns the tensors of a task and level, both from 1, by the backbone's names. Bytes are read when written.

    Raises:
        InputError: no such task or level.
    """
    metadata = header.metadata
    entry = metadata.tasks[find_task(metadata.tasks, task) - 1]
    units = entry.units(check_level(entry, level))
    tensors = {}
    for name in metadata.tensors:
        file_name = source(header.tensors, name, task, level)
        tensors[name] = _cut_tensor(header, file_name, runs_in_file(header, file_name, units, len(entry.classes)))
    return tensors


def runs_in_file(header: Header[CheckpointMetadata], name: str, units: Iterable[int], classes: int) -> list[list[Run]]:
    """Returns for each dimension of a checkpoint's tensor the runs of indices that a network of some units takes.

    Args:
        name: of the tensor in the file, such as `shared/conv1.weight`.
        units: of the network, by number from 1.
        classes: of its classifier.
    """
    shape = header.tensors[name].shape
    if "/level/" in name:  # narrow already
        return [[(0, size)] for size in shape]
    return header.metadata.assignment.runs(name.rpartition("/")[2], shape, units, classes)


def _cut_tensor(header: Header[CheckpointMetadata], name: str, runs: Sequence[Sequence[Run]]) -> TensorData:
    shape = tuple(sum(stop - start for start, stop in along) for along in runs)
    return TensorData(header.tensors[name].dtype, shape, lambda: blocks(header, name, runs))


def blocks(header: Header[CheckpointMetadata], name: str, runs: Sequence[Sequence[Run]]) -> Iterator[np.ndarray]:
    """Yields the runs of a tensor, some rows at a time, as views of what was read wherever they can be."""
    stored = header.tensors[name]
    shape = stored.shape or (1,)
    row_bytes = math.prod(shape[1:]) * ITEM_SIZE[stored.dtype]
    for rows in _grouped(runs[0] if runs else [(0, 1)], max(1, BLOCK // max(1, row_bytes))):
        start, stop = rows[0][0], rows[-1][1]
        data = header.read(name, start * row_bytes, stop * row_bytes)
        array = np.frombuffer(data, f"<u{ITEM_SIZE[stored.dtype]}").reshape(stop - start, *shape[1:])
        yield _take(array, [[(first - start, last - start) for first, last in rows], *runs[1:]])


def _grouped(runs: Sequence[Run], span: int) -> Iterator[list[Run]]:
    """Yields the runs, in order, in groups that lie within `span` indices; longer runs in parts."""
    group: list[Run] = []
    for run_start, run_stop in runs:
        for start in range(run_start, run_stop, span):
            stop = min(start + span, run_stop)
            if group and stop - group[0][0] > span:
                yield group
                group = []
            group.append((start, stop))
    if group:
        yield group


def _take(array: np.ndarray, runs: Sequence[Sequence[Run]]) -> np.ndarray:
    """Returns the runs of every dimension."""
    # Views first, then copies: what is copied is already narrow in all other dimensions.
    for dim, along in sorted(enumerate(runs), key=lambda item: len(item[1]) > 1):
        if len(along) > 1:
            array = array.take(np.concatenate([np.arange(start, stop) for start, stop in along]), axis=dim)
        else:
            start, stop = along[0] if along else (0, 0)
            array = array[(slice(None),) * dim + (slice(start, stop),)]
    return array


def check_output(
    checkpoint: Header[CheckpointMetadata], output: str | os.PathLike[str], ending: str = ".safetensors"
) -> None:
    """Raises InputError where a slice would take the place of what is worth more.

    That is its checkpoint, a trained one, and any file that has neither a slice in it nor the ending of the format. A
    file of another format than safetensors, which is not known again by what is in it, has to have its ending.
    """
    if os.path.exists(output) and os.path.samefile(output, checkpoint.path):
        raise InputError(f"cannot write the slice to '{output}': that is the checkpoint itself")
    if is_trained(output):
        raise InputError(f"{lost_with(Path(output))}; give the slice another output with -o")
    if os.fspath(output).lower().endswith(ending):
        return
    is_foreign = os.path.isfile(output) and os.path.getsize(output) > 0 and not is_slice(output)
    if is_foreign or (ending.startswith(".") and ending != ".safetensors"):
        raise InputError(
            f"cannot write the slice to '{output}': its name does not end with {ending}; give another output with -o"
        )


def slice_file(
    checkpoint: Header[CheckpointMetadata],
    task: int,
    level: int,
    output: str | os.PathLike[str],
    changed: Mapping[str, TensorData] | None = None,
    calibration: Calibration | None = None,
) -> Counts:
    """Writes the standalone file of a task and level, both from 1, and returns what it holds.

    Args:
        changed: tensors of the network, by the backbone's names, that take the place of those in the checkpoint.
        calibration: how they were calculated.

    Raises:
        InputError: as `cut` and `atomic`, or `output` is the checkpoint itself.
        DvnError: as `atomic`.
    """
    tensors, own = _contents(checkpoint, task, level, changed or {}, calibration)
    check_output(checkpoint, output)
    write(output, tensors, own)
    return _counts(checkpoint.metadata, tensors)


def slice_size(checkpoint: Header[CheckpointMetadata], task: int, level: int) -> int:
    """Returns the bytes of the file of a task and level, both from 1; raises InputError as `cut`."""
    return size(*_contents(checkpoint, task, level, {}, None))


def _contents(
    checkpoint: Header[CheckpointMetadata],
    task: int,
    level: int,
    changed: Mapping[str, TensorData],
    calibration: Calibration | None,
) -> tuple[dict[str, TensorData], SliceMetadata]:
    tensors = {**cut(checkpoint, task, level), **changed}
    entry = replace(checkpoint.metadata.tasks[task - 1], data=None, affinity=())  # nothing of where it was cut
    tensors |= _aliased(checkpoint.metadata, tensors)
    divided, units = checkpoint.metadata.divided_for(entry), entry.units(level)
    own = SliceMetadata(**divided, task_number=task, level=level, kept=units, calibration=calibration)
    return tensors, own


def count(
    header: Header[CheckpointMetadata] | Header[SliceMetadata], task: int | None = None, level: int | None = None
) -> Counts:
    """Counts what the file of a task and level holds, from the header alone; a slice is counted whole, without them.

    Raises:
        InputError: as `cut`.
    """
    if isinstance(header.metadata, SliceMetadata):
        return _counts(header.metadata, header.tensors)
    if task is None or level is None:
        raise ValueError("a checkpoint is counted by task and level")
    tensors = cut(header, task, level)
    return _counts(header.metadata, tensors | _aliased(header.metadata, tensors))


def _aliased(metadata: DividedBackbone, tensors: Mapping[str, TensorData]) -> dict[str, TensorData]:
    """What a slice holds a second time, by its other name, since the backbone's own weights file does."""
    return {name: tensors[first] for name, first in metadata.aliases.items()}


def _counts(metadata: DividedBackbone, tensors: Mapping[str, TensorData] | Mapping[str, StoredTensor]) -> Counts:
    elements = {name: math.prod(tensor.shape) for name, tensor in tensors.items()}
    own = metadata.tensors
    return Counts(
        sum(count for name, count in elements.items() if name in own and own[name].trainable),
        sum(elements.values()),
        sum(count * ITEM_SIZE[tensors[name].dtype] for name, count in elements.items()),
    )
