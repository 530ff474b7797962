"""Whether networks are good enough: what is asked of each of them, and what came of it."""

import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import yaml

from dvn_cli.errors import DvnError, InputError, did_you_mean, shortened
from dvn_cli.files import read_bytes
from dvn_cli.overrides import LARGEST, read_yaml
from dvn_cli.store.lookup import matching_tasks

if TYPE_CHECKING:
    from dvn_cli.evaluation.measure import Evaluation

Verdict = Literal["passed", "failed", "undecided"]


class Named(NamedTuple):
    """A network by the number, from 1, and the name of its task, and its level from 1."""

    task: int
    name: str
    level: int


class UndecidedError(DvnError):
    """There are too few images to tell whether the answer is yes or no. The command exits with 3."""

    exit_code = 3


# Floors


@dataclass(frozen=True)
class Floor:
    """The least accuracy, in per cent, of the networks of a task, of a level, of both, or of all."""

    accuracy: float
    task: str | None = None
    level: int | None = None

    @property
    def selector(self) -> str:
        """The networks, as the command line has them."""
        parts = {"task": self.task, "level": self.level}
        return ",".join(f"{key}={value}" for key, value in parts.items() if value is not None) or "all"

    def applies(self, network: Named, tasks: Collection[tuple[int, str]]) -> bool:
        """Whether it is a network's; `tasks` are the numbers and names of all."""
        own = self.task is None or network[:2] in matching_tasks(tasks, self.task)
        return own and self.level in (None, network.level)


def parse_floor(text: str) -> Floor:
    """Reads what `--min-accuracy` says: `74.5`, `task=2:74.5`, `level=1:74.5` or `task=2,level=1:74.5`.

    Raises:
        InputError: it is none of these, or no accuracy in per cent.
    """
    selector, _, accuracy = text.rpartition(":")
    return _floor("--min-accuracy", selector, accuracy)


def read_floors(path: str | os.PathLike[str]) -> list[Floor]:
    """Reads a YAML file that maps networks, as `--min-accuracy` has them, or `all`, to accuracies.

    Raises:
        InputError: it is missing, no such mapping, or has something else for a network or an accuracy.
    """
    raw = read_bytes(path, LARGEST)
    try:
        content = read_yaml(raw.decode())
    except (InputError, UnicodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read '{path}': {error}") from None
    if not isinstance(content, dict) or not content:
        raise InputError(f"'{path}' holds no floors: give lines such as `all: 70` and `task=2,level=1: 74.5`")
    return [_floor(f"'{path}'", str(selector), accuracy) for selector, accuracy in content.items()]


def _floor(where: str, selector: str, accuracy: Any) -> Floor:
    pattern = r"(?:all)?|(?:task=(?P<task>.+?))?(?:(?:^|,)level=(?P<level>[1-9][0-9]{0,8}))?"
    match = re.fullmatch(pattern, selector)
    if match is None:
        raise InputError(f"{where}: give task=T, level=L, task=T,level=L or all, not '{shortened(selector)}'")
    percent = accuracy_in_percent(where, accuracy)
    return Floor(percent, match["task"], int(match["level"]) if match["level"] else None)


def accuracy_in_percent(where: str, accuracy: Any) -> float:
    """Returns an accuracy in per cent, a number or its text; `where` it is given is for the message.

    Raises:
        InputError: it is none, or looks like a share of 1.
    """
    try:
        percent = float(accuracy)
    except (TypeError, ValueError):
        percent = math.nan
    if isinstance(accuracy, bool) or not 0 <= percent <= 100:
        raise InputError(f"{where} is in per cent, 0 to 100, not {shortened(str(accuracy))}")
    if 0 < percent < 1:
        raise InputError(f"{where} is in per cent: give {100 * percent:g} for {percent:g}")
    return percent


def choose_floors(
    floors: Sequence[Floor], networks: Sequence[Named], partial: bool = False
) -> tuple[list[Floor | None], list[str]]:
    """Returns the floor of each network, and in lines which networks have none and which floors are of none.

    The floor of a task and level goes before that of a task or of a level, and these before that of all; of two alike,
    the later one counts.

    Args:
        floors: what is asked.
        networks: those that are evaluated.
        partial: there are others that are not.

    Raises:
        InputError: a floor is of no network, or if `partial`, all of them are; or its task means two.
    """
    tasks = {network[:2] for network in networks}
    of_network: list[Floor | None] = [None] * len(networks)
    of_none = []
    for floor in sorted(floors, key=lambda floor: (floor.task is not None) + (floor.level is not None)):
        places = [place for place, network in enumerate(networks) if floor.applies(network, tasks)]
        if not places and not partial:
            near = did_you_mean(floor.task, [name for _, name in tasks]) if floor.task else ""
            raise InputError(f"there is a floor for {floor.selector}, and no such network{near}")
        of_none += [] if places else [floor.selector]
        for place in places:
            of_network[place] = floor
    words = f"no network of {'; '.join(of_none)} is evaluated"
    if of_none and len(of_none) == len(floors):
        raise InputError(f"{words}: none of the floors would be checked")
    lacking = [network for network, floor in zip(networks, of_network, strict=True) if floor is None]
    lines = [f"task '{network.name}', level {network.level} has no floor" for network in lacking if floors]
    return of_network, lines + ([f"{words}: what is asked of it is not checked"] if of_none else [])


# Verdicts


@dataclass(frozen=True)
class Check:
    """What was asked of a network, and what came of it.

    Attributes:
        kind: `loss`, `min_accuracy` or `baseline`.
        network: which.
        file: that it came from; None of one that is gone.
        asked: in words, such as `top-1 >= 74.5 %`.
        found: in words.
        verdict: what came of it.
        margin: points between what was found and the bound; the check with the lowest one is told first.
        figures: of the comparison, as JSON has them.
    """

    kind: Literal["loss", "min_accuracy", "baseline"]
    network: Named
    file: str | None
    asked: str
    found: str
    verdict: Verdict
    margin: float = -math.inf
    figures: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        own = {key: getattr(self, key) for key in ("kind", "file", "asked", "found", "verdict")}
        return {**self.network._asdict(), **own, **self.figures}

    def __str__(self) -> str:
        where = f"task '{self.network.name}', level {self.network.level}" + (f" of '{self.file}'" if self.file else "")
        return f"{where}: {self.found}"


def check_rows(rows: Sequence["Evaluation"], floors: Sequence[Floor | None]) -> list[Check]:
    """Checks that no loss is infinite or no number, and that every network reaches its floor."""
    checks = []
    for row, floor in zip(rows, floors, strict=True):
        network = Named(row.task, row.name, row.level)
        finite = math.isfinite(row.loss)
        if not finite:
            checks.append(Check("loss", network, row.file, "a finite loss", "the loss is not a number", "failed"))
        if floor is not None:
            passed = finite and row.top1 >= floor.accuracy
            # Rounded down, as 94.996 is no 95; 100 times 4.6 is 459.99999999999994.
            down = math.floor(row.top1 * 100 + 1e-9) / 100
            below = f"top-1 is {down:.2f} %, not {floor.accuracy:g} %"
            found = f"top-1 is {row.top1:.2f} %" if passed else below
            verdict: Verdict = "passed" if passed else "failed"
            asked, margin = f"top-1 >= {floor.accuracy:g} %", row.top1 - floor.accuracy
            figures = {"top1": row.top1, "min_accuracy": floor.accuracy}
            checks.append(Check("min_accuracy", network, row.file, asked, found, verdict, margin, figures))
    return checks


@dataclass(frozen=True)
class Gate:
    """All checks of an evaluation.

    Attributes:
        checks: of its networks, and of those that are gone.
        undecided: what a check that too few images leave undecided counts as: `passed`, `failed`, or neither.
        min_accuracy: the floor of all networks, where there is one.
    """

    checks: Sequence[Check]
    undecided: Verdict = "undecided"
    min_accuracy: float | None = None

    def counts_as(self, check: Check) -> Verdict:
        """A check's verdict, or what an undecided one counts as."""
        return self.undecided if check.verdict == "undecided" else check.verdict

    @property
    def verdict(self) -> Verdict:
        """The worst of the verdicts."""
        verdicts = {self.counts_as(check) for check in self.checks}
        return "failed" if "failed" in verdicts else "undecided" if "undecided" in verdicts else "passed"

    @property
    def in_words(self) -> str:
        """The verdict, and that undecided checks are part of it, where these count as something else."""
        lenient = any(check.verdict == "undecided" for check in self.checks) and self.undecided != "undecided"
        return f"{self.verdict}, undecided counted as {self.undecided}" if lenient else self.verdict

    def raise_for_verdict(self) -> None:
        """Raises what the command ends with: nothing where all passed.

        Raises:
            DvnError: a check failed; the message tells the worst one.
            UndecidedError: none failed, and one is undecided.
        """
        if self.verdict == "passed":
            return
        wrong = [check for check in self.checks if self.counts_as(check) == self.verdict]
        worst = min(wrong, key=lambda check: check.margin)
        few, many = (len({(check.network, check.file) for check in checks}) for checks in (wrong, self.checks))
        error = DvnError if self.verdict == "failed" else UndecidedError
        raise error(f"{worst} ({few} of {many} networks {'fail' if self.verdict == 'failed' else 'are undecided'})")
