"""Batches of images that are read by worker processes while others are used."""

import atexit
import functools
import signal
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dvn_cli.data.augment import ResizedCrop
from dvn_cli.data.pool import Pool, different_sizes, none_readable
from dvn_cli.errors import DvnError, InputError

Read = tuple[Tensor, Tensor, list[str]]  # images uint8 (B, C, H, W), which of the split they are, what is wrong


class _Reading(Dataset[Read | InputError]):
    """Batches of a split, by the positions of their images. What it gives depends on nothing else."""

    def __init__(self, pool: Pool, indices: np.ndarray, transform: ResizedCrop | None, seed: int | None) -> None:
        self.pool, self.indices, self.seed = pool, indices, seed
        self.transform = None if seed is None else transform
        self.shape = pool.shape[1:]
        self.unreadable = set[int]()  # positions, as far as this process has met them

    def __getitem__(self, positions: np.ndarray) -> Read | InputError:
        """Reads a batch. What is raised in a worker would lose its one line, so that it is returned."""
        try:
            return self._read(positions.copy())
        except InputError as error:
            return error

    def _read(self, positions: np.ndarray) -> Read:
        """Reads a batch; in training an image that is skipped leaves its place to the next one of the split."""
        images = np.empty((len(positions), *self.shape), dtype=np.uint8)
        problems: list[str] = []
        pending = np.arange(len(positions))
        while len(pending):
            pending = pending[np.argsort(self.indices[positions[pending]], kind="stable")]
            missing = []
            rising = self.indices[positions[pending]]
            for place, image in zip(pending, self.pool.decoded(rising, self.transform, self.seed or 0), strict=True):
                if isinstance(image, InputError):
                    problems.append(str(image))
                    missing.append(place)
                    self.unreadable.add(int(positions[place]))
                elif image.shape != self.shape:
                    raise different_sizes(self.pool.request, self.shape[1:], image.shape[1:])
                else:
                    images[place] = image
            pending = np.array(missing, dtype=np.int64)
            is_over = self.seed is None or self.pool.request.on_bad_image == "stop"
            if is_over or len(self.unreadable) == len(self.indices):
                break
            for place in pending:
                while int(positions[place]) in self.unreadable:
                    positions[place] = (positions[place] + 1) % len(self.indices)
        if len(pending):
            images, positions = np.delete(images, pending, axis=0), np.delete(positions, pending)
        return torch.from_numpy(images), torch.from_numpy(positions), problems


def stream(
    pool: Pool,
    indices: Tensor,
    chosen: Sequence[Tensor],
    device: torch.device | str,
    transform: ResizedCrop | None,
    seed: int | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the images of batches and which of the split each is; see `Split.read`.

    Args:
        pool: What they are read from.
        indices: Which images of its listing those of the split are.
        chosen, device, transform, seed: As of `Split.read`.

    Raises:
        InputError: An image cannot be read, or they are of different sizes.
        DvnError: A worker is killed, as for want of memory.
    """
    workers = min(pool.workers, len(chosen))
    if workers:
        pool.find_white()
    try:
        with warnings.catch_warnings():  # more processes than cores may be what someone wants
            warnings.filterwarnings("ignore", "This DataLoader will create")
            results = iter(
                DataLoader(
                    _Reading(pool, indices.cpu().numpy(), transform, seed),
                    batch_size=None,
                    sampler=[positions.cpu().numpy() for positions in chosen],
                    num_workers=workers,
                    multiprocessing_context="fork" if workers else None,
                    pin_memory=torch.device(device).type == "cuda",
                    generator=torch.Generator(),  # not the one that dropout draws from
                    worker_init_fn=_outlive_sigterm,
                )
            )
        if workers:
            _end_with_process(results)
        for result in results:
            if isinstance(result, InputError):
                raise result
            images, positions, problems = result
            pool.leave_out(problems)
            if seed is not None and not len(images):
                raise none_readable(pool.request, problems)
            if len(images):
                yield images.to(device, non_blocking=True), positions.to(indices.device, non_blocking=True)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise DvnError(
            f"a process that reads images of {pool.request} was ended by the system, as for want of memory: set fewer "
            "workers or a smaller batch_size"
        ) from error


_open = weakref.WeakSet[Any]()
"""Iterators that have workers: what was raised keeps its frames, and so these, until the process ends."""


def _end_with_process(results: Any) -> None:
    """Ends workers before Python, at its exit, sends them SIGTERM and waits; those that are stuck are killed then."""
    _open.add(results)
    _register()
    for worker in results._workers:
        worker._popen.terminate = worker._popen.kill


@functools.cache
def _register() -> None:
    atexit.register(lambda: [each._shutdown_workers() for each in list(_open)])


def _outlive_sigterm(_: int) -> None:
    """Lets the main process end the step: `timeout` and batch systems send SIGTERM to all processes of a command.

    A worker whose main process is gone ends by itself, as torch has it.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
