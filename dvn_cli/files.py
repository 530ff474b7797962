"""Files are read where they are files, and replaced whole or not at all; what prevents that is known before work."""

import contextlib
import datetime
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dvn_cli.errors import DvnError, InputError

try:
    import fcntl
except ImportError:  # Windows: a killed process's temporary file stays until someone removes it
    fcntl = None  # type: ignore[assignment]

_DESCRIPTOR = re.compile(r"/dev/(stdin|fd/\d+)|/proc/(self|\d+)/fd/\d+")
"""What shells call a pipe that they hand to a command, as for `<(...)`."""

_STREAM = re.compile(r"/dev/(stdin|stdout|stderr|fd/\d+)|/proc/.+/fd/\d+")
"""Names of what a process has open: to replace what one leads to takes a log from who writes it."""

LARGEST_RECORD = 64 << 20
"""Bytes of the record of a run."""

_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raises InputError unless a path leads to a regular file: to open a pipe or a device may wait for ever."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise InputError(f"there is no file '{path}'") from None
    except (OSError, ValueError) as error:  # ValueError: there is a NUL in it
        raise InputError(f"cannot read '{path}': {reason(error)}") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"cannot read '{path}': it is {_kind(mode)}")


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """Returns what is in a regular file, or in a pipe that the shell hands over (`/dev/stdin`, `<(...)`).

    Raises:
        InputError: it is neither, cannot be read, or holds more bytes than `limit`.
    """
    if not _DESCRIPTOR.fullmatch(os.fspath(path)):
        check_regular(path)
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"cannot read '{path}': {reason(error)}") from None
    return check_length(content, limit, f"'{path}'")


def check_length(content: bytes, limit: int, shown: str) -> bytes:
    """Returns what was read of a file, of which `limit` bytes and one more were asked for.

    Raises:
        InputError: it holds more than `limit`; the message calls it `shown`.
    """
    if len(content) > limit:
        raise InputError(f"cannot read {shown}: it is larger than {limit >> 20} MiB")
    return content


def _kind(mode: int) -> str:
    """Returns what a path leads to that is no regular file."""
    return "a folder" if stat.S_ISDIR(mode) else "not a regular file"


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a file to write in place of `path`, which changes when all is written and safe on disk, or not at all.

    Written as `.NAME.PID-XXXXXXXX.tmp` beside it and renamed. A failure removes the temporary file; that of a killed
    process is removed by the next write to the same folder.

    Raises:
        InputError: the folder is missing or not writable, or `path` is something else than a file.
        DvnError: writing failed, such as on a full disk.
    """
    if _STREAM.fullmatch(os.path.abspath(path)):
        raise InputError(f"cannot write '{path}': it is a stream of this process: give a file")
    shown, path = path, Path(os.path.realpath(path))  # through a link, the file it leads to is replaced
    try:
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"cannot write '{shown}': it is {_kind(path.stat().st_mode)}")
        _remove_leftovers(path.parent)
        file, temporary = _open_temporary(path)
    except OSError as error:
        if not os.path.isdir(path.parent):
            raise InputError(f"cannot write '{shown}': there is no folder '{path.parent}'") from None
        raise _not_opened(shown, error) from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl:  # as long as it is locked
                os.replace(temporary, path)
        if not fcntl:  # a system that renames no open file
            os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DvnError(f"cannot write '{shown}': {reason(error)}") from error
        raise
    if hasattr(os, "O_DIRECTORY"):
        with contextlib.suppress(OSError):  # the file is whole; some file systems cannot sync a folder
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _not_opened(path: str | os.PathLike[str], error: OSError) -> DvnError:
    """What to say of a file that cannot be opened to write; an InputError where another one would do."""
    as_asked = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)
    return (InputError if as_asked else DvnError)(f"cannot write '{path}': {reason(error)}")


def append(path: str | os.PathLike[str], content: bytes) -> None:
    """Adds lines to the end of a file, which need not be there, in one write: others may add to it meanwhile.

    Where the last line that is there has no end, it gets one. To add nothing tells whether it can be done. A full disk
    leaves the part that it had place for, after what was there.

    Raises:
        InputError: the file cannot be opened to write.
        DvnError: writing failed, such as on a full disk.
    """
    try:
        file = open(path, "a+b", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise _not_opened(path, error) from None
    try:
        with file:
            if content and file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                content = (b"" if file.read(1) == b"\n" else b"\n") + content
            while content:  # again where a disk had place for a part, to be told why
                content = content[file.write(content) :]
            os.fsync(file.fileno())
    except OSError as error:
        raise DvnError(f"cannot write '{path}': {reason(error)}") from error


def _open_temporary(path: Path) -> tuple[BinaryIO, Path]:
    """Opens a new file that is locked as long as this process lives and writes it."""
    while True:
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
        file = open(temporary, "xb")  # noqa: SIM115
        if fcntl:
            with contextlib.suppress(OSError):  # no locks on this file system: then nothing is taken for a leftover
                fcntl.flock(file, fcntl.LOCK_EX)
        if temporary.exists():  # not so if another process took it for a leftover before it was locked
            return file, temporary
        file.close()


def _remove_leftovers(folder: Path) -> None:
    """Removes temporary files that no living process holds; the lock, unlike a PID, knows of other hosts."""
    if not fcntl:
        return
    for leftover in os.listdir(folder):
        if _TEMPORARY.fullmatch(leftover):
            with contextlib.suppress(OSError), open(folder / leftover, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(file.name)


def put(source: Path, path: str | os.PathLike[str]) -> None:
    """Copies a file, or a folder of files, to `path`, which changes when all is safe on disk, or not at all.

    A folder takes the place of one that has no other files than it.

    Raises:
        InputError, DvnError: as `atomic`.
    """
    if source.is_file():
        with atomic(path) as file, open(source, "rb") as copied:
            shutil.copyfileobj(copied, file)
        return
    shown, path = path, Path(os.path.realpath(path))
    check_folder_writable(path.parent)
    if os.path.lexists(path):
        kind = _kind(path.stat().st_mode)
        others = sorted(set(os.listdir(path)) - set(os.listdir(source))) if path.is_dir() else []
        if others or not path.is_dir():
            raise InputError(f"cannot write '{shown}': it is {kind}{f' with {others[0]!r} in it' if others else ''}")
    beside = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        shutil.copytree(source, beside / "new")
        for written in (beside / "new").iterdir():
            with open(written, "rb") as file:
                os.fsync(file.fileno())
        if path.is_dir():
            os.replace(path, beside / "old")
        os.replace(beside / "new", path)
    except OSError as error:
        if (beside / "old").exists():
            os.replace(beside / "old", path)
        raise DvnError(f"cannot write '{shown}': {reason(error)}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def encoded(text: str) -> bytes:
    r"""Returns a text in UTF-8; a byte of a file's name that is none becomes `\udcff`, as JSON writes it too."""
    return text.encode(errors="backslashreplace")


def stem(path: Path) -> str:
    """Returns what files that come of a checkpoint are named after: `m.v1` of `m.v1.safetensors`, as of `m.v1`."""
    return path.name.removesuffix(".safetensors")


def run_record(checkpoint: Path) -> Path:
    """Returns where the record of the run is that a checkpoint comes of."""
    return checkpoint.with_name(f"{stem(checkpoint)}.run.json")


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises what `atomic` would raise before anything is written, such as at the start of long work.

    A folder that is missing is not made.
    """

    class Writable(Exception):
        pass

    with contextlib.suppress(Writable), atomic(path):
        raise Writable  # which leaves the context before it replaces anything


def check_folder_writable(folder: Path) -> None:
    """Raises InputError unless files can be written to a folder, or to one that is made where it is not yet."""
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not os.path.isdir(there):
        raise InputError(f"cannot write to the folder '{folder}': '{there}' is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to the folder '{folder}': '{there}' is not writable")


def written_at(path: Path) -> str:
    """Returns when a file was last written, by the local clock: `2026-11-25 14:10`."""
    return datetime.datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")


def reason(error: Exception) -> str:
    """Returns in one line what an error says, of the operating system's its own words alone."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0]
