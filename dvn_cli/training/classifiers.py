"""What the classifiers of a run start from, where its backbone starts from weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvn_cli.backbones import BackboneSpec
from dvn_cli.backbones.class_names import IMAGENET, class_numbers, folded
from dvn_cli.data import TaskData, batches, some
from dvn_cli.data.sample import BATCH
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.store.metadata import Task

Load = Callable[[BackboneSpec], tuple[nn.Module, Sequence[str]]]
"""Builds a backbone with the weights, and names the tensors that they lack."""


FITTED_ON = 2048
"""Training images of a task, at most, that its classifier is fitted to."""

PENALTY = 0.1
"""What the sum of the squares of the weights counts for beside the mean loss, with features of variance 1."""


@torch.no_grad()
def start(
    network: DeepVirtualNetwork,
    tensors: Mapping[str, Tensor],
    load: Load | None,
    is_loaded: bool,
    fitted: Callable[[int], Mapping[str, Tensor]],
    note: Callable[[str], None],
) -> None:
    """Sets the classifiers of all networks, each of which has its own.

    That of a task whose classes are those of the weights, by their names, starts from their rows; any other from a fit,
    or at zero, since a random one would spoil what the weights have learnt before it has learnt anything itself.

    Args:
        tensors: whole ones that the networks were cut from, by their names in the file.
        load: loads the weights into a backbone of other classes; None where nothing has them but the network.
        is_loaded: whether the classifier among the tensors is that of the weights.
        fitted: fits that of a task, by its number from 1; see `fit`.
        note: is told, in a line, what a task's classifier starts from.
    """
    own, classes = network.file_tensors(), network.partition.assignment.classes
    numbers, published = _published(network, tensors, load, is_loaded)
    for number, task in enumerate(network.tasks, 1):
        rows = _rows(task, numbers)
        if rows is None and is_loaded and len(task.classes) == network.partition.spec.num_classes:
            continue
        whole: Mapping[str, Tensor]
        if rows is not None:
            whole = {name: published[name].index_select(dim, torch.tensor(rows)) for name, dim in classes}
            origin = "from the weights of its classes"
        else:
            whole = fitted(number)
            origin = "fitted to features of its training images" if whole else "at zero"
        note(f"task '{task.name}': its classifier starts {origin}")
        for level in range(1, len(task.levels) + 1):
            for name, dim in classes:
                tensor = own[network.source(name, number, level)]
                if not whole:
                    tensor.zero_()
                    continue
                value = whole[name]
                for other, indices in enumerate(_indices(network, name, number, level)):
                    if other != dim:
                        value = value.index_select(other, indices)
                tensor.copy_(value)


@torch.no_grad()
def fit(
    network: DeepVirtualNetwork, number: int, data: TaskData, seed: int, device: torch.device
) -> Mapping[str, Tensor]:
    """Fits a task's classifier to what its top level makes of training images: logistic regression.

    Its lower levels start with as much of the same one as they have features, as they do with known classes' weights.

    Args:
        number: of the task, from 1.
        data: its images; some are drawn where there are more than `FITTED_ON`, and none is augmented.
        seed: of that.
        device: to compute on.

    Returns:
        Whole tensors by their names, zero for features that the top level lacks. None of them where the classifier is
        more than one linear layer, or reads more than a vector of each image.
    """
    task, shapes = network.tasks[number - 1], network.partition.shapes
    names = sorted((name for name, _ in network.partition.assignment.classes), key=lambda name: -len(shapes[name]))
    if [len(shapes[name]) for name in names] not in ([2], [2, 1]):
        return {}
    split, level = some(data.train, FITTED_ON, seed=seed), len(task.levels)
    top = network.virtual_network(number, level).eval().to(device)
    of_each = [
        (top.features(images).float().cpu(), labels.cpu())
        for images, labels in batches(split, BATCH, mean=data.mean, std=data.std, device=device)
    ]
    features, labels = torch.cat([each for each, _ in of_each]), torch.cat([each for _, each in of_each])
    if features.dim() != 2:
        return {}
    weight, bias = _regression(features, labels, len(task.classes), has_bias=len(names) == 2)
    whole = torch.zeros(len(weight), shapes[names[0]][1])
    whole[:, _indices(network, names[0], number, level)[1]] = weight
    return dict(zip(names, (whole, bias), strict=False))


@torch.enable_grad()
def _regression(features: Tensor, labels: Tensor, classes: int, has_bias: bool) -> tuple[Tensor, Tensor]:
    """Returns weight (classes, features) and bias (classes,) of a multinomial logistic regression."""
    mean, std = features.mean(0) if has_bias else torch.zeros(features.shape[1]), features.std(0, correction=0)
    scale = std.clamp(min=1e-6 * float(std.max()) + 1e-12)
    inputs = (features - mean) / scale
    weight = torch.zeros(classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=has_bias)
    optimizer = torch.optim.LBFGS([weight, bias] if has_bias else [weight], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight.T + bias, labels) + PENALTY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weight = weight.detach() / scale
    return weight, bias.detach() - weight @ mean


def _indices(network: DeepVirtualNetwork, name: str, number: int, level: int) -> list[Tensor]:
    """Which indices of a whole tensor a network has, along each dimension."""
    partition, task = network.partition, network.tasks[number - 1]
    runs = partition.assignment.runs(name, partition.shapes[name], task.units(level), len(task.classes))
    return [torch.cat([torch.arange(*run) for run in along]) for along in runs]


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
