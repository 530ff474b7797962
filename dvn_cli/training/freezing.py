"""Which elements of which tensors a stage of a run trains. The others are frozen: bit-identical afterwards."""

from collections.abc import Iterable

import torch
from torch import Tensor

from dvn_cli.errors import InputError
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.store.metadata import TaskLevel
from dvn_cli.training.methods import Stage


def elements(network: DeepVirtualNetwork, networks: Iterable[TaskLevel]) -> dict[str, Tensor]:
    """Returns bool masks of the elements that any of some networks uses, by the names of their tensors in the file."""
    used: dict[str, Tensor] = {}
    tensors = network.file_tensors()
    for task, level in networks:
        entry = network.tasks[task - 1]
        for name, whole in network.partition.shapes.items():
            source = network.source(name, task, level)
            shape = tensors[source].shape
            mask = torch.ones(shape, dtype=torch.bool)
            if "/level/" not in source:
                assignment, classes = network.partition.assignment, len(entry.classes)
                for dim, runs in enumerate(assignment.runs(name, whole, entry.units(level), classes)):
                    along = torch.zeros(shape[dim], dtype=torch.bool)
                    for start, stop in runs:
                        along[start:stop] = True
                    mask &= along.view(-1, *(1,) * (len(shape) - dim - 1))
            used[source] = mask | used[source] if source in used else mask
    return used


def statistics(network: DeepVirtualNetwork, task: int, level: int) -> set[str]:
    """Returns the names in the file of the running statistics that a network writes to in train mode."""
    partition = network.partition
    names = (name for name, owner in partition.owners.items() if owner == "network")
    return {network.source(name, task, level) for name in names if name not in partition.parameters}


class Freezing:
    """Freezes what one stage does not train.

    Attributes:
        train_mode: networks that run on each batch's own statistics and keep a running mean of them. Those whose
            statistics were learnt in an earlier stage are not among them: they run on these, and leave them be.
    """

    def __init__(self, network: DeepVirtualNetwork, stage: Stage) -> None:
        """Sets `requires_grad` of every parameter.

        Raises:
            InputError: the backbone's own code freezes all that the stage would train.
        """
        used, before = elements(network, stage.trained), elements(network, stage.before)
        self.train_mode = {each for each in stage.trained if statistics(network, *each).isdisjoint(before)}
        self._frozen: list[tuple[Tensor, Tensor, Tensor]] = []
        for name, tensor in network.file_tensors().items():
            if name.rpartition("/")[2] not in network.partition.parameters:
                continue
            trainable = used.get(name, torch.zeros(tensor.shape, dtype=torch.bool))
            if stage.trainable == "new" and name in before:
                trainable &= ~before[name]
            if name.rpartition("/")[2] in network.partition.frozen:
                trainable.zero_()
            tensor.requires_grad_(bool(trainable.any()))
            if trainable.any() and not trainable.all():
                self._frozen.append((tensor, trainable.to(tensor.device), tensor.detach().clone()))
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise InputError(f"{network.partition.spec.name} has requires_grad=False on all that is to be trained")

    def mask_gradients(self) -> None:
        """Takes frozen elements out of gradients: norms of a tensor, or of all together, are of what is trained."""
        for tensor, trainable, _ in self._frozen:
            if tensor.grad is not None:
                tensor.grad.mul_(trainable)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the frozen elements back: weight decay and momentum change what merely has no gradient."""
        for tensor, trainable, before in self._frozen:
            tensor.copy_(torch.where(trainable, tensor, before))
