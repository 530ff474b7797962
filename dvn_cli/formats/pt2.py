"""torch's own archive of an exported program: `torch.export.load(file).module()(images)`, with torch alone."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dvn_cli.formats.program import description, program
from dvn_cli.network import VirtualNetwork


def write(network: VirtualNetwork, path: Path, fold_norms: bool) -> None:
    """Writes a network for batches of any size; classes and preprocessing are extra files of the archive."""
    exported = program(network, fold_norms)
    for node in exported.graph.nodes:
        for key in ("nn_module_stack", "from_node"):  # of where it was exported: equal networks give equal bytes
            node.meta.pop(key, None)
    exported.example_inputs = None  # they would be pickled
    torch.export.save(exported, path, extra_files=description(network))


def read(path: Path, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """Opens a file; torch's number of threads is the process's."""
    module = torch.export.load(path).module()
    return lambda images: module(images)  # the module says that it trains, which an exported one cannot
