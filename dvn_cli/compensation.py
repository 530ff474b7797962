"""What makes up, within what is private to a network, for the channels that its level lacks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from dvn_cli.graph.consumers import Consumer, consumers, observe
from dvn_cli.graph.narrow import Narrowed
from dvn_cli.graph.stepwise import Stepwise
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.partition import Partition

Batches = Sequence[Tensor]
"""Normalised images, each float (batch, channels, height, width)."""


def with_private_biases(partition: Partition) -> Partition:
    """Returns the same partition with biases that every network has of its own; see `biases`."""
    return replace(partition, owners={**partition.owners, **dict.fromkeys(biases(partition), "network")})


def biases(partition: Partition) -> list[str]:
    """Names the biases that take the mean of what a network lacks.

    They are those of layers that read channels which units divide, and that no norm with running statistics follows,
    which would hold that mean.
    """
    whole = partition.network(range(1, partition.units + 1), partition.spec.num_classes)
    return [bias for _, _, bias in _folding(partition, whole)]


def statistics(partition: Partition) -> list[str]:
    """Names the running statistics of a backbone."""
    private = (name for name, owner in partition.owners.items() if owner == "network")
    return [name for name in private if name not in partition.parameters and partition.dtypes[name].is_floating_point]


def arguments(network: Narrowed) -> dict[fx.Node, str]:
    """The arguments of a network but for the images, and the backbone's names of them."""
    return dict(zip(network.module.graph.find_nodes(op="placeholder")[1:], network.names, strict=True))


def _folding(partition: Partition, network: Narrowed) -> list[tuple[Consumer, str, str]]:
    """The layers of a network whose bias takes the mean of what is lacking, and the names of their weight and bias."""
    names = arguments(network)
    return [
        (consumer, names[consumer.weight], names[consumer.bias])
        for consumer in consumers(network.module.graph)
        if consumer.weight in names and consumer.bias in names and consumer.is_plain and not consumer.is_normalised
        if len(consumer.weight.users) == len(consumer.bias.users) == 1  # else the bias is of several layers
        if partition.assignment.tensors[names[consumer.weight]][consumer.weight_dim] is not None
    ]


@torch.no_grad()
def compensate(network: DeepVirtualNetwork, images: Mapping[int, Batches]) -> None:
    """Sets what compensates, in the tensors that the networks have of their own.

    The bias of a layer takes the mean of the channels that are lacking, as the task's top level computes them, times
    the weights that read them there. Running statistics are then estimated anew with the network's own images. Levels
    of all units lack nothing, and stay what the backbone is.

    Args:
        images: of each task, by its number from 1.
    """
    for number, batches in images.items():
        _fold(network, number, batches)
        for level, units in enumerate(network.tasks[number - 1].levels, 1):
            if units == network.partition.units:
                continue
            for name, value in estimated(network, number, level, batches).items():
                network.file_tensors()[network.source(name, number, level)].copy_(value)


@torch.no_grad()
def estimated(network: DeepVirtualNetwork, task: int, level: int, batches: Batches) -> dict[str, Tensor]:
    """Returns the running statistics that a network has on some images, by the backbone's names."""
    narrowed = network.narrowed(task, level, training=False)
    side_by_side = Stepwise(narrowed.module, runs(network, task, level, batches))
    names = arguments(narrowed)
    return {names[node]: value for node, value in side_by_side.estimate_statistics()}


def _fold(network: DeepVirtualNetwork, task: int, batches: Batches) -> None:
    """Puts the means of what the lower levels of a task lack into their biases."""
    top, own = len(network.tasks[task - 1].levels), network.file_tensors()
    whole = network.narrowed(task, top, training=False)
    folding = _folding(network.partition, whole) if top > 1 else []
    watched = [consumer for consumer, _, _ in folding]
    readings = observe(whole.module, watched, runs(network, task, top, batches)) if watched else []
    tensors = network.tensors(task, top)
    for (_, weight, bias), reading in zip(folding, readings, strict=True):
        read = tensors[weight].double().reshape(*tensors[weight].shape[:2], -1).sum(2)
        for level in range(1, top):
            rows, columns = (present(network, task, level, weight, dim) for dim in (0, 1))
            lacking = torch.ones(len(reading.mean), dtype=torch.bool)
            lacking[columns] = False
            value = tensors[bias] + read[:, lacking] @ reading.mean[lacking]
            own[network.source(bias, task, level)].copy_(value[rows])


def present(network: DeepVirtualNetwork, task: int, level: int, name: str, dim: int) -> Tensor:
    """Where along a dimension of the top level's tensor the indices are that a level has of it."""
    entry, partition = network.tasks[task - 1], network.partition
    theirs, ours = (
        partition.assignment.runs(name, partition.shapes[name], entry.units(each), len(entry.classes))[dim]
        for each in (len(entry.levels), level)
    )
    return torch.searchsorted(*(torch.cat([torch.arange(*run) for run in each]) for each in (theirs, ours)))


def runs(network: DeepVirtualNetwork, task: int, level: int, batches: Batches) -> Iterator[list[Tensor]]:
    """Yields the arguments of a network in eval mode, for each batch."""
    names, tensors = network.narrowed(task, level, training=False).names, network.tensors(task, level)
    return ([images, *(tensors[name] for name in names)] for images in batches)
