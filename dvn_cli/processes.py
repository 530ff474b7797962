"""The processes that train one run together, as torchrun starts them; alone, a process has nothing to do here."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dvn_cli.errors import DvnError, is_out_of_memory

T = TypeVar("T")

_joined = False
"""Whether this is one of several: what else a user's program may have torch.distributed for is not looked at."""


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Joins the processes that the environment tells of, by torchrun's variables: with gloo on the CPU, NCCL on CUDA.

    Of errors that end several processes only the first one leaves this context; the others are SystemExit.
    """
    global _joined
    store, number, of = next(dist.rendezvous("env://"))
    if torch.cuda.is_available() and local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=of)
    _joined = True
    try:
        yield
    except DvnError as error:
        is_first = False
        with contextlib.suppress(RuntimeError):  # the store is gone with the process that kept it, which was first
            is_first = store.add("dvn/errors", 1) == 1
        if is_first:
            raise
        raise SystemExit(error.exit_code) from None
    finally:
        _joined = False
    dist.destroy_process_group()


def count() -> int:
    """Returns how many processes there are."""
    return dist.get_world_size() if _joined else 1


def rank() -> int:
    """Returns the number of this process, from 0; number 0 writes files and is heard."""
    return dist.get_rank() if count() > 1 else 0


def local_rank() -> int:
    """Returns the number of this process among those of its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def on_this_machine() -> int:
    """Returns how many of the processes share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if count() > 1 else 1


@contextlib.contextmanager
def _all_there() -> Iterator[None]:
    """Says in a line that another process has ended, which those that wait for it are told as a lost connection."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise DvnError(
            "another process of this run has ended, or cannot be reached: see what it, or its system, says of it"
        ) from error


@torch.no_grad()
def _at_once(tensors: Sequence[Tensor], collective: Callable[[Tensor], object]) -> None:
    """Does something to all elements of tensors of one device, in one message."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with _all_there():
        collective(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def average(tensors: Sequence[Tensor]) -> None:
    """Gives every process the mean of what all have in some tensors, to the bit the same, by one all-reduce."""
    if count() > 1:
        _at_once(tensors, lambda flat: (dist.all_reduce(flat), flat.div_(count())))


def total(tensor: Tensor) -> Tensor:
    """Returns the sum of what all processes have for a tensor."""
    summed = tensor.clone(memory_format=torch.contiguous_format)
    if count() > 1:
        with _all_there():
            dist.all_reduce(summed)
    return summed


def broadcast(tensors: Sequence[Tensor]) -> None:
    """Gives every process what process 0 has in some tensors."""
    if count() > 1:
        _at_once(tensors, lambda flat: dist.broadcast(flat, 0))


def gathered(value: T) -> list[T]:
    """Returns what every process has for a value, in their order: numbers, text, tensors on the CPU."""
    found = [value] * count()
    if count() > 1:
        with _all_there():
            dist.all_gather_object(found, value)
    return found


def check_alike(value: object) -> None:
    """Raises DvnError unless all processes have the same of something that they have read from files."""
    if len(set(map(repr, gathered(value)))) > 1:
        raise DvnError("the processes of this run read different files: all machines need the same folders")


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Lets process 0 do something, such as a download, before the others do it and find it done."""
    if rank():
        gathered(None)
    try:
        yield
    finally:
        if not rank():
            gathered(None)


def share(positions: Tensor) -> Tensor:
    """Returns this process's part of some positions (N,), in order; each is in one part, and parts are nearly equal."""
    return positions.tensor_split(count())[rank()]
