"""Whether networks cost what they did: parameters, bytes and MACs exactly, latency where it is of the same machine."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dvn_cli import report
from dvn_cli.errors import DvnError, InputError
from dvn_cli.files import LARGEST_RECORD, read_bytes, stem
from dvn_cli.store.schema import check_version, dumps, loads, parse

SCHEMA_VERSION = 1
"""Of the document of `dvn bench --json`, which `bench.schema.json` describes; it rises when a key goes or changes."""

EXACT = ("params", "bytes", "macs")


@dataclass(frozen=True)
class NetworkCost:
    """What one network costs, as `dvn bench --json` has it."""

    file: str
    name: str
    level: int
    params: int
    bytes: int
    macs: int
    latency_ms: Mapping[str, float]
    format: str | None = None

    def key(self, by_file: bool = False) -> tuple[str, int, str | None, str | None]:
        """What tells it from the others of its document."""
        return self.name, self.level, self.format, self.file if by_file else None

    def where(self, by_file: bool) -> str:
        """The same in words."""
        form = f" as {self.format}" if self.format else ""
        return f"task '{self.name}', level {self.level}{form}" + (f" of '{self.file}'" if by_file else "")


@dataclass(frozen=True)
class Costs:
    """A document of `dvn bench --json`: the machine, its settings, and the networks."""

    host: str
    device: str
    device_name: str
    torch: str
    threads: int
    batch_size: int
    channels_last: bool
    results: tuple[NetworkCost, ...]

    @property
    def machine(self) -> list[Any]:
        """What two documents have in common whose latencies can be compared."""
        return [getattr(self, each.name) for each in fields(self) if each.name != "results"]


@dataclass(frozen=True)
class Comparison:
    """A network of the baseline, and what it costs now: None where it is gone.

    Attributes:
        latency_ratio: now over then, of the medians; None on another machine or with other settings.
        by_file: whether its file, too, tells it from others.
    """

    before: NetworkCost
    after: NetworkCost | None
    latency_ratio: float | None
    by_file: bool = False

    @property
    def differences(self) -> dict[str, tuple[int, int]]:
        """What was and is not the same: then and now."""
        pairs = ((key, getattr(self.before, key), getattr(self.after, key, 0)) for key in EXACT)
        return {key: (then, now) for key, then, now in pairs if then != now}

    def to_dict(self) -> dict[str, Any]:
        """As `dvn bench --json` shows it."""
        differences = {key: list(pair) for key, pair in self.differences.items()} if self.after else None
        key = {key: getattr(self.before, key) for key in ("file", "name", "level", "format")}
        return {**key, "differences": differences, "latency_ratio": self.latency_ratio}

    def __str__(self) -> str:
        differences = ", ".join(f"{key} {then:,} -> {now:,}" for key, (then, now) in self.differences.items())
        return f"{self.before.where(self.by_file)}: {differences if self.after else 'it is gone'}"


def read(path: str | os.PathLike[str]) -> Costs:
    """Reads a document of `dvn bench --json`.

    Raises:
        InputError: it is missing, no such document, or one of a newer dvn.
    """
    raw = read_bytes(path, LARGEST_RECORD)
    try:
        content = loads(raw)
    except ValueError as error:
        raise _no_document(path, error) from None
    check_version(path, content, SCHEMA_VERSION)
    try:
        return parse(Costs, content)
    except InputError as error:
        raise _no_document(path, error) from None


def _no_document(path: str | os.PathLike[str], error: Exception) -> InputError:
    return InputError(f"'{path}' is no document of `dvn bench --json` of this version: {error}")


def compare(
    before: Costs,
    document: Mapping[str, Any],
    every: bool = True,
    level: int | None = None,
    formats: Collection[str | None] = (None,),
) -> tuple[list[Comparison], list[str]]:
    """Compares the networks of a baseline with those of a document of now, by their tasks, levels and formats.

    Where these are not enough to tell the networks of either apart, as those of two checkpoints, so do their files.

    Args:
        before: the baseline.
        document: of what was measured.
        every: all tasks of the baseline are asked for, not only those of which networks were measured.
        level: the only one asked for.
        formats: those asked for; None is that of networks as dvn runs them.

    Returns:
        A comparison for each network of the baseline that is asked for, and in lines what is not compared.
    """
    now = parse(Costs, loads(dumps(document)))
    # Not always: the networks of a checkpoint are compared with its slices, too.
    by_file = any(len({network.key() for network in each.results}) < len(each.results) for each in (before, now))
    found = {network.key(by_file): network for network in now.results}
    names = {network.name for network in (before if every else now).results}
    comparisons = []
    for network in before.results:
        if network.name not in names or network.format not in formats or level not in (None, network.level):
            continue
        after = found.get(network.key(by_file))
        same = after is not None and now.machine == before.machine
        ratio = after.latency_ms["p50"] / network.latency_ms["p50"] if same and after else None
        comparisons.append(Comparison(network, after, ratio, by_file))
    known = {network.key(by_file) for network in before.results}
    lines = [f"{each.where(by_file)} is not in the baseline" for each in now.results if each.key(by_file) not in known]
    unasked = [f"task '{each.name}'" for each in before.results if each.name not in names]
    others = [each.format for each in before.results if each.format not in formats]
    unasked += ["networks without --formats" if each is None else f"format {each}" for each in others]
    lines += [
        f"{what} was not asked for: what the baseline has of it is not compared" for what in dict.fromkeys(unasked)
    ]
    return comparisons, lines


def table(comparisons: Sequence[Comparison]) -> report.FittedTable:
    """A row for each network of a baseline."""
    made = report.table("task", "level", *EXACT, "p50 ratio", title="\nagainst the baseline", text=1)
    for one in comparisons:
        cells = [
            "gone" if one.after is None else f"{one.differences[key][1] - one.differences[key][0]:+,}"
            if key in one.differences else "same"
            for key in EXACT
        ]  # fmt: skip
        ratio = "-" if one.latency_ratio is None else f"{one.latency_ratio:.2f}"
        level = f"{one.before.level} {one.before.format or ''}".strip()
        name = f"{stem(Path(one.before.file))} {one.before.name}" if one.by_file else one.before.name
        made.add_row(name, level, *cells, ratio)
    return made


def check(comparisons: Sequence[Comparison]) -> None:
    """Judges what came of a comparison with a baseline.

    Raises:
        InputError: nothing of what was measured is in the baseline.
        DvnError: a network is gone, or one of `EXACT` is not what it was.
    """
    if all(one.after is None for one in comparisons):
        raise InputError("none of the networks that were measured is in the baseline")
    wrong = [one for one in comparisons if one.after is None or one.differences]
    if wrong:
        raise DvnError(f"{wrong[0]} ({len(wrong)} of {len(comparisons)} networks are not the baseline's)")
