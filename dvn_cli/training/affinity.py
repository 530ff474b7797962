"""How well tasks agree on the weights that they share: the cosine between what they want of them."""

import torch
import torch.nn.functional as F

from dvn_cli import processes
from dvn_cli.errors import DvnError
from dvn_cli.training.loop import Run
from dvn_cli.training.sharing import check_batches

STEPS = 32
"""Of the short run: with four units as much work as 17 steps of training, which trains smaller levels too."""


def affinity(run: Run) -> list[list[float]]:
    """Takes the first steps of a run, and returns for each two of its tasks the cosine between their gradients.

    Each task's gradients of the shared weights are added up over the steps, since those of single batches are mostly
    noise. That tasks whose gradients point apart harm each other is shown by T. Yu et al., "Gradient Surgery for
    Multi-Task Learning" (NeurIPS 2020); to measure it once in a joint run, not for every set of tasks, is of C. Fifty
    et al., "Efficiently Identifying Task Groupings for Multi-Task Learning" (NeurIPS 2021).

    Args:
        run: of one network a task; it is of no use afterwards.

    Raises:
        InputError: as `check_batches`.
        DvnError: a gradient is not a number.
    """
    check_batches(run)
    tensors = run.network.file_tensors()
    shared = [tensor for name, tensor in tensors.items() if name.startswith("shared/") and tensor.requires_grad]
    wanted = torch.zeros(len(run.network.tasks), sum(tensor.numel() for tensor in shared), device=run.device)
    batches = {number: run.endless(number, split) for number, split in run.train.items()}
    for step in range(1, STEPS + 1):
        before = torch.zeros_like(wanted[0])
        for network in run.stage.learn:
            run.step({network.task: next(batches[network.task])}, (network,))
            gradient = torch.cat([tensor.grad.flatten() for tensor in shared if tensor.grad is not None])
            wanted[network.task - 1] += gradient - before
            before = gradient
        for group in run.optimizer.param_groups:
            group["lr"] = run.recipe.optimizer.lr * group["lr_scale"] * step / STEPS
        processes.average([tensor.grad for tensor in run.step.parameters if tensor.grad is not None])
        run.optimizer.step()
        run.step.clear()
    processes.average([wanted])
    if not wanted.isfinite().all():
        raise DvnError("a gradient of the steps that compare tasks is not a number: a lower optimizer.lr may help")
    directions = F.normalize(wanted)
    return [[round(cosine, 4) for cosine in row] for row in (directions @ directions.T).tolist()]
