"""What a run will take, by its first two steps."""

import contextlib
import time
from dataclasses import dataclass

import torch

from dvn_cli.training.loop import Run
from dvn_cli.worker import resident_peak


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
    """All steps that were asked for have been taken."""


def pace(run: Run, warm: int, timed: int) -> list[tuple[float, float]]:
    """Takes steps of a run, which is of no use afterwards, with all levels where the first steps would have few.

    Args:
        warm: steps before those that are timed; fewer where the run ends.
        timed: steps that are; the last one at least.

    Returns:
        Of each step its seconds, and for how many of them the process waited for images.

    Raises:
        DvnError: a loss is not a number.
    """
    taken: list[tuple[float, float]] = []
    since = time.perf_counter(), run.waited

    def begin(run: Run) -> None:  # validation is not counted
        nonlocal since
        since = time.perf_counter(), run.waited

    def after_step(run: Run, _: int) -> None:
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        taken.append((time.perf_counter() - since[0], run.waited - since[1]))
        if len(taken) == warm + timed:
            raise _Enough
        begin(run)

    run.recipe = run.recipe.model_copy(update={"unlock": None})  # the most that a step takes, and most steps do
    with contextlib.suppress(_Enough):
        run.run(begin, after_step)
    return taken[warm:] or taken[-1:]


def images_of_step(run: Run) -> int:
    """Returns how many images of all tasks a step takes."""
    return sum(min(run.batch_sizes[task], len(run.train[task])) for task in run.stage.tasks) * run.recipe.accumulate


def peak_memory(run: Run) -> int | None:
    """Returns the most bytes so far: on CUDA of the device, else of this process; None where none are told."""
    return torch.cuda.max_memory_allocated(run.device) if run.device.type == "cuda" else resident_peak()


def rehearse(run: Run) -> Rehearsal:
    """Takes two steps of a run, which is of no use afterwards.

    Raises:
        DvnError: a loss is not a number.
    """
    images = images_of_step(run)
    ((seconds, _),) = pace(run, warm=1, timed=1)
    steps = sum(stage.epochs * run.steps_of(stage) for stage in run.stages)
    return Rehearsal(steps, seconds, images / seconds, steps * seconds, peak_memory(run))
