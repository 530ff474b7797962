"""How fast a run trains, against its networks apart and against what the device can do: `dvn bench --training`."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dvn_cli.device import memory_format
from dvn_cli.training.levels import networks_of_step
from dvn_cli.training.loop import Run
from dvn_cli.training.rehearsal import images_of_step, pace, peak_memory

ROUNDS = 5
"""Turns that the joint step, the networks apart and the device's multiplication take."""

SIDE = {"cpu": 1024, "cuda": 8192}
"""Of the square matrices whose product says what a device can do."""


@dataclass(frozen=True)
class Speed:
    """What a training step costs, in seconds, bytes and floating-point operations a second.

    Attributes:
        networks: how many a step trains.
        steps: that were timed.
        step: median time of a step, everything counted.
        step_p90: what nine in ten steps took at most.
        images_per_s: of all tasks together, in the median step.
        wait: mean time in a step that the process took to get and augment images.
        joint: median time of forward and backward of all networks together.
        apart: the same of each network on its own, with the labels, summed; None where some learn from a teacher alone.
        ratio: median over the rounds of the one over the other.
        peak_memory_bytes: on CUDA of the device, else of this process; None where the system does not tell.
        flops: operations of a step, in the mean: two for each multiply-accumulate forward, four backward.
        achieved: `flops` a second in the median step.
        device: operations a second in the product of two large matrices of the run's precision.
    """

    networks: int
    steps: int
    step: float
    step_p90: float
    images_per_s: float
    wait: float
    joint: float
    apart: float | None
    ratio: float | None
    peak_memory_bytes: int | None
    flops: int
    achieved: float
    device: float

    @property
    def share(self) -> float:
        """What the run makes of the device, of 1."""
        return self.achieved / self.device


def speed(run: Run, warm: int, timed: int) -> Speed:
    """Measures the steps of a run's first stage; the run is of no use afterwards.

    Args:
        warm: steps before those that are timed.
        timed: steps that are.

    Raises:
        DvnError: a loss is not a number.
    """
    images, passes = images_of_step(run), run.recipe.accumulate
    stage, device = run.stage, run.device
    in_batch = {task: min(run.batch_sizes[task], len(run.train[task])) for task in stage.tasks}
    of_new = in_batch[stage.tasks[-1]]  # on these, those that are held learn to agree with what they said before
    taken = pace(run, warm, timed)
    by_step = [networks_of_step(stage, run.recipe, 1.0, warm + number) for number in range(1, len(taken) + 1)]
    networks = by_step[-1]
    of_network = {
        each: 6 * run.network.macs(*each) * in_batch.get(each.task, of_new) * passes for each in stage.trained
    }
    flops = round(statistics.mean(sum(of_network[each] for each in of_step) for of_step in by_step))
    seconds = sorted(each for each, _ in taken)
    median, peak = statistics.median(seconds), peak_memory(run)

    batches = {task: next(run.endless(task, run.train[task])) for task in run.stage.tasks}
    layout = memory_format(run.recipe.memory_format, device)
    batches = {task: (given.contiguous(memory_format=layout), labels) for task, (given, labels) in batches.items()}
    reduced = torch.bfloat16 if run.recipe.precision == "bf16" else torch.float32
    side = SIDE.get(device.type, 1024)
    matrix = torch.ones(side, side, dtype=reduced, device=device)
    run.network.train()
    alone = {} if run.stage.distilled else {each: run.network.virtual_network(*each) for each in networks}

    def jointly() -> None:
        run.step(batches, networks)
        run.step.clear()

    def apart() -> None:
        for (task, _), network in alone.items():
            given, labels = batches[task]
            with torch.autocast(device.type, torch.bfloat16, enabled=reduced is torch.bfloat16, cache_enabled=False):
                logits = network(given).float()
            F.cross_entropy(logits, labels).backward()
        for network in alone.values():
            network.zero_grad(set_to_none=True)

    def multiply() -> None:
        torch.mm(matrix, matrix)

    turns = {"joint": jointly, "apart": apart, "device": multiply}
    for turn in turns.values():
        _seconds(turn, device)
    rounds = [{name: _seconds(turn, device) for name, turn in turns.items()} for _ in range(ROUNDS)]
    of = {name: statistics.median(each[name] for each in rounds) for name in turns}
    return Speed(
        networks=len(networks),
        steps=len(taken),
        step=median,
        step_p90=seconds[-(-9 * len(seconds) // 10) - 1],
        images_per_s=images / median,
        wait=statistics.mean(wait for _, wait in taken),
        joint=of["joint"] * passes,
        apart=of["apart"] * passes if alone else None,
        ratio=statistics.median(each["joint"] / each["apart"] for each in rounds) if alone else None,
        peak_memory_bytes=peak,
        flops=flops,
        achieved=flops / median,
        device=2 * side**3 / of["device"],
    )


def _seconds(turn: Callable[[], None], device: torch.device) -> float:
    begin = time.perf_counter()
    turn()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
