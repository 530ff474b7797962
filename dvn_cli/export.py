"""Standalone files of single networks, cut out of a checkpoint; only to fit them to images takes torch."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvn_cli.errors import DvnError, InputError
from dvn_cli.files import check_folder_writable, reason
from dvn_cli.store.file import Header, TensorData, read_checkpoint
from dvn_cli.store.metadata import Calibration, CheckpointMetadata, TaskLevel, check_level, find_task
from dvn_cli.store.slicing import slice_file

if TYPE_CHECKING:
    from dvn_cli.data.words import Data

Fit = Callable[[int, int], tuple[Mapping[str, TensorData], Calibration] | None]
"""Gives the tensors of a task and level that are others than in the checkpoint, and how they were calculated."""

FORMATS = ("safetensors",)
"""Of the files that networks are cut into."""


@dataclass(frozen=True)
class SliceFile:
    """A file of one network.

    Attributes:
        file: where it is.
        task: number of its task, from 1.
        name: of its task.
        level: from 1.
        levels: how many its task has.
        units: that it is made of, by number from 1.
        params: elements of its parameters.
        bytes: of the file.
        calibration: how its layers were fitted to the top level; None where they were not.
    """

    file: Path
    task: int
    name: str
    level: int
    levels: int
    units: tuple[int, ...]
    params: int
    bytes: int
    calibration: Calibration | None = None

    def to_dict(self) -> dict[str, Any]:
        """As `dvn slice --json` has it."""
        fields = {key: value for key, value in vars(self).items() if key != "levels"}
        calibration = None if self.calibration is None else vars(self.calibration)
        return fields | {"file": str(self.file), "units": list(self.units), "calibration": calibration}


def slice(
    checkpoint: str | os.PathLike[str] = "dvn.safetensors",
    task: int | str = 1,
    level: int = 1,
    output: str | os.PathLike[str] | None = None,
    calibrate: "Data | Sequence[Data] | None" = None,
    note: Callable[[str], None] = lambda _: None,
) -> SliceFile:
    """Cuts the network of a task and level out of a checkpoint, into a file that needs nothing else.

    Args:
        checkpoint: the file of all networks.
        task: by name or by number from 1.
        level: from 1.
        output: a file or an existing folder; by default STEM-taskT-levelL.safetensors in the working directory, STEM
            being the checkpoint's name.
        calibrate: images to fit its layers to what they give in the task's top level, as of `evaluate`; their labels
            are not read, and a folder may hold nothing but images. By default they stay as they are.
        note: is told, in a line, what the images were taken for.

    Raises:
        InputError: no such task, level or images, a slice in place of a checkpoint, or an output that is not writable.
        DvnError: writing failed, such as on a full disk.

    Example:
        >>> cut = dvn_cli.slice("dvn.safetensors", task=2, level=1)  # doctest: +SKIP
        >>> network = dvn_cli.load(cut.file)  # doctest: +SKIP
    """
    header = read_checkpoint(checkpoint)
    tasks = header.metadata.tasks
    number = find_task(tasks, task)
    network = TaskLevel(number, check_level(tasks[number - 1], level))
    file = Path(_name(header, network) if output is None else output)
    file = file / _name(header, network) if os.path.isdir(file) else file
    return _cut(header, network, file, _fit(header, calibrate, note))


def slice_all(
    checkpoint: str | os.PathLike[str] = "dvn.safetensors",
    folder: str | os.PathLike[str] | None = None,
    calibrate: "Data | Sequence[Data] | None" = None,
    note: Callable[[str], None] = lambda _: None,
) -> Iterator[SliceFile]:
    """Cuts every network out of a checkpoint, each when it is asked for.

    Args:
        checkpoint: the file of all networks.
        folder: for the files, made where it is missing; by default STEM-slices in the working directory.
        calibrate, note: as `slice`.

    Raises:
        InputError, DvnError: as `slice`.
    """
    header = read_checkpoint(checkpoint)
    folder = Path(f"{header.path.stem}-slices" if folder is None else folder)
    check_folder_writable(folder)
    fit = _fit(header, calibrate, note)
    for network in header.metadata.networks:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write to the folder '{folder}': {reason(error)}") from None
        try:
            yield _cut(header, network, folder / _name(header, network), fit)
        except DvnError:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
            raise


def _fit(header: Header[CheckpointMetadata], data: "Data | Sequence[Data] | None", note: Callable[[str], None]) -> Fit:
    """What fits networks of a checkpoint to images, if any."""
    if data is None:
        return lambda task, level: None
    from dvn_cli.calibration import Calibrator  # which imports torch

    return Calibrator(header, data, note)


def _cut(header: Header[CheckpointMetadata], network: TaskLevel, file: Path, fit: Fit) -> SliceFile:
    task = header.metadata.tasks[network.task - 1]
    changed, calibration = fit(*network) or ({}, None)
    params = slice_file(header, *network, file, changed, calibration).params
    units, size = task.units(network.level), file.stat().st_size
    return SliceFile(file, network.task, task.name, network.level, len(task.levels), units, params, size, calibration)


def _name(header: Header[CheckpointMetadata], network: TaskLevel) -> str:
    return f"{header.path.stem}-task{network.task}-level{network.level}.safetensors"
