"""What can go wrong, with the exit code that each command ends with."""

import difflib
from collections.abc import Iterable


class DvnError(Exception):
    """It ran and the answer is no: a gate missed, a NaN loss, a full disk. The command exits with 1."""

    exit_code = 1


class InputError(DvnError):
    """It cannot be run as asked: the message says what is wrong and what would be right. Exits with 2."""

    exit_code = 2


def did_you_mean(word: object, choices: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` for the choice nearest to `word`, or nothing where none is near."""
    near = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""
