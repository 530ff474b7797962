"""Some images of a data set, whatever their classes."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dvn_cli.data import folders, sources
from dvn_cli.data.batches import Split, batches
from dvn_cli.data.listing import Request, stratified_order
from dvn_cli.data.pool import Pool, left_out
from dvn_cli.data.spec import DataSpec
from dvn_cli.data.words import Data, parse_data, prepared
from dvn_cli.errors import InputError
from dvn_cli.store.metadata import Task

IMAGES = 128
"""That are enough to tell by how much a channel varies, and what its mean is."""

BATCH = 32
"""Of them at a time: one whose own statistics are near to those of all."""


def sample(spec: DataSpec, count: int = IMAGES, *, seed: int, channels: int = 3, base: Path | None = None) -> Split:
    """Reads some of a data set's training images, drawn by a seed; where `test_split` is `.`, of all images.

    Args:
        spec: what to read, at what size; its classes are not looked at, and the test images never.
        count: how many images, where there are as many.
        channels: of the images, 1 or 3; grey and colour are converted.
        base: the folder that relative paths start from, before the working directory.

    Returns:
        The images, in the order of the data set. Their labels say nothing.

    Raises:
        InputError: there are no such images, or they do not fit the memory.
        DvnError: they cannot be downloaded.
    """
    request = Request.of(spec, channels, base)
    listing = folders.unsplit(request) if request.test_split == "." else sources.read(request, "train")
    if listing is None:
        raise InputError(f"{request} has no train images")
    pool = Pool(listing, request)
    pool.use(np.sort(stratified_order(listing.strata.numpy(), seed)[:count]))
    return Split(pool.images, torch.zeros(len(pool.images), dtype=torch.int64), bad=pool.bad)


def some(split: Split, count: int, *, seed: int) -> Split:
    """Returns some images of a split, drawn by a seed: all where it has no more."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:count].to(split.labels.device)
    return split.subset(order)


def drawn(split: Split, mean: Sequence[float], std: Sequence[float], *, seed: int, count: int = IMAGES) -> list[Tensor]:
    """Returns some images of a split, drawn by a seed: normalised batches, float (batch, channels, height, width)."""
    return [images for images, _ in batches(some(split, count, seed=seed), BATCH, mean=mean, std=std)]


def unlabelled(
    data: Data | Sequence[Data], task: Task, channels: int, seed: int, note: Callable[[str], None]
) -> list[Tensor]:
    """Reads some training images, prepared as a task's, whatever their classes.

    Args:
        data: as of `parse_data`; a folder may also hold nothing but images.
        channels: of the images.
        seed: of the choice.
        note: is told, in a line, what was taken for what.

    Returns:
        Normalised batches, float (batch, channels, height, width).

    Raises:
        InputError: as `parse_data` and `sample`.
    """
    spec, base = parse_data(data, note, flat=True)
    split = sample(spec.model_copy(update=prepared(task)), seed=seed, channels=channels, base=base)
    if line := left_out(split.bad):
        note(f"warning: {line}")
    return drawn(split, task.mean, task.std, seed=seed)
