"""ExecuTorch's program for XNNPACK, that is for ARM and x86 CPUs: `Module("x.pte").forward(image)` on a device."""

from collections.abc import Callable
from pathlib import Path

from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import Tensor

from dvn_cli.formats.program import description, one_by_one, program
from dvn_cli.network import VirtualNetwork


def write(network: VirtualNetwork, path: Path, fold_norms: bool) -> None:
    """Writes a network for one image at a time; classes and preprocessing are methods that return text."""
    exported = program(network, fold_norms, batch=1)
    texts = description(network)
    lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()], constant_methods=texts)
    path.write_bytes(lowered.to_executorch().buffer)


def read(path: Path, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """Opens a file with ExecuTorch's Python runtime, which sets its threads itself."""
    method = Runtime.get().load_program(path).load_method("forward")
    return one_by_one(lambda image: method.execute([image])[0].clone())
