"""What a run will take, by its first two steps."""

import contextlib
import time
from dataclasses import dataclass

import torch

from dvn_cli.benchmark import resident_peak
from dvn_cli.training.loop import Run


@dataclass(frozen=True)
class Rehearsal:
    """What the first steps of a run say of all.

    Attributes:
        steps: of the run, in all its epochs.
        seconds_per_step: that the second step took.
        images_per_s: of all tasks together.
        seconds: of all steps, if they take as long; what validation takes comes on top.
        peak_memory_bytes: so far: on CUDA of the device, else of this process; None where the system does not tell.
    """

    steps: int
    seconds_per_step: float
    images_per_s: float
    seconds: float
    peak_memory_bytes: int | None


class _Enough(Exception):
    """Two steps have been taken."""


def rehearse(run: Run) -> Rehearsal:
    """Takes two steps of a run, which is of no use afterwards.

    Raises:
        DvnError: a loss is not a number.
    """
    ends = []

    def after_step(run: Run, _: int) -> None:
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        ends.append(time.perf_counter())
        if len(ends) == 2:
            raise _Enough

    start = time.perf_counter()
    images = sum(run.batch_sizes[task] for task in run.stage.tasks) * run.recipe.accumulate
    with contextlib.suppress(_Enough):
        run.run(lambda _: None, after_step)
    seconds = ends[-1] - (ends[0] if len(ends) > 1 else start)
    steps = sum(stage.epochs * run.steps_of(stage) for stage in run.stages)
    peak = torch.cuda.max_memory_allocated(run.device) if run.device.type == "cuda" else resident_peak()
    return Rehearsal(steps, seconds, images / seconds, steps * seconds, peak)
