"""The parameters that the units do not divide, and why."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

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
    few = {place: bucket for bucket in partition.buckets if not bucket.sizes for place in bucket.places}
    classes = set(partition.assignment.classes)
    counts: dict[str, dict[str, int]] = {}
    operators: dict[str, dict[str, None]] = {}  # of one kind, by the reason that they are
    owned = partition.assignment.owned_counts(range(1, partition.units + 1))
    for name, shape in partition.shapes.items():
        count = partition.assignment.shared_elements(name, shape, owned)
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
