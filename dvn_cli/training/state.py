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
from dvn_cli.network import DTYPES

KIND = "training state"


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
    if not os.path.exists(path):
        raise InputError(f"there is nothing to resume: no file '{path}'")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})["dvn"])
        if metadata["kind"] != KIND or not {"recipe", "epochs_done", "history", "best"} <= metadata.keys():
            raise KeyError(KIND)
        return safetensors.torch.load_file(path), metadata
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, OSError):
        raise InputError(f"'{path}' is damaged, or not the state of a run: start again without --resume") from None
