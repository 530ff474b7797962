"""Files that commands write beside networks: what must not be lost for them is known before the work."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from dvn_cli.errors import InputError
from dvn_cli.files import check_writable
from dvn_cli.store.file import holds_weights

Input = str | os.PathLike[str] | None


def check_outputs(outputs: Mapping[str, Path | None], inputs: Iterable[Input]) -> None:
    """Refuses outputs that would replace, or add to, what is worth more than an older output.

    Args:
        outputs: files by the options that name them; None where one is not given.
        inputs: what the command reads, as far as it is files.

    Raises:
        InputError: one cannot be written, holds weights, is the record of a run or an input, or two are one file.
    """
    given = [(option, path) for option, path in outputs.items() if path is not None]
    read = list(inputs)
    for place, (option, path) in enumerate(given):
        check_writable(path)
        if os.path.exists(path):
            kept = "holds weights" if holds_weights(path) else "is the record of a run" if _is_record(path) else None
            if kept is not None:
                raise InputError(f"{option} cannot be '{path}', which {kept}: give another file")
        check_is_no_input(option, path, read)
        for other, earlier in given[:place]:
            if _same(path, earlier):
                raise InputError(f"{other} and {option} are both '{path}': give each a file of its own")


def check_is_no_input(option: str, path: Path, inputs: Iterable[Input]) -> None:
    """Raises InputError where the file that an option names is one that the command reads."""
    if any(each is not None and _same(path, each) for each in inputs):
        raise InputError(f"{option} cannot be '{path}', which this command reads: give another file")


def _is_record(path: Path) -> bool:
    return path.name.endswith(".run.json")


def _same(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two paths lead to one file, which need not be there yet."""
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them is not there
        return os.path.realpath(one) == os.path.realpath(other)
