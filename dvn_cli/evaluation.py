"""Accuracy and loss of networks on test images, and where those images come from."""

import contextlib
import json
import math
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from pydantic import ValidationError
from torch import Tensor

from dvn_cli import checkpoint, report
from dvn_cli.data import Chosen, DataSpec, Reader, Split, batches, to_device
from dvn_cli.data.classes import corresponding, few, is_range
from dvn_cli.data.sources import TEST_SPLITS
from dvn_cli.errors import InputError, enough_memory
from dvn_cli.network import DeepVirtualNetwork, VirtualNetwork, load
from dvn_cli.overrides import first_problem, override_key, parse_override, read_yaml
from dvn_cli.tasks import Task
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
    networks: Iterable[tuple[int, int]] | None = None,
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
    chosen = [(task, level) for task, level in network if task in splits] if networks is None else list(networks)
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
            rows.append(Row(number, task.name, level, task.kept(level), params, params / top, result, file))
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
    header: checkpoint.Header
    module: DeepVirtualNetwork | VirtualNetwork
    networks: list[tuple[int, int]]
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
        units = tuple(self.header.metadata["kept"])
        return [Row(number, task.name, level, units, params, density, result, self.file)]


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
    headers = [checkpoint.read_header(path) for path in paths]
    if task is not None:  # of all slices together, a text must not be the number of one and the name of another
        slices = [header.metadata for header in headers if header.kind == "slice"]
        checkpoint.matching_tasks({(one["task_number"], one["task"]["name"]) for one in slices}, task)
    chosen = [_networks(header, task, level) for header in headers]
    if not any(chosen):
        asked = " and ".join([f"task '{task}'"] * (task is not None) + [f"level {level}"] * (level is not None))
        names = [f"'{h.path}' (task '{h.metadata['task']['name']}', level {h.metadata['level']})" for h in headers]
        raise InputError(f"none of the slices is of {asked}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}")
    reader = Reader()
    tasks: dict[str, Task] = {}
    images: dict[str, Chosen] = {}
    of_files: list[dict[int, str]] = []  # of each file the key of every task's images
    for header, networks in zip(headers, chosen, strict=True):
        of_files.append({})
        channels = header.metadata["backbone"]["in_chans"]
        for number in dict.fromkeys(number for number, _ in networks):
            entry = header.metadata["task"] if header.kind == "slice" else header.metadata["tasks"][number - 1]
            of_entry = Task.from_dict(entry)
            key = json.dumps([entry["classes"], _prepared(of_entry), channels, data is None and entry["data"]])
            if key not in images:
                tasks[key] = of_entry
                images[key] = choose_images(reader, of_entry, channels, data, base, note)
            of_files[-1][number] = key
    reader.check_memory()
    splits = {}
    for key in images:
        with _named(tasks[key], data is None):
            splits[key] = images[key].load()
    if note is not None:
        for line in reader.notes:
            note(line)
    return [
        Loaded(str(path), header, load(path), networks, {number: splits[key] for number, key in of_file.items()})
        for path, header, networks, of_file in zip(paths, headers, chosen, of_files, strict=True)
        if networks
    ]


def _networks(header: checkpoint.Header, task: str | None, level: int | None) -> list[tuple[int, int]]:
    """The networks of a file that are asked for, by number of task and level; none of a slice that is another one."""
    metadata = header.metadata
    if header.kind == "slice":
        own, depth = metadata["task_number"], metadata["level"]
        asked = task is None or checkpoint.matching_tasks([(own, metadata["task"]["name"])], task)
        return [(own, depth)] if asked and level in (None, depth) else []
    numbers = [checkpoint.find_task(metadata, task)] if task else list(range(1, len(metadata["tasks"]) + 1))
    depths = {number: len(metadata["tasks"][number - 1]["levels"]) for number in numbers}
    if level is not None:
        checkpoint.check_level(metadata, max(numbers, key=lambda number: depths[number]), level)
    return [(n, d) for n in numbers for d in range(1, depths[n] + 1) if level in (None, d)]


# Images


def choose_images(
    reader: Reader,
    task: Task,
    channels: int,
    data: DataSpec | None = None,
    base: Path | None = None,
    note: Callable[[str], None] | None = None,
) -> Chosen:
    """Chooses the images to evaluate a task on, at its size, with labels in the order of its classes.

    Args:
        reader: that reads them, with those of other tasks.
        channels: of the images.
        data, base, note: as `open_files`.

    Raises:
        InputError: there are none, or their classes are not the task's; the message names the task.
    """
    try:
        if data is None:
            if task.data is None:
                raise InputError(
                    "the file does not say where its images are; give them with --data, a folder or keys such as "
                    "--data source=digits"
                )
            try:
                spec = DataSpec.model_validate(task.data["spec"])
                base = None if task.data["base"] is None else Path(task.data["base"])
            except (ValidationError, KeyError, TypeError):
                raise InputError("what it says of its images cannot be read; give them with --data FOLDER") from None
        else:
            spec = data
        if spec.height_width not in (None, task.input_size):
            raise InputError(f"its images are {_size(task.input_size)}: leave out size, or give that")
        spec = spec.model_copy(update=_prepared(task))
        if data is None and spec.classes is not None and len(set(task.classes)) == len(task.classes):
            spec = spec.model_copy(update={"classes": list(task.classes)})  # whatever has which index by now
        absent = _absent(task, None if data else spec)
        try:
            images, classes = reader.test(spec, channels=channels, base=base, absent=absent)
        except InputError as error:
            raise InputError(f"{error}{'' if data else '; --data gives other images'}") from None
        labels = _labels(task, classes, images.labels, spec, data is None, note)
        there = set((labels[images.labels] if spec.test_images is None else labels).tolist())
        missing = [name for label, name in enumerate(task.classes) if label not in there]
        if missing and note is not None:
            note(f"task '{task.name}': there are no images of {few(missing)}, of its {len(task.classes)} classes")
        return replace(images, labels=labels[images.labels])
    except InputError as error:
        raise InputError(f"task '{task.name}': {error}") from None


@contextlib.contextmanager
def _named(task: Task, own: bool) -> Iterator[None]:
    """What is wrong with a task's images, its own or others, is said with its name."""
    try:
        yield
    except InputError as error:
        raise InputError(f"task '{task.name}': {error}{'; --data gives other images' if own else ''}") from None


def _prepared(task: Task) -> dict[str, Any]:
    """How a task's images are prepared, as the keys of a `DataSpec`."""
    keys: dict[str, Any] = {"size": task.input_size}
    keys |= {key: getattr(task, key) for key in ("interpolation", "crop_pct", "crop_mode")}
    return keys | ({"mean": list(task.mean)} if task.crop_mode == "border" else {})


def _absent(task: Task, trained: DataSpec | None) -> set[str]:
    """Names of classes that test images may lack: the task's, and what its groups were made of."""
    old = (trained.groups or {}).values() if trained is not None else ()
    names = {name for group in old if isinstance(group, list) for name in group if isinstance(name, str)}
    return {*task.classes, *(name for name in names if not is_range(name))}


def _labels(
    task: Task, classes: Sequence[str], found: Tensor, spec: DataSpec, own: bool, note: Callable[[str], None] | None
) -> Tensor:
    """The task's label of each of the images' classes: by name, or by number where one side has numbers for names.

    Args:
        task: Whose labels.
        classes: The images'; -1 is the label of those that have no images and that the task lacks.
        found: The class of each image.
        spec: What was read.
        own: It is the task's own data.
        note: As `open_files`.

    Raises:
        InputError: There are images of a class that the task lacks, or that it has twice.
    """
    names, count = list(task.classes), len(task.classes)
    numbers = [str(number) for number in range(count)]
    for numbered, rest in ((classes, names), (names, classes)):
        if len(classes) == count and sorted(numbered) == sorted(numbers) and set(rest) != set(numbers):
            labels = list(map(int, classes)) if numbered is classes else list(map(names.index, numbers))
            if note is not None:
                first = f"'{classes[0]}' is taken for '{names[labels[0]]}'"
                other = "the images' classes have other names and are taken in order"
                note(f"task '{task.name}': {other}: {first}, and so on")
            return torch.tensor(labels)
    labels = corresponding(names, classes)
    foreign = [classes[index] for index in found.unique().tolist() if labels[index] < 0]
    twice = sorted(set(foreign) & set(names))
    if twice:
        raise InputError(
            f"several classes are named {few(twice)}: they are told apart only where the images have the task's "
            "classes in the same order"
        )
    if foreign:
        raise InputError(f"{_difference(names, classes)}; {_advice(names, classes, spec, own)}")
    return torch.tensor(labels)


def _difference(own: Sequence[str], classes: Sequence[str]) -> str:
    lacking, foreign = ([name for name in a if name not in b] for a, b in ((own, classes), (classes, own)))
    if len(lacking) == len(own):
        return f"the images have {len(classes)} classes ({few(classes)}), the task {len(own)} others ({few(own)})"
    differ = " and ".join(f"{verb} {few(names)}" for verb, names in (("lack", lacking), ("have", foreign)) if names)
    return f"the images have {len(classes)} classes, the task {len(own)}: they {differ}{'' if lacking else ' as well'}"


def _advice(own: Sequence[str], classes: Sequence[str], spec: DataSpec, own_data: bool) -> str:
    """What to add to the command, so that images of other classes are left out or get the task's names."""
    if spec.groups is not None and not own_data:
        return "groups={NEW: [OLD], ...} gives names of the task's classes, and what each is made of in the images"
    common = [name for name in classes if name in set(own)]
    listed = yaml.safe_dump(common, default_flow_style=True, allow_unicode=True, width=math.inf).strip()
    chosen = shlex.quote(f"classes={listed if len(common) <= 20 else '[...]'}")
    folder = "--data FOLDER " if own_data else ""
    leave_out = [f"{folder}--data {chosen} leaves out the others"] if common else []
    return ", ".join(
        [*leave_out, f"{folder}--data 'groups={{NEW: [OLD], ...}}' names each class of the task and what it is made of"]
    )


def _size(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


_NOT_EVALUATED = (
    "train_images",
    "validation",
    "augment",
    "pad",
    "mean",
    "std",
    "interpolation",
    "crop_pct",
    "crop_mode",
)


def parse_data(words: Sequence[str], note: Callable[[str], None] | None = None) -> tuple[DataSpec, Path | None]:
    """Reads what `--data` says: a folder, whose kind is seen from what is in it, or a YAML file of a `DataSpec`; and
    `KEY=VALUE` of a `DataSpec`, which go before. Returns it, and the folder that relative paths start from.

    Raises:
        InputError: no such folder or file, nothing known in it, or an unknown key or value.
    """
    content: dict[str, Any] = {}
    base = None
    for word in words:
        path, key = Path(word).expanduser(), word.partition("=")[0]
        if os.path.isdir(path):  # which is false, unlike pathlib's, of what is too long for a path: long KEY=VALUE
            content |= _folder(path)
            if note is not None:
                what = "parquet files" if content["source"] == "hf" else "images by class"
                note(f"images: the {what} in '{path}'")
        elif os.path.isfile(path) and path.suffix in (".yaml", ".yml"):
            base = path.parent
            content |= _yaml(path)
        elif "=" not in word:
            raise InputError(f"--data {word}: there is no such folder; give a folder, a YAML file or KEY=VALUE")
        elif key in _NOT_EVALUATED:
            raise InputError(f"--data {word}: '{key}' is for training; images are prepared as the task's were")
        else:
            override_key(content, *parse_override(word))
    try:
        return DataSpec.model_validate(content), base
    except ValidationError as error:
        raise InputError(f"--data: {first_problem(error, DataSpec)}") from None


def _folder(path: Path) -> dict[str, Any]:
    if next(path.rglob("*.parquet"), None) is not None:
        return {"source": "hf", "path": str(path)}
    folders = {entry.name for entry in path.iterdir() if entry.is_dir()}
    if not folders:
        raise InputError(f"--data {path}: there are neither parquet files in it nor folders of classes")
    return {"source": "folder", "path": str(path)} | ({} if folders & set(TEST_SPLITS) else {"test_split": "."})


def _yaml(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: no text, or a date that there is not
        raise InputError(f"cannot read '{path}': {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"'{path}' describes no images: give a mapping of keys, such as source and path")
    return content


# Judging and showing


@dataclass(frozen=True)
class Gate:
    """Whether every network reaches an accuracy, in per cent, and the one that is furthest below or lowest above it."""

    min_accuracy: float
    passed: bool
    worst: Row


def gate(rows: Sequence[Row], min_accuracy: float) -> Gate:
    """Judges rows; a loss that is not finite does not pass."""
    worst = min(rows, key=lambda row: (math.isfinite(row.result.loss), row.result.top1))
    return Gate(min_accuracy, math.isfinite(worst.result.loss) and worst.result.top1 >= min_accuracy, worst)


def failure(rows: Sequence[Row], judged: Gate | None) -> str | None:
    """What is wrong with the worst row, in one line; None where nothing is."""
    broken = [row for row in rows if not math.isfinite(row.result.loss)]
    if broken:
        return f"{broken[0]}: the loss is not a number ({len(broken)} of {len(rows)} networks)"
    if judged is None or judged.passed:
        return None
    below = sum(row.result.top1 < judged.min_accuracy for row in rows)
    reached = math.floor(judged.worst.result.top1 * 100) / 100  # 94.996 is no 95
    asked = f"{judged.min_accuracy:g} %"
    return f"{judged.worst} reaches {reached:.2f} %, not {asked} ({below} of {len(rows)} networks are below)"


def as_json(row: Row) -> dict[str, Any]:
    """A row as JSON has it: accuracies in per cent, density a share, and null for a loss that is not finite."""
    result = row.result
    return {
        "task": row.task,
        "name": row.name,
        "level": row.level,
        "units": list(row.units),
        "params": row.params,
        "density": row.density,
        "top1": result.top1,
        "top5": result.top5,
        "loss": result.loss if math.isfinite(result.loss) else None,
        "images": result.images,
        "file": row.file,
    }


def gate_as_json(judged: Gate | None) -> dict[str, Any] | None:
    """A gate as JSON has it."""
    if judged is None:
        return None
    row = as_json(judged.worst)
    worst = {key: row[key] for key in ("task", "name", "level", "top1", "file")}
    return {"min_accuracy": judged.min_accuracy, "passed": judged.passed, "worst": worst}


def result_tables(rows: Sequence[Row]) -> list[report.FittedTable]:
    """A row for each network, in one table, or in one for each file where several have the same task and level."""
    files = list(dict.fromkeys(row.file for row in rows))
    if len({(row.task, row.name, row.level) for row in rows}) < len(rows) and len(files) > 1:
        return [_result_table([row for row in rows if row.file == file], file) for file in files]
    return [_result_table(rows, None)]


def _result_table(rows: Sequence[Row], title: str | None) -> report.FittedTable:
    columns = ("task", "level", "units", "params", "density", "top-1", "top-5", "loss", "images")
    optional = ("units", "params", "density", "images", "loss", "top-5")
    made = report.table(*columns, title=title, text=1, optional=optional)
    for row in rows:
        result = row.result
        made.add_row(
            f"{row.task} {row.name}",
            str(row.level),
            " ".join(map(str, row.units)),
            report.short(row.params),
            report.percent(row.density),
            f"{result.top1:.2f}",
            "-" if result.top5 is None else f"{result.top5:.2f}",
            f"{result.loss:.3f}",
            str(result.images),
        )
    return made


def accuracy_table(tasks: Sequence[Task], rows: Sequence[Row]) -> report.FittedTable:
    """Top-1 accuracy in per cent, a row for each task and a column for each level."""
    levels = max(row.level for row in rows)
    columns = (f"level {level}" for level in range(1, levels + 1))
    made = report.table("top-1 in %", *columns, "images", text=1, optional=("images",))
    for number, task in enumerate(tasks, 1):
        own = {row.level: row.result for row in rows if row.task == number}
        if own:
            cells = [f"{own[level].top1:.2f}" if level in own else "" for level in range(1, levels + 1)]
            made.add_row(f"{number} {task.name}", *cells, str(next(iter(own.values())).images))
    return made
