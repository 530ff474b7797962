"""Whether two graphs are one."""

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from dvn_cli.graph.trace import bind


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
