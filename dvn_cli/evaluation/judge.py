"""An evaluation judged: what is asked is looked up before anything runs, and compared with what came of it."""

from collections.abc import Callable, Sequence
from pathlib import Path

from dvn_cli.evaluation import baseline as baselines
from dvn_cli.evaluation.gates import Floor, Gate, Named, Verdict, check_rows, choose_floors
from dvn_cli.evaluation.measure import Evaluation, Loaded

TOLERANCE = 0.5
"""Points of accuracy that may be lost, where nobody says how many."""


class Judge:
    """Judges the networks of `measure.evaluate`, to which `opens` is given as its `opened`.

    Args:
        floors: least accuracies.
        baseline: a file to compare with.
        tolerance: points of accuracy that may be lost, `TOLERANCE` by default.
        undecided: see `Gate`.
        save_baseline: a file to write a new baseline to.
        task, level: what is evaluated is limited to.
        note: is told, in a line, which networks nothing is asked of.

    Raises:
        InputError: the baseline is missing or none.
    """

    def __init__(
        self,
        floors: Sequence[Floor],
        baseline: Path | None,
        tolerance: float | None,
        undecided: Verdict,
        save_baseline: Path | None,
        task: str | None,
        level: int | None,
        note: Callable[[str], None],
    ) -> None:
        self._floors, self._undecided, self._saves, self._note = floors, undecided, save_baseline, note
        self._baseline = None if baseline is None else baselines.read(baseline)
        self._tolerance = TOLERANCE if tolerance is None else tolerance
        self._task, self._level = task, level
        self.loaded: Sequence[Loaded] = ()
        self._of_network: list[Floor | None] = []

    def opens(self, loaded: Sequence[Loaded]) -> None:
        """Finds the floor of every network, and that the baseline has any of those that are asked for.

        Raises:
            InputError: a floor is of no network, the baseline has none, or a new one is to hold a network twice.
        """
        networks = [
            Named(task, opened.header.metadata.numbered_tasks[task].name, level)
            for opened in loaded
            for task, level in opened.networks
        ]
        partial = self._task is not None or self._level is not None
        self._of_network, lines = choose_floors(self._floors, networks, partial)
        if self._baseline is not None:
            baselines.asked_for(self._baseline, self._task, self._level)
            lines += baselines.missing(self._baseline, networks)
        if self._saves is not None:
            baselines.check_distinct(networks)
        for line in lines:
            self._note(line)
        self.loaded = loaded

    def judge(self, rows: Sequence[Evaluation]) -> Gate:
        """Judges what came of the networks."""
        checks = check_rows(rows, self._of_network)
        if self._baseline is not None:
            checks += baselines.compare(self._baseline, self.loaded, rows, self._tolerance, self._task, self._level)
        floor_of_all = next((floor.accuracy for floor in self._floors[::-1] if floor.selector == "all"), None)
        return Gate(checks, self._undecided, floor_of_all)

    def save(self, rows: Sequence[Evaluation]) -> None:
        """Writes the new baseline, if one is wanted.

        Raises:
            InputError, DvnError: as `files.atomic`.
        """
        if self._saves is not None:
            baselines.save(self._saves, self.loaded, rows)
            self._note(f"{self._saves} is written")
