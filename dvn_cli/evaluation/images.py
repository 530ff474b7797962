"""The images that a task's networks are evaluated on: its own test images, or those of `--data`."""

import contextlib
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from dvn_cli.data import Chosen, DataSpec, Reader
from dvn_cli.data.classes import corresponding, few, is_range, number_in
from dvn_cli.data.words import prepared
from dvn_cli.errors import InputError
from dvn_cli.store.metadata import Task


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
        data, base, note: as `measure.open_files`.

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
                spec = DataSpec.model_validate(task.data.spec)
                base = None if task.data.base is None else Path(task.data.base)
            except ValidationError:
                raise InputError("what it says of its images cannot be read; give them with --data FOLDER") from None
        else:
            spec = data
        if spec.height_width not in (None, task.input_size):
            raise InputError(f"its images are {_size(task.input_size)}: leave out size, or give that")
        spec = spec.model_copy(update=prepared(task))
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
def named(task: Task, own: bool) -> Iterator[None]:
    """What is wrong with a task's images, its own or others, is said with its name."""
    try:
        yield
    except InputError as error:
        raise InputError(f"task '{task.name}': {error}{'; --data gives other images' if own else ''}") from None


def _absent(task: Task, trained: DataSpec | None) -> set[str]:
    """Names of classes that test images may lack: the task's, and what its groups were made of."""
    old = (trained.groups or {}).values() if trained is not None else ()
    names = {name for group in old if isinstance(group, list) for name in group if isinstance(name, str)}
    return {*task.classes, *(name for name in names if not is_range(name))}


def _labels(
    task: Task, classes: Sequence[str], found: Tensor, spec: DataSpec, own: bool, note: Callable[[str], None] | None
) -> Tensor:
    """The task's label of each of the images' classes: by name, or by number where only one side has numbers for names.

    Args:
        task: Whose labels.
        classes: The images'; -1 is the label of those that have no images and that the task lacks.
        found: The class of each image.
        spec: What was read.
        own: It is the task's own data.
        note: As `measure.open_files`.

    Raises:
        InputError: There are images of a class that the task lacks, or that it has twice.
    """
    names, count = list(task.classes), len(task.classes)
    numbers = [str(number) for number in range(count)]
    for numbered, rest in ((classes, names), (names, classes)):
        # a number such as '2' in the place of class 1 is a name of its own; '01' is another way to write '1'
        agree = list(rest) != numbers and all(number_in(name) in (None, place) for place, name in enumerate(rest))
        if len(classes) == count and sorted(numbered) == sorted(numbers) and agree:
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
