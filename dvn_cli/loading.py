"""From a file to the networks in it."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from dvn_cli.errors import InputError
from dvn_cli.network import DTYPES, DeepVirtualNetwork, VirtualNetwork
from dvn_cli.partition import Partition
from dvn_cli.store import shapes
from dvn_cli.store.file import AnyHeader, Header, read_header
from dvn_cli.store.metadata import CheckpointMetadata, DividedBackbone, Metadata
from dvn_cli.store.slicing import BLOCK


def load(path: str | os.PathLike[str]) -> DeepVirtualNetwork | VirtualNetwork:
    """Returns what a file holds, in eval mode on the CPU.

    Args:
        path: a slice (then one network, an ordinary `nn.Module` whose `state_dict` has the backbone's own names), or a
            checkpoint (then all of them: `load(path).virtual_network(task, level)`).

    Raises:
        InputError: missing, truncated or foreign file, or one that the installed libraries build another backbone for.

    Example:
        >>> network = dvn_cli.load("dvn-task2-level1.safetensors")  # doctest: +SKIP
        >>> logits = network(images)  # doctest: +SKIP
    """
    return from_file(read_header(path))


def from_file(header: AnyHeader) -> DeepVirtualNetwork | VirtualNetwork:
    """Returns what an open file holds, in eval mode on the CPU.

    Raises:
        InputError: it is damaged, or the installed libraries build another backbone than the one that was divided.
    """
    metadata, partition = header.metadata, restored(header)
    tensors = read_tensors(header)
    if isinstance(metadata, CheckpointMetadata):
        known = metadata.training, metadata.preprocessing, metadata.earlier
        network = DeepVirtualNetwork(partition, metadata.tasks, tensors, *known).eval()
        network.random = metadata.random
        return network
    task = metadata.task
    origin = partition.origin(metadata.kept, len(task.classes), task.input_size)
    return VirtualNetwork(metadata, tensors, origin.network(train=False), origin)


def restored(header: AnyHeader) -> Partition:
    """Returns the partition that a file is of.

    Raises:
        InputError: it is damaged, or the installed libraries build another backbone than the one that was divided.
    """
    partition = Partition.restore(header.metadata)
    try:
        shapes.check_tensors(header.metadata, header.tensors, partition.shapes)
    except InputError as error:
        raise InputError(f"'{header.path}' is damaged: {error}") from None
    return partition


def read_tensors(header: Header[Metadata]) -> dict[str, Tensor]:
    """Reads all tensors of a file, each once, and not mapped, so that memory holds them once and the file may go.

    Raises:
        InputError: they cannot be read, or are not what was written.
    """
    aliases = header.metadata.aliases if isinstance(header.metadata, DividedBackbone) else {}
    tensors = {}
    for name, stored in header.tensors.items():
        if name in aliases:
            continue
        tensors[name] = empty(header, name, stored.shape)
        array = tensors[name].reshape(-1).view(torch.uint8).numpy()
        for start in range(0, stored.nbytes, BLOCK):
            array[start : start + BLOCK] = header.read(name, start, min(start + BLOCK, stored.nbytes))
    return tensors


def empty(header: Header[Metadata], name: str, shape: Sequence[int]) -> Tensor:
    """Returns a tensor to be filled, of the dtype of one of a file's.

    Raises:
        InputError: torch has no such dtype.
    """
    stored = header.tensors[name].dtype
    if stored not in _TORCH:
        raise InputError(f"'{header.path}' cannot be opened: its tensor '{name}' has dtype {stored}")
    return torch.empty(tuple(shape), dtype=_TORCH[stored])


_TORCH = {name: dtype for dtype, name in DTYPES.items()}
"""torch's dtypes by safetensors' names."""
