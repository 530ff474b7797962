"""What keys of a recipe make of a training step: steps of several runs, in turns.

    python tests/benchmarks/joint_step.py RECIPE [KEY=VALUE ...] [--with KEY=VALUE ...] [--with ...] [--rounds R]

Forward and backward of all networks, without the optimizer, on one CPU thread, by the time of the processor: of the
recipe as it is, and with the keys of each `--with`. A figure is the median of the ratios of each round. (What a step
takes against the same networks on their own says `dvn bench --training`.) Last the memory that torch's allocator gives
out at the peak of the recipe's step, and of one of its first task's top network alone: weights, gradients (which are
there from the step before) and all else.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from dvn_cli.device import memory_format
from dvn_cli.training import recipes
from dvn_cli.training.experiment import prepare
from dvn_cli.training.loop import Run
from dvn_cli.training.step import Batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--with", nargs="+", action="append", default=[], metavar="KEY=VALUE", dest="others")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_intermixed_args()
    runs = {
        " ".join(more) or "the recipe": begun(options.recipe, [*options.keys, "threads=1", *more])
        for more in ([], *options.others)
    }
    for run, batches in runs.values():
        seconds(run, batches)
    rounds = [{name: seconds(*run) for name, run in runs.items()} for _ in range(options.rounds)]
    run, batches = runs["the recipe"]
    print(f"{run.network.partition.spec.name}, {len(run.stage.trained)} networks, torch {torch.__version__}:")
    for name in runs:
        taken, ratio = (statistics.median(r[name] / r.get(of, 1) for r in rounds) for of in ("", "the recipe"))
        print(f"{name:50}{taken:7.3f} s {ratio:6.3f}")

    (task, (images, labels)) = next(iter(batches.items()))
    top = max(network for network in run.stage.trained if network.task == task)
    alone = run.network.virtual_network(*top).train()
    images = images.contiguous(memory_format=memory_format(run.recipe.memory_format, run.device))
    held = [
        peak_memory(lambda: run.step(batches), run.network),
        peak_memory(lambda: F.cross_entropy(alone(images), labels).backward(), alone),
    ]
    print(f"peak memory {held[0] / 1e6:.0f} MB, {held[0] / held[1]:.3f} of what the top network takes alone")


def begun(recipe: str, overrides: list[str]) -> tuple[Run, Batches]:
    """Returns a run before its first step, and the batches of that."""
    file = recipes.find(recipe)
    session = prepare(recipes.read(file, overrides), recipes.folder(file), Path("none"), torch.device("cpu"))
    session.run.network.train()
    return session.run, {task: next(session.run.endless(task, session.run.train[task])) for task in session.run.data}


def seconds(run: Run, batches: Batches) -> float:
    start = time.process_time()
    run.step(batches)
    run.step.clear()
    return time.process_time() - start


def peak_memory(step: Callable[[], None], module: nn.Module) -> int:
    """Returns the bytes at the peak of the second of two steps, after which gradients are left as they are."""
    step()
    now = sum(t.nbytes + (0 if t.grad is None else t.grad.nbytes) for t in [*module.parameters(), *module.buffers()])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes, initial=now))


if __name__ == "__main__":
    main()
