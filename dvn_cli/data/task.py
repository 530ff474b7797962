"""The data of one task: its classes chosen, its splits made, its normalisation known."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dvn_cli.data import sources
from dvn_cli.data.batches import Split, batches
from dvn_cli.data.classes import Selection, corresponding, few, resolved, select
from dvn_cli.data.spec import DataSpec
from dvn_cli.errors import InputError


@dataclass(frozen=True, eq=False)
class TaskData:
    """A task's images in memory.

    Attributes:
        spec: What they were made from, with the names of the classes in its groups.
        classes: Names, in the order of the labels.
        input_size: Height and width in pixels.
        mean: Per channel, of pixels in 0..1.
        std: Per channel, of pixels in 0..1.
        train: To learn from.
        validation: Held out from train to choose by; None where the recipe wants none.
        test: To report on, and for nothing else.
    """

    spec: DataSpec
    classes: tuple[str, ...]
    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split
    validation: Split | None
    test: Split

    @property
    def counts(self) -> dict[str, int]:
        """How many images each split has."""
        validation = 0 if self.validation is None else len(self.validation)
        return {"train": len(self.train), "validation": validation, "test": len(self.test)}

    def train_batches(
        self, batch_size: int, generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One shuffled, augmented pass over train; see `batches`."""
        return batches(
            self.train,
            batch_size,
            mean=self.mean,
            std=self.std,
            device=device,
            generator=generator,
            augment=self.spec.augment,
            pad=self.spec.pad,
        )


def load_task(spec: DataSpec, *, channels: int = 3, base: Path | None = None) -> TaskData:
    """Reads the data of a task.

    The images held out of train are drawn from the whole data set, before classes are chosen: with the same seed and
    share, an image that one task chooses by is not one that another task of the data set learns from.

    Args:
        spec: What to read.
        channels: Of the images, 1 or 3; grey and colour are converted.
        base: The folder that relative paths start from, before the working directory.

    Raises:
        InputError: Something that `spec` names is not there, or too little is left: fewer than 2 classes, no images.
        DvnError: It cannot be downloaded.
    """
    train_source = _read(spec, True, channels, base)
    selection = select(spec, train_source.class_names)
    if len(selection.names) < 2:
        raise InputError(f"a task needs at least 2 classes, not {len(selection.names)}")
    test = _test_split(spec, _read(spec, False, channels, base), selection, train_source.class_names)
    if tuple(train_source.images.shape[2:]) != tuple(test.images.shape[2:]):
        sizes = " and ".join("x".join(map(str, images.shape[2:])) for images in (train_source.images, test.images))
        raise InputError(f"train and test images have different sizes ({sizes}): set size")
    new_label = selection.relabelled(len(train_source.class_names))[train_source.labels.numpy()]
    untrained = np.setdiff1d(test.labels.numpy(), new_label)
    if len(untrained):
        raise InputError(
            f"there are test images of {few([selection.names[label] for label in untrained])} and no train images: "
            "leave that out with classes"
        )
    order = sources.stratified_order(train_source.strata.numpy(), spec.seed)
    held_out = np.zeros(len(order), dtype=bool)
    held_out[order[: round(spec.validation * len(order))]] = True
    order = order[new_label[order] >= 0]
    validation, train = order[held_out[order]], order[~held_out[order]]
    if spec.train_images is not None and spec.train_images < len(order):
        validation = validation[: round(spec.validation * spec.train_images)]
        train = train[: spec.train_images - len(validation)]
    if len(train) == 0 or (len(validation) == 0 and spec.validation > 0):
        raise InputError(
            f"{len(train) + len(validation)} images are too few to train on and to hold out a share of "
            f"{spec.validation:g}; give more, or set validation to 0"
        )
    learnt = _split(train_source, new_label, train)
    mean, std = _mean_std(learnt.images)
    return TaskData(
        spec=resolved(spec, train_source.class_names),
        classes=selection.names,
        input_size=(learnt.images.shape[2], learnt.images.shape[3]),
        mean=_per_channel("mean", spec.mean, channels) or mean,
        std=_per_channel("std", spec.std, channels) or std,
        train=learnt,
        validation=_split(train_source, new_label, validation) if len(validation) else None,
        test=test,
    )


def load_test(
    spec: DataSpec, *, channels: int = 3, base: Path | None = None, absent: Collection[str] = ()
) -> tuple[Split, tuple[str, ...]]:
    """Reads only the test images of a task, and the names of its classes.

    Args:
        spec, channels, base: As `load_task`.
        absent: Classes that `spec` may name although there are no images of them.

    Raises:
        InputError, DvnError: As `load_task`.
    """
    source = _read(spec, False, channels, base)
    selection = select(spec, source.class_names, absent)
    return _test_split(spec, source, selection, source.class_names), selection.names


def _test_split(spec: DataSpec, source: sources.Images, selection: Selection, names: Sequence[str]) -> Split:
    """The test images of a selection of classes from a list of names, of which the source may lack some."""
    places = np.array(corresponding(names, source.class_names))
    foreign = [source.class_names[label] for label in np.unique(source.labels.numpy()) if places[label] < 0]
    if spec.classes is not None or spec.groups is not None:  # others may be there, but none of the name of one of these
        foreign = sorted({names[index] for members in selection.members for index in members} & set(foreign))
    if foreign:
        has = "more than once" if foreign[0] in names else "not"
        raise InputError(f"test has images of {few(foreign)}, which train has {has}: name the classes to keep")
    of_name = np.append(selection.relabelled(len(names)), -1)  # the last one for what has no place
    new_label = of_name[places][source.labels.numpy()]
    order = sources.stratified_order(source.strata.numpy(), spec.seed)
    order = order[new_label[order] >= 0]
    if len(order) == 0:
        raise InputError(f"no test images of the classes {', '.join(selection.names[:5])}")
    return _split(source, new_label, order[: spec.test_images])


def _read(spec: DataSpec, train: bool, channels: int, base: Path | None) -> sources.Images:
    return sources.read(sources.Request.of(spec, channels, base), train)


def _split(source: sources.Images, new_label: np.ndarray, chosen: np.ndarray) -> Split:
    chosen = np.sort(chosen)
    images = source.images if len(chosen) == len(source.images) else source.images[torch.from_numpy(chosen)]
    return Split(images, torch.from_numpy(new_label[chosen]))


def _mean_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 images, in units of 255; a constant channel has deviation 1."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = (share * values).sum()
        deviation = float((share * (values - mean) ** 2).sum().sqrt())
        means.append(float(mean))
        deviations.append(deviation or 1.0)
    return tuple(means), tuple(deviations)


def _per_channel(what: str, values: list[float] | None, channels: int) -> tuple[float, ...] | None:
    if values is not None and len(values) != channels:
        raise InputError(f"{what} has {len(values)} values for images of {channels} channels")
    return None if values is None else tuple(values)
