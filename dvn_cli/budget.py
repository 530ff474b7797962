"""Which level of a task fits a budget: by counts, and by what `dvn eval`, `dvn bench` and training have recorded."""

import contextlib
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dvn_cli.errors import DvnError, InputError
from dvn_cli.files import LARGEST_RECORD, read_bytes, run_record
from dvn_cli.report import limits, short
from dvn_cli.store.file import Header, read_run
from dvn_cli.store.metadata import CheckpointMetadata
from dvn_cli.store.schema import check_version, loads, parse
from dvn_cli.store.slicing import count, slice_size

_DECIMAL = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}
_BYTES = {f"{prefix}b": factor for prefix, factor in _DECIMAL.items()} | {"": 1, "kib": 2**10, "mib": 2**20}
_UNITS = {"bytes": _BYTES, "params": _DECIMAL, "macs": _DECIMAL, "latency": {"ms": 1, "s": 1e3, "us": 1e-3}}
"""What may follow a number, in small letters, and how many bytes, elements, operations or milliseconds it means."""

_EXAMPLES = {"bytes": "2MB", "params": "1.5M", "macs": "300M", "latency": "5ms"}

PLAIN = "safetensors"
"""The format whose files are cut and run by dvn itself; what names no format is of it."""

_SCHEMA = 1
"""The newest `schema_version` of documents of `dvn eval` and `dvn bench` that is read here."""

_SOURCES = {"latency": "bench CHECKPOINT --all", "accuracy": "eval CHECKPOINT"}
"""What measures a figure of every task; `dvn bench` as it is takes the first one."""


@dataclass(frozen=True)
class KnownLevel:
    """What is known of a network.

    Attributes:
        level: from 1.
        params: elements of its parameters.
        bytes: of its file; None where nobody asked.
        macs: multiply-accumulates of one image; None where nobody asked.
        latency: the median of a forward pass, in ms; None where none is recorded.
        accuracy: top-1, per cent; None where none is recorded.
        accuracy_interval: its 95 % interval.
    """

    level: int
    params: int
    bytes: int | None = None
    macs: int | None = None
    latency: float | None = None
    accuracy: float | None = None
    accuracy_interval: tuple[float, float] | None = None

    def describe(self, what: str, exactly: bool = False) -> str:
        """Says one of the figures in words, `1.9MB` for one, and an accuracy with its interval."""
        words = in_words(what, getattr(self, what), exactly)
        return f"{words} ({limits(self.accuracy_interval)})" if what == "accuracy" and self.accuracy_interval else words


@dataclass(frozen=True)
class _Recorded:
    """What a document of results says of a network."""

    task: int
    name: str
    level: int
    params: int
    top1: float | None = None
    top1_interval: tuple[float, float] | None = None
    latency_ms: Mapping[str, float] | None = None
    format: str | None = None
    file: str | None = None


@dataclass(frozen=True)
class Choice:
    """A level, and why it is that.

    Attributes:
        level: the one.
        why: in words.
        levels: of its task, all that are known.
    """

    level: KnownLevel
    why: str
    levels: tuple[KnownLevel, ...]

    @property
    def neighbours(self) -> list[KnownLevel]:
        """The level below, itself and the one above, as far as there are any."""
        return [each for each in self.levels if abs(each.level - self.level.level) <= 1]


def amount(what: str, text: str, option: str) -> float:
    """Reads a budget of `bytes`, `params`, `macs` or `latency`, such as `2MB`, `1.5M` or `5ms`, given by an option.

    Raises:
        InputError: it is none.
    """
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if parts is None or parts[2].lower() not in _UNITS[what] or not float(parts[1]):
        raise InputError(f"{option} is an amount such as {_EXAMPLES[what]}, not '{text}'")
    return float(parts[1]) * _UNITS[what][parts[2].lower()]


def in_words(what: str, value: float | None, exactly: bool = False) -> str:
    """Says a figure with its unit, rounded or not."""
    if value is None:
        return "-"
    if exactly:
        unit = {"latency": "ms", "accuracy": "%"}.get(what, what)
        return f"{value:,.12g} {unit}"
    words = {"latency": f"{value:.2f} ms", "accuracy": f"{value:.1f} %", "bytes": f"{short(value)}B"}
    return words.get(what) or f"{short(value)} {what}"


def known_levels(
    header: Header[CheckpointMetadata],
    task: int,
    results: Sequence[str | os.PathLike[str]] = (),
    counted: Collection[str] = (),
    file_format: str = PLAIN,
) -> list[KnownLevel]:
    """Returns what is known of a task's levels.

    Args:
        header: a checkpoint's. Accuracies are also taken from the record of its run beside it, see `read_run`.
        task: from 1.
        results: files of what `dvn eval` and `dvn bench` found, as JSON; later ones count where several say it.
        counted: which of `bytes` (as safetensors) and `macs` to count; for the latter the backbone is built.
        file_format: whose latencies are taken; rows that name no format are of safetensors.

    Raises:
        InputError: a file cannot be read, holds nothing of the task, or is of other networks, or of several files that
            are not told apart.
    """
    return _levels(header, task, _recorded(header, [task], results)[task], counted, file_format)


def known_networks(
    header: Header[CheckpointMetadata], results: Sequence[str | os.PathLike[str]] = ()
) -> dict[int, list[KnownLevel]]:
    """Returns what is known of the levels of all tasks, by their numbers; see `known_levels`.

    Raises:
        InputError: as `known_levels`; of the tasks, a file need hold results of one only.
    """
    rows = _recorded(header, header.metadata.numbered_tasks, results)
    return {task: _levels(header, task, of_task) for task, of_task in rows.items()}


def _levels(
    header: Header[CheckpointMetadata],
    task: int,
    rows: Sequence[tuple[str | None, _Recorded]],
    counted: Collection[str] = (),
    file_format: str = PLAIN,
) -> list[KnownLevel]:
    """What is known of a task's levels, from what `_recorded` says of it."""
    entry, found = header.metadata.tasks[task - 1], []
    for level in range(1, len(entry.levels) + 1):
        params, latency, accuracy, interval = count(header, task, level).params, None, None, None
        for path, row in (each for each in rows if each[1].level == level):
            if row.params != params and path is None:
                continue
            if row.params != params:
                raise InputError(
                    f"'{path}' is of other networks: level {level} of task '{entry.name}' has {row.params:,} "
                    f"parameters there, {params:,} in '{header.path}'"
                )
            if (row.format or PLAIN) == file_format:
                latency = (row.latency_ms or {}).get("p50", latency)
            if row.top1 is not None:
                accuracy, interval = row.top1, row.top1_interval
        size = slice_size(header, task, level) if "bytes" in counted else None
        macs = _macs(header, task, level) if "macs" in counted else None
        found.append(KnownLevel(level, params, size, macs, latency, accuracy, interval))
    return found


def unread_record(header: Header[CheckpointMetadata]) -> str | None:
    """Says why the record beside a checkpoint, NAME.run.json, does not count; None where it does, or is not there."""
    try:
        if run_record(header.path).exists():
            read_run(header)
    except InputError as error:
        return str(error)
    return None


def missing_record(what: str, task: str, file_format: str = PLAIN, unread: str | None = None) -> InputError:
    """What to say where a figure of a task is wanted and none is recorded; see `unread_record`."""
    why = f", and {unread}" if unread and what == "accuracy" else ""
    other = what == "latency" and file_format != PLAIN
    command = _SOURCES[what] + f" --formats {file_format}" * other
    return InputError(
        f"no {what} of task '{task}'{f' as {file_format}' * other} is recorded{why}: give --results FILE of "
        f"`dvn {command} --results-file FILE`{', without -b: it is that of one image' * (what == 'latency')}"
    )


def _recorded(
    header: Header[CheckpointMetadata], tasks: Collection[int], results: Sequence[str | os.PathLike[str]]
) -> dict[int, list[tuple[str | None, _Recorded]]]:
    """What is recorded of tasks, by their numbers: the later, the more it counts, with its file where one was given."""
    found: dict[int, list[tuple[str | None, _Recorded]]] = {task: [] for task in tasks}
    names = {task: header.metadata.tasks[task - 1].name for task in tasks}
    documents: list[tuple[str | None, tuple[_Recorded, ...]]] = []
    with contextlib.suppress(InputError):  # it may be of a run that has not ended, and nobody gave it
        documents.append((None, _rows(read_run(header), run_record(header.path))))
    documents += [(str(path), _rows(_read(path), path)) for path in results]
    for path, rows in documents:
        if path is not None and not any(names.get(row.task) == row.name for row in rows):
            whose = "any task" if len(names) > 1 else f"task '{next(iter(names.values()))}'"
            raise InputError(f"'{path}' holds no results of {whose} of '{header.path}'")
        for task, name in names.items():
            of_task = [row for row in rows if (row.task, row.name) == (task, name)]
            own = of_task if path is None else _of_checkpoint(of_task, header.path, path)
            found[task] += [(path, row) for row in own]
    return found


def _read(path: str | os.PathLike[str]) -> Any:
    raw = read_bytes(path, LARGEST_RECORD)
    try:
        return loads(raw)
    except ValueError:
        raise _no_results(path) from None


def _rows(document: Any, path: str | os.PathLike[str]) -> tuple[_Recorded, ...]:
    """What a document of results, or the record of a run, from a file says of networks."""
    check_version(path, document, _SCHEMA)
    try:
        rows = document["results"] if "results" in document else document["test"]
        recorded = parse(tuple[_Recorded, ...], rows)
        if document.get("batch_size", 1) != 1:  # a latency is that of one image here
            recorded = tuple(replace(row, latency_ms=None) for row in recorded)
    except (KeyError, TypeError, AttributeError, InputError):
        raise _no_results(path) from None
    return recorded


def _no_results(path: str | os.PathLike[str]) -> InputError:
    return InputError(f"'{path}' holds no results of `dvn eval` or `dvn bench` as JSON")


def _of_checkpoint(rows: Sequence[_Recorded], checkpoint: Path, document: str) -> Sequence[_Recorded]:
    """Returns of a document's rows of a task those of a checkpoint, where it has rows of several files.

    A name is enough: a document may come from a machine with other folders. Where none is the checkpoint's, they are of
    its slices, or it had another name: then one file of each network is all that there may be.
    """
    path = os.path.abspath(checkpoint)
    own = [row for row in rows if row.file is not None and os.path.abspath(row.file) == path]
    own = own or [row for row in rows if row.file is not None and Path(row.file).name == checkpoint.name]
    files: dict[tuple[int, str], set[str | None]] = {}
    for row in own or rows:
        files.setdefault((row.level, row.format or PLAIN), set()).add(row.file)
    for (level, _), of_one in files.items():
        if len(of_one) > 1:
            names = ", ".join(sorted("a file without a name" if each is None else f"'{each}'" for each in of_one))
            raise InputError(
                f"'{document}' has level {level} of task '{rows[0].name}' of several files: {names}; give results of "
                f"'{checkpoint}' alone"
            )
    return own or rows


def _macs(header: Header[CheckpointMetadata], task: int, level: int) -> int:
    from dvn_cli.partition import Partition
    from dvn_cli.units.count import macs

    entry, partition = header.metadata.tasks[task - 1], Partition.restore(header.metadata)
    units, classes = entry.units(level), len(entry.classes)
    image = (partition.spec.in_chans, *entry.input_size)
    return macs(partition.network(units, classes, entry.input_size), partition.tensors(units, classes), image)


def choose(
    levels: Sequence[KnownLevel],
    limits: Mapping[str, float],
    least: float | None = None,
    name: str = "",
    file_format: str = PLAIN,
    unread: Callable[[], str | None] = lambda: None,
) -> Choice:
    """Chooses the largest level within limits; where only an accuracy is asked for, the smallest that has it.

    Args:
        levels: of a task.
        limits: the most of `bytes`, `params`, `macs` or `latency`.
        least: accuracy in per cent.
        name: of the task.
        file_format: that the files are of.
        unread: asked, where no accuracy is recorded, for what `unread_record` says.

    Raises:
        InputError: what is limited is not known of any level.
        DvnError: no level will do; the message says which comes nearest.
    """
    wanted = {**limits, **({} if least is None else {"accuracy": least})}
    for what in wanted:
        if all(getattr(level, what) is None for level in levels):
            raise missing_record(what, name, file_format, unread())
    known = [level for level in levels if all(getattr(level, what) is not None for what in wanted)]

    def asked(exactly: Collection[str] = ()) -> str:
        return " and ".join(
            f"at {'least' if what == 'accuracy' else 'most'} {in_words(what, bound, what in exactly)}"
            for what, bound in wanted.items()
        )

    def excess(level: KnownLevel) -> float:
        """How many times as much as is allowed a level takes of what it has too much of."""
        over = [getattr(level, what) / most for what, most in limits.items()]
        return max([*over, *([least / max(level.accuracy or 0, 1e-9)] if least else [])], default=0)

    fitting = [level for level in known if excess(level) <= 1]
    if not fitting:
        near = min(known, key=excess)
        alike = [what for what in wanted if in_words(what, getattr(near, what)) == in_words(what, wanted[what])]
        has = ", ".join(near.describe(what, what in alike) for what in wanted)
        raise DvnError(
            f"no level of task '{name}' has {asked(alike)}: the nearest is level {near.level}, which has {has}"
        )
    chosen = fitting[-1] if limits else fitting[0]
    why = f"the {'largest' if limits else 'smallest'} with {asked()}"
    return Choice(chosen, why, tuple(levels))
