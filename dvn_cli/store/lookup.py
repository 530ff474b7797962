"""Which of some tasks is meant by a number or a name."""

from collections.abc import Collection, Iterable, Sequence

from dvn_cli.errors import InputError, did_you_mean
from dvn_cli.store.metadata import Task


def find_task(tasks: Sequence[Task], task: str | int) -> int:
    """Returns the number, from 1, of one of a checkpoint's tasks: see `matching_tasks`.

    Raises:
        InputError: there is no such task, or the text means one by its number and another by its name.
    """
    names = [each.name for each in tasks]
    numbered = list(enumerate(names, 1))
    matching = matching_tasks(numbered, task)
    if matching:
        return matching[0][0]
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
    by_name = [each for each in tasks if each[1] == text and not isinstance(task, int)]
    by_number = [each for each in tasks if _is_number(text, each[0])]
    if not by_name and not by_number and colon:
        by_name = [each for each in tasks if kind == "name" and each[1] == rest]
        by_number = [each for each in tasks if kind == "number" and _is_number(rest, each[0])]
    if by_name and by_number and set(by_name) != set(by_number):
        both = _listed(dict.fromkeys([*by_number, *by_name]))
        raise InputError(
            f"task '{text}' is the number of one task and the name of another ({both}): write number:{text} or "
            f"name:{text}"
        )
    return by_name or by_number


def _is_number(text: str, number: int) -> bool:
    return text.isdecimal() and text.lstrip("0") == str(number)  # not as an int, which 5,000 digits are too many for


def _listed(tasks: Iterable[tuple[int, str]]) -> str:
    return ", ".join(f"{number} '{name}'" for number, name in tasks)
