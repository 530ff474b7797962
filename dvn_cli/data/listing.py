"""What every source of images gives: a listing of one part of a data set, its images not decoded yet."""

import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dvn_cli.data.decode import Item
from dvn_cli.data.resize import Resize
from dvn_cli.data.spec import DataSpec, locate
from dvn_cli.errors import InputError

Part = Literal["train", "validation", "test"]
Items = Callable[[np.ndarray], Iterator[Item]]

TRAIN_SPLITS = ("train", "trainval")
VALIDATION_SPLITS = ("validation", "valid", "val", "dev")
TEST_SPLITS = ("test", *VALIDATION_SPLITS)


class Request(NamedTuple):
    """What is to be read. Tasks whose requests are equal share one reading."""

    source: str
    name: str | None
    path: Path | None
    image: str | None
    label: str | None
    subset: str | None
    test_split: str | None
    size: tuple[int, int] | None
    channels: int
    resize: Resize = Resize()
    load: str = "auto"
    workers: int | None = None
    on_bad_image: str = "stop"

    @classmethod
    def of(cls, spec: DataSpec, channels: int, base: Path | None) -> "Request":
        """The request of a task's data, as images of `channels` channels, paths relative to `base`."""
        path = None if spec.path is None else Path(os.path.realpath(locate(spec.path, base)))
        columns = spec.image, spec.label, spec.subset, spec.test_split
        reading = spec.load, spec.workers, spec.on_bad_image
        return cls(spec.source, spec.name, path, *columns, spec.height_width, channels, Resize.of(spec), *reading)

    def splits(self, part: Part) -> tuple[str, ...]:
        """The names that the split may have, the first found counts; what is tested on is no validation split."""
        if part == "train":
            return TRAIN_SPLITS
        if part == "validation":
            return tuple(name for name in VALIDATION_SPLITS if name != self.test_split)
        return TEST_SPLITS if self.test_split is None else (self.test_split,)

    def __str__(self) -> str:
        return str(self.name or self.path or self.source)


@dataclass(frozen=True, eq=False)
class Listing:
    """One part of a data set, its images not decoded yet.

    Attributes:
        split: What the source calls it.
        labels: int64 (N,), the index of each image's class.
        class_names: Of all classes.
        strata: int64 (N,), what random choices of images are balanced over. The same whichever column is the label,
            so that tasks of one data set choose the same images.
        key: Equal for listings of the same images.
        items: Given indices of images in rising order, those images.
        empty: Classes that ought to have images and have none, by their index, and what is there instead.
        left_out: How many files, by kind, lie there and are not read.
    """

    split: str
    labels: Tensor
    class_names: tuple[str, ...]
    strata: Tensor
    key: Hashable
    items: Items
    empty: Mapping[int, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)


def in_words(left_out: Mapping[str, int]) -> str:
    """Counts of files by kind: 3 .txt, 1 hidden."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))


def stratified_order(strata: np.ndarray, seed: int) -> np.ndarray:
    """Returns a random order of the images in which every prefix has the strata in their proportions, nearly.

    The n images of a stratum are shuffled and spread evenly: the i-th stands at (i + 1/2) / n of the way. Drawn with
    numpy's legacy generator, whose stream numpy keeps for ever, so that a choice of images outlives all versions.

    Args:
        strata: Integers (N,).
        seed: Of the shuffle.
    """
    shuffled = np.random.RandomState(seed).permutation(len(strata))
    of_shuffled = strata[shuffled]
    by_stratum = np.argsort(of_shuffled, kind="stable")
    _, first, of_image, counts = np.unique(
        of_shuffled[by_stratum], return_index=True, return_inverse=True, return_counts=True
    )
    place = np.empty(len(strata))
    place[by_stratum] = (np.arange(len(strata)) - first[of_image] + 0.5) / counts[of_image]
    return shuffled[np.argsort(place, kind="stable")]


SHORT = 64
"""Characters of what may name a class where nothing says so: longer ones are texts."""


def together(labels: Sequence[np.ndarray]) -> np.ndarray:
    """Returns which combination of several labels, each int64 (N,), each image has: int64 (N,), from 0."""
    return np.unique(np.stack(labels), axis=1, return_inverse=True)[1].reshape(-1)


def strata_of(labels: Iterable[np.ndarray], count: int) -> np.ndarray:
    """Returns what random choices are balanced over, int64 (N,), where nothing says which labels are of classes.

    That is the one of the fewest values, if that has at most half as many as there are images, and together with it
    the next ones as long as there are 20 images to a stratum in the mean: ids and texts tell nothing.

    Args:
        labels: Each int64 (N,), from 0.
        count: N.
    """
    found, enough = np.zeros(count, dtype=np.int64), 2
    for codes in sorted(labels, key=lambda codes: int(codes.max(initial=0))):
        if codes.any():
            both = together([found, codes])
            if enough * (int(both.max()) + 1) > count:
                break
            found, enough = both, 20
    return found


def first_present(names: Sequence[str], present: Sequence[str], has_no: str) -> str:
    """The first of the names that is present."""
    for name in names:
        if name in present:
            return name
    raise InputError(f"{has_no} {' or '.join(names)}; there is: {', '.join(present) or 'nothing'}")


def labelled(
    split: str, labels: Sequence[int] | np.ndarray, names: tuple[str, ...], *, key: Hashable, items: Items, **more: Any
) -> Listing:
    """A listing of images that have one label each, which random choices are balanced over."""
    of_image = torch.as_tensor(np.asarray(labels, dtype=np.int64))
    return Listing(split, of_image, names, strata=of_image, key=key, items=items, **more)
