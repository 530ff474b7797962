"""Accuracy and loss of networks on test images."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dvn_cli.data import Chosen, DataSpec, Reader, Split, batches, to_device
from dvn_cli.errors import InputError, enough_memory
from dvn_cli.evaluation.images import choose_images, named, prepared
from dvn_cli.network import DeepVirtualNetwork, VirtualNetwork, from_file
from dvn_cli.store.file import AnyHeader, read_header
from dvn_cli.store.metadata import SliceMetadata, Task, TaskLevel, check_level, find_task, matching_tasks
from dvn_cli.store.schema import dumps
from dvn_cli.units.count import params_and_density

Progress = Callable[[int], None]
"""Told of every batch how many images it had."""


@dataclass(frozen=True)
class Result:
    """What a network makes of a split.

    Attributes:
        top1: accuracy in per cent.
        top5: share of the images, in per cent, whose class is among the five likeliest; None for a task of five
            classes or fewer, where that says nothing.
        loss: mean cross-entropy over the images; NaN where one of their logits is not finite.
        images: how many there were.
    """

    top1: float
    top5: float | None
    loss: float
    images: int


@dataclass(frozen=True)
class Row:
    """A network, by number of task and level from 1, and its result.

    Attributes:
        units: that it is made of, by number from 1.
        params: elements of its trainable parameters.
        density: their share of those of its task's top level.
        file: that it came from, where it came from one.
    """

    task: int
    name: str
    level: int
    units: tuple[int, ...]
    params: int
    density: float
    result: Result
    file: str | None = None

    def __str__(self) -> str:
        return f"task '{self.name}', level {self.level}" + (f" of '{self.file}'" if self.file else "")


# Measuring


def evaluate(
    network: Callable[[Tensor], Tensor],
    split: Split,
    task: Task,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Result:
    """Runs a network over every image of a split once. The counts are exact, whatever the batch size.

    Of equal logits the first class is taken. An image with a logit that is not finite counts as wrong.

    Args:
        network: maps normalised images (batch, channels, height, width) to logits (batch, classes); in eval mode and on
            the device.
        split: the images; on the device if they have room there, else copied batch by batch.
        task: whose mean and std the images are normalised by.
        batch_size: images at a time.
        device: to compute on.
        progress: see `Progress`.

    Raises:
        ValueError: the network is in train mode, where it would use the batch's own statistics.
    """
    if getattr(network, "training", False):
        raise ValueError("a network is evaluated in eval mode")
    losses, ranks = [], []
    classes = len(task.classes)
    with torch.inference_mode():
        for images, labels in batches(split, batch_size, mean=task.mean, std=task.std, device=device):
            logits = network(images).float()
            own = logits.gather(1, labels[:, None])
            before = torch.arange(classes, device=logits.device) < labels[:, None]
            rank = ((logits > own) | ((logits == own) & before)).sum(1)
            finite = logits.isfinite().all(1)
            losses.append(F.cross_entropy(logits, labels, reduction="none").where(finite, math.nan))
            ranks.append(rank.where(finite, classes))
            if progress is not None:
                progress(len(labels))
    all_ranks = torch.cat(ranks)
    return Result(
        top1=100 * int((all_ranks < 1).sum()) / len(split),
        top5=100 * int((all_ranks < 5).sum()) / len(split) if classes > 5 else None,
        loss=float(torch.cat(losses).cpu().double().mean()),
        images=len(split),
    )


def evaluate_all(
    network: DeepVirtualNetwork,
    splits: Mapping[int, Split],
    *,
    networks: Iterable[TaskLevel] | None = None,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    file: str | None = None,
) -> list[Row]:
    """Evaluates networks of a checkpoint, which is on the device; its mode is left as it was.

    Args:
        splits: the images of each task, by its number from 1.
        networks: numbers of task and level; every level of the tasks that have images by default.
        batch_size, device, progress: as `evaluate`.
        file: that the checkpoint came from, to be noted.
    """
    chosen = [one for one in network if one.task in splits] if networks is None else list(networks)
    training = network.training
    network.eval()
    on_device: dict[int, Split] = {}
    rows = []
    try:
        for number, level in chosen:
            if number not in on_device:  # tasks that share their images go there together, and others make room
                same = [other for other in splits if splits[other].pool is splits[number].pool]
                on_device = dict(zip(same, to_device((splits[other] for other in same), device), strict=True))
            task = network.tasks[number - 1]

            def forward(images: Tensor, number: int = number, level: int = level) -> Tensor:
                return network(images, number, level)

            result = evaluate(forward, on_device[number], task, batch_size=batch_size, device=device, progress=progress)
            params, top = _params(network, number, level), _params(network, number, len(task.levels))
            rows.append(Row(number, task.name, level, task.units(level), params, params / top, result, file))
    finally:
        network.train(training)
    return rows


def _params(network: DeepVirtualNetwork, task: int, level: int) -> int:
    tensors = network.tensors(task, level)
    return sum(tensors[name].numel() for name in network.partition.parameters)


# Files


@dataclass(frozen=True, eq=False)
class Loaded:
    """A checkpoint's or a slice's file, its networks that are asked for, and the images of each of their tasks."""

    file: str
    header: AnyHeader
    module: DeepVirtualNetwork | VirtualNetwork
    networks: list[TaskLevel]
    splits: dict[int, Split]

    @property
    def images(self) -> int:
        """How many are run in all."""
        return sum(len(self.splits[task]) for task, _ in self.networks)

    def evaluate(self, batch_size: int, device: torch.device, progress: Progress | None = None) -> list[Row]:
        """Evaluates its networks, in order.

        Raises:
            DvnError: the device's memory is too small.
        """
        with enough_memory(device, f"give a smaller --batch-size than {batch_size}"):
            module = self.module.to(device)
            if isinstance(module, DeepVirtualNetwork):
                return evaluate_all(
                    module,
                    self.splits,
                    networks=self.networks,
                    batch_size=batch_size,
                    device=device,
                    progress=progress,
                    file=self.file,
                )
            (number, level), task = self.networks[0], module.task
            split = self.splits[number].to(device)
            result = evaluate(module, split, task, batch_size=batch_size, device=device, progress=progress)
        params, density = params_and_density(self.header)
        return [Row(number, task.name, level, task.units(level), params, density, result, self.file)]


def open_files(
    paths: Sequence[Path],
    task: str | None = None,
    level: int | None = None,
    data: DataSpec | None = None,
    base: Path | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Loaded]:
    """Opens files with all that it takes to evaluate them, so that whatever is missing is missed before anything runs.

    Args:
        paths: checkpoints and slices.
        task: only this task, by name or number; of several files those that have it.
        level: only this level, likewise.
        data: images for all tasks, in place of those that each task was trained for.
        base: the folder that relative paths in `data` start from, before the working directory.
        note: told, in a line, of what was taken for what.

    Raises:
        InputError: a file that is missing or broken, no such task or level, or images that are not there or not of
            the tasks' classes.
    """
    headers = [read_header(path) for path in paths]
    slices = [(header.path, header.metadata) for header in headers if isinstance(header.metadata, SliceMetadata)]
    if task is not None:  # of all slices together, a text must not be the number of one and the name of another
        matching_tasks({(one.task_number, one.task.name) for _, one in slices}, task)
    chosen = [_networks(header, task, level) for header in headers]
    if not any(chosen):
        asked = " and ".join([f"task '{task}'"] * (task is not None) + [f"level {level}"] * (level is not None))
        names = [f"'{path}' (task '{one.task.name}', level {one.level})" for path, one in slices]
        raise InputError(f"none of the slices is of {asked}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}")
    reader = Reader()
    tasks: dict[str, Task] = {}
    images: dict[str, Chosen] = {}
    of_files: list[dict[int, str]] = []  # of each file the key of every task's images
    for header, networks in zip(headers, chosen, strict=True):
        of_files.append({})
        channels = header.metadata.backbone.in_chans
        for number in dict.fromkeys(number for number, _ in networks):
            entry = header.metadata.numbered_tasks[number]
            key = dumps([entry.classes, prepared(entry), channels, data is None and entry.data])
            if key not in images:
                tasks[key] = entry
                images[key] = choose_images(reader, entry, channels, data, base, note)
            of_files[-1][number] = key
    reader.check_memory()
    splits = {}
    for key in images:
        with named(tasks[key], data is None):
            splits[key] = images[key].load()
    if note is not None:
        for line in reader.notes:
            note(line)
    return [
        Loaded(str(path), header, from_file(header), networks, {number: splits[key] for number, key in of_file.items()})
        for path, header, networks, of_file in zip(paths, headers, chosen, of_files, strict=True)
        if networks
    ]


def _networks(header: AnyHeader, task: str | None, level: int | None) -> list[TaskLevel]:
    """The networks of a file that are asked for, by number of task and level; none of a slice that is another one."""
    metadata = header.metadata
    if isinstance(metadata, SliceMetadata):
        asked = task is None or matching_tasks([(metadata.task_number, metadata.task.name)], task)
        return [network for network in metadata.networks if asked and level in (None, network[1])]
    numbers = [find_task(metadata.tasks, task)] if task else list(metadata.numbered_tasks)
    if level is not None:
        check_level(max((metadata.tasks[number - 1] for number in numbers), key=lambda entry: len(entry.levels)), level)
    return [each for each in metadata.networks if each.task in numbers and level in (None, each.level)]
