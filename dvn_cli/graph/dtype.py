"""The floating types in a graph: what autocast must not touch, and what follows weights whose type changes."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from dvn_cli.graph.trace import AUTOCAST_OFF, Batched

TRACED = torch.float32
"""The type that backbones are traced in, so that a cast to the weights' own type looks like one to float32."""


def without_autocast(where: Tensor, device: str | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function, such as an operator, with autocast switched off.

    Args:
        where: a tensor on the device that it runs on.
        device: the type of device whose autocast is meant; None for that one.
    """
    here = where.device.type
    if device not in (None, here) or not torch.amp.is_autocast_available(here):
        return function(*args, **kwargs)
    with torch.autocast(here, enabled=False):
        return function(*args, **kwargs)


def keep_out_of_autocast(graph: fx.Graph) -> None:
    """Makes the nodes that are noted to be outside of autocast calls of `without_autocast`, in place."""
    for node in graph.nodes:
        if node.op == "call_function" and AUTOCAST_OFF in node.meta and node.target is not operator.getitem:
            device, tensors = node.meta.pop(AUTOCAST_OFF), [n for n in node.all_input_nodes if not is_size(n)]
            if tensors:
                node.args = (tensors[0], device, node.target, *node.args)
                node.target = without_autocast
                node.meta["is_wrapped"] = True  # as torch.fx.wrap has it: a call, also where a pickle is traced again


def recast(module: fx.GraphModule, before: torch.dtype, after: torch.dtype) -> None:
    """Changes the casts of a graph, in place, to follow weights whose type changes.

    A backbone writes `y = f(x.float()).to(x.dtype)`; traced in float32 both are casts to float32. A cast of what has
    the weights' type is taken for the first kind where everything that is made of it meets only what is made of casts
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
    """Whether what is made of a cast ends in other casts, and meets on its way only what is made of casts as well."""
    inside: set[fx.Node] = set()
    waiting = [user for user in cast.users if user not in casts]
    while waiting:
        node = waiting.pop()
        if node in inside:
            continue
        if node.op != "call_function":  # the output, a weight or a constant
            return False
        inside.add(node)
        met = [source for source in node.all_input_nodes if not is_size(source)]
        waiting += [near for near in (*node.users, *met) if near not in casts]
    return True


def is_size(node: fx.Node) -> bool:
    """Whether a node is a number that follows the batch, and no tensor."""
    return isinstance(node.meta.get("val"), int | Batched)
