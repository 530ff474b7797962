"""What a run is about to train: how large each network is, what it shares, and how well it does before."""

from dataclasses import dataclass

from dvn_cli.evaluation.measure import evaluate_all
from dvn_cli.training.loop import Run
from dvn_cli.units import count


@dataclass(frozen=True)
class Outlook:
    """A network, by number of task and level from 1.

    Attributes:
        units: how many it is made of.
        params: elements of its parameters.
        density: their share of those of its task's top level.
        macs: multiply-accumulates of one image.
        common: the share of its parameters that belongs to all units, and so to every level.
        top1: accuracy on the validation images, in per cent; None where there are none, weights are random, or the
            run goes on.
        interval: its 95 % interval.
    """

    task: int
    level: int
    units: int
    params: int
    density: float
    macs: int
    common: float
    top1: float | None
    interval: tuple[float, float] | None


def outlook(run: Run) -> list[Outlook]:
    """Returns what there is to say of each network before its run starts."""
    network, backbone = run.network, run.recipe.backbone
    has_weights = network.preprocessing is not None or (backbone is not None and backbone.has_weights)
    splits = run.validation if has_weights and not run.epochs_done else {}
    rows = evaluate_all(network, splits, device=run.device)
    accuracy = {(row.task, row.level): (row.top1, row.interval) for row in rows}
    header = network.header("dvn.safetensors")
    return [
        Outlook(
            number,
            level,
            network.tasks[number - 1].levels[level - 1],
            *count.params_and_density(header, number, level),
            network.macs(number, level),
            1 - count.divided_share(header, number, level),
            *accuracy.get((number, level), (None, None)),
        )
        for number, level in network
    ]
