"""Another floating type for a graph: which of its casts were to float32, and which to the type of the weights."""

from typing import Any

import torch
from torch import fx

TRACED = torch.float32
"""The type that backbones are traced in, so that a cast to the weights' own type looks like one to float32."""


def recast(module: fx.GraphModule, before: torch.dtype, after: torch.dtype) -> None:
    """Changes the casts of a graph, in place, to follow weights whose type changes.

    A backbone writes `y = f(x.float()).to(x.dtype)`; traced in float32 both are casts to float32. A cast of what has
    the weights' type is taken for the first kind where everything that is made of it meets only tensors cast likewise
    and ends in other casts; these are then of the second kind, and so are all that are left over. A step of which this
    cannot be told is less precise than the backbone's, but types fit.

    Args:
        before: type of the weights so far.
        after: type of the weights from now on.
    """
    casts = {node for node in module.graph.nodes if _has(node, before)}
    wide: set[fx.Node] = set()  # of float32 whatever the weights are
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        narrow = not any(source in wide for source in node.all_input_nodes)
        if node in casts and not (before is TRACED and narrow and _is_closed(node, casts)):
            args, kwargs = fx.node.map_aggregate(  # type: ignore[misc]
                (node.args, node.kwargs), lambda value: after if value is before else value
            )
            node.args, node.kwargs = args, kwargs
        elif node in casts or not narrow:
            wide.add(node)
    module.recompile()


def _has(node: fx.Node, dtype: torch.dtype) -> bool:
    found: list[Any] = []
    fx.node.map_aggregate((node.args, node.kwargs), lambda value: found.append(value))
    return any(value is dtype for value in found)


def _is_closed(cast: fx.Node, casts: set[fx.Node]) -> bool:
    """Whether all that is made of a cast ends in other casts, and meets on its way only what was cast too."""
    inside, waiting = {cast}, [cast]
    while waiting:
        for user in waiting.pop().users:
            if user in inside or user in casts:
                continue
            if user.op == "output":
                return False
            inside.add(user)
            waiting.append(user)
    met = {source for node in inside - {cast} for source in node.all_input_nodes}
    return all(isinstance(source.meta.get("val"), int | torch.SymInt) for source in met - inside - casts)
