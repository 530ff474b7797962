"""What dvn knows of each operator: one entry, with its label rule and its rewrite side by side.

An entry is found by the operator's base name (no overload, no trailing underscore) or, where no name is entered, by a
trait of the operator such as a tag. What has no entry is refused. The entries are in `dvn_cli.graph.ops`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Entry:
    """What dvn knows of an operator.

    Attributes:
        label: `label(labeller, call)` returns the `Labels` of the output, a list of them where there are several.
        rewrite: `rewrite(narrower, node, arguments)` returns the node of the narrow graph. Where the entry `moves`, it
            may return None: elements are then gathered one by one.
        moves: it only moves elements, without looking at them. It may meet tensors of which what is left is no choice
            of indices along each dimension.
        takes_nothing: it is right, too, on a tensor of which nothing is left.
        reads: of an operator that multiplies its `input` with its `weight`: `reads(arguments)` returns along which
            dimension of the one and of the other the channels are that it reads; None for all others.
        adds_margin: it makes an image larger without changing its pixels.
    """

    label: Callable[..., Any]
    rewrite: Callable[..., Any]
    moves: bool = False
    takes_nothing: bool = False
    reads: Callable[[Mapping[str, Any]], tuple[int, int]] | None = None
    adds_margin: bool = False


Trait = Callable[[Any], bool]

_BY_NAME: dict[str, Entry] = {}
_BY_TRAIT: dict[Trait, Entry] = {}


def enter(*operators: str | Trait, label: Callable[..., Any], rewrite: Callable[..., Any], **facts: Any) -> None:
    """Enters operators, all with one entry.

    Args:
        operators: base names (`add` stands for `aten.add.Tensor` and `aten.add_.Scalar`), or traits: functions that
            tell of an operator whether it is meant. A name goes before traits, and these exclude one another.
        label: see `Entry`, as for `rewrite` and `facts`.
        rewrite: needed, also where the operator is right as it is; `narrow.as_it_is` then.
    """
    entry = Entry(label, rewrite, **facts)
    for operator in operators:
        assert operator not in _BY_NAME, f"{operator} has an entry"
        if isinstance(operator, str):
            _BY_NAME[operator] = entry
        else:
            _BY_TRAIT[operator] = entry


def entry_of(target: Any) -> Entry | None:
    """Returns what is known of an operator, None where that is nothing."""
    by_trait = (entry for trait, entry in _BY_TRAIT.items() if trait(target))
    return _BY_NAME.get(base_name(target)) or next(by_trait, None)


def base_name(target: object) -> str:
    """Returns an operator's name without its overload, in-place or not: `aten.add_.Tensor` is `add`."""
    packet = getattr(target, "overloadpacket", None)
    name = packet.__name__ if packet is not None else getattr(target, "__name__", str(target))
    return name if name.startswith("_") and name.endswith("__") else name.rstrip("_")
