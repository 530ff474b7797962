"""What networks learn from in place of labels: larger levels of their task, or a network of a file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dvn_cli.data.spec import locate
from dvn_cli.errors import InputError
from dvn_cli.loading import load
from dvn_cli.network import DeepVirtualNetwork, VirtualNetwork, on_float32
from dvn_cli.store.metadata import Task, TaskLevel
from dvn_cli.training.losses import as_seen_by
from dvn_cli.training.methods import Stage


class FileTeacher(nn.Module):
    """A frozen network of a file, which maps a task's images to logits of that task's classes.

    Attributes:
        sums: of each of its tensors, float64 (tensors,), by which another file is told from it.
    """

    columns: Tensor

    def __init__(self, network: VirtualNetwork, task: Task) -> None:
        super().__init__()
        self.network, self.task = network.eval().requires_grad_(False), task
        self.sums = torch.stack([tensor.detach().cpu().double().sum() for tensor in network.state_dict().values()])
        self.register_buffer("columns", torch.tensor([network.task.classes.index(name) for name in task.classes]))

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (batch, classes) for images (batch, channels, height, width), normalised for the task."""
        logits = on_float32(self.network)(as_seen_by(images, self.task, self.network.task))
        return logits.index_select(1, self.columns)


Teacher = TaskLevel | FileTeacher | None
"""Of a network: another one of the same step (or of before the stage, which holds an old task's network), one of a
file, or None: labels."""


def teachers(
    stage: Stage, networks: Sequence[TaskLevel], teacher: str | None, files: Mapping[int, FileTeacher]
) -> dict[TaskLevel, Teacher]:
    """Returns the networks of a step in the order in which they are computed, each with what it learns from.

    Args:
        stage: says which networks learn, and which are held by those of before.
        networks: those of the step.
        teacher: as the recipe has it.
        files: by number of task the network of a file that teaches it.
    """
    learn = [network for network in networks if network in stage.learn]
    if teacher in ("top", "next"):
        learn.sort(key=lambda network: -network.level)
    found: dict[TaskLevel, Teacher] = {}
    for network in learn:
        larger = [other for other in found if other.task == network.task]
        if teacher in ("top", "next") and larger:
            found[network] = larger[0 if teacher == "top" else -1]
        else:
            found[network] = files.get(network.task)
    return {**found, **{student: held for student, held in stage.distilled if student in networks}}


def file_teachers(
    file: str, base: Path, network: DeepVirtualNetwork, numbers: Sequence[int], device: torch.device
) -> dict[int, FileTeacher]:
    """Returns the network of a file that teaches each of some tasks, by number: with its classes, of the most units.

    Args:
        file: a slice or a checkpoint; a relative path starts from `base`.
        network: all networks that learn.
        numbers: of the tasks that are taught.
        device: where they are taught.

    Raises:
        InputError: the file cannot be opened, or has no network for a task.
    """
    opened, channels = load(locate(file, base)), network.partition.spec.in_chans
    known = [opened.task] if isinstance(opened, VirtualNetwork) else opened.tasks
    found = {}
    for number in numbers:
        task = network.tasks[number - 1]
        places = [place for place, of in enumerate(known, 1) if set(task.classes) <= set(of.classes)]
        if not places:
            raise InputError(f"teacher '{file}' has no task with the classes of '{task.name}'")
        place = max(places, key=lambda place: known[place - 1].levels[-1])  # of as many units the first one
        of_task = opened
        if isinstance(of_task, DeepVirtualNetwork):
            of_task = of_task.virtual_network(place, len(known[place - 1].levels))
        if of_task.metadata.backbone.in_chans != channels:
            raise InputError(f"teacher '{file}' takes images of {of_task.metadata.backbone.in_chans} channels")
        found[number] = FileTeacher(of_task, task).to(device)
    return found
