"""Which elements of which tensors a stage of a run moves. What it does not move is bit-identical afterwards."""

from collections.abc import Iterable

import torch
from torch import Tensor

from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.training.methods import Network, Stage


def elements(network: DeepVirtualNetwork, networks: Iterable[Network]) -> dict[str, Tensor]:
    """Of each tensor that any of some networks uses, by its name in the file, a bool mask of the elements they use."""
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


def statistics(network: DeepVirtualNetwork, of: Network) -> set[str]:
    """The names in the file of the running statistics that a network would write to in train mode."""
    partition = network.partition
    names = (name for name, owner in partition.owners.items() if owner == "network")
    return {network.source(name, *of) for name in names if name not in partition.parameters}


class Moves:
    """What one stage moves.

    Attributes:
        train_mode: networks that run on each batch's own statistics and keep a running mean of them. Those whose
            statistics were learnt in an earlier stage are not among them: they run on these, and leave them be.
    """

    def __init__(self, network: DeepVirtualNetwork, stage: Stage) -> None:
        """Sets `requires_grad` of every parameter."""
        used, before = elements(network, stage.trained), elements(network, stage.before)
        self.train_mode = {of for of in stage.trained if statistics(network, of).isdisjoint(before)}
        self._still: list[tuple[Tensor, Tensor, Tensor]] = []
        for name, tensor in network.file_tensors().items():
            if name.rpartition("/")[2] not in network.partition.parameters:
                continue
            moved = used.get(name, torch.zeros(tensor.shape, dtype=torch.bool))
            if stage.moves == "new" and name in before:
                moved &= ~before[name]
            tensor.requires_grad_(bool(moved.any()))
            if moved.any() and not moved.all():
                self._still.append((tensor, moved.to(tensor.device), tensor.detach().clone()))

    @torch.no_grad()
    def restore(self) -> None:
        """Puts back the elements that are not moved: weight decay and momentum move what is merely without gradient."""
        for tensor, moved, before in self._still:
            tensor.copy_(torch.where(moved, tensor, before))
