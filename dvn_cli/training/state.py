"""All that a run needs to go on where it was: one safetensors file, no pickle."""

import json
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dvn_cli import checkpoint
from dvn_cli.errors import InputError
from dvn_cli.files import written_at
from dvn_cli.network import DTYPES

KIND = "training state"

_DAMAGED = "'{path}' is damaged, or not the state of a run: start again with --force, or elsewhere with -o"


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes tensors and JSON-able metadata, atomically."""
    entries = {
        name: checkpoint.Tensor(DTYPES[t.dtype], tuple(t.shape), t.detach().cpu().contiguous().reshape(-1)
                                .view(torch.uint8).numpy())
        for name, t in tensors.items()
    }  # fmt: skip
    checkpoint.write(path, entries, {"format": checkpoint.FORMAT, "kind": KIND, **metadata})


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `save` wrote.

    Raises:
        InputError: there is none, or it is something else.
    """
    metadata = read_metadata(path)
    try:
        return safetensors.torch.load_file(path), metadata
    except (safetensors.SafetensorError, ValueError, OSError):
        raise InputError(_DAMAGED.format(path=path)) from None


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the metadata that `save` wrote. Errors as `load`."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})["dvn"])
        if metadata["kind"] != KIND or not {"recipe", "epochs_done", "history", "best"} <= metadata.keys():
            raise KeyError(KIND)
        return metadata
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, OSError):
        raise InputError(_DAMAGED.format(path=path)) from None


def lost_with(path: Path) -> str | None:
    """Returns in words what would be lost if a state were replaced; None where there is none."""
    if not path.exists():
        return None
    try:
        metadata = read_metadata(path)
        done, total = metadata["epochs_done"], metadata.get("total_epochs", metadata["recipe"]["epochs"])
        names = ", ".join(task["name"] for task in metadata["recipe"]["tasks"])
    except (InputError, KeyError, TypeError):
        return f"'{path}' is there, and is not the state of a run that this dvn reads"
    written = written_at(path)
    how_far = f"after epoch {done} of {total}, written {written}"
    return f"'{path}' is the state of an interrupted run (tasks: {names}; {how_far})"
