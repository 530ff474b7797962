"""Images that tasks share: which of them are used is known before any is decoded, and each is decoded once."""

import functools
import math
from collections.abc import Iterable

import numpy as np
from torch import Tensor

from dvn_cli.data import decode, memory
from dvn_cli.data.listing import Listing, Request
from dvn_cli.data.sources import stack
from dvn_cli.errors import InputError


class Pool:
    """The images of one listing that some task uses, as one tensor."""

    def __init__(self, listing: Listing, request: Request) -> None:
        self._request, self._items = request, listing.items
        self._used = np.zeros(len(listing.labels), dtype=bool)
        self._images: Tensor | None = None

    def use(self, indices: np.ndarray) -> None:
        """Notes that some of the listing's images are used, before any is decoded."""
        assert self._images is None
        self._used[indices] = True

    @property
    def decoded(self) -> bool:
        """Whether the images are decoded, so that no others can be added."""
        return self._images is not None

    @property
    def images(self) -> Tensor:
        """All images that are used, uint8 (N, C, H, W), decoded at the first call.

        Raises:
            InputError: They do not fit the memory, or see `sources.stack`.
        """
        if self._images is None:
            check_memory([self])
            used = np.flatnonzero(self._used)
            try:
                self._images = stack(lambda: self._items(used), len(used), self._request)
            except MemoryError:
                raise too_large([self], memory.available()) from None
            del self._items
        return self._images

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Returns where in `images` some of the listing's images are."""
        return (np.cumsum(self._used) - 1)[indices]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of `images`, by the size of one of them where none is requested."""
        return (int(self._used.sum()), self._request.channels, *(self._request.size or self._size_of_one))

    @functools.cached_property
    def _size_of_one(self) -> tuple[int, int]:
        width, height = decode.size(next(iter(self._items(np.flatnonzero(self._used)[:1]))))
        return height, width

    def __str__(self) -> str:
        count, *pixels = self.shape
        return f"{count:,} images of {'x'.join(map(str, pixels))} of {self._request}"


def check_memory(pools: Iterable[Pool]) -> None:
    """Checks that images which are not decoded yet fit the memory that there is, where the system says.

    Raises:
        InputError: They do not; the message says what they take and what to set.
    """
    waiting = [pool for pool in pools if not pool.decoded]
    free = memory.available()
    if free is not None and sum(_bytes(pool) for pool in waiting) > free:
        raise too_large(waiting, free)


def too_large(pools: Iterable[Pool], free: int | None) -> InputError:
    """What is said of images that do not fit the memory."""
    largest_first = sorted(pools, key=_bytes, reverse=True)
    total = sum(map(_bytes, largest_first))
    rest = len(largest_first) - 1
    others = f", and those of {'another split' if rest == 1 else f'{rest} other splits'}," if rest else ""
    there_are = "" if free is None else f", and {memory.in_words(free)} of memory are free"
    return InputError(
        f"{largest_first[0]}{others} take {memory.in_words(total)}{there_are}: set a smaller size, fewer train_images "
        "or test_images, or fewer classes"
    )


def _bytes(pool: Pool) -> int:
    return math.prod(pool.shape)
