"""What networks cost: parameters, how many of them the units divide and why the rest not, multiply-accumulates."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dvn_cli import checkpoint
from dvn_cli.graph.shape_check import shape_check
from dvn_cli.graph.trace import located
from dvn_cli.units.assign import owned, undivided

if TYPE_CHECKING:
    from dvn_cli.partition import Networks, Partition


def params_and_density(
    header: checkpoint.Header, task: int | None = None, level: int | None = None
) -> tuple[int, float]:
    """Parameters of one network, and their share of those of its task's top level; from the header alone.

    Args:
        header: a checkpoint's, with a task and level, both from 1; or a slice's, without them. Of a slice's top level
            the size follows from what its metadata says of the units that it lacks.

    Raises:
        InputError: as `checkpoint.count`.
    """
    params = checkpoint.count(header, task, level).params
    if task is not None:
        return params, params / checkpoint.count(header, task, len(header.metadata["tasks"][task - 1]["levels"])).params
    metadata = header.metadata
    entry = metadata["task"]
    lacking = set(entry["order"][: entry["levels"][-1]]) - set(metadata["kept"])
    indices = owned(metadata["axes"], lacking)
    top = sum(
        math.prod(
            size + (0 if axis is None else indices[axis])
            for size, axis in zip(header.tensors[name].shape, info["axes"], strict=True)
        )
        for name, info in metadata["tensors"].items()
        if info["trainable"]
    )
    return params, params / top


def divided_share(header: checkpoint.Header, task: int, level: int) -> float:
    """The share of a network's parameters that units own; the rest is in every network of the task.

    Args:
        header: a checkpoint's.
        task: from 1.
        level: from 1.

    Raises:
        InputError: as `checkpoint.cut`.
    """
    metadata = header.metadata
    indices = owned(metadata["axes"], checkpoint.kept_units(metadata["tasks"][task - 1], level))
    params = whole = 0
    for name, tensor in checkpoint.cut(header, task, level).items():
        info = metadata["tensors"][name]
        if info["trainable"]:
            params += tensor.elements
            whole += undivided(tensor.shape, info["axes"], indices)
    return 1 - whole / params


@dataclass(frozen=True)
class Whole:
    """What the units do not divide, for one reason.

    Attributes:
        why: the reason.
        params: elements of parameters that every network has.
        places: names of the tensors they are in.
    """

    why: str
    params: int
    places: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def whole(partition: "Partition") -> list[Whole]:
    """The parameters, stem and classifier included, that no unit owns, most of them first."""
    few = {place: bucket for bucket in partition.buckets if not bucket.sizes for place in bucket.places}
    classes = set(partition.assignment.classes)
    counts: dict[str, dict[str, int]] = {}
    operators: dict[str, dict[str, None]] = {}  # of one kind, by the reason that they are
    indices = owned(partition.assignment.axes, range(1, partition.units + 1))
    for name, axes in partition.assignment.tensors.items():
        shape = partition.shapes[name]
        count = undivided(shape, axes, indices)
        if not count or name not in partition.parameters:
            continue
        places = {(name, dim) for dim in range(len(shape))}
        bucket = next((few[place] for place in sorted(places) if place in few), None)
        if bucket is not None:
            tied = any(partition.is_tied(*place) for place in bucket.places)
            what = "channels that only go together, in fewer groups" if tied else "fewer channels"
            why = f"{what} than the {partition.units} units"
        elif places & classes:
            why = "one number for each class"
        elif (node := partition.kept_whole_by(name)) is not None:
            why = f"{node.target} {located(node).rpartition(' ')[2]}"
            operators.setdefault(why, {})[located(node)] = None
        else:
            why = "no channels that units divide"
        counts.setdefault(why, {})[name] = count
    found = [
        Whole(_reason(why, list(operators.get(why, ()))), sum(of.values()), tuple(of)) for why, of in counts.items()
    ]
    return sorted(found, key=lambda one: -one.params)


def _reason(why: str, operators: Sequence[str]) -> str:
    if not operators:
        return why
    more = f" and {len(operators) - 1} more like it" if len(operators) > 1 else ""
    return f"channels that all units need for operator {operators[0]}{more}"


def macs(partition: "Partition", networks: "Networks", input_size: tuple[int, int]) -> int:
    """Multiply-accumulates of one image: half of what `torch.utils.flop_counter` counts, run without data.

    Args:
        networks: of a set of the partition's units; the eval form is counted.
        input_size: height and width of the image.
    """
    image = torch.empty(1, partition.spec.in_chans, *input_size, device="meta")
    with FlopCounterMode(display=False) as counter:
        shape_check(networks.eval, partition.tensors(networks), image)
    return counter.get_total_flops() // 2
