"""What the classifiers of a run start from, where its backbone starts from weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dvn_cli.backbones import BackboneSpec
from dvn_cli.backbones.class_names import IMAGENET, class_numbers, folded
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.store.metadata import Task

Load = Callable[[BackboneSpec], tuple[nn.Module, Sequence[str]]]
"""Builds a backbone with the weights, and names the tensors that they lack."""


@torch.no_grad()
def start(
    network: DeepVirtualNetwork,
    tensors: Mapping[str, Tensor],
    load: Load | None,
    is_loaded: bool,
    note: Callable[[str], None],
) -> None:
    """Sets the classifiers of all networks, each of which has its own.

    That of a task whose classes are those of the weights, by their names, starts from their rows; any other at zero,
    since a random one would spoil what the weights have learnt before it has learnt anything itself.

    Args:
        tensors: whole ones that the networks were cut from, by their names in the file.
        load: loads the weights into a backbone of other classes; None where nothing has them but the network.
        is_loaded: whether the classifier among the tensors is that of the weights.
        note: is told, in a line, what a task's classifier starts from.
    """
    own, partition = network.file_tensors(), network.partition
    numbers, published = _published(network, tensors, load, is_loaded)
    for number, task in enumerate(network.tasks, 1):
        rows = _rows(task, numbers)
        if rows is None and is_loaded and len(task.classes) == partition.spec.num_classes:
            continue
        origin = "at zero" if rows is None else "from the weights of its classes"
        note(f"task '{task.name}': its classifier starts {origin}")
        for level in range(1, len(task.levels) + 1):
            for name, dim in partition.assignment.classes:
                tensor = own[network.source(name, number, level)]
                if rows is None:
                    tensor.zero_()
                    continue
                value = published[name].index_select(dim, torch.tensor(rows))
                runs = partition.assignment.runs(name, partition.shapes[name], task.units(level), len(task.classes))
                for other, along in enumerate(runs):
                    if other != dim:
                        value = value.index_select(other, torch.cat([torch.arange(*run) for run in along]))
                tensor.copy_(value)


def _rows(task: Task, numbers: Mapping[str, int]) -> list[int] | None:
    """The numbers of a task's classes among those of the weights; None where these lack one of them."""
    found = [numbers.get(folded(name), -1) for name in task.classes]
    return None if min(found) < 0 else found


def _published(
    network: DeepVirtualNetwork, tensors: Mapping[str, Tensor], load: Load | None, is_loaded: bool
) -> tuple[Mapping[str, int], Mapping[str, Tensor]]:
    """The numbers of the weights' classes by name, and tensors with their classifier by the backbone's names.

    Both are empty where no task has these classes, or nobody knows which they are.
    """
    spec = network.partition.spec
    numbers = {} if spec.hidden_layers else class_numbers(spec)
    if not any(_rows(task, numbers) for task in network.tasks):
        return {}, {}
    if spec.num_classes == IMAGENET and is_loaded:
        return numbers, {name: tensors[f"shared/{name}"] for name, _ in network.partition.assignment.classes}
    if load is None:
        return {}, {}
    module, lacking = load(replace(spec, num_classes=IMAGENET))
    return ({}, {}) if lacking else (numbers, module.state_dict())
