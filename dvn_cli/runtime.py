"""Networks of one file that come and go while others run; memory holds what the active ones need.

Of each tensor of the file *pieces* are held: what some units have of it, as a slice would have it. A network is given
the piece of its own units, or a view of a larger one that another active network needs anyway. When other networks are
to be active, new pieces are filled from those that are there, and from the file with what none of them has. A piece
never changes once a network has it, so what computes goes on with what it started with.
"""

import contextlib
import ctypes
import os
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, fx

from dvn_cli.budget import KnownLevel, choose, known_levels
from dvn_cli.errors import DvnError, InputError
from dvn_cli.loading import empty, restored
from dvn_cli.network import Cut, as_cut, is_of_other_size, taken
from dvn_cli.partition import Origin, check_size
from dvn_cli.store.file import ITEM_SIZE, read_checkpoint
from dvn_cli.store.lookup import find_task
from dvn_cli.store.metadata import TaskLevel, check_level
from dvn_cli.store.regions import Region, joined, outer_index
from dvn_cli.store.shapes import source
from dvn_cli.store.slicing import blocks, runs_in_file

WARM, TIMED = 2, 7
"""Forward passes of one image before latency is measured, and those that are timed."""


class Runtime:
    """Networks of a checkpoint, of which some are active: these can be called, and memory holds what they need.

    Outputs are those of the slice of the same task and level, to the bit, on the CPU. Networks can be called and set
    from several threads: a call goes on with the network that it started with.

    Attributes:
        path: of the checkpoint.
        tasks: number 1 first.
        bytes_read: of tensors, from the file, so far.

    Example:
        >>> runtime = dvn_cli.Runtime("dvn.safetensors")  # doctest: +SKIP
        >>> runtime.set("digits", 1)  # doctest: +SKIP
        >>> logits = runtime(images, "digits")  # doctest: +SKIP
        >>> runtime.set("digits", 3)  # doctest: +SKIP
    """

    def __init__(self, path: str | os.PathLike[str] = "dvn.safetensors") -> None:
        """Opens a checkpoint; no network is active yet, and no tensor is read.

        Raises:
            InputError: missing, damaged or foreign file, a slice, or a backbone that cannot be built here.
        """
        self._header = read_checkpoint(path)
        self._partition = restored(self._header)
        self.path, self.tasks, self.bytes_read = self._header.path, self._header.metadata.tasks, 0
        self._lock = threading.RLock()
        self._active: dict[TaskLevel, _Network] = {}  # replaced, never changed, as others may be reading it
        self._held: dict[str, dict[Region, Tensor]] = {}

    @property
    def active(self) -> list[TaskLevel]:
        """The networks that can be called, by the numbers of task and level from 1."""
        return sorted(self._active)

    @property
    def resident_bytes(self) -> int:
        """Bytes of all tensors that are held."""
        with self._lock:
            return sum(tensor.nbytes for pieces in self._held.values() for tensor in pieces.values())

    def set(self, task: int | str, *levels: int) -> None:
        """Makes levels of a task active, and no others of it; without any the task is left.

        Of what is added those bytes are read that no active network has, each checked against its checksum; what no
        active network needs any more is freed. The first time that a task is set, the graphs of all of its levels are
        made, so that a change of level is a matter of bytes. After an error all is as it was before.

        Args:
            task: by name or by number from 1.
            levels: from 1.

        Raises:
            InputError: no such task or level, or the file is damaged.
        """
        number = find_task(self.tasks, task)
        wanted = [TaskLevel(number, check_level(self.tasks[number - 1], level)) for level in levels]
        with self._lock:
            before = self._active
            after = {key: network for key, network in before.items() if key.task != number}
            after |= {key: before.get(key) or self._network(key) for key in wanted}
            try:
                self._hold(after.values(), [network for key, network in before.items() if key not in after])
            except BaseException:
                self._hold(before.values())
                raise
            self._active = after  # until now those that leave could be called
            del before  # and what they alone have
            self._hold(after.values())
        with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc keeps what is freed until it is told
            ctypes.CDLL(None).malloc_trim(0)

    def __call__(self, images: Tensor, task: int | str | None = None, level: int | None = None) -> Tensor:
        """Returns the logits, float (batch, classes), of an active network.

        Args:
            images: float (batch, channels, height, width), normalised by the task's mean and std.
            task: by name or by number from 1; by default the only active one.
            level: from 1; by default the highest active one.

        Raises:
            InputError: no such network is active.
        """
        network = self._chosen(task, level)
        if is_of_other_size(images, network.origin.input_size):
            check_size(images, network.origin, False, self._partition)
        return network.graph(images, *[taken(*network.tensors[name]) for name in network.regions])

    def fit(
        self,
        task: int | str | None = None,
        *,
        budget_bytes: float | None = None,
        latency_ms: float | None = None,
        results: Sequence[str | os.PathLike[str]] = (),
    ) -> int:
        """Makes the largest level of a task active that fits, in place of its others, and returns its number.

        Args:
            task: by name or by number from 1; by default the only active one.
            budget_bytes: the most that `resident_bytes` may be, with the active networks of other tasks.
            latency_ms: the most that the median forward pass of one image may take; measured here, from the lowest
                level on, where `results` do not say.
            results: files of what `dvn bench` found, as JSON.

        Raises:
            InputError: no such task, no limit, or `results` that hold nothing of the task.
            DvnError: no level fits; the message says which comes nearest, and all is as it was before.
        """
        sizes = {"bytes": budget_bytes, "latency": latency_ms}
        limits = {what: most for what, most in sizes.items() if most is not None}
        if not limits:
            raise InputError("nothing limits the level: give budget_bytes or latency_ms")
        number = self._only_task() if task is None else find_task(self.tasks, task)
        name = self.tasks[number - 1].name
        with self._lock:
            before = [key.level for key in self._active if key.task == number]
            others = [network for key, network in self._active.items() if key.task != number]
            levels = [
                replace(known, bytes=self._bytes([*others, self._network(TaskLevel(number, known.level))]))
                for known in known_levels(self._header, number, results)
            ]
            if budget_bytes is not None:
                choose(levels, {"bytes": budget_bytes}, name=name)  # there is one
                levels = [level for level in levels if (level.bytes or 0) <= budget_bytes]
            try:
                if latency_ms is not None and all(level.latency is None for level in levels):
                    levels = list(self._timed(number, levels, latency_ms))
                chosen = choose(levels, limits, name=name).level.level
                self.set(number, chosen)
            except DvnError:
                self.set(number, *before)
                raise
        return chosen

    def __repr__(self) -> str:
        active = ", ".join(f"{self.tasks[task - 1].name!r} level {level}" for task, level in self.active)
        return f"Runtime({str(self.path)!r}, active: {active or 'none'}, {self.resident_bytes:,} bytes)"

    # Networks

    def _chosen(self, task: int | str | None, level: int | None) -> "_Network":
        active = self._active
        number = self._only_task() if task is None else find_task(self.tasks, task)
        key = max((key for key in active if key.task == number and level in (None, key.level)), default=None)
        if key is None:
            what = f"level {level} is not" if level is not None else "no level is"
            name = self.tasks[number - 1].name
            raise InputError(f"task '{name}': {what} active; call set({name!r}, {level or 1}) first")
        return active[key]

    def _only_task(self) -> int:
        numbers = {key.task for key in self._active}
        if len(numbers) != 1:
            raise InputError(f"{len(numbers) or 'no'} tasks are active: say which is meant")
        return numbers.pop()

    def _network(self, key: TaskLevel) -> "_Network":
        """A network without its tensors; the graphs of all levels of its task are made with the first."""
        task, partition, header = self.tasks[key.task - 1], self._partition, self._header
        units, classes = task.units(key.level), len(task.classes)
        graphs = {
            level: partition.network(task.units(level), classes, task.input_size)
            for level in range(1, len(task.levels) + 1)
        }
        regions = {}
        for name in graphs[key.level].names:
            stored = source(header.tensors, name, *key)
            regions[stored] = Region.of(runs_in_file(header, stored, units, classes), header.tensors[stored].shape)
        return _Network(graphs[key.level].module, partition.origin(units, classes, task.input_size), regions)

    def _timed(self, number: int, levels: Iterable[KnownLevel], most: float) -> Iterator[KnownLevel]:
        """Yields levels with their latencies in ms, up to the first that takes more than is allowed."""
        for level in levels:
            self.set(number, level.level)
            latency = self._latency(TaskLevel(number, level.level))
            yield replace(level, latency=latency)
            if latency > most:
                break

    def _latency(self, key: TaskLevel) -> float:
        task = self.tasks[key.task - 1]
        weights = (tensor for tensor, _ in self._active[key].tensors.values() if tensor.is_floating_point())
        image = torch.randn(1, self._partition.spec.in_chans, *task.input_size).to(next(weights).dtype)
        times = []
        with torch.inference_mode():
            for _ in range(WARM + TIMED):
                begin = time.perf_counter()
                self(image, *key)
                times.append(1000 * (time.perf_counter() - begin))
        return statistics.median(times[WARM:])

    # Tensors

    def _needed(self, networks: Iterable["_Network"]) -> dict[str, list[Region]]:
        """Returns the pieces that some networks need, by the names of the tensors in the file."""
        regions = defaultdict[str, list[Region]](list)
        for network in networks:
            for name, region in network.regions.items():
                regions[name].append(region)
        return {name: joined(of_tensor) for name, of_tensor in regions.items()}

    def _bytes(self, networks: Iterable["_Network"]) -> int:
        """Counts the bytes that are held for some networks."""
        return sum(
            ITEM_SIZE[self._header.tensors[name].dtype] * piece.elements
            for name, pieces in self._needed(networks).items()
            for piece in pieces
        )

    def _hold(self, networks: Iterable["_Network"], leaving: Iterable["_Network"] = ()) -> None:
        """Reads what networks need and frees the rest, one tensor after the other.

        Args:
            networks: those that there are to be.
            leaving: others that keep what they have.
        """
        users, needed = [*networks, *leaving], self._needed(networks)
        for name in {**self._held, **needed}:
            held, pieces = self._held.get(name, {}), needed.get(name, [])
            if leaving:  # nothing that is there is copied yet, so that there is never more than one tensor twice
                pieces = [piece for piece in pieces if not any(piece <= other for other in held)]
                pieces += [piece for piece in held if not any(piece <= other for other in pieces)]
            filled = {piece: held[piece] if piece in held else self._filled(name, piece, held) for piece in pieces}
            for user in users:
                if name in user.regions and (name not in user.tensors or filled.keys() != held.keys()):
                    user.take(name, filled)
            self._held[name] = filled
        self._held = {name: pieces for name, pieces in self._held.items() if pieces}

    def _filled(self, name: str, piece: Region, held: Mapping[Region, Tensor]) -> Tensor:
        """Returns a piece of a tensor, from those that are held and from the file."""
        tensor = empty(self._header, name, piece.shape if self._header.tensors[name].shape else ())
        target, missing = _numbers(tensor), [piece]
        for other, there in held.items():
            for both in (part & other for part in missing):
                if both.elements:
                    own, theirs = (outer_index(both.within(whole).positions) for whole in (piece, other))
                    target[own] = _numbers(there)[theirs]
            missing = [rest for part in missing for rest in part - other]
        for part in missing:
            rows, *others = part.within(piece).positions
            start = 0
            for block in blocks(self._header, name, part.runs):
                target[outer_index([rows[start : start + len(block)], *others])] = block
                start += len(block)
            self.bytes_read += part.elements * tensor.itemsize
        return tensor


@dataclass(frozen=True)
class _Network:
    """A network of the file.

    Attributes:
        graph: what is called with images and tensors.
        origin: what its graph was made by.
        regions: what it has of the file's tensors, in the order in which the graph takes them.
        tensors: its tensors by the same names, each a whole piece or a view of one; or, where its indices in the
            piece are no runs, the piece and what is to be taken of it whenever it is called.
    """

    graph: fx.GraphModule
    origin: Origin
    regions: dict[str, Region]
    tensors: dict[str, tuple[Tensor, Cut]] = field(default_factory=dict)

    def take(self, name: str, pieces: Mapping[Region, Tensor]) -> None:
        """Uses the piece of a tensor that has all that it needs of it."""
        region = self.regions[name]
        piece = next(piece for piece in pieces if region <= piece)
        tensor, cut = pieces[piece], as_cut(region.within(piece).runs, piece.shape)
        is_view = not any(isinstance(part, Tensor) for part in cut)
        self.tensors[name] = (taken(tensor, cut), ()) if is_view else (tensor, cut)


def _numbers(tensor: Tensor) -> np.ndarray:
    """A contiguous tensor as unsigned integers of its item size, in the same memory; one without dimensions as (1,)."""
    array = tensor.reshape(-1).view(torch.uint8).numpy().view(f"<u{tensor.itemsize}")
    return array.reshape(tensor.shape or (1,))
