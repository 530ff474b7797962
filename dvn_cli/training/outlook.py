"""What a run is about to train: how large each network is, what it shares, and how well it does before."""

from dataclasses import dataclass

from dvn_cli.evaluation.measure import evaluate_all
from dvn_cli.network import DeepVirtualNetwork
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
        top1: accuracy on the validation images, in per cent; None where there are none or weights are random.
    """

    task: int
    level: int
    units: int
    params: int
    density: float
    macs: int
    common: float
    top1: float | None


def outlook(run: Run) -> list[Outlook]:
    """Returns what there is to say of each network before its run starts."""
    network, backbone = run.network, run.recipe.backbone
    has_weights = network.preprocessing is not None or (backbone is not None and backbone.has_weights)
    rows = evaluate_all(network, run.validation if has_weights else {}, device=run.device)
    accuracy = {(row.task, row.level): row.top1 for row in rows}
    header = network.header("dvn.safetensors")
    return [
        Outlook(
            number,
            level,
            network.tasks[number - 1].levels[level - 1],
            *count.params_and_density(header, number, level),
            _macs(network, number, level),
            1 - count.divided_share(header, number, level),
            accuracy.get((number, level)),
        )
        for number, level in network
    ]


def _macs(network: DeepVirtualNetwork, task: int, level: int) -> int:
    entry, partition = network.tasks[task - 1], network.partition
    tensors = partition.tensors(entry.units(level), len(entry.classes))
    image = (partition.spec.in_chans, *entry.input_size)
    return count.macs(network.narrowed(task, level, training=False), tensors, image)
