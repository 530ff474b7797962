"""Images that tasks share: which of them are used is known before any is decoded; kept in memory, or read each time."""

import contextlib
import functools
import itertools
import math
import os
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from dvn_cli import processes
from dvn_cli.data import decode, memory
from dvn_cli.data.augment import ResizedCrop
from dvn_cli.data.listing import Listing, Request
from dvn_cli.errors import InputError

RESIDENT = 3 * 2**29
"""Bytes of images that are kept in memory unless the recipe says otherwise."""

DEFAULT_WORKERS = 4
"""At most: each has up to three batches in memory."""

BATCH = 256
"""Images of it must fit the memory where they are streamed."""

NAMED = 3
"""Of the images that cannot be read."""


class Pool:
    """The images of one listing that some task uses: one tensor, or what they are read from whenever they are needed.

    Attributes:
        request: As what they are read.
        streamed: Whether they are read anew whenever they are needed; None before `settle` or the first reading.
        bad: What is said of each image that cannot be read and is left out.
    """

    def __init__(self, listing: Listing, request: Request) -> None:
        self.request = request
        self.streamed: bool | None = None
        self.bad: dict[str, None] = {}  # in the order of their discovery
        self._items = listing.items
        self._used = np.zeros(len(listing.labels), dtype=bool)
        self._images: Tensor | None = None
        self._must_stream = self._looked_for_white = False
        # One range of values for all images: a dark one is no measure.
        self._white = functools.cache(self._white_of)

    def use(self, indices: np.ndarray, stream: bool = False) -> None:
        """Notes that some of the listing's images are used, before any is decoded; `stream`: they cannot be kept."""
        assert self.streamed is None
        self._used[indices] = True
        self._must_stream |= stream

    def decoded(
        self, indices: np.ndarray, transform: ResizedCrop | None = None, seed: int = 0
    ) -> Iterator[np.ndarray | InputError]:
        """Decodes images, in rising order: uint8 (C, H, W) each, or what is wrong with it.

        Args:
            indices: Of the listing.
            transform: In place of the resizing that is requested, with a seed and the image's index.
            seed: Of the transform.
        """
        mode = {1: "L", 3: "RGB"}[self.request.channels]
        for index, item in zip(indices, self._items(indices), strict=True):
            try:
                stored = decode.upright(item)
                with decode.named(item):
                    image = decode.eight_bit(stored, "RGB" if transform else mode, self._white)
            except InputError as error:
                yield error
                continue
            if transform is not None:
                image = transform(image, seed, int(index)).convert(mode)
            elif self.request.size is not None:
                image = self.request.resize(image, self.request.size)
            yield np.asarray(image).reshape(image.height, image.width, -1).transpose(2, 0, 1)

    def _white_of(self, mode: str) -> int:
        skip = self.request.on_bad_image == "skip"
        return decode.white_of(self._items(np.flatnonzero(self._used)), mode, skip=skip)

    def find_white(self) -> None:
        """Finds, once, what is white where the first image is of floats or 32-bit integers, before processes fork."""
        if self._looked_for_white:
            return
        self._looked_for_white = True
        for item in self._items(np.flatnonzero(self._used)[:1]):
            with contextlib.suppress(InputError):  # which is said when the images are read
                mode = decode.upright(item).mode
                if mode in decode.FULL_SCALES:
                    self._white(mode)

    def leave_out(self, problems: Iterable[InputError | str]) -> None:
        """Notes images that cannot be read.

        Raises:
            InputError: The first of them, unless they are to be skipped.
        """
        for problem in problems:
            if self.request.on_bad_image == "stop":
                raise InputError(f"{problem}; on_bad_image=skip leaves such images out")
            self.bad[str(problem)] = None

    @property
    def images(self) -> Tensor:
        """All images that are used and can be read, uint8 (N, C, H, W), decoded at the first call.

        Raises:
            InputError: They do not fit the memory, are of different sizes, or one cannot be read.
        """
        if self._images is None:
            if self.streamed is None:
                _check_memory([self])
            self.streamed = False
            try:
                self._images = self._read_all()
            except MemoryError:
                raise too_large([self], memory.available()) from None
            del self._items
        return self._images

    def _read_all(self) -> Tensor:
        used, count = np.flatnonzero(self._used), 0
        out = np.empty((0, self.request.channels, 1, 1), dtype=np.uint8)
        for index, image in zip(used, self.decoded(used), strict=True):
            if isinstance(image, InputError):
                self.leave_out([image])
                self._used[index] = False
                continue
            if count == 0:
                out = np.empty((len(used), *image.shape), dtype=np.uint8)
            elif out.shape[1:] != image.shape:
                raise different_sizes(self.request, out.shape[2:], image.shape[1:])
            out[count] = image
            count += 1
        if count == 0:
            raise none_readable(self.request, self.bad)
        return torch.from_numpy(out[:count])

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Returns where in `images` some of the listing's images are, -1 where they cannot be read."""
        return np.where(self._used, np.cumsum(self._used) - 1, -1)[indices]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of all images, by the size of one of them where none is requested."""
        return (int(self._used.sum()), self.request.channels, *(self.request.size or self._size_of_one))

    @functools.cached_property
    def _size_of_one(self) -> tuple[int, int]:
        for item in self._items(np.flatnonzero(self._used)):
            try:
                width, height = decode.size(item)
                return height, width
            except InputError as error:
                self.leave_out([error])
        raise none_readable(self.request, self.bad)

    @property
    def workers(self) -> int:
        """How many processes read the images where they are streamed."""
        if not hasattr(os, "fork"):  # a listing cannot be sent to a process that starts from nothing
            return 0
        if self.request.workers is not None:
            return self.request.workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(cores, DEFAULT_WORKERS)

    def describe(self) -> str:
        """Returns a line on how the images are read where they are streamed."""
        workers = {0: "the process that uses them", 1: "one process"}.get(self.workers, f"{self.workers} processes")
        return f"{self} ({memory.in_words(_bytes(self))}) are read whenever they are needed, by {workers}"

    def __str__(self) -> str:
        count, *pixels = self.shape
        return f"{count:,} images of {'x'.join(map(str, pixels))} of {self.request}"


def left_out(problems: Iterable[str]) -> str | None:
    """Returns a line on the images that cannot be read, by any of all processes; None where there are none."""
    bad = list(dict.fromkeys(itertools.chain.from_iterable(processes.gathered(list(problems)))))
    more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    count = "1 image is" if len(bad) == 1 else f"{len(bad)} images are"
    return f"{count} left out: {'; '.join(bad[:NAMED])}{more}" if bad else None


def settle(pools: Iterable[Pool]) -> None:
    """Decides of pools that are not read yet which of them are kept in memory.

    Raises:
        InputError: What is to be kept does not fit the memory; the message says what it takes and what to set.
    """
    waiting = [pool for pool in pools if pool.streamed is None]
    for pool in waiting:
        if pool._must_stream or pool.request.load != "auto":
            pool.streamed = pool._must_stream or pool.request.load == "stream"
    asked = [pool for pool in waiting if pool.streamed is False]
    _check_memory(asked)
    free = memory.available()
    if free is not None:  # every process has images of its own, and all decide alike
        free = min(processes.gathered(free // processes.on_this_machine()))
    room = RESIDENT if free is None else min(RESIDENT, free // 2)
    room -= sum(map(_bytes, asked))
    for pool in sorted((pool for pool in waiting if pool.streamed is None), key=_bytes):
        room -= _bytes(pool)
        pool.streamed = room < 0
    for pool in waiting:
        if pool.streamed and free is not None and min(BATCH, pool.shape[0]) * math.prod(pool.shape[1:]) > free:
            raise too_large([pool], free)


def _check_memory(pools: list[Pool]) -> None:
    free = memory.available()
    if free is not None and sum(map(_bytes, pools)) > free:
        raise too_large(pools, free)


def too_large(pools: Iterable[Pool], free: int | None) -> InputError:
    """What is said of images that do not fit the memory."""
    largest_first = sorted(pools, key=_bytes, reverse=True)
    total = sum(map(_bytes, largest_first))
    rest = len(largest_first) - 1
    others = f", and those of {'another split' if rest == 1 else f'{rest} other splits'}," if rest else ""
    there_are = "" if free is None else f", and {memory.in_words(free)} of memory are free"
    stream = "" if largest_first[0].streamed else "load to stream, "
    return InputError(
        f"{largest_first[0]}{others} take {memory.in_words(total)}{there_are}: set {stream}a smaller size, fewer "
        "train_images or test_images, or fewer classes"
    )


def none_readable(request: Request, problems: Iterable[str]) -> InputError:
    """What is said where no image that is wanted can be read."""
    return InputError(f"none of the images of {request} can be read: {next(iter(problems))}")


def different_sizes(request: Request, size: tuple[int, ...], other: tuple[int, ...]) -> InputError:
    """What is said of images that are not of one size."""
    return InputError(
        f"images of {request} have different sizes ({size[0]}x{size[1]} and {other[0]}x{other[1]}): set size"
    )


def _bytes(pool: Pool) -> int:
    return math.prod(pool.shape)
