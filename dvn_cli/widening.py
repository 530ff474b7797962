"""More units for networks that use all of theirs: a wider backbone, in which they are what they were."""

from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from dvn_cli.dividing import partition_backbone
from dvn_cli.errors import InputError
from dvn_cli.graph.compare import same_graph
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.partition import Partition
from dvn_cli.store.ownership import Assignment, Axis, Run


def add_units(network: DeepVirtualNetwork, count: int, seed: int) -> DeepVirtualNetwork:
    """Returns the same networks in a backbone with more units, which no task uses yet.

    The backbone is built wider in proportion. Its channels that a division into so many units gives to the first ones
    are the old ones, in their order; the others belong to the new units, and start from what the constructor gives.

    Args:
        count: how many units are added.
        seed: of their weights.

    Raises:
        InputError: the backbone cannot be built wider, or the old networks would not be what they are.
    """
    old = network.partition
    width = Fraction(*old.spec.width) * Fraction(old.units + count, old.units)
    spec = replace(old.spec, width=(width.numerator, width.denominator))
    torch.manual_seed(seed)
    module = spec.build()
    division = partition_backbone(spec, old.units + count, replace(old.rule, assign="even", widths="even"))
    refusal = InputError(
        f"no units can be added to {spec.name} in {old.units} units: they are not equally wide, or do not divide all"
    )
    if _old_shapes(old, division) != old.shapes:
        raise refusal
    places = {name: _places(old, division, name) for name in old.shapes}
    partition = Partition.of_module(module, spec, old.rule, _merged(old, division, places), old.owners)
    for task, level in network:
        own = network.tasks[task - 1]
        key = own.units(level), len(own.classes), own.input_size
        if not all(
            same_graph(old.network(*key, train).module, partition.network(*key, train).module)
            for train in (False, True)
        ):
            raise refusal
    tensors, state = network.file_tensors(), module.state_dict()
    for name, tensor in tensors.items():
        if "/level/" not in name:
            own_name = name.rpartition("/")[2]
            tensors[name] = _placed(state[own_name], places[own_name], tensor)
    new = range(old.units + 1, old.units + count + 1)
    tasks = [replace(task, order=(*task.order, *new)) for task in network.tasks]
    earlier = (*network.earlier, old.metadata())
    return DeepVirtualNetwork(partition, tasks, tensors, network.training_record, network.preprocessing, earlier)


def _old_shapes(old: Partition, division: Partition) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of the first units of a division, as many as there were."""
    assignment, classes = division.assignment, old.spec.num_classes
    units = range(1, old.units + 1)
    return {name: assignment.shape(name, shape, units, classes) for name, shape in division.shapes.items()}


def _places(old: Partition, division: Partition, name: str) -> list[Tensor]:
    """Where in each dimension of a wide tensor the old indices are."""
    units, classes = range(1, old.units + 1), old.spec.num_classes
    runs = division.assignment.runs(name, division.shapes[name], units, classes)
    return [torch.cat([torch.arange(*run) for run in along]) for along in runs]


def _merged(old: Partition, division: Partition, places: dict[str, list[Tensor]]) -> Assignment:
    """The old units in their places, and the new ones where the division has them."""
    axes: list[Axis] = []
    tensors: dict[str, list[int | None]] = {}
    for name, along in places.items():
        tensors[name] = []
        both = zip(old.assignment.tensors[name], division.assignment.tensors[name], along, strict=True)
        for before, after, place in both:
            if before is None or after is None:
                tensors[name].append(None)
                continue
            known = [_runs(place, runs) for runs in old.assignment.axes[before]]
            axis = (*known, *division.assignment.axes[after][old.units :])
            if axis not in axes:
                axes.append(axis)
            tensors[name].append(axes.index(axis))
    entries = {name: tuple(numbers) for name, numbers in tensors.items()}
    return Assignment(division.units, tuple(axes), entries, division.assignment.classes)


def _runs(place: Tensor, runs: tuple[Run, ...]) -> tuple[Run, ...]:
    """Runs of old indices, where they are now, as long as they can be."""
    if not runs:
        return ()
    now = torch.cat([place[start:stop] for start, stop in runs])
    parts = torch.tensor_split(now, (now.diff() != 1).nonzero().flatten() + 1)
    return tuple((int(part[0]), int(part[-1]) + 1) for part in parts)


def _placed(wide: Tensor, places: list[Tensor], tensor: Tensor) -> Tensor:
    """A wide tensor with the old one in its places."""
    wide = wide.clone()
    wide[torch.meshgrid(*places, indexing="ij") if places else ()] = tensor.detach()
    return wide
