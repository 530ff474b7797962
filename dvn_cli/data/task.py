"""The data of one task: its classes chosen, its splits made, its normalisation known."""

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dvn_cli.data import decode, sources
from dvn_cli.data.augment import Mixing, ResizedCrop
from dvn_cli.data.batches import Split, batches
from dvn_cli.data.classes import Selection, corresponding, few, resolved, select
from dvn_cli.data.listing import VALIDATION_SPLITS, Listing, Part, Request, in_words, stratified_order
from dvn_cli.data.pool import RESIDENT, Pool, left_out, none_readable, settle
from dvn_cli.data.spec import DataSpec
from dvn_cli.errors import InputError

VALIDATION_SHARE = 0.1
"""Of train, held out where a data set has no validation split of its own beside test."""

ESTIMATED_ON = 2048
"""Images on which the mean and standard deviation of the channels are estimated where there are too many to keep."""

HEADERS = 64
"""Of images, how many are looked at to see whether all have one size."""


@dataclass(frozen=True, eq=False)
class TaskData:
    """A task's images, in memory or where they are read from.

    Attributes:
        spec: What they were made from, with the names of the classes in its groups.
        classes: Names, in the order of the labels.
        input_size: Height and width in pixels.
        mean: Per channel, of pixels in 0..1.
        std: Per channel, of pixels in 0..1.
        train: To learn from.
        validation: To choose by: the data set's own validation split or a share held out from train; None where the
            recipe wants none.
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

    @property
    def bad(self) -> list[str]:
        """What is said of each image that cannot be read and is left out, so far."""
        splits = (split for split in (self.train, self.validation, self.test) if split is not None)
        return [problem for split in splits for problem in split.bad]

    def train_batches(
        self,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
        skip: int = 0,
        part: tuple[int, int] = (0, 1),
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
            mixing=Mixing.of(self.spec, len(self.classes)),
            skip=skip,
            part=part,
        )


def load_task(spec: DataSpec, *, channels: int = 3, base: Path | None = None) -> TaskData:
    """Reads the data of one task; see `Reader.task` and `TaskPlan.load`."""
    return Reader().task(spec, channels=channels, base=base).load()


def load_test(
    spec: DataSpec, *, channels: int = 3, base: Path | None = None, absent: Collection[str] = ()
) -> tuple[Split, tuple[str, ...]]:
    """Reads only the test images of a task, and the names of its classes; see `Reader.test`."""
    reader = Reader()
    chosen, classes = reader.test(spec, channels=channels, base=base, absent=absent)
    reader.settle()
    return chosen.load(), classes


class Reader:
    """Reads the data of several tasks: first which images each of them uses, then those, each decoded once.

    The images held out of train are drawn from the whole data set, before classes are chosen: with the same seed and
    share, an image that one task chooses by is not one that another task of the data set learns from.

    Attributes:
        notes: Lines that say what of each data set is used for what, and which files are left out.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._listings: dict[tuple[Request, Part], Listing | None] = {}
        self._pools: dict[Hashable, Pool] = {}

    def task(self, spec: DataSpec, *, channels: int = 3, base: Path | None = None) -> "TaskPlan":
        """Chooses the images of a task, to be loaded when those of all tasks are chosen.

        Args:
            spec: What to read.
            channels: Of the images, 1 or 3; grey and colour are converted.
            base: The folder that relative paths start from, before the working directory.

        Raises:
            InputError: Something that `spec` names is not there, or too little is left: fewer than 2 classes, no
                images.
            DvnError: It cannot be downloaded.
        """
        if spec.crop_pct is None and spec.crop_mode not in (None, "squash"):
            raise InputError(f"crop_mode {spec.crop_mode} needs crop_pct, such as 1.0: without it nothing is cropped")
        if spec.crop_mode == "border" and spec.mean is None:
            raise InputError("crop_mode border fills what is missing with the mean: give mean and std too")
        request, transform = Request.of(spec, channels, base), ResizedCrop.of(spec)
        source = self._listing(request, "train")
        selection = select(spec, source.class_names)
        if len(selection.names) < 2:
            raise InputError(f"a task needs at least 2 classes, not {len(selection.names)}")
        for index in itertools.chain.from_iterable(selection.members):
            if index in source.empty:
                raise InputError(f"class '{source.class_names[index]}' has no train images: {source.empty[index]}")
        test_source = self._listing(request, "test")
        test = self._beside_train(spec, request, "test", test_source, selection, source.class_names)
        new_label = selection.relabelled(len(source.class_names))[source.labels.numpy()]
        untrained = np.setdiff1d(test.labels.numpy(), new_label)
        if len(untrained):
            raise InputError(
                f"there are test images of {few([selection.names[label] for label in untrained])} and no train images: "
                "leave that out with classes"
            )
        own = self._own_validation(request, test_source) if spec.validation is None else None
        share = (VALIDATION_SHARE if own is None else 0) if spec.validation is None else spec.validation
        order = stratified_order(source.strata.numpy(), spec.seed)
        held_out = np.zeros(len(order), dtype=bool)
        held_out[order[: round(share * len(order))]] = True
        order = order[new_label[order] >= 0]
        validation, train = order[held_out[order]], order[~held_out[order]]
        if spec.train_images is not None and spec.train_images < len(order):
            validation = validation[: round(share * spec.train_images)]
            train = train[: spec.train_images - len(validation)]
        if len(train) == 0 or (len(validation) == 0 and share > 0):
            raise InputError(
                f"{len(train) + len(validation)} images are too few to train on and to hold out a share of "
                f"{share:g}; give more, or set validation to 0"
            )
        chosen = self._chosen(request, source, train, new_label, transform)
        validated = None
        if own is not None:
            validated = self._beside_train(spec, request, "validation", own, selection, source.class_names)
        elif share > 0:
            validated = self._chosen(request, source, validation, new_label)
        self._note_uses(request, source, own, test_source, share)
        spec = resolved(spec, source.class_names)
        return TaskPlan(self, spec, selection.names, channels, chosen, validated, test)

    def test(
        self, spec: DataSpec, *, channels: int = 3, base: Path | None = None, absent: Collection[str] = ()
    ) -> tuple["Chosen", tuple[str, ...]]:
        """Chooses only the test images of a task, and names its classes.

        Args:
            spec, channels, base: As `task`.
            absent: Classes that `spec` may name although there are no images of them.

        Raises:
            InputError, DvnError: As `task`.
        """
        request = Request.of(spec, channels, base)
        source = self._listing(request, "test")
        selection = select(spec, source.class_names, absent)
        self._note_left_out(request, source)
        return self._beside_train(spec, request, "test", source, selection, source.class_names), selection.names

    def needs_size(self, spec: DataSpec, *, channels: int = 3, base: Path | None = None) -> bool:
        """Returns whether a task that sets no size needs one, by its augmentation or some of its training images."""
        if spec.size is not None or spec.augment == "resized-crop":
            return spec.size is None
        listing = self._listing(Request.of(spec, channels, base), "train")
        some = np.unique(np.linspace(0, len(listing.labels) - 1, HEADERS).astype(np.int64))
        sizes = set()
        for item in listing.items(some):
            with contextlib.suppress(InputError):  # which is said, or not, when all are read
                sizes.add(decode.size(item))
        return len(sizes) > 1

    def settle(self) -> None:
        """Decides which of the images chosen so far are kept in memory; see `pool.settle`."""
        settle(self._pools.values())

    def _listing(self, request: Request, part: Part) -> Listing:
        if (request, part) not in self._listings:
            self._listings[request, part] = sources.read(request, part)
        listing = self._listings[request, part]
        assert listing is not None  # there is always a train and a test part, or an error
        return listing

    def _own_validation(self, request: Request, test: Listing) -> Listing | None:
        """The data set's own validation split, None where it has none beside what is tested on."""
        beside = request._replace(test_split=test.split)
        if (beside, "validation") not in self._listings:
            self._listings[beside, "validation"] = sources.read(beside, "validation")
        return self._listings[beside, "validation"]

    def _beside_train(
        self,
        spec: DataSpec,
        request: Request,
        part: Part,
        source: Listing,
        selection: Selection,
        names: Sequence[str],
    ) -> "Chosen":
        """The images of a selection of classes from a list of names, of which the source may lack some."""
        places = np.array(corresponding(names, source.class_names))
        foreign = [source.class_names[label] for label in np.unique(source.labels.numpy()) if places[label] < 0]
        if spec.classes is not None or spec.groups is not None:  # others may be there, but none of these names
            foreign = sorted({names[index] for members in selection.members for index in members} & set(foreign))
        if foreign:
            has = "more than once" if foreign[0] in names else "not"
            raise InputError(f"{part} has images of {few(foreign)}, which train has {has}: name the classes to keep")
        of_name = np.append(selection.relabelled(len(names)), -1)  # the last one for what has no place
        new_label = of_name[places][source.labels.numpy()]
        order = stratified_order(source.strata.numpy(), spec.seed)
        order = order[new_label[order] >= 0]
        if len(order) == 0:
            advice = "" if part == "test" else "; with validation=0.1 a tenth of train is held out instead"
            raise InputError(f"no {part} images of the classes {', '.join(selection.names[:5])}{advice}")
        limit = spec.test_images if part == "test" else spec.train_images
        return self._chosen(request, source, order[:limit], new_label)

    def _chosen(
        self,
        request: Request,
        source: Listing,
        indices: np.ndarray,
        new_label: np.ndarray,
        transform: ResizedCrop | None = None,
    ) -> "Chosen":
        indices = np.sort(indices)
        key = (source.key, request._replace(label=None, test_split=None))
        if key not in self._pools or self._pools[key].streamed is not None:
            self._pools[key] = Pool(source, request)
        self._pools[key].use(indices, stream=transform is not None)
        return Chosen(self._pools[key], indices, torch.from_numpy(new_label[indices]), transform)

    def _note_uses(
        self,
        request: Request,
        train: Listing,
        own: Listing | None,
        test: Listing,
        share: float,
    ) -> None:
        if request.name is None and request.path is None:  # it comes with dvn, whose documentation says this
            return
        held_out = f" ({100 * share:.3g} % of that is held out to validate on)" if share > 0 else ""
        validated = "" if own is None else f", validates on {own.split}"
        want = "" if request.test_split or test.split not in VALIDATION_SPLITS else " (there is no test split)"
        self.note(f"{request}: trains on {train.split}{held_out}{validated} and tests on {test.split}{want}")
        self._note_left_out(request, train, *([] if own is None else [own]), test)

    def note_reading(self, *pools: Pool) -> None:
        """Notes which images are read whenever they are needed, and which of them cannot be read."""
        for pool in pools:
            if pool.streamed:
                self.note(pool.describe())
            if bad := left_out(pool.bad):
                self.note(f"{pool.request}: {bad}")

    def _note_left_out(self, request: Request, *listings: Listing) -> None:
        left_out = sum((listing.left_out for listing in listings), Counter[str]())
        if left_out:
            self.note(f"{request}: left out {in_words(left_out)}")

    def note(self, line: str) -> None:
        """Adds a line, unless it is there."""
        if line not in self.notes:  # of several tasks of one data set
            self.notes.append(line)


@dataclass(frozen=True, eq=False)
class Chosen:
    """Images that a task uses and their labels, which are read together with those of other tasks.

    Attributes:
        pool: All images of their part of the data set that some task uses.
        indices: Of its listing, in rising order, int64 (N,).
        labels: int64 (N,).
        transform: See `Split`.
    """

    pool: Pool
    indices: np.ndarray
    labels: Tensor
    transform: ResizedCrop | None = None

    def load(self) -> Split:
        """Decodes the pool, if it is kept in memory and not decoded yet.

        Raises:
            InputError: An image cannot be read, or their sizes differ and none is set.
        """
        bad = self.pool.bad
        if self.pool.streamed:
            return Split(self.pool, self.labels, torch.from_numpy(self.indices), self.transform, bad)
        images, rows = self.pool.images, torch.from_numpy(self.pool.rows(self.indices))
        labels, rows = self.labels[rows >= 0], rows[rows >= 0]
        if not len(rows):
            raise none_readable(self.pool.request, bad)
        return Split(images, labels, None if len(rows) == len(images) else rows, bad=bad)


@dataclass(frozen=True, eq=False)
class TaskPlan:
    """The images that a task is to have."""

    reader: "Reader"
    spec: DataSpec
    classes: tuple[str, ...]
    channels: int
    train: Chosen
    validation: Chosen | None
    test: Chosen

    def load(self) -> TaskData:
        """Decodes the images that are kept in memory, with those of all tasks planned so far that share them.

        Raises:
            InputError: They do not fit the memory, one cannot be read, or their sizes differ and none is set.
        """
        self.reader.settle()
        train, test = self.train.load(), self.test.load()
        validation = None if self.validation is None else self.validation.load()
        for name, other in (("test", test), ("validation", validation)):
            if other is not None and train.shape[1:] != other.shape[1:]:
                sizes = " and ".join("x".join(map(str, split.shape[1:])) for split in (train, other))
                raise InputError(f"train and {name} images have different sizes ({sizes}): set size")
        mean, std = (_per_channel(key, getattr(self.spec, key), self.channels) for key in ("mean", "std"))
        if mean is None or std is None:
            some = train
            # By what the recipe says alone, not by the memory that is free now: a resumed run has the same.
            too_many = train.transform is not None or len(train) * math.prod(train.shape) > RESIDENT
            if too_many and len(train) > ESTIMATED_ON:
                order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.spec.seed))
                some = train.subset(order[:ESTIMATED_ON].sort().values)
                self.reader.note(f"{self.train.pool.request}: mean and std are estimated on {ESTIMATED_ON:,} images")
            counted = _mean_std(some)
            mean, std = mean or counted[0], std or counted[1]
        self.reader.note_reading(*(chosen.pool for chosen in (self.train, self.validation, self.test) if chosen))
        return TaskData(
            spec=self.spec,
            classes=self.classes,
            input_size=(train.shape[1], train.shape[2]),
            mean=mean,
            std=std,
            train=train,
            validation=validation,
            test=test,
        )


def _mean_std(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of 8-bit images, in units of 255; a constant channel has deviation 1."""
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.zeros(split.shape[0], 256, dtype=torch.int64)  # of each value, by channel
    for images, _ in split.read(torch.arange(len(split)).split(256)):
        for channel, count in zip(images.unbind(1), counts, strict=True):
            count += torch.bincount(channel.flatten(), minlength=256)
    means, deviations = [], []
    for count in counts:
        share = count.double() / count.sum()
        mean = (share * values).sum()
        deviation = float((share * (values - mean) ** 2).sum().sqrt())
        means.append(float(mean))
        deviations.append(deviation or 1.0)
    return tuple(means), tuple(deviations)


def _per_channel(what: str, values: list[float] | None, channels: int) -> tuple[float, ...] | None:
    if values is not None and len(values) != channels:
        raise InputError(f"{what} has {len(values)} values for images of {channels} channels")
    return None if values is None else tuple(values)
