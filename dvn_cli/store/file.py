"""The file format. Tensors are bytes here, named, typed and shaped as safetensors has them.

A file is a safetensors file whose metadata has one key, `dvn`: compact JSON with sorted keys, which holds `format`,
`kind`, `checksums` and what `metadata` lists for the kind. A checkpoint holds `shared/NAME`, `task/T/NAME` and
`task/T/level/L/NAME`, NAME being the backbone's own; a slice is one task and level, cut out under the plain NAMEs. What
a backbone holds under two names, a checkpoint has under the first, and a slice, as the backbone's own weights file
does, under both.

`checksums` is a text of CRC-32s, eight hexadecimal digits each: of what the file says (its metadata without them, and
every tensor's dtype and shape, as JSON), then, tensor by tensor in the order of their names, of each `CHECKED` bytes.
Files from before there were checksums are read unchecked.
"""

import contextlib
import json
import math
import os
import weakref
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import numpy as np

from dvn_cli.errors import InputError, did_you_mean
from dvn_cli.files import LARGEST_RECORD, atomic, check_regular, read_bytes, reason, run_record, written_at
from dvn_cli.store.metadata import KINDS, CheckpointMetadata, Index, Metadata, SliceMetadata, StateMetadata
from dvn_cli.store.schema import check_version, checked, dumps, loads, parse
from dvn_cli.store.shapes import check_tensors

FORMAT = 1
"""The newest format of the metadata that this version reads, and the one it writes."""

ITEM_SIZE = {
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"], 1),
    **dict.fromkeys(["U16", "I16", "F16", "BF16"], 2),
    **dict.fromkeys(["U32", "I32", "F32"], 4),
    **dict.fromkeys(["U64", "I64", "F64", "C64"], 8),
}
"""Bytes per element of the dtypes, by their names in safetensors."""

CHECKED = 256 << 10
"""Bytes of a tensor that have a checksum of their own."""

MOST_HEADER = 100_000_000
"""Bytes of the longest header that safetensors reads."""

AnyMetadata = TypeVar("AnyMetadata", bound=Metadata, covariant=True)


@dataclass(frozen=True)
class TensorData:
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
class StoredTensor:
    """A tensor in a file: its dtype by safetensors' name, its shape, and where in the file its bytes begin."""

    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


@dataclass(frozen=True)
class Header(Generic[AnyMetadata]):
    """What a file says of itself, and access to its bytes, which are read and checked as they are used.

    The file stays the one that was opened, whatever replaces it in its folder meanwhile; None before it is written.
    """

    path: Path
    metadata: AnyMetadata
    tensors: dict[str, StoredTensor]
    file: BinaryIO | None = None
    checksums: Mapping[str, str] = field(default_factory=dict)
    _checked: set[tuple[str, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.file is not None:
            weakref.finalize(self, self.file.close)

    def read(self, name: str, start: int, stop: int) -> memoryview:
        """Reads some of the bytes of a tensor, and checks what has a checksum and was not checked before.

        Raises:
            InputError: they cannot be read, or are not what was written.
        """
        checksums, size = self.checksums.get(name, ""), self.tensors[name].nbytes
        blocks = [block for block in range(start // CHECKED, -(-stop // CHECKED)) if (name, block) not in self._checked]
        if not checksums or not blocks:
            return self._bytes(name, start, stop)
        first, last = min(start, blocks[0] * CHECKED), max(stop, min((blocks[-1] + 1) * CHECKED, size))
        data = self._bytes(name, first, last)
        for block in blocks:
            begin = block * CHECKED - first
            if crc(data[begin : begin + CHECKED]) != checksums[8 * block : 8 * block + 8]:
                raise InputError(f"'{self.path}' is damaged: its tensor '{name}' has other bytes than were written")
            self._checked.add((name, block))
        return data[start - first : stop - first]

    def _bytes(self, name: str, start: int, stop: int) -> memoryview:
        assert self.file is not None
        try:
            self.file.seek(self.tensors[name].start + start)
            data = self.file.read(stop - start)
        except OSError as error:
            raise InputError(f"cannot read '{self.path}': {reason(error)}") from None
        if len(data) < stop - start:
            raise InputError(f"'{self.path}' is truncated: it ends within its tensor '{name}'")
        return memoryview(data)


AnyHeader = Header[CheckpointMetadata] | Header[SliceMetadata]


def crc(data: bytes | memoryview) -> str:
    """Returns the CRC-32 of some bytes, as eight hexadecimal digits."""
    return f"{zlib.crc32(data):08x}"


# Reading


def read_header(path: str | os.PathLike[str]) -> AnyHeader:
    """Opens a checkpoint or a slice; reads its header only, and checks all that it says.

    Raises:
        InputError: missing, unreadable, truncated or damaged, not safetensors, not dvn's, or of a newer format.
    """
    return _open(path, (CheckpointMetadata.kind, SliceMetadata.kind))


def read_checkpoint(path: str | os.PathLike[str]) -> Header[CheckpointMetadata]:
    """As `read_header`, for a checkpoint only: a slice is an InputError as well."""
    header = read_header(path)
    if isinstance(header.metadata, SliceMetadata):
        task, level = header.metadata.task.name, header.metadata.level
        raise InputError(
            f"'{header.path}' is a slice already (task '{task}', level {level}); give the checkpoint it was cut from"
        )
    return header


def read_state(path: str | os.PathLike[str]) -> Header[StateMetadata]:
    """As `read_header`, for the state of an interrupted run."""
    return _open(path, (StateMetadata.kind,))


def _open(path: str | os.PathLike[str], kinds: Collection[str]) -> Any:
    path = Path(path)
    try:
        path.stat()
        check_regular(path)
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        near = did_you_mean(path.name, (other.name for other in path.parent.glob("*.safetensors")))
        hint = near or "; `dvn partition` and `dvn train` write one"
        raise InputError(f"there is no checkpoint '{path}'{hint}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read '{path}': {reason(error)}") from None
    with contextlib.ExitStack() as stack:
        stack.enter_context(file)
        try:
            header = _read(path, file, kinds)
        except OSError as error:
            raise InputError(f"cannot read '{path}': {reason(error)}") from None
        stack.pop_all()  # it stays open
        return header


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Says of which file it is that something is wrong in it."""
    try:
        yield
    except (InputError, ValueError) as error:  # ValueError: it is no JSON
        raise InputError(f"'{path}' is damaged: {reason(error)}") from None


def _read(path: Path, file: BinaryIO, kinds: Collection[str]) -> Header[Metadata]:
    size, lead = os.fstat(file.fileno()).st_size, file.read(9)
    if len(lead) < 9:
        raise InputError(f"'{path}' is no checkpoint: it ends after {size} bytes")
    if lead[8:] != b"{":
        raise InputError(
            f"'{path}' is not a safetensors file; a checkpoint is what `dvn partition` or `dvn train` wrote"
        )
    start = 8 + int.from_bytes(lead[:8], "little")
    if start > size:
        raise InputError(f"'{path}' is truncated: it ends within its header, after {size} bytes")
    with _named(path):
        if start > MOST_HEADER:
            raise InputError(f"its header has more than {MOST_HEADER:,} bytes")
        entries = loads((lead[8:] + file.read(start - 9)).decode())
        texts = parse(_Texts, {"texts": entries.pop("__metadata__", {})}).texts
        tensors = _tensors(entries, start)
    end = max((tensor.start + tensor.nbytes for tensor in tensors.values()), default=start)
    if end > size:
        raise InputError(f"'{path}' is truncated: it has {size} of {end} bytes")
    if "dvn" not in texts:
        raise InputError(
            f"'{path}' holds plain weights, no checkpoint; `dvn partition BACKBONE --weights {path}` makes one"
        )
    with _named(path):
        if end < size:
            raise InputError(f"it has {size} bytes, its header speaks of {end}")
        content = loads(texts["dvn"])
        envelope = parse(_Envelope, content)
    check_version(path, content, FORMAT, "format")
    if envelope.kind not in kinds:
        raise InputError(f"'{path}' has kind {envelope.kind!r:.40}, not {' or '.join(kinds)}")
    with _named(path):
        if envelope.checksums is None:
            content.pop("graph", None)  # which nothing but its checksum tells from another one
        checksums = {} if envelope.checksums is None else _by_tensor(envelope.checksums, content, tensors)
        metadata = parse(KINDS[envelope.kind], content)
        if not isinstance(metadata, StateMetadata):
            check_tensors(metadata, tensors)
    return Header(path, metadata, tensors, file, checksums)


@dataclass(frozen=True)
class _Texts:
    """The metadata of any safetensors file."""

    texts: Mapping[str, str]


@dataclass(frozen=True)
class _Envelope:
    """What every kind of dvn's metadata says besides its own."""

    format: Index
    kind: str
    checksums: str | None = None


@dataclass(frozen=True)
class _Entry:
    """A tensor in a safetensors header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _tensors(entries: Mapping[str, Any], start: int) -> dict[str, StoredTensor]:
    """Returns the tensors of a header, whose bytes follow each other from `start` on without a gap."""
    parsed = [(name, parse(_Entry, entry)) for name, entry in entries.items()]
    tensors, position = {}, 0
    for name, entry in sorted(parsed, key=lambda item: item[1].data_offsets):
        if entry.dtype not in ITEM_SIZE:
            raise InputError(f"tensor {name!r:.80} has dtype {entry.dtype!r:.20}, which dvn does not write")
        if any(size < 0 for size in entry.shape):
            raise InputError(f"tensor {name!r:.80} has a negative size")
        tensors[name] = StoredTensor(entry.dtype, entry.shape, start + position)
        begin, position = position, position + tensors[name].nbytes
        if entry.data_offsets != (begin, position):
            raise InputError(f"the bytes of tensor {name!r:.80} are not where its shape and those of others say")
    return {name: tensors[name] for name in entries}


# Checksums


def _described(content: Mapping[str, Any], tensors: Mapping[str, "TensorData | StoredTensor"]) -> bytes:
    """Returns what the first checksum is of."""
    own = {key: value for key, value in content.items() if key != "checksums"}
    return dumps([own, {name: [tensor.dtype, tensor.shape] for name, tensor in tensors.items()}]).encode()


def _block_count(nbytes: int) -> int:
    return -(-nbytes // CHECKED)


def _by_tensor(text: str, content: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Returns the checksums of each tensor's blocks.

    Raises:
        InputError: they are not of this metadata and these tensors.
    """
    if text[:8] != crc(_described(content, tensors)):
        raise InputError("what it says is not what was written: its checksum is another one")
    found, position = {}, 8
    for name, tensor in sorted(tensors.items()):
        found[name] = text[position : position + 8 * _block_count(tensor.nbytes)]
        position += 8 * _block_count(tensor.nbytes)
    if len(text) != position:
        raise InputError("'checksums' are not as many as there are blocks")
    return found


# Writing


def write(path: str | os.PathLike[str], tensors: Mapping[str, TensorData], metadata: Metadata) -> None:
    """Writes a file, atomically: equal tensors and metadata give equal bytes, in whatever order.

    The file is laid out as safetensors does, but written tensor by tensor, never held in memory as a whole. What could
    not be read again is not written.

    Args:
        path: of the file.
        tensors: by their full names.
        metadata: that says which kind of file it is.

    Raises:
        InputError, DvnError: as `atomic`; InputError as well for metadata that no file may have.
        ValueError: data that does not fit its shape and dtype, or metadata that is not JSON (NaN is not).
    """
    try:
        content, ordered = _laid_out(tensors, metadata)
    except InputError as error:
        raise InputError(f"cannot write '{path}': {error}") from None
    # Zeros are as long as the checksums will be.
    checksums = {name: "0" * 8 * _block_count(tensor.nbytes) for name, tensor in ordered.items()}
    before = _packed(content, ordered, checksums)
    if len(before) > MOST_HEADER:
        raise InputError(f"cannot write '{path}': its header would have more than {MOST_HEADER:,} bytes")
    with atomic(path) as file:
        file.write(before)
        for name, tensor in ordered.items():
            checksums[name] = _write_tensor(file, name, tensor)
        file.seek(0)
        file.write(_packed(content, ordered, checksums))


def size(tensors: Mapping[str, TensorData], metadata: Metadata) -> int:
    """Returns how many bytes `write` would write.

    Raises:
        InputError: metadata that no file may have.
    """
    content, ordered = _laid_out(tensors, metadata)
    zeros = {name: "0" * 8 * _block_count(tensor.nbytes) for name, tensor in ordered.items()}
    return len(_packed(content, ordered, zeros)) + sum(tensor.nbytes for tensor in ordered.values())


def _laid_out(tensors: Mapping[str, TensorData], metadata: Metadata) -> tuple[Mapping[str, Any], dict[str, TensorData]]:
    """Returns what a file says, and its tensors in their order; InputError where it cannot be said."""
    content = checked(metadata) | {"format": FORMAT, "kind": metadata.kind}
    if not isinstance(metadata, StateMetadata):
        check_tensors(metadata, tensors)
    # Larger items first keeps every tensor aligned to its item size.
    return content, dict(sorted(tensors.items(), key=lambda item: (-ITEM_SIZE[item[1].dtype], item[0])))


def _packed(content: Mapping[str, Any], ordered: Mapping[str, TensorData], checksums: Mapping[str, str]) -> bytes:
    """Returns the beginning of a file, up to its tensors."""
    joined = crc(_described(content, ordered)) + "".join(checksums[name] for name in sorted(checksums))
    entries: dict[str, Any] = {"__metadata__": {"dvn": dumps(dict(content) | {"checksums": joined})}}
    end = 0
    for name, tensor in ordered.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    packed = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    packed += b" " * (-len(packed) % 8)
    return len(packed).to_bytes(8, "little") + packed


def _write_tensor(file: BinaryIO, name: str, tensor: TensorData) -> str:
    """Writes a tensor and returns the checksums of its blocks."""
    written, running, checksums = 0, 0, []
    for block in tensor.data() if callable(tensor.data) else [tensor.data]:
        # As an array's view, since a memoryview knows neither bfloat16 nor how to cast an empty array.
        array = block if isinstance(block, np.ndarray) else np.frombuffer(block, np.uint8)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        file.write(data)
        begin = 0
        while begin < len(data):
            end = min(begin + CHECKED - written % CHECKED, len(data))
            running = zlib.crc32(data[begin:end], running)
            written, begin = written + end - begin, end
            if written % CHECKED == 0:
                checksums.append(running)
                running = 0
    if written % CHECKED:
        checksums.append(running)
    if written != tensor.nbytes:
        raise ValueError(f"{name}: {written} bytes for {tensor.dtype} of shape {tensor.shape}")
    return "".join(f"{checksum:08x}" for checksum in checksums)


# What is there already


def read_run(header: Header[Any]) -> dict[str, Any]:
    """Returns the record of the run that a checkpoint comes of, which is beside it.

    Raises:
        InputError: the checkpoint is not trained, or the record is missing, unreadable or of another run, as that of a
            checkpoint in whose place another one was put.
    """
    path, training = run_record(header.path), header.metadata.training
    if training is None:
        raise InputError(f"'{header.path}' is not trained")
    try:
        record = loads(read_bytes(path, LARGEST_RECORD))
        is_own = record["recipe"] == training.recipe
    except (ValueError, LookupError, TypeError):
        raise InputError(f"'{path}' is no record of a run") from None
    if not is_own:
        raise InputError(f"'{path}' is the record of another run than that of '{header.path}'")
    return record


def is_trained(path: str | os.PathLike[str]) -> bool:
    """Returns whether a file is there and is a trained checkpoint."""
    with contextlib.suppress(InputError):
        metadata = read_header(path).metadata if os.path.exists(path) else None
        return isinstance(metadata, CheckpointMetadata) and metadata.training is not None
    return False


def is_slice(path: str | os.PathLike[str]) -> bool:
    """Returns whether a file is a slice."""
    with contextlib.suppress(InputError):
        return isinstance(read_header(path).metadata, SliceMetadata)
    return False


def holds_weights(path: str | os.PathLike[str]) -> bool:
    """Returns whether a file is there that begins as safetensors do: of dvn or not, whole or not."""
    if not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            lead = file.read(9)
            return lead[8:] == b"{" and 8 + int.from_bytes(lead[:8], "little") <= os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(f"cannot read '{path}': {reason(error)}") from None


def lost_with(path: Path) -> str | None:
    """Returns in words what would be lost if a file were replaced.

    None where there is none, or a fresh partition: the command that made that one makes it again.
    """
    if not os.path.exists(path):
        return None
    try:
        metadata = read_header(path).metadata
    except InputError as error:
        return str(error)
    if isinstance(metadata, SliceMetadata):
        return f"'{path}' is a slice"
    if metadata.training is None:
        return None
    names = [task.name for task in metadata.tasks]
    tasks = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    count = metadata.training.epochs
    epochs = "" if count is None else f"{count} epoch{'s' * (count != 1)}, "
    return f"'{path}' is a trained checkpoint (tasks: {tasks}; {epochs}written {written_at(path)})"
