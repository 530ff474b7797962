"""What an elastic runtime costs beside slices: changes of level, and forward passes.

    dvn partition resnet50 --units 4 && python tests/benchmarks/runtime.py dvn.safetensors

By the time of the processor, one thread, medians of rounds in which what is compared takes turns. Each round is a
process that has imported dvn and torch and nothing else. It loads the level's slice (`new`), then in turns loads it
again (`again`) and grows a runtime from the level below (`grown`). `built` is, once, the slice without the graph that
files keep. A forward pass is the runtime's in parts of the slice's: of the level `alone`, and `beside` the top one,
which it is a view of.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.numpy
import torch

import dvn_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--task", default=1, type=int)
    parser.add_argument("--batch-size", default=1, type=int)
    parser.add_argument("--rounds", default=5, type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    count = len(dvn_cli.Runtime(options.checkpoint).tasks[options.task - 1].levels)
    print("level  MB read  MB slice  grown s  again s    new s  built s  alone  beside", flush=True)
    with TemporaryDirectory() as folder:
        for level in range(2, count + 1):
            cut = dvn_cli.slice(options.checkpoint, options.task, level, folder).file
            place = options.checkpoint, options.task, level, cut
            rounds = [in_new_process(changes, *place, turn) for turn in range(options.rounds)]
            read, grown, again, new = map(statistics.median, zip(*rounds, strict=True))
            built = in_new_process(loading, without_graph(cut))
            size = cut.stat().st_size / 1e6
            print(f"{level:5}  {read:7.1f}  {size:8.1f}  {grown:7.3f}  {again:7.3f}  {new:7.3f}  {built:7.3f}", end="")
            for active in ((level,), (level, count)):
                found = in_new_process(forward, *place, active, options.batch_size, 4 * options.rounds)
                print(f"  {found:5.2f}", end="", flush=True)
            print()


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def loading(file: Path) -> float:
    return seconds(lambda: dvn_cli.load(file))


def without_graph(file: Path) -> Path:
    """Writes a slice as one of before there were graphs."""
    tensors = safetensors.numpy.load_file(file)
    with safetensors.safe_open(file, "numpy") as opened:
        said = json.loads(opened.metadata()["dvn"])
    del said["checksums"], said["graph"]
    safetensors.numpy.save_file(tensors, file.with_name("old.safetensors"), {"dvn": json.dumps(said)})
    return file.with_name("old.safetensors")


def changes(checkpoint: Path, task: int, level: int, cut: Path, turn: int) -> tuple[float, float, float, float]:
    """Returns MB that growing reads, and seconds of growing, of loading the slice again, and of loading it first."""
    new, runtime = loading(cut), dvn_cli.Runtime(checkpoint)
    runtime.set(task, level - 1)
    before = runtime.bytes_read
    again = loading(cut) if turn % 2 else None
    grown = seconds(lambda: runtime.set(task, level))
    return (runtime.bytes_read - before) / 1e6, grown, again or loading(cut), new


def forward(
    checkpoint: Path, task: int, level: int, cut: Path, active: tuple[int, ...], batch: int, rounds: int
) -> float:
    """Returns how many times as long as the slice the runtime takes, each being first in half of the rounds."""
    runtime, network, found = dvn_cli.Runtime(checkpoint), dvn_cli.load(cut), []
    runtime.set(task, *active)
    images = torch.randn(batch, len(runtime.tasks[task - 1].mean), *runtime.tasks[task - 1].input_size)
    pair = [lambda: runtime(images, task, level), lambda: network(images)]
    with torch.no_grad():
        for turn in range(rounds + 1):
            first, second = map(seconds, pair if turn % 2 else pair[::-1])
            found.append(first / second if turn % 2 else second / first)
    return statistics.median(found[1:])


if __name__ == "__main__":
    main()
