"""Whether two graphs are one."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from dvn_cli.graph.narrow import Narrowed
from dvn_cli.graph.trace import bind

ROUNDING = 1e-3
"""How far logits of one network may be from those of another that says the same in other operators, relatively."""


def same_logits(
    a: Narrowed, b: Narrowed, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], image: tuple[int, ...]
) -> bool:
    """Tells whether two networks give the same logits, up to rounding, for the same random weights and images.

    Args:
        tensors: shape and dtype of all that they may take, by name.
        image: shape of the images, (batch, channels, height, width).
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if not dtype.is_floating_point:
            return torch.zeros(shape, dtype=dtype)
        if len(shape) < 2:  # scales, shifts, statistics: none is zero, and variances are positive
            return torch.empty(shape).uniform_(0.5, 1.5, generator=generator).to(dtype)
        return (torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5).to(dtype)

    values = {name: drawn(*tensors[name]) for name in sorted({*a.names, *b.names})}
    x = torch.randn(image, generator=generator)
    try:
        with torch.no_grad():
            ours, theirs = (each.module(x, *map(values.__getitem__, each.names)) for each in (a, b))
    except (IndexError, RuntimeError, TypeError, ValueError):  # a graph may come from a file, and not run at all
        return False
    return bool((ours - theirs).norm() <= ROUNDING * ours.norm())


def same_graph(a: fx.GraphModule, b: fx.GraphModule) -> bool:
    """Tells whether two networks compute the same of the same: node by node, constants and sizes included."""
    if len(a.graph.nodes) != len(b.graph.nodes):
        return False
    twin: dict[fx.Node, fx.Node] = {}
    for left, right in zip(a.graph.nodes, b.graph.nodes, strict=True):
        if left.op != right.op:
            return False
        if left.op == "get_attr":
            if not _same_value(getattr(a, str(left.target)), getattr(b, str(right.target))):
                return False
        elif left.op == "call_function" and left.target is not right.target:
            return False
        ours, form = pytree.tree_flatten(_arguments(left))
        theirs, other_form = pytree.tree_flatten(_arguments(right))
        if form != other_form:
            return False
        for x, y in zip(ours, theirs, strict=True):
            if isinstance(x, fx.Node) != isinstance(y, fx.Node):
                return False
            if twin[x] is not y if isinstance(x, fx.Node) else not _same_value(x, y):
                return False
        twin[left] = right
    return True


def _arguments(node: fx.Node) -> object:
    """What a node is called with: lists of one kind, and an operator's defaults, which not all graphs write out."""
    given = bind(node) if isinstance(node.target, torch._ops.OpOverload) else (node.args, node.kwargs)
    return fx.node.map_aggregate(given, lambda value: value)


def _same_value(x: object, y: object) -> bool:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.dtype == y.dtype and torch.equal(x, y)
    return type(x) is type(y) and x == y
