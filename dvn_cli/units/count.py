"""What networks cost: parameters, multiply-accumulates, and how much of it the units divide."""

import math
from collections.abc import Mapping

import torch
from torch.utils.flop_counter import FlopCounterMode

from dvn_cli.graph.narrow import Narrowed
from dvn_cli.graph.shape_check import shape_check
from dvn_cli.store.file import Header
from dvn_cli.store.metadata import CheckpointMetadata, SliceMetadata
from dvn_cli.store.slicing import count, cut


def params_and_density(
    header: Header[CheckpointMetadata] | Header[SliceMetadata], task: int | None = None, level: int | None = None
) -> tuple[int, float]:
    """Returns the parameters of one network, and their share of those of its task's top level; from the header alone.

    Args:
        header: a checkpoint's, with a task and level, both from 1; or a slice's, without them. Of a slice's top level
            the size follows from what its metadata says of the units that it lacks.

    Raises:
        InputError: as `slicing.count`.
    """
    params, metadata = count(header, task, level).params, header.metadata
    if isinstance(metadata, CheckpointMetadata):
        assert task is not None
        return params, params / count(header, task, len(metadata.tasks[task - 1].levels)).params
    own, most = metadata.task, frozenset(metadata.task.units(len(metadata.task.levels)))
    units = {unit for unit in range(1, metadata.units + 1) if unit in metadata.kept or unit not in most}
    top = sum(
        math.prod(metadata.assignment.whole_shape(name, header.tensors[name].shape, units, len(own.classes)))
        for name, entry in metadata.tensors.items()
        if entry.trainable
    )
    return params, params / top


def divided_share(header: Header[CheckpointMetadata], task: int, level: int) -> float:
    """Returns the share of a network's parameters that units own; the rest is in every network of the task.

    Args:
        header: a checkpoint's.
        task: from 1.
        level: from 1.

    Raises:
        InputError: as `slicing.cut`.
    """
    metadata = header.metadata
    owned = metadata.assignment.owned_counts(metadata.tasks[task - 1].units(level))
    params = shared = 0
    for name, tensor in cut(header, task, level).items():
        if metadata.tensors[name].trainable:
            params += tensor.elements
            shared += metadata.assignment.shared_elements(name, tensor.shape, owned)
    return 1 - shared / params


def macs(
    network: Narrowed, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], image_shape: tuple[int, int, int]
) -> int:
    """Returns the multiply-accumulates of one image: half of what `torch.utils.flop_counter` counts, run without data.

    Args:
        network: the eval form of a narrow network.
        tensors: shape and dtype of each of its tensors, see `Partition.tensors`.
        image_shape: channels, height and width of the image.
    """
    image = torch.empty(1, *image_shape, device="meta")
    with FlopCounterMode(display=False) as counter:
        shape_check(network, tensors, image)
    return counter.get_total_flops() // 2
