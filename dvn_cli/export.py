"""Standalone files of single networks, cut out of a checkpoint; safetensors as they are take no torch."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvn_cli.budget import known_networks
from dvn_cli.errors import DvnError, InputError, did_you_mean
from dvn_cli.files import LARGEST_RECORD, atomic, check_folder_writable, encoded, read_bytes, reason, stem
from dvn_cli.formats import DTYPES, Format, NotExpressible, find_format
from dvn_cli.store.file import Header, TensorData, read_checkpoint
from dvn_cli.store.lookup import find_task
from dvn_cli.store.metadata import Calibration, CheckpointMetadata, TaskLevel, check_level
from dvn_cli.store.schema import loads, parse
from dvn_cli.store.slicing import BLOCK, check_output, slice_file

if TYPE_CHECKING:
    from dvn_cli.data.words import Data
    from dvn_cli.formats.writing import Check

Fit = Callable[[int, int], tuple[Mapping[str, TensorData], Calibration] | None]
"""Gives the tensors of a task and level that are others than in the checkpoint, and how they were calculated."""

MANIFEST = "manifest.json"
"""Beside the files of all networks: what they are."""


@dataclass(frozen=True)
class SliceSize:
    """What a file of one network weighs, as the manifest of `dvn slice --all` has it."""

    name: str
    level: int
    params: int
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """The manifest of `dvn slice --all`: the files of a checkpoint's networks in one format."""

    format: str
    slices: tuple[SliceSize, ...]
    dtype: str = "fp32"

    def __str__(self) -> str:
        return self.format if self.dtype == "fp32" else f"{self.format} {self.dtype}"


@dataclass(frozen=True)
class Form:
    """What files networks are cut into.

    Attributes:
        format: by its name in `formats.FORMATS`.
        dtype: of the weights, `fp32`, `fp16`, `bf16` or `int8`; of other types than float32 the network is another one.
        fold_norms: whether running statistics go into the layers before them.
        data: images, as of `evaluate`, on which a file is compared with the network, beside random ones.
        ranges: images, likewise, that give the ranges of activations in `int8`; their labels are not read.
    """

    format: str = "safetensors"
    dtype: str = "fp32"
    fold_norms: bool = False
    data: "Data | Sequence[Data] | None" = None
    ranges: "Data | Sequence[Data] | None" = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"weights are {', '.join(DTYPES)}, not '{self.dtype}'{did_you_mean(self.dtype, DTYPES)}")
        if self.dtype == "int8" and not self.ranges:
            raise InputError("int8 needs images for the ranges of activations: give --calibrate DATA")

    @property
    def is_cut(self) -> bool:
        """Whether bytes are copied, and nothing needs to be built."""
        return self == Form()


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
        check: how the file, run, compares with the network; None where its bytes were copied.
        macs: multiply-accumulates of one image; None where its bytes were copied.
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
    check: "Check | None" = None
    macs: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As `dvn slice --json` has it."""
        fields = {key: value for key, value in vars(self).items() if key != "levels"}
        parts = {key: None if fields[key] is None else vars(fields[key]) for key in ("calibration", "check")}
        return fields | {"file": str(self.file), "units": list(self.units)} | parts


def slice(
    checkpoint: str | os.PathLike[str] = "dvn.safetensors",
    task: int | str = 1,
    level: int = 1,
    output: str | os.PathLike[str] | None = None,
    calibrate: "Data | Sequence[Data] | None" = None,
    note: Callable[[str], None] = lambda _: None,
    form: Form = Form(),
) -> SliceFile:
    """Cuts the network of a task and level out of a checkpoint, into a file that needs nothing else.

    Args:
        checkpoint: the file of all networks.
        task: by name or by number from 1.
        level: from 1.
        output: a file or an existing folder, which is replaced where a format of folders has written it before; by
            default STEM-taskT-levelL with the format's ending in the working directory, STEM being the checkpoint's
            name.
        calibrate: images to fit its layers to what they give in the task's top level, as of `evaluate`; their labels
            are not read, and a folder may hold nothing but images. By default they stay as they are.
        note: is told, in a line, what the images were taken for.
        form: the format of the file, and what else it is to be.

    Raises:
        InputError: no such task, level, images or format, a slice in place of a checkpoint, or an output that is not
            writable.
        DvnError: writing failed, such as on a full disk, or the file, read back, is not the same network.

    Example:
        >>> cut = dvn_cli.slice("dvn.safetensors", task=2, level=1)  # doctest: +SKIP
        >>> network = dvn_cli.load(cut.file)  # doctest: +SKIP
    """
    header, kind = read_checkpoint(checkpoint), find_format(form.format)
    tasks = header.metadata.tasks
    number = find_task(tasks, task)
    network = TaskLevel(number, check_level(tasks[number - 1], level))
    name = _name(header, network, kind)
    file = Path(name if output is None else output)
    is_target = kind.is_written_to(file) or (kind.is_folder and output is None)  # which is replaced
    file = file / name if os.path.isdir(file) and not is_target else file
    return _cut(header, network, file, _fit(header, calibrate, note), form, note)


def slice_all(
    checkpoint: str | os.PathLike[str] = "dvn.safetensors",
    folder: str | os.PathLike[str] | None = None,
    calibrate: "Data | Sequence[Data] | None" = None,
    note: Callable[[str], None] = lambda _: None,
    form: Form = Form(),
    results: Sequence[str | os.PathLike[str]] = (),
    networks: Sequence[TaskLevel] | None = None,
) -> Iterator[SliceFile]:
    """Cuts every network out of a checkpoint, each when it is asked for, and at last writes what they are.

    Networks that the format has no way to say are left out, with a line to `note`.

    Args:
        checkpoint: the file of all networks.
        folder: for the files, made where it is missing; by default STEM-slices in the working directory.
        calibrate, note, form: as `slice`.
        results: files of what `dvn eval` found, as JSON, whose accuracies are noted, as are those of training.
        networks: the only ones; all by default.

    Raises:
        InputError, DvnError: as `slice`; all networks are left out.
    """
    header, kind = read_checkpoint(checkpoint), find_format(form.format)
    folder = Path(f"{stem(header.path)}-slices" if folder is None else folder)
    check_folder_writable(folder)
    if os.path.lexists(folder / MANIFEST):
        try:
            read_manifest(folder / MANIFEST)
        except InputError as error:
            raise InputError(f"{error}; give another folder with -o") from None
    known = {
        (task, each.level): each.accuracy for task, levels in known_networks(header, results).items() for each in levels
    }
    fit, files = _fit(header, calibrate, note), list[SliceFile]()
    for network in header.metadata.networks if networks is None else networks:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write to the folder '{folder}': {reason(error)}") from None
        try:
            files.append(_cut(header, network, folder / _name(header, network, kind), fit, form, note))
        except NotExpressible as error:
            note(str(error))
            continue
        except DvnError:
            _remove_empty(folder)
            raise
        yield files[-1]
    if not files:
        _remove_empty(folder)
        raise InputError(f"{form.format} can express no network of '{header.path}': nothing is written")
    manifest: dict[str, Any] = {
        "checkpoint": header.path.name,
        "format": form.format,
        "dtype": form.dtype,
        "slices": [],
    }
    manifest["slices"] = [
        _entry(cut) | {"top1": None if cut.calibration or form.dtype == "int8" else known[cut.task, cut.level]}
        for cut in files
    ]  # of what is calibrated, or in int8, no accuracy is recorded: it is another network
    with atomic(folder / MANIFEST) as opened:
        opened.write(encoded(json.dumps(manifest, indent=2, ensure_ascii=False)) + b"\n")


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it is not empty
        folder.rmdir()


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Reads the manifest of `dvn slice --all`, given by its path or its folder's.

    Raises:
        InputError: it is missing, or no such document.
    """
    path = Path(path) / MANIFEST if os.path.isdir(path) else Path(path)
    raw = read_bytes(path, LARGEST_RECORD)
    try:
        return parse(Manifest, loads(raw))
    except (InputError, ValueError) as error:
        raise InputError(f"'{path}' is no manifest of `dvn slice --all`: {error}") from None


def without_manifests(files: Sequence[Path], note: Callable[[str], None]) -> list[Path]:
    """Returns the files less the manifests among them, as FOLDER/* gives them; a line to `note` says so."""
    for file in files:
        if file.name == MANIFEST:
            note(f"'{file}' lists networks and holds none: it is passed over")
    return [file for file in files if file.name != MANIFEST] or list(files)


def _entry(cut: SliceFile) -> dict[str, Any]:
    """What a manifest says of a network, with the checksum of each of its files."""
    known = {key: value for key, value in cut.to_dict().items() if key not in ("check", "file")}
    paths = sorted(cut.file.iterdir()) if cut.file.is_dir() else [cut.file]
    files = []
    for path in paths:
        digest = hashlib.sha256()
        with open(path, "rb") as opened:
            for block in iter(lambda: opened.read(BLOCK), b""):
                digest.update(block)
        files.append({"file": path.relative_to(cut.file.parent).as_posix(), "sha256": digest.hexdigest()})
    return known | {"files": files}


def _fit(header: Header[CheckpointMetadata], data: "Data | Sequence[Data] | None", note: Callable[[str], None]) -> Fit:
    """What fits networks of a checkpoint to images, if any."""
    if data is None:
        return lambda task, level: None
    from dvn_cli.calibration import Calibrator  # which imports torch

    return Calibrator(header, data, note)


def _cut(
    header: Header[CheckpointMetadata],
    network: TaskLevel,
    file: Path,
    fit: Fit,
    form: Form,
    note: Callable[[str], None],
) -> SliceFile:
    task, kind = header.metadata.tasks[network.task - 1], find_format(form.format)
    check_output(header, file, kind.ending)
    changed, calibration = fit(*network) or ({}, None)
    check, macs = None, None
    if form.is_cut:
        params = slice_file(header, *network, file, changed, calibration).params
    else:
        with tempfile.TemporaryDirectory(prefix="dvn-slice-") as folder:
            cut = Path(folder) / "slice.safetensors"
            params = slice_file(header, *network, cut, changed, calibration).params
            check, macs = _convert(cut, file, kind, form, note)
    units, paths = task.units(network.level), sorted(file.iterdir()) if file.is_dir() else [file]
    return SliceFile(
        file=file,
        task=network.task,
        name=task.name,
        level=network.level,
        levels=len(task.levels),
        units=units,
        params=params,
        bytes=sum(path.stat().st_size for path in paths),
        calibration=calibration,
        check=check,
        macs=macs,
    )


def _convert(cut: Path, file: Path, kind: Format, form: Form, note: Callable[[str], None]) -> tuple["Check", int]:
    """Writes a slice in another form. Returns how it compares, and its multiply-accumulates of one image."""
    from dvn_cli.data import unlabelled
    from dvn_cli.formats.writing import write
    from dvn_cli.loading import load
    from dvn_cli.network import VirtualNetwork

    network = load(cut)
    assert isinstance(network, VirtualNetwork)
    channels = network.metadata.backbone.in_chans
    images, ranges = (
        [] if data is None else unlabelled(data, network.task, channels, 0, note) for data in (form.data, form.ranges)
    )
    return write(network, kind, file, images, form.dtype, form.fold_norms, ranges), network.macs()


def _name(header: Header[CheckpointMetadata], network: TaskLevel, kind: Format) -> str:
    return f"{stem(header.path)}-task{network.task}-level{network.level}{kind.ending}"
