"""Whether the batches of a run can be shared by its processes, and what is left of them can be normalised."""

from dvn_cli import processes
from dvn_cli.errors import InputError
from dvn_cli.graph.statistics import norm_of_a_single_value
from dvn_cli.training.loop import Run


def check_batches(run: Run) -> None:
    """Raises InputError where processes cannot share a batch evenly, or what a norm gets has no variance.

    Such is a single value: of one image at 1x1 pixels.
    """
    of, replay = processes.count(), run.recipe.sequential.replay
    held = {student.task for stage in run.stages for student, _ in stage.distilled} if replay else set()
    for number, split in run.train.items():
        batch = min(len(split), run.batch_sizes[number])
        if batch % of:
            raise _uneven(run, number, batch, f"set its batch_size to a multiple of {of}")
        if number in held and (replayed := min(batch, replay)) % of:
            raise _uneven(run, number, replayed, f"set sequential.replay to a multiple of {of}", " when it is replayed")
        networks = [network for stage in run.stages for network in stage.learn if network.task == number]
        if (batch if run.recipe.sync_bn else batch // of) > 1 or not networks:
            continue
        tensors = {name: (tuple(t.shape), t.dtype) for name, t in run.network.tensors(*networks[0]).items()}
        graph = run.network.narrowed(*networks[0], training=True)
        norm = norm_of_a_single_value(graph, tensors, split.shape)
        if norm is not None:
            remedy = f"batch_size {2 * of} or more" if len(split) > 1 else "the task 2 training images or more"
            raise InputError(
                f"task '{run.network.tasks[number - 1].name}' is trained on one image at a time, of which "
                f"'{norm}' has one value for each channel, and so no variance: give {remedy}"
            )


def _uneven(run: Run, number: int, batch: int, remedy: str, when: str = "") -> InputError:
    return InputError(
        f"{processes.count()} processes cannot share the {batch} images evenly that task "
        f"'{run.network.tasks[number - 1].name}' has in a batch{when}: {remedy}"
    )
