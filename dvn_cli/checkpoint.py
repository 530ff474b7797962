"""The checkpoint file and the slices cut from it, with neither torch nor timm.

A file is a safetensors file whose metadata holds one key, `dvn`: sorted compact JSON. A checkpoint holds `shared/NAME`,
`task/T/NAME` and `task/T/level/L/NAME`, NAME being the backbone's own; a slice is one task and level, cut out under the
plain NAMEs. What a backbone holds under two names, a checkpoint has under the first, and a slice, as the backbone's own
weights file does, under both. Tensors are handled as unsigned integers of their item size, so every dtype is cut alike
and bit for bit.
"""

import contextlib
import json
import math
import mmap
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from dvn_cli.errors import InputError, did_you_mean
from dvn_cli.files import atomic, reason, written_at

FORMAT = 1
"""The newest format of the metadata that this version reads, and the one it writes."""

ITEM_SIZE = {
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"], 1),
    **dict.fromkeys(["U16", "I16", "F16", "BF16"], 2),
    **dict.fromkeys(["U32", "I32", "F32"], 4),
    **dict.fromkeys(["U64", "I64", "F64", "C64"], 8),
}
"""Bytes per element of the dtypes, by their names in safetensors."""

BLOCK = 4 << 20
"""Bytes of a tensor that are cut and written at a time: what bounds the memory that a slice takes."""

Runs = Sequence[Sequence[int]]
"""Runs of indices along a dimension, each `(start, stop)`."""


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: `data` is its little-endian bytes in C order, or a function that yields them block by block.

    Memory for the whole tensor is needed only while it is written, where `data` is a function.
    """

    dtype: str
    shape: tuple[int, ...]
    data: "bytes | bytearray | memoryview | np.ndarray | Callable[[], Iterable[np.ndarray]]"

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * ITEM_SIZE[self.dtype]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its dtype by safetensors' name, its shape, and the bytes of the file that hold it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself, and access to its bytes, which are read as they are used.

    The file stays the one that was opened, whatever replaces it in its folder meanwhile; None before it is written.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]
    file: mmap.mmap | None = None

    @property
    def kind(self) -> str:
        """`checkpoint` or `slice`."""
        return self.metadata["kind"]

    def raw(self, name: str) -> np.ndarray:
        """Returns tensor `name`, in its shape, as unsigned integers of its item size: a read-only view of the file."""
        assert self.file is not None
        stored = self.tensors[name]
        data = np.frombuffer(self.file, f"<u{ITEM_SIZE[stored.dtype]}", math.prod(stored.shape), stored.start)
        return data.reshape(stored.shape)


@dataclass(frozen=True)
class Counts:
    """What the file of one network holds: elements of trainable tensors, of all tensors, and the bytes of all.

    A parameter with two names is counted once, its elements and bytes as often as the file holds them.
    """

    params: int
    elements: int
    bytes: int


# Reading


def read_header(path: str | os.PathLike[str]) -> Header:
    """Opens a checkpoint or a slice; reads its header only.

    Raises:
        InputError: missing, unreadable, truncated or damaged, not safetensors, not dvn's, or of a newer format.
    """
    path = Path(path)
    try:
        with open(path, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            file = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) if size else None
    except FileNotFoundError:
        near = did_you_mean(path.name, (other.name for other in path.parent.glob("*.safetensors")))
        hint = near or "; `dvn partition` and `dvn train` write one"
        raise InputError(f"there is no checkpoint '{path}'{hint}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read '{path}': {reason(error)}") from None

    start = 8 + int.from_bytes(file[:8], "little") if file and size > 8 else 0
    if file is None or not start:
        raise InputError(f"'{path}' is no checkpoint: it ends after {size} bytes")
    if file[8:9] != b"{":
        raise InputError(
            f"'{path}' is not a safetensors file; a checkpoint is what `dvn partition` or `dvn train` wrote"
        )
    if start > size:
        raise InputError(f"'{path}' is truncated: it ends within its header, after {size} bytes")
    try:
        with safe_open(path, framework="numpy"):  # checks the header's grammar, and offsets against shapes and dtypes
            pass
        entries = json.loads(file[8:start])
    except (SafetensorError, OSError, ValueError) as error:
        end = _end_of_data(file[8:start])
        if end and start + end > size:
            raise InputError(f"'{path}' is truncated: it has {size} of {start + end} bytes") from None
        raise InputError(f"'{path}' is damaged: {reason(error)}") from None

    metadata = _parse(path, entries.pop("__metadata__", {}))
    tensors = {}
    for name, entry in entries.items():
        if entry["dtype"] not in ITEM_SIZE:
            raise InputError(
                f"'{path}' is damaged: tensor '{name}' has dtype {entry['dtype']}, which dvn does not write"
            )
        begin, end = entry["data_offsets"]
        tensors[name] = Stored(entry["dtype"], tuple(entry["shape"]), start + begin, start + end)
    if metadata["kind"] == "slice" and tensors.keys() != metadata["tensors"].keys() | metadata["aliases"].keys():
        raise InputError(f"'{path}' is damaged: it does not hold the tensors that its metadata lists")
    return Header(path, metadata, tensors, file)


def read_checkpoint(path: str | os.PathLike[str]) -> Header:
    """As `read_header`, for a checkpoint only: a slice is an InputError as well."""
    header = read_header(path)
    _refuse_slice(header)
    return header


def _refuse_slice(header: Header) -> None:
    if header.kind == "slice":
        task, level = header.metadata["task"]["name"], header.metadata["level"]
        raise InputError(
            f"'{header.path}' is a slice already (task '{task}', level {level}); give the checkpoint it was cut from"
        )


def _end_of_data(header: bytes) -> int:
    """Returns how many bytes of tensors the header promises, 0 where it does not say."""
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, IndexError):
        entries = json.loads(header)
        return max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
    return 0


# What the metadata must hold for this module to work on it: type, [type of every item], {key: type}, {...: of any key}.
_TASK = {"name": str, "classes": list, "order": [int], "levels": [int]}
_COMMON = {
    "units": int,
    "rule": {"assign": str, "round_to": int},
    "aliases": {...: str},
    "axes": [[[[int]]]],
    "tensors": {...: {"axes": [(int, type(None))], "trainable": bool}},
}
_FORMS: dict[str, dict[str, Any]] = {
    "checkpoint": {**_COMMON, "tasks": [_TASK]},
    "slice": {**_COMMON, "task": _TASK, "task_number": int, "level": int, "kept": [int]},
}


def _has_form(value: object, form: Any) -> bool:
    if isinstance(form, list):
        return isinstance(value, list) and all(_has_form(item, form[0]) for item in value)
    if not isinstance(form, dict):
        return isinstance(value, form)
    if not isinstance(value, dict):
        return False
    if ... in form:
        return all(_has_form(item, form[...]) for item in value.values())
    return all(key in value and _has_form(value[key], of_key) for key, of_key in form.items())


def _parse(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if "dvn" not in metadata:
        raise InputError(
            f"'{path}' holds plain weights, no checkpoint; `dvn partition BACKBONE --weights {path}` makes one"
        )
    try:
        dvn = json.loads(metadata["dvn"])
    except ValueError:
        raise InputError(f"'{path}' is damaged: its metadata is not JSON") from None
    if not _has_form(dvn, {"format": int, "kind": str}):
        raise InputError(f"'{path}' is damaged: its metadata has no format and kind")
    if dvn["format"] > FORMAT:
        raise InputError(f"'{path}' has format {dvn['format']}, this dvn reads up to {FORMAT}: update dvn")
    if dvn["kind"] not in _FORMS:
        raise InputError(f"'{path}' has kind '{dvn['kind']}': it is neither a checkpoint nor a slice")
    dvn = {"rule": {"assign": "even", "round_to": 1}, "aliases": {}, **dvn}  # which the first files do not say
    form = _FORMS[dvn["kind"]]
    for key in form:
        if not _has_form(dvn, {key: form[key]}):
            raise InputError(f"'{path}' is damaged: its metadata has no usable '{key}'")
    used = {axis for info in dvn["tensors"].values() for axis in info["axes"] if axis is not None}
    if not used <= set(range(len(dvn["axes"]))) or any(
        len(run) != 2 for axis in dvn["axes"] for r in axis for run in r
    ):
        raise InputError(f"'{path}' is damaged: its axes do not say which unit owns which indices")
    if not set(dvn["aliases"].values()) <= dvn["tensors"].keys():
        raise InputError(f"'{path}' is damaged: its aliases are of tensors that it does not list")
    return dvn


# Writing


def is_trained(path: str | os.PathLike[str]) -> bool:
    """Returns whether a file is there and is a trained checkpoint."""
    with contextlib.suppress(InputError):
        return os.path.exists(path) and read_header(path).metadata.get("training") is not None
    return False


def lost_with(path: Path) -> str | None:
    """Returns in words what would be lost if a file were replaced.

    None where there is none, or a fresh partition: the command that made that one makes it again.
    """
    if not path.exists():
        return None
    try:
        metadata = read_header(path).metadata
    except InputError as error:
        return str(error)
    if metadata["kind"] == "slice":
        return f"'{path}' is a slice"
    record = metadata.get("training")
    if record is None:
        return None
    names = [entry["name"] for entry in metadata["tasks"]]
    tasks = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    count = record.get("epochs") if isinstance(record, dict) else None
    epochs = "" if count is None else f"{count} epoch{'s' * (count != 1)}, "
    return f"'{path}' is a trained checkpoint (tasks: {tasks}; {epochs}written {written_at(path)})"


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes a checkpoint or a slice, atomically: equal tensors and metadata give equal bytes, in whatever order.

    The file is laid out as safetensors does, but written tensor by tensor, never held in memory as a whole.

    Args:
        tensors: by their full names.
        metadata: JSON-able, stored under the key `dvn`.

    Raises:
        InputError, DvnError: as `atomic`.
        ValueError: data that does not fit its shape and dtype, or metadata that is not JSON (NaN is not).
    """
    # Larger items first keeps every tensor aligned to its item size.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-ITEM_SIZE[item[1].dtype], item[0])))
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"), allow_nan=False)
    entries: dict[str, Any] = {"__metadata__": {"dvn": text}}
    end = 0
    for name, tensor in ordered.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)

    with atomic(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, tensor in ordered.items():
            written = 0
            for block in tensor.data() if callable(tensor.data) else [tensor.data]:
                # As an array's view, since a memoryview knows neither bfloat16 nor how to cast an empty array.
                array = block if isinstance(block, np.ndarray) else np.frombuffer(block, np.uint8)
                written += file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            if written != tensor.nbytes:
                raise ValueError(f"{name}: {written} bytes for {tensor.dtype} of shape {tensor.shape}")


# Tasks, levels and units


def find_task(metadata: Mapping[str, Any], task: str | int) -> int:
    """Returns the number, from 1, of a checkpoint's task: see `matching_tasks`.

    Raises:
        InputError: there is no such task, or the text means one by its number and another by its name.
    """
    names = [entry["name"] for entry in metadata["tasks"]]
    numbered = list(enumerate(names, 1))
    found = matching_tasks(numbered, task)
    if found:
        return found[0][0]
    near = did_you_mean(task, names)
    raise InputError(f"there is no task '{task}'{near + ' The' if near else '; the'} tasks are {_listed(numbered)}")


def matching_tasks(tasks: Collection[tuple[int, str]], task: str | int) -> list[tuple[int, str]]:
    """Returns those of some tasks, each a number and a name, that are meant by a number, or by a text.

    A text is a name, a number, or either of them said to be one: `name:2`, `number:2`.

    Raises:
        InputError: a text that is the number of one task and the name of another.
    """
    text = str(task)
    kind, colon, rest = text.partition(":")
    of_name = [each for each in tasks if each[1] == text and not isinstance(task, int)]
    of_number = [each for each in tasks if text.isdecimal() and each[0] == int(text)]
    if not of_name and not of_number and colon:
        of_name = [each for each in tasks if kind == "name" and each[1] == rest]
        of_number = [each for each in tasks if kind == "number" and rest.isdecimal() and each[0] == int(rest)]
    if of_name and of_number and set(of_name) != set(of_number):
        both = _listed(dict.fromkeys([*of_number, *of_name]))
        raise InputError(
            f"task '{text}' is the number of one task and the name of another ({both}): write number:{text} or "
            f"name:{text}"
        )
    return of_name or of_number


def _listed(tasks: Iterable[tuple[int, str]]) -> str:
    return ", ".join(f"{number} '{name}'" for number, name in tasks)


def check_level(metadata: Mapping[str, Any], task: int, level: int) -> int:
    """Returns `level` if the checkpoint's task number `task` has it, else raises InputError."""
    entry = metadata["tasks"][task - 1]
    count = len(entry["levels"])
    if not 1 <= level <= count:
        allowed = f"levels 1 to {count}" if count > 1 else "level 1 only"
        raise InputError(f"there is no level {level}; task '{entry['name']}' has {allowed}")
    return level


def kept_units(task: Mapping[str, Any], level: int) -> list[int]:
    """Returns the units, from 1 and ascending, of a level of the task of this entry in the metadata."""
    return sorted(task["order"][: task["levels"][level - 1]])


def kept_runs(axis: Sequence[Runs], kept: Collection[int], size: int) -> list[tuple[int, int]]:
    """Returns the runs of indices that stay of a dimension: all but those that units outside of `kept` own.

    Args:
        axis: the runs that each unit owns, disjoint.
        kept: units, from 1.
        size: of the dimension.
    """
    dropped = sorted((start, stop) for unit, runs in enumerate(axis, 1) if unit not in kept for start, stop in runs)
    result, position = [], 0
    for start, stop in [*dropped, (size, size)]:
        if position < start:
            result.append((position, start))
        position = max(position, stop)
    return result


# Cutting


def cut(header: Header, task: int, level: int) -> dict[str, Tensor]:
    """Returns the tensors of a task and level, both from 1, by the backbone's names. Bytes are read when written.

    Raises:
        InputError: no such task or level, a slice, or a checkpoint that lacks a tensor it lists.
    """
    _refuse_slice(header)
    metadata = header.metadata
    check_level(metadata, find_task(metadata, task), level)
    entry = metadata["tasks"][task - 1]
    kept = set(kept_units(entry, level))
    classes = {(name, dim): len(entry["classes"]) for name, dim in metadata.get("class_axis", ())}

    tensors = {}
    for name, info in metadata["tensors"].items():
        if (narrow := f"task/{task}/level/{level}/{name}") in header.tensors:
            runs = [[(0, size)] for size in header.tensors[narrow].shape]
            tensors[name] = _cut_tensor(header, narrow, runs)
            continue
        full = next((full for full in (f"task/{task}/{name}", f"shared/{name}") if full in header.tensors), None)
        if full is None:
            raise InputError(f"'{header.path}' is damaged: it has no tensor '{name}' for task {task}, level {level}")
        shape = header.tensors[full].shape
        if len(shape) != len(info["axes"]):
            raise InputError(
                f"'{header.path}' is damaged: '{full}' has {len(shape)} dimensions, not {len(info['axes'])}"
            )
        runs = []
        for dim, (size, axis) in enumerate(zip(shape, info["axes"], strict=True)):
            here = [(0, size)] if axis is None else kept_runs(metadata["axes"][axis], kept, size)
            limit = classes.get((name, dim), size)
            runs.append([(start, min(stop, limit)) for start, stop in here if start < limit])
        tensors[name] = _cut_tensor(header, full, runs)
    return tensors


def _cut_tensor(header: Header, name: str, runs: Sequence[Runs]) -> Tensor:
    dtype = header.tensors[name].dtype
    shape = tuple(sum(stop - start for start, stop in of_dim) for of_dim in runs)
    return Tensor(dtype, shape, lambda: _blocks(header, name, runs))


def _blocks(header: Header, name: str, runs: Sequence[Runs]) -> Iterator[np.ndarray]:
    """Yields the runs of a tensor as contiguous arrays, some rows at a time, and lets go of the pages it has read."""
    array = header.raw(name)
    if not array.ndim:
        array, runs = array.reshape(1), [[(0, 1)]]
    start_of_tensor = header.tensors[name].start
    row_bytes = array.nbytes // len(array) if len(array) else 0
    for rows in _grouped(runs[0], max(1, BLOCK // max(1, row_bytes))):
        start, stop = rows[0][0], rows[-1][1]
        here = [(first - start, last - start) for first, last in rows]
        yield np.array(_take(array[start:stop], [here, *runs[1:]]), order="C")
        if hasattr(mmap, "MADV_DONTNEED") and header.file is not None:
            begin = (start_of_tensor + start * row_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
            header.file.madvise(mmap.MADV_DONTNEED, begin, start_of_tensor + stop * row_bytes - begin)


def _grouped(runs: Runs, span: int) -> Iterator[list[tuple[int, int]]]:
    """Yields the runs, in order, in groups that lie within `span` indices; longer runs in parts."""
    group: list[tuple[int, int]] = []
    for run_start, run_stop in runs:
        for start in range(run_start, run_stop, span):
            stop = min(start + span, run_stop)
            if group and stop - group[0][0] > span:
                yield group
                group = []
            group.append((start, stop))
    if group:
        yield group


def _take(array: np.ndarray, runs: Sequence[Runs]) -> np.ndarray:
    """Returns the runs of every dimension."""
    # Views first, then copies: what is copied is already narrow in all other dimensions.
    for dim, of_dim in sorted(enumerate(runs), key=lambda item: len(item[1]) > 1):
        if len(of_dim) > 1:
            array = array.take(np.concatenate([np.arange(start, stop) for start, stop in of_dim]), axis=dim)
        else:
            start, stop = of_dim[0] if of_dim else (0, 0)
            array = array[(slice(None),) * dim + (slice(start, stop),)]
    return array


def slice_file(checkpoint: Header, task: int, level: int, output: str | os.PathLike[str]) -> Counts:
    """Writes the standalone file of a task and level, both from 1, and returns what it holds.

    Raises:
        InputError: as `cut` and `atomic`, or `output` is the checkpoint itself.
        DvnError: as `atomic`.
    """
    tensors = cut(checkpoint, task, level)
    if os.path.exists(output) and os.path.samefile(output, checkpoint.path):
        raise InputError(f"cannot write the slice to '{output}': that is the checkpoint itself")
    if is_trained(output):
        raise InputError(f"{lost_with(Path(output))}; give the slice another output with -o")
    entry = {**checkpoint.metadata["tasks"][task - 1], "data": None}  # a slice is shipped: nothing of where it was cut
    tensors |= _aliased(checkpoint.metadata, tensors)
    same = ("format", "backbone", "units", "rule", "axes", "tensors", "aliases", "class_axis")
    metadata = {key: checkpoint.metadata[key] for key in same if key in checkpoint.metadata}
    metadata |= {"kind": "slice", "task": entry, "task_number": task, "level": level, "kept": kept_units(entry, level)}
    write(output, tensors, metadata)
    return _counts(checkpoint.metadata, tensors)


def count(header: Header, task: int | None = None, level: int | None = None) -> Counts:
    """Counts what the file of a task and level holds, from the header alone; a slice is counted whole, without them.

    Raises:
        InputError: as `cut`.
    """
    if header.kind == "slice":
        return _counts(header.metadata, header.tensors)
    if task is None or level is None:
        raise ValueError("a checkpoint is counted by task and level")
    tensors = cut(header, task, level)
    return _counts(header.metadata, tensors | _aliased(header.metadata, tensors))


def _aliased(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a slice holds a second time, by its other name, since the backbone's own weights file does."""
    return {name: tensors[first] for name, first in metadata["aliases"].items()}


def _counts(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor] | Mapping[str, Stored]) -> Counts:
    elements = {name: math.prod(tensor.shape) for name, tensor in tensors.items()}
    own = metadata["tensors"]
    return Counts(
        sum(count for name, count in elements.items() if name in own and own[name]["trainable"]),
        sum(elements.values()),
        sum(count * ITEM_SIZE[tensors[name].dtype] for name, count in elements.items()),
    )
