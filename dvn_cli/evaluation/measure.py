"""Accuracy and loss of networks on test images."""

import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvn_cli import processes
from dvn_cli.data import Chosen, DataSpec, Reader, Split, batches, to_device
from dvn_cli.data.pool import left_out
from dvn_cli.data.words import Data, parse_data, prepared
from dvn_cli.device import choose
from dvn_cli.errors import InputError, enough_memory
from dvn_cli.evaluation.images import choose_images, named
from dvn_cli.evaluation.intervals import top1_interval
from dvn_cli.loading import from_file
from dvn_cli.network import DeepVirtualNetwork, VirtualNetwork, on_float32
from dvn_cli.store.file import AnyHeader, read_header
from dvn_cli.store.lookup import find_task, matching_tasks
from dvn_cli.store.metadata import SliceMetadata, Task, TaskLevel, check_level
from dvn_cli.store.schema import dumps
from dvn_cli.units.count import params_and_density

File = str | os.PathLike[str] | DeepVirtualNetwork | VirtualNetwork
"""A checkpoint or a slice, or what `dvn_cli.load` returns for one."""


Progress = Callable[[int], None]
"""Told of every batch how many images it had."""


@dataclass(frozen=True)
class Scores:
    """What a network makes of a split.

    Attributes:
        top1: accuracy in per cent.
        top5: share of the images, in per cent, whose class is among the five likeliest; None for a task of five
            classes or fewer, where that says nothing.
        loss: mean cross-entropy over the images; NaN where one of their logits is not finite.
        images: how many there were.
        predicted: the likeliest class of each image, int64 (N,) on the CPU; -1 where a logit is not finite.
        labels: their classes, likewise.
    """

    top1: float
    top5: float | None
    loss: float
    images: int
    predicted: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Evaluation:
    """A network, and what it makes of its task's test images.

    Attributes:
        task: number of its task, from 1.
        name: of its task.
        level: from 1.
        units: that it is made of, by number from 1.
        params: elements of its trainable parameters.
        density: their share of those of its task's top level.
        top1, top5, loss, images, predicted, labels: see `Scores`; the last two are None in what was read back.
        file: that it came from, where it came from one.
        classes: of the task, by name; none in what was read back.
    """

    task: int
    name: str
    level: int
    units: tuple[int, ...]
    params: int
    density: float
    top1: float
    top5: float | None
    loss: float
    images: int
    predicted: Tensor | None = field(default=None, repr=False, compare=False)
    labels: Tensor | None = field(default=None, repr=False, compare=False)
    file: str | None = None
    classes: tuple[str, ...] = field(default=(), repr=False, compare=False)

    def by_class(self) -> list[tuple[str, float | None, int]]:
        """Returns of each class its name, accuracy in per cent, None where it has no images, and number of images."""
        assert self.predicted is not None
        assert self.labels is not None
        images = torch.bincount(self.labels, minlength=len(self.classes)).tolist()
        right = torch.bincount(self.labels[self.predicted == self.labels], minlength=len(self.classes)).tolist()
        shares = (100 * told / count if count else None for told, count in zip(right, images, strict=True))
        return list(zip(self.classes, shares, images, strict=True))

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of `top1`, in per cent: what as many other images of this kind may give."""
        return top1_interval(self.top1, self.images)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, without predictions, labels and classes: null for a loss that is not finite."""
        entry = {key: value for key, value in vars(self).items() if key not in ("predicted", "labels", "classes")}
        return {
            **entry,
            "units": list(self.units),
            "loss": self.loss if math.isfinite(self.loss) else None,
            "top1_interval": list(self.interval),
        }

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> "Evaluation":
        """Reads what `to_dict` returned."""
        loss = math.nan if entry["loss"] is None else entry["loss"]
        kept = {key: value for key, value in entry.items() if key != "top1_interval"}
        return cls(**{**kept, "units": tuple(entry["units"]), "loss": loss})

    def __str__(self) -> str:
        return f"task '{self.name}', level {self.level}" + (f" of '{self.file}'" if self.file else "")


# Measuring


def measure(
    network: Callable[[Tensor], Tensor],
    split: Split,
    task: Task,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    shared: bool = False,
) -> Scores:
    """Runs a network over every image of a split once; see `measure_together`."""
    [scores] = measure_together(
        [network], split, task, batch_size=batch_size, device=device, progress=progress, shared=shared
    )
    return scores


def measure_together(
    networks: Sequence[Callable[[Tensor], Tensor]],
    split: Split,
    task: Task,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    shared: bool = False,
) -> list[Scores]:
    """Runs networks over every image of a split, read once. The counts are exact, whatever the batch size.

    Of equal logits the first class is taken. An image with a logit that is not finite counts as wrong.

    Args:
        networks: each maps normalised images (batch, channels, height, width) to logits (batch, classes); in eval mode
            and on the device.
        split: the images; on the device if they have room there, else copied batch by batch.
        task: whose mean and std the images are normalised by.
        batch_size: images at a time.
        device: to compute on.
        progress: see `Progress`; told of every network's batches.
        shared: whether the processes that run together, which all call this, each run their part of the images.

    Raises:
        ValueError: a network is in train mode, where it would use the batch's own statistics.
        InputError: an image cannot be read.
    """
    if any(getattr(network, "training", False) for network in networks):
        raise ValueError("a network is evaluated in eval mode")
    if shared:
        split = split.subset(processes.share(torch.arange(len(split), device=split.labels.device)))
    losses: list[list[Tensor]] = [[] for _ in networks]
    ranks: list[list[Tensor]] = [[] for _ in networks]
    predicted: list[list[Tensor]] = [[] for _ in networks]
    seen: list[Tensor] = []
    classes = len(task.classes)
    with torch.inference_mode():
        for images, labels in batches(split, batch_size, mean=task.mean, std=task.std, device=device):
            seen.append(labels)
            for place, network in enumerate(networks):
                logits = network(images).float()
                own = logits.gather(1, labels[:, None])
                before = torch.arange(classes, device=logits.device) < labels[:, None]
                rank = ((logits > own) | ((logits == own) & before)).sum(1)
                finite = logits.isfinite().all(1)
                losses[place].append(F.cross_entropy(logits, labels, reduction="none").where(finite, math.nan))
                ranks[place].append(rank.where(finite, classes))
                predicted[place].append(logits.argmax(1).where(finite, -1))  # the first of equal ones
                if progress is not None:
                    progress(len(labels))
    made = [seen, *(kept for of_network in zip(ranks, losses, predicted, strict=True) for kept in of_network)]
    if shared:
        of_processes = processes.gathered([[tensor.cpu() for tensor in kept] for kept in made])
        made = [list(itertools.chain.from_iterable(kept)) for kept in zip(*of_processes, strict=True)]
    if not sum(map(len, made[0])):
        raise InputError("none of the images can be read")
    labels, *rest = (torch.cat(kept).cpu() for kept in made)
    return [_scores(*of_network, labels, classes) for of_network in zip(rest[::3], rest[1::3], rest[2::3], strict=True)]


def _scores(ranks: Tensor, losses: Tensor, predicted: Tensor, labels: Tensor, classes: int) -> Scores:
    return Scores(
        top1=100 * int((ranks < 1).sum()) / len(ranks),
        top5=100 * int((ranks < 5).sum()) / len(ranks) if classes > 5 else None,
        loss=float(losses.double().mean()),
        images=len(ranks),
        predicted=predicted,
        labels=labels,
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
    shared: bool = False,
) -> list[Evaluation]:
    """Evaluates networks of a checkpoint, which is on the device; its mode is left as it was.

    Args:
        splits: the images of each task, by its number from 1.
        networks: every level of the tasks that have images by default.
        batch_size, device, progress, shared: as `measure_together`.
        file: that the checkpoint came from, to be noted.
    """
    chosen = [one for one in network if one.task in splits] if networks is None else list(networks)
    training = network.training
    network.eval()
    on_device: dict[int, Split] = {}
    scores: dict[TaskLevel, Scores] = {}
    try:
        for number in dict.fromkeys(number for number, _ in chosen):
            if number not in on_device:  # tasks that share their images go there together, and others make room
                same = [other for other in splits if splits[other].pool is splits[number].pool]
                on_device = dict(zip(same, to_device((splits[other] for other in same), device), strict=True))
            of_task = [one for one in chosen if one.task == number]
            forwards = [on_float32(network, task=number, level=level) for _, level in of_task]
            task, images = network.tasks[number - 1], on_device[number]
            made = measure_together(
                forwards, images, task, batch_size=batch_size, device=device, progress=progress, shared=shared
            )
            scores |= dict(zip(of_task, made, strict=True))
    finally:
        network.train(training)
    rows = []
    for number, level in chosen:
        task = network.tasks[number - 1]
        params, top = _params(network, number, level), _params(network, number, len(task.levels))
        values = {**vars(scores[TaskLevel(number, level)]), "classes": task.classes}
        rows.append(Evaluation(number, task.name, level, task.units(level), params, params / top, **values, file=file))
    return rows


def _params(network: DeepVirtualNetwork, task: int, level: int) -> int:
    tensors = network.tensors(task, level)
    return sum(tensors[name].numel() for name in network.partition.parameters)


# Files


def evaluate(
    files: File | Sequence[File] = "dvn.safetensors",
    task: int | str | None = None,
    level: int | None = None,
    *,
    data: Data | Sequence[Data] | None = None,
    batch_size: int = 256,
    device: str | torch.device = "auto",
    note: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    opened: Callable[[Sequence["Loaded"]], None] | None = None,
) -> list[Evaluation]:
    """Measures accuracy and loss of networks on test images.

    Args:
        files: a checkpoint, a slice, what `dvn_cli.load` returns for one, or several of these.
        task: only this task, by name or by number from 1; of several slices those that have it.
        level: only this level, from 1, likewise.
        data: other images than the tasks' own: a folder (of images by class, or of parquet files), a YAML file with
            the keys of a recipe's `data`, a mapping of them, `key=value` of one, or several of these.
        batch_size: images at a time; the result does not depend on it.
        device: `auto`, or by torch's name; networks in memory are moved there.
        note: is told, in a line, what was taken for what.
        progress: is told how many images have been run, and how many there are.
        opened: is given the files with their images before anything is run.

    Raises:
        InputError: a file that is missing or broken, no such task or level, or images that are not there or not of
            the tasks' classes.
        DvnError: the device's memory is too small.

    Example:
        >>> [result] = dvn_cli.evaluate("dvn.safetensors", task=2, level=1)  # doctest: +SKIP
        >>> print(f"{result.top1:.1f} % of {result.images} images")  # doctest: +SKIP
    """
    if batch_size < 1:
        raise InputError(f"batch_size is at least 1, not {batch_size}")
    chosen = device if isinstance(device, torch.device) else choose(device)
    spec, base = parse_data(data, note) if data else (None, None)
    given = [files] if isinstance(files, str | os.PathLike | nn.Module) else files
    loaded = open_files(given, None if task is None else str(task), level, spec, base, note)
    if opened is not None:
        opened(loaded)
    total, done, results = sum(each.images for each in loaded), 0, []

    def advance(count: int) -> None:
        nonlocal done
        done += count * processes.count()
        if progress is not None:
            progress(min(done, total), total)

    for each in loaded:
        results += each.evaluate(batch_size, chosen, advance)
    line = left_out(problem for each in loaded for split in each.splits.values() for problem in split.bad)
    if line is not None and note is not None:
        note(f"warning: {line}")
    return results


@dataclass(frozen=True, eq=False)
class Loaded:
    """A checkpoint's or a slice's file, its networks that are asked for, and the images of each of their tasks."""

    file: str | None
    header: AnyHeader
    module: DeepVirtualNetwork | VirtualNetwork
    networks: list[TaskLevel]
    splits: dict[int, Split]

    @property
    def images(self) -> int:
        """How many are run in all."""
        return sum(len(self.splits[task]) for task, _ in self.networks)

    def sha256(self, task: int, level: int) -> str:
        """Returns the digest of a network: of its tensors by name, and of what its task's images are normalised by."""
        entry, module = self.header.metadata.numbered_tasks[task], self.module
        tensors = module.tensors(task, level) if isinstance(module, DeepVirtualNetwork) else module.state_dict()
        digest = hashlib.sha256(repr((entry.mean, entry.std)).encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def evaluate(self, batch_size: int, device: torch.device, progress: Progress | None = None) -> list[Evaluation]:
        """Evaluates its networks, in order; their mode is left as it was.

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
                    shared=True,
                )
            (number, level), task = self.networks[0], module.task
            split, training = self.splits[number].to(device), module.training
            try:
                scores = measure(
                    on_float32(module.eval()),
                    split,
                    task,
                    batch_size=batch_size,
                    device=device,
                    progress=progress,
                    shared=True,
                )
            finally:
                module.train(training)
        params, density = params_and_density(self.header)
        return [
            Evaluation(
                number,
                task.name,
                level,
                task.units(level),
                params,
                density,
                **vars(scores),
                file=self.file,
                classes=task.classes,
            )
        ]


def open_files(
    files: Sequence[File],
    task: str | None = None,
    level: int | None = None,
    data: DataSpec | None = None,
    base: Path | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Loaded]:
    """Opens files with all that it takes to evaluate them, so that whatever is missing is missed before anything runs.

    Args:
        files: checkpoints and slices.
        task: only this task, by name or number; of several files those that have it.
        level: only this level, likewise.
        data: images for all tasks, in place of those that each task was trained for.
        base: the folder that relative paths in `data` start from, before the working directory.
        note: told, in a line, of what was taken for what.

    Raises:
        InputError: a file that is missing or broken, no such task or level, or images that are not there or not of
            the tasks' classes.
    """
    headers = [file.header("the network") if isinstance(file, nn.Module) else read_header(file) for file in files]
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
    reader.settle()
    splits = {}
    for key in images:
        with named(tasks[key], data is None):
            splits[key] = images[key].load()
    if note is not None:
        for line in reader.notes:
            note(line)
    return [
        Loaded(
            None if isinstance(file, nn.Module) else str(file),
            header,
            file if isinstance(file, nn.Module) else from_file(header),
            networks,
            {number: splits[key] for number, key in of_file.items()},
        )
        for file, header, networks, of_file in zip(files, headers, chosen, of_files, strict=True)
        if networks
    ]


def _networks(header: AnyHeader, task: str | None, level: int | None) -> list[TaskLevel]:
    """The networks of a file that are asked for; none of a slice that is another one."""
    metadata = header.metadata
    if isinstance(metadata, SliceMetadata):
        asked = task is None or matching_tasks([(metadata.task_number, metadata.task.name)], task)
        return [network for network in metadata.networks if asked and level in (None, network.level)]
    numbers = list(metadata.numbered_tasks) if task is None else [find_task(metadata.tasks, task)]
    if level is not None:
        check_level(max((metadata.tasks[number - 1] for number in numbers), key=lambda entry: len(entry.levels)), level)
    return [network for network in metadata.networks if network.task in numbers and level in (None, network.level)]
