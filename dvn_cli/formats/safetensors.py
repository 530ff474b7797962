"""dvn's own slice: weights by the backbone's names, which dvn runs; byte for byte what is cut without torch."""

import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from dvn_cli.loading import load
from dvn_cli.network import VirtualNetwork, on_float32, to_data
from dvn_cli.store.file import write as write_file


def write(network: VirtualNetwork, path: Path, fold_norms: bool) -> None:
    """Writes a network, which cannot have its norms folded."""
    write_file(path, to_data(network.state_dict()), network.metadata)


def read(path: str | os.PathLike[str], threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """Opens a file with dvn; torch's number of threads is the process's."""
    return on_float32(load(path))
