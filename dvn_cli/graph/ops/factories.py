"""Operators that make a tensor of nothing but its shape (and type), or of positions."""

from typing import Any

from torch import fx

from dvn_cli.graph.labels import Call, Labeller, Labels, from_vectors
from dvn_cli.graph.narrow import Narrower, as_it_is
from dvn_cli.graph.registry import enter


def _fresh(labeller: Labeller, call: Call) -> Labels:
    return from_vectors(call.shape, {d: labeller.coupled.fresh(n) for d, n in enumerate(call.shape) if n > 1})


def _made_whole(narrower: Narrower, node: fx.Node, args: dict[str, Any]) -> fx.Node:
    """It is made as large as ever, and what is left of it is taken."""
    new = narrower.copy(node)
    for dim, indices in enumerate(narrower.indices(node)):
        if indices is not None:
            new = narrower.pick(new, dim, indices)
    return new


enter(
    *("arange", "empty", "eye", "full", "linspace", "new_empty", "new_full", "new_ones", "new_zeros", "ones", "rand"),
    *("randn", "scalar_tensor", "zeros"),
    label=_fresh,
    rewrite=_made_whole,
    takes_nothing=True,
)


def _whole(labeller: Labeller, call: Call) -> Labels | list[Labels]:
    """Nothing of these is dropped."""
    for labels in call.tensors():
        for layer in labels.layers:
            labeller.pin(layer)
    return call.outputs(Labels)


enter("meshgrid", "one_hot", "affine_grid_generator", label=_whole, rewrite=as_it_is)
