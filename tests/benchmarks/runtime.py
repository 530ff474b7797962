"""What an elastic runtime costs beside slices: changes of level, and forward passes.

    dvn partition resnet50 --units 4 && python tests/benchmarks/runtime.py dvn.safetensors

By the time of the processor, one thread. Loading is that of the level's slice in a process that has imported dvn and
torch and nothing else, and once more there; growing is from the level below. Ratios are medians of rounds in which
slice and runtime take turns: of the level alone, and of the level beside the top one, which it is a view of.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

import dvn_cli

LOAD = """
import sys, time, dvn_cli
dvn_cli.Runtime, dvn_cli.load
for _ in range(2):
    start = time.process_time()
    dvn_cli.load(sys.argv[1])
    print(time.process_time() - start)
"""


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def ratio(one: Callable[[], object], other: Callable[[], object], rounds: int) -> float:
    """How many times as long the one takes, each being first in half of the rounds."""
    found = []
    for turn in range(rounds + 1):
        pair = (one, other) if turn % 2 else (other, one)
        first, second = map(seconds, pair)
        found.append(first / second if turn % 2 else second / first)
    return statistics.median(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--task", default=1, type=int)
    parser.add_argument("--batch-size", default=1, type=int)
    parser.add_argument("--rounds", default=20, type=int)
    options = parser.parse_args()

    torch.set_num_threads(1)
    runtime = dvn_cli.Runtime(options.checkpoint)
    task = runtime.tasks[options.task - 1]
    images = torch.randn(options.batch_size, len(task.mean), *task.input_size)
    print("level  MB read  grown s  loaded s  again s  alone  beside top", flush=True)
    with TemporaryDirectory() as folder, torch.no_grad():
        for level in range(1, len(task.levels) + 1):
            row(runtime, options.task, level, images, folder, options.rounds)


def row(runtime: dvn_cli.Runtime, task: int, level: int, images: Tensor, folder: str, rounds: int) -> None:
    cut = dvn_cli.slice(runtime.path, task, level, folder).file
    done = subprocess.run([sys.executable, "-c", LOAD, cut], capture_output=True, text=True, check=True)
    first, again = done.stdout.split()
    grown, network = [], dvn_cli.load(cut)
    for _ in range(6):
        runtime.set(task, *([level - 1] if level > 1 else []))
        before = runtime.bytes_read
        grown.append(seconds(lambda: runtime.set(task, level)))
        read = runtime.bytes_read - before
    ratios = []
    for active in ((level,), (level, len(runtime.tasks[task - 1].levels))):
        runtime.set(task, *active)
        ratios.append(ratio(lambda: runtime(images, task, level), lambda: network(images), rounds))
    times = f"{statistics.median(grown[1:]):7.3f}  {float(first):8.3f}  {float(again):7.3f}"
    print(f"{level:5}  {read / 1e6:7.1f}  {times}  {ratios[0]:5.2f}  {ratios[1]:10.2f}", flush=True)


if __name__ == "__main__":
    main()
