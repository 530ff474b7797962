"""What networks cost when they run: time and memory, each network in processes of its own.

Time. One process for each network, all of them alive together. After its warm-up a network waits, and then they take
turns: `ROUNDS` rounds, in each of which every network runs its share of the iterations while the others sleep. What
else the machine does meets them all alike, so the speed-up over the largest network is the median over the rounds of
the ratio of the two medians within one round. The latencies are percentiles over all iterations of all rounds. An
iteration is one forward pass of one batch that lies on the device already: by the clock on a CPU, between two CUDA
events on a GPU, and in either case the next one starts when it is done.

Memory. Another process for each network, which times nothing. On CUDA it is the most that torch had allocated; on a CPU
the most memory that was resident, less what was resident before the network was loaded (interpreter, libraries and a
small warm-up of them not counted). Weights, the batch of images and activations are counted in both. None where the
system does not tell.

In the format of another runtime a network is written and compared first; its processes run the file on the CPU.
"""

import contextlib
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dvn_cli.device import choose
from dvn_cli.errors import DvnError, InputError
from dvn_cli.formats import NotExpressible, find_format, writing
from dvn_cli.loading import from_file
from dvn_cli.network import VirtualNetwork
from dvn_cli.partition import Partition
from dvn_cli.store.file import AnyHeader, read_header
from dvn_cli.store.lookup import find_task
from dvn_cli.store.metadata import CheckpointMetadata, SliceMetadata, Task, check_level
from dvn_cli.store.slicing import count, slice_file
from dvn_cli.units.count import macs, params_and_density
from dvn_cli.worker import Job, Settings, Worker

ROUNDS = 8
"""Turns that each network takes, fewer where there are fewer iterations."""


@dataclass(frozen=True)
class Target:
    """One network to measure: a slice, or a task and level, both from 1, of a checkpoint; in a format, if any."""

    header: AnyHeader
    task: int
    level: int
    format: str | None = None

    @property
    def entry(self) -> Task:
        return self.header.metadata.numbered_tasks[self.task]

    @property
    def family(self) -> object:
        """What those that it is compared with have in common: format, file and task, of slices backbone and task."""
        if isinstance(self.header.metadata, CheckpointMetadata):
            return self.format, str(self.header.path), self.task
        return self.format, self.header.metadata.backbone, self.entry.name


@dataclass(frozen=True)
class Measurement:
    """What one network costs.

    Attributes:
        file: where it came from.
        task: number, from 1.
        name: of the task.
        level: from 1.
        units: that it is made of, by number from 1.
        params: elements of its parameters.
        bytes: of its tensors in a file; where a format was asked for, of its file.
        density: the share of those of its task's top level.
        macs: multiply-accumulates of one image.
        latencies: seconds of each forward pass of a batch, in the order measured.
        memory: bytes at the peak; None where the system does not tell.
        speedup: over the largest network measured of its task; None where it is the only one.
        kind: of the file, `checkpoint` or `slice`.
        batch_size: images in a forward pass.
        format: of the file that was run, where one was asked for.
        difference: of that file's logits from the network's, in parts of the largest; see `formats.writing.Check`.
    """

    file: str
    task: int
    name: str
    level: int
    units: tuple[int, ...]
    params: int
    bytes: int
    density: float
    macs: int
    latencies: tuple[float, ...]
    memory: int | None
    speedup: float | None
    kind: str = "checkpoint"
    batch_size: int = 1
    format: str | None = None
    difference: float | None = None

    def percentile(self, percent: float) -> float:
        """Seconds that so many per cent of the forward passes took at most."""
        return torch.tensor(self.latencies, dtype=torch.float64).quantile(percent / 100).item()

    def to_dict(self) -> dict[str, Any]:
        """As `dvn bench --json` shows it: latencies in ms, images per second at the median."""
        return {
            "file": self.file,
            "task": self.task,
            "name": self.name,
            "level": self.level,
            "format": self.format,
            "params": self.params,
            "bytes": self.bytes,
            "difference": self.difference,
            "density": self.density,
            "compression": 1 / self.density,
            "macs": self.macs,
            "latency_ms": {f"p{p}": 1000 * self.percentile(p) for p in (50, 90, 99)},
            "images_per_s": self.batch_size / self.percentile(50),
            "peak_memory_bytes": self.memory,
            "speedup": self.speedup,
        }


def bench(
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = "dvn.safetensors",
    task: int | str | None = None,
    level: int | None = None,
    *,
    every: bool = False,
    batch_size: int = 1,
    device: str | torch.device = "auto",
    num_warm_iter: int = 10,
    num_bench_iter: int = 40,
    channels_last: bool = False,
    threads: int | None = None,
    formats: Sequence[str] = (),
    progress: Callable[[str, float], None] = lambda what, done: None,
    note: Callable[[str], None] = lambda _: None,
) -> list[Measurement]:
    """Measures parameters, multiply-accumulates, latency and peak memory of networks; the module says how.

    Args:
        files: checkpoints and slices.
        task: of a checkpoint, by name or by number from 1; the first by default.
        level: of a checkpoint, from 1; all by default.
        every: every task of a checkpoint, not the first only.
        batch_size: images in a forward pass.
        device: `auto`, or by torch's name.
        num_warm_iter: forward passes before timing.
        num_bench_iter: forward passes that are timed.
        channels_last: whether images and convolutions' weights have their channels last in memory.
        threads: of the CPU; torch's by default. ExecuTorch chooses its own.
        formats: by their names in `formats.FORMATS`, each of which every network is written and run in, on the CPU.
        progress: is told what goes on, and which share of it is done.
        note: is told in a line of a network that a format cannot express, which is left out.

    Raises:
        InputError: a file is missing, broken or cannot be built here, or there is no such task, level or format here.
        DvnError: a network failed to run, as for want of memory.

    Example:
        >>> for network in dvn_cli.bench("dvn.safetensors", task=1):  # doctest: +SKIP
        ...     print(network.level, network.params, network.percentile(50))
    """
    paths = [files] if isinstance(files, str | os.PathLike) else files
    headers = [read_header(path) for path in paths]
    chosen = [target for header in headers for target in targets_of(header, task, level, every)]
    where = device if isinstance(device, torch.device) else choose(device)
    if formats:
        for name in formats:
            find_format(name)
        if where.type != "cpu" or channels_last:
            raise InputError(
                "formats are compared on the CPU, as their runtimes lay out memory: give --device cpu alone"
            )
        chosen = [replace(target, format=name) for target in chosen for name in formats]
    settings = Settings(where, batch_size, num_warm_iter, num_bench_iter, channels_last, threads)
    return measure(chosen, settings, progress, note)


def targets_of(
    header: AnyHeader, task: int | str | None = None, level: int | None = None, every: bool = False
) -> list[Target]:
    """Returns the networks of a file that are asked for; see `bench`."""
    metadata = header.metadata
    if isinstance(metadata, SliceMetadata) and (task is not None or level is not None):
        raise InputError(f"'{header.path}' is a slice, of one task and level; --task and --level are for checkpoints")
    networks = metadata.networks
    if isinstance(metadata, CheckpointMetadata):
        numbers = list(metadata.numbered_tasks) if every else [find_task(metadata.tasks, 1 if task is None else task)]
        if level is not None:
            check_level(max((metadata.tasks[number - 1] for number in numbers), key=lambda one: len(one.levels)), level)
        networks = [each for each in networks if each.task in numbers and level in (None, each.level)]
    return [Target(header, *network) for network in networks]


def measure(
    targets: Sequence[Target],
    settings: Settings,
    progress: Callable[[str, float], None] = lambda what, done: None,
    note: Callable[[str], None] = lambda _: None,
) -> list[Measurement]:
    """Measures networks; the module says how. Arguments as `bench`.

    Raises:
        InputError: a file's network cannot be built here.
        DvnError: a network failed to run, as for want of memory.
    """
    with TemporaryDirectory(prefix="dvn-bench-") as folder, contextlib.ExitStack() as stack:
        prepared = []
        for number, target in enumerate(targets):
            progress("reading" if target.format is None else f"writing {target.format}", number / len(targets))
            try:
                prepared.append((target, *_prepare(target, Path(folder) / f"{number}.safetensors", settings)))
            except NotExpressible as error:
                note(str(error))
        if not prepared:
            raise DvnError("no network can be written in these formats")
        targets, jobs, costs = zip(*prepared, strict=True)

        def memory(job: Job) -> int | None:
            with Worker(job, "memory") as worker:
                return worker.answer()

        with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
            memories = []
            for number, peak in enumerate(pool.map(memory, jobs)):
                memories.append(peak)
                progress("memory", (number + 1) / len(jobs))
        workers = [stack.enter_context(Worker(job, "time")) for job in jobs]
        for number, worker in enumerate(workers):
            progress("warm-up", number / len(jobs))
            worker.answer()
        times: list[list[list[float]]] = [[] for _ in jobs]
        rounds = min(ROUNDS, settings.iterations)
        for turn in range(rounds):
            share = (turn + 1) * settings.iterations // rounds - turn * settings.iterations // rounds
            for number, worker in enumerate(workers):
                progress("time", (turn + number / len(jobs)) / rounds)
                worker.send(share)
                times[number].append(worker.answer())
        progress("time", 1.0)

    return [
        Measurement(
            file=str(target.header.path),
            task=target.task,
            name=target.entry.name,
            level=target.level,
            units=target.entry.units(target.level),
            params=cost.params,
            bytes=cost.bytes,
            density=cost.density,
            macs=cost.macs,
            latencies=tuple(seconds for turn in times[number] for seconds in turn),
            memory=memories[number],
            speedup=_speedup(number, targets, costs, times),
            kind=target.header.metadata.kind,
            batch_size=settings.batch_size,
            format=target.format,
            difference=cost.difference,
        )
        for number, (target, cost) in enumerate(zip(targets, costs, strict=True))
    ]


@dataclass(frozen=True)
class Cost:
    """What is known of a network without running it."""

    params: int
    bytes: int
    density: float
    macs: int
    difference: float | None = None


def _prepare(target: Target, file: Path, settings: Settings) -> tuple[Job, Cost]:
    header = target.header
    entry, partition = target.entry, Partition.restore(header.metadata)
    origin = partition.origin(entry.units(target.level), len(entry.classes), entry.input_size)
    if isinstance(header.metadata, CheckpointMetadata):
        params, density = params_and_density(header, target.task, target.level)
        slice_file(header, target.task, target.level, file)
        header = read_header(file)
    else:
        params, density = params_and_density(header)
    image = (partition.spec.in_chans, *entry.input_size)
    narrowed = origin.network(train=False)
    cost = Cost(
        params, count(header).bytes, density, macs(narrowed, partition.tensors(origin.units, origin.classes), image)
    )
    title = f"task {target.task}, level {target.level} of '{target.header.path}'"
    own = Job(title, settings, narrowed, origin, image, header.path)
    if target.format is None:
        return own, cost
    form = find_format(target.format)
    if header.path.suffix == form.ending:  # it is a file of this format, which dvn runs as ever
        return own, replace(cost, bytes=header.path.stat().st_size, difference=0.0)
    network = from_file(header)
    assert isinstance(network, VirtualNetwork)
    written = file.with_name(f"{file.stem}{form.ending}")
    check = writing.write(network, form, written)
    size = sum(path.stat().st_size for path in (written.iterdir() if form.is_folder else [written]))
    job = Job(f"{title} as {form.name}", settings, form.name, origin, image, written)
    return job, replace(cost, bytes=size, difference=check.difference)


def _speedup(
    number: int, targets: Sequence[Target], costs: Sequence[Cost], times: Sequence[Sequence[Sequence[float]]]
) -> float | None:
    same = [other for other, target in enumerate(targets) if target.family == targets[number].family]
    if len(same) == 1:
        return None
    largest = max(same, key=lambda other: costs[other].params)
    pairs = zip(times[largest], times[number], strict=True)
    return statistics.median(statistics.median(theirs) / statistics.median(own) for theirs, own in pairs)
