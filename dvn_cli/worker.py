"""A process of its own for a network, in which nothing else runs: what `benchmark` measures is measured there."""

import contextlib
import os
import pickle
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dvn_cli.errors import DvnError, is_out_of_memory
from dvn_cli.formats import find_format, writing
from dvn_cli.graph.narrow import Narrowed
from dvn_cli.loading import read_tensors
from dvn_cli.network import VirtualNetwork, device_and_dtype
from dvn_cli.partition import Origin
from dvn_cli.store.file import read_header
from dvn_cli.store.metadata import SliceMetadata


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: where.
        batch_size: images in a forward pass.
        warm: forward passes before anything is timed.
        iterations: forward passes that are timed.
        channels_last: whether images and convolutions' weights have their channels last in memory.
        threads: of torch in each process; None leaves it as it is.
    """

    device: torch.device
    batch_size: int = 1
    warm: int = 10
    iterations: int = 40
    channels_last: bool = False
    threads: int | None = None


@dataclass(frozen=True)
class Job:
    """What a process needs to run a network: its graph, and where its tensors lie, not the backbone or its library.

    Of another runtime's file it is not the graph but the name of the format.
    """

    title: str
    settings: Settings
    narrowed: Narrowed | str
    origin: Origin
    image: tuple[int, int, int]
    file: Path


What = Literal["memory", "time"]

_START = """
import pickle, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:], what, job = pickle.load(sys.stdin.buffer)
from dvn_cli.worker import work
work(what, job)
"""


class Worker:
    """A process that measures one thing of a network; it ends with the context, whatever happens.

    It imports dvn and what that needs, not the program that it is started by, as those of `multiprocessing` do: a
    script that measures need not keep its calls under `if __name__ == "__main__"`.
    """

    def __init__(self, job: Job, what: What) -> None:
        self.job = job
        self._process = subprocess.Popen([sys.executable, "-c", _START], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.send((sys.path, what, pickle.dumps(job)))  # the job as bytes: it is read before torch is imported

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._process.wait()

    def send(self, what: Any) -> None:
        """Tells the process something. If it is dead already, `answer` says so."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            pickle.dump(what, self._process.stdin)
            self._process.stdin.flush()

    def answer(self) -> Any:
        """What the process answers next.

        Raises:
            DvnError: the network cannot run there, or the process is dead.
        """
        assert self._process.stdout is not None
        try:
            answer = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            code = self._process.wait()
            why = f"ended with exit code {code}" if code >= 0 else "was killed, most likely for want of memory"
            raise DvnError(f"{self.job.title}: its process {why}") from None
        if isinstance(answer, str):
            raise DvnError(f"{self.job.title} cannot run on {self.job.settings.device}: {answer}")
        return answer


# Within the process


def work(what: What, pickled: bytes) -> None:
    """Answers the process's parent: with the peak of memory, or once warm with an empty list and then one a number."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever libraries print is no answer

    def answer(value: Any) -> None:
        pickle.dump(value, answers)
        answers.flush()

    job: Job | None = None
    try:
        job = pickle.loads(pickled)
        assert job is not None
        if job.settings.threads is not None:
            torch.set_num_threads(job.settings.threads)
        with torch.inference_mode():
            if what == "memory":
                answer(_peak_memory(job))
                return
            network, images = load(job)
            seconds(network, images, job.settings.warm)
            answer([])
            while True:
                count = pickle.load(sys.stdin.buffer)
                seconds(network, images, 1)  # another network has had the caches since
                answer(seconds(network, images, count))
    except (EOFError, BrokenPipeError):  # the parent has enough
        return
    except Exception as error:
        size = job.settings.batch_size if job else 1
        remedy = f"too little memory: give a smaller --batch-size than {size}" if size > 1 else "too little memory"
        answer(remedy if is_out_of_memory(error) else next(iter(str(error).splitlines()), type(error).__name__))


def seconds(network: Callable[[Tensor], Tensor], images: Tensor, count: int) -> list[float]:
    """Seconds that each of `count` forward passes takes, one after the other."""
    times = []
    for _ in range(count):
        if images.is_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            network(images)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        else:
            begin = time.perf_counter()
            network(images)
            if images.device.type == "mps":
                torch.mps.synchronize()
            times.append(time.perf_counter() - begin)
    return times


def load(job: Job) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The network and a batch of random images, on the device."""
    settings = job.settings
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(settings.batch_size, *job.image, generator=generator).to(settings.device)
    if isinstance(job.narrowed, str):
        with writing.quiet():
            return find_format(job.narrowed).module.read(job.file, settings.threads), images
    header = read_header(job.file)
    assert isinstance(header.metadata, SliceMetadata)
    network: nn.Module = VirtualNetwork(header.metadata, read_tensors(header), job.narrowed, job.origin)
    network, images = network.to(settings.device), images.to(device_and_dtype(network)[1])
    if settings.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    return network, images


def _peak_memory(job: Job) -> int | None:
    device = job.settings.device
    if device.type == "cuda":
        seconds(*load(job), 3)  # the first thing on the device in this process: the peak needs no reset
        return torch.cuda.max_memory_allocated(device)
    zeros = torch.zeros(32)
    features = nn.functional.conv2d(torch.zeros(1, 16, 16, 16), torch.zeros(32, 16, 3, 3))
    features = nn.functional.batch_norm(features, zeros, zeros, zeros, zeros).relu_()
    nn.functional.linear(features.mean((2, 3)), torch.zeros(8, 32))
    if isinstance(job.narrowed, str):
        with writing.quiet():
            _ = find_format(job.narrowed).module  # its libraries
    before = resident_peak(reset=True)
    seconds(*load(job), 3)
    after = resident_peak()
    return None if before is None or after is None or device.type != "cpu" else after - before


def resident_peak(reset: bool = False) -> int | None:
    """The most bytes of this process that were ever in memory, or are now where the mark can be reset."""
    with contextlib.suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else 1024 * peak
