"""The parameters that the units do not divide, and why."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx

from dvn_cli.graph.labels import Labeller
from dvn_cli.graph.trace import located
from dvn_cli.partition import Partition


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


def whole(partition: Partition) -> list[Whole]:
    """The parameters, stem and classifier included, that no unit owns, most of them first."""
    few = {place: group for group in partition.groups if not group.sizes for place in group.places}
    classes = set(partition.assignment.classes)
    labeller = partition.graph(train=True).labeller
    counts: dict[str, dict[str, int]] = {}
    operators: dict[str, dict[str, None]] = {}  # of one kind, by the reason that they are
    owned = partition.assignment.owned_counts(range(1, partition.units + 1))
    for name, shape in partition.shapes.items():
        count = partition.assignment.shared_elements(name, shape, owned)
        if not count or name not in partition.parameters:
            continue
        places = {(name, dim) for dim in range(len(shape))}
        group = next((few[place] for place in sorted(places) if place in few), None)
        if group is not None and group.is_whole_stream(partition.rule):
            why = "channels that sums couple, the residual stream"
        elif group is not None:
            tied = any(_is_tied(labeller, *place) for place in group.places)
            what = "channels that only go together, in fewer groups" if tied else "fewer channels"
            why = f"{what} than the {partition.units} units"
        elif places & classes:
            why = "one number for each class"
        elif (node := _pinned_by(labeller, name)) is not None:
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


def _pinned_by(labeller: Labeller, name: str) -> fx.Node | None:
    """Returns the operator for which all units have channels of a tensor, where there is one."""
    pinned = labeller.coupled.pinned_by
    found = (pinned(int(label)) for vector in labeller.sources[name] for label in vector[:1])
    return next((node for node in found if node is not None), None)


def _is_tied(labeller: Labeller, name: str, dim: int) -> bool:
    """Tells whether some of a dimension's indices are only in or out together, as those of a head."""
    roots = labeller.coupled.find(labeller.sources[name][dim])
    roots = roots[roots > 0]
    return len(torch.unique(roots)) < len(roots)
