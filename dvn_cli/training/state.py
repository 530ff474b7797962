"""The state of an interrupted run: all that it needs to go on where it was."""

import os
from pathlib import Path

from torch import Tensor

from dvn_cli.errors import InputError
from dvn_cli.files import written_at
from dvn_cli.loading import read_tensors
from dvn_cli.store.file import Header, read_state
from dvn_cli.store.metadata import StateMetadata


def read(path: str | os.PathLike[str]) -> Header[StateMetadata]:
    """Opens a state and reads its header.

    Raises:
        InputError: there is none, or it is something else.
    """
    try:
        return read_state(path)
    except InputError as error:
        raise _damaged(path, error) from None


def tensors(state: Header[StateMetadata]) -> dict[str, Tensor]:
    """Reads the tensors of a state. Errors as `read`."""
    try:
        return read_tensors(state)
    except InputError as error:
        raise _damaged(state.path, error) from None


def _damaged(path: str | os.PathLike[str], error: InputError) -> InputError:
    return InputError(
        f"'{path}' is damaged, or not the state of a run: start again with --force, or elsewhere with -o ({error})"
    )


def lost_with(path: Path) -> str | None:
    """Returns in words what would be lost if a state were replaced; None where there is none."""
    if not os.path.exists(path):
        return None
    try:
        metadata = read(path).metadata
        total = metadata.total_epochs or metadata.recipe["epochs"]
        names = ", ".join(task["name"] for task in metadata.recipe["tasks"])
    except (InputError, KeyError, TypeError):
        return f"'{path}' is there, and is not the state of a run that this dvn reads"
    how_far = f"after {metadata.place} of {total}, written {written_at(path)}"
    return f"'{path}' is the state of an interrupted run (tasks: {names}; {how_far})"
