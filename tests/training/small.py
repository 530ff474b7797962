"""The smallest run there is: two tasks of the digits, two units, four steps."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dvn_cli.data import TaskData
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.training import recipes
from dvn_cli.training.experiment import prepare
from dvn_cli.training.loop import Run
from dvn_cli.training.session import Session

CPU = torch.device("cpu")


def data(**keys: Any) -> dict[str, Any]:
    return {"source": "digits", "train_images": 40, "test_images": 20, "validation": 0.2, **keys}


def content(**keys: Any) -> dict[str, Any]:
    return {
        "backbone": {"name": "wrn_10_1", "in_chans": 1},
        "units": 2,
        "tasks": [
            {"name": "low", "data": data(classes="0-4", augment="crop", pad=1)},
            {"name": "all", "data": data()},
        ],
        "epochs": 2,
        "batch_size": 16,
        "optimizer": {"lr": 0.05},
        "schedule": {"name": "step", "milestones": [0.5]},
        "threads": 1,
        **keys,
    }


def session(
    folder: Path, *overrides: str, resume: bool = False, force: bool = False, note: Any = None, **keys: Any
) -> Session:
    """A session of the small recipe whose checkpoint is `dvn.safetensors` in a folder."""
    read = recipes.resolved(deepcopy(content(**keys)), overrides, "small.yaml")
    output, told = folder / "dvn.safetensors", note or nothing
    return prepare(recipes.parse(read, "small.yaml"), folder, output, CPU, resume, force=force, note=told)


def trained(folder: Path, *overrides: str, resume: bool = False, **keys: Any) -> Session:
    made = session(folder, *overrides, resume=resume, force=not resume, **keys)
    made.train(nothing, nothing)
    return made


def nothing(*_: Any) -> None:
    pass


class Stopped(Exception):
    """In place of a kill."""


def stop_after(epoch: int, step: int = 0) -> tuple[Callable[[Run], None], Callable[[Run, int], None]]:
    """The callbacks of a run that ends after an epoch, and so many steps of the next."""

    def after_epoch(run: Run) -> None:
        if run.epochs_done == epoch and not step:
            raise Stopped

    def after_step(run: Run, now: int) -> None:
        if run.epochs_done == epoch and now == step:
            raise Stopped

    return after_epoch, after_step


def history(run: Run) -> list[dict[str, Any]]:
    """What does not depend on the clock."""
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in run.history]


def copied(network: DeepVirtualNetwork) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.file_tensors().items()}


def labels_of(images: Tensor, data: TaskData) -> Tensor:
    """Found by their pixels: nothing is augmented."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    known = ((data.train.images / 255 - mean) / std).flatten(1)
    distance = torch.cdist(images.flatten(1).double(), known.double())
    assert distance.min(1).values.max() < 1e-3
    return data.train.labels[distance.argmin(1)]


def indices(network: DeepVirtualNetwork, name: str, task: int, level: int) -> list[Tensor]:
    """Along each dimension of a full tensor what a network has, from the runs that the file lists."""
    entry, shape = network.tasks[task - 1], network.partition.shapes[name]
    runs = network.partition.assignment.runs(name, shape, entry.units(level), len(entry.classes))
    return [torch.cat([torch.arange(start, stop) for start, stop in along]) for along in runs]


def gathered(network: DeepVirtualNetwork, copies: Mapping[tuple[int, int], nn.Module]) -> dict[str, Tensor]:
    """The gradients of copies of networks, scattered back to where they came from by the file's description."""
    gradients = {name: torch.zeros_like(tensor) for name, tensor in network.file_tensors().items()}
    for (task, level), copy in copies.items():
        for name, parameter in copy.named_parameters():
            assert parameter.grad is not None
            source = network.source(name, task, level)
            if "/level/" in source:
                gradients[source] += parameter.grad
            else:
                place = torch.meshgrid(*indices(network, name, task, level), indexing="ij")
                gradients[source][place] += parameter.grad
    return gradients


class Dropping(nn.Sequential):
    """A backbone of one's own, `small:Dropping`, that draws random numbers."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        layers = nn.Conv2d(in_chans, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Dropout(0.3)
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


class Frozen(Dropping):
    """Its first layer and norm stay as they are."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__(num_classes, in_chans)
        for layer in (self[0], self[1]):
            layer.requires_grad_(False)


def all_frozen(num_classes: int, in_chans: int) -> nn.Module:
    return Frozen(num_classes, in_chans).requires_grad_(False)
