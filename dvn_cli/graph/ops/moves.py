"""Operators that move elements: they are run on labels as they are.

Whatever is left of a tensor keeps its order, so a move whose arguments follow the sizes is right wherever what is left
is a choice of indices along each dimension, before and after. Where it is not, elements are gathered one by one.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dvn_cli.graph.labels import Call, Labeller, Labels
from dvn_cli.graph.narrow import Narrower, as_it_is, if_it_fits
from dvn_cli.graph.registry import enter
from dvn_cli.graph.trace import refusal


def move(labeller: Labeller, labels: Labels, function: Callable[[Tensor], Any]) -> Any:
    """Runs `function` on every layer. A tensor without layers is run too, for the shapes that come out."""
    layers = labeller.refresh(labels).layers or (torch.zeros([1] * len(labels.shape), dtype=torch.int64),)
    results = [function(layer.expand(labels.shape)) for layer in layers]
    if isinstance(results[0], Tensor):
        return _gathered(labeller, results)
    return [_gathered(labeller, outputs) for outputs in zip(*results, strict=True)]


def _gathered(labeller: Labeller, layers: Sequence[Tensor]) -> Labels:
    return labeller.refresh(Labels(tuple(layers[0].shape), tuple(layers)))


def _moved(labeller: Labeller, call: Call) -> Any:
    """Runs the operator itself."""
    operator: Any = call.node.target
    first, *others = call.args
    arguments = {name: call.plain(name) for name in others}
    return move(labeller, call.labels(first), lambda t: operator(t, **arguments))


def _is_view(target: Any) -> bool:
    return getattr(target, "is_view", False) and torch.Tag.pointwise not in target.tags


enter(
    *("alias", "contiguous", "flatten", "movedim", "moveaxis", "permute", "ravel", "squeeze", "swapaxes", "t"),
    *("transpose", "unsqueeze"),
    label=_moved,
    rewrite=as_it_is,
    moves=True,
)
enter(
    *("flip", "narrow", "roll", "rot90", "tile", "repeat", "repeat_interleave", "select", "unbind", "unfold"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", _is_view),
    label=_moved,
    rewrite=if_it_fits,
    moves=True,
)


# Shapes


def _reshaped(labeller: Labeller, call: Call) -> Any:
    return move(labeller, call.labels("self"), lambda t: t.reshape(call.shape))  # also a view, as layers are expanded


def _reshape(narrower: Narrower, node: fx.Node, args: dict[str, Any]) -> fx.Node:
    size = next(name for name in ("size", "shape") if name in args)
    return narrower.copy(node, {**args, size: narrower.sizes(node, args[size])})


enter("view", "reshape", "_unsafe_view", label=_reshaped, rewrite=_reshape, moves=True)
enter("reshape_as", "view_as", label=_reshaped, rewrite=as_it_is, moves=True)  # the other tensor is narrow, too


def _expand(narrower: Narrower, node: fx.Node, args: dict[str, Any]) -> fx.Node:
    sizes = [
        n if indices is None or n == -1 else narrower.scaled(n, len(indices))
        for n, indices in zip(args["size"], narrower.indices(node), strict=True)
    ]
    return narrower.copy(node, {**args, "size": sizes})


def _expanded(labeller: Labeller, call: Call) -> Any:
    return move(labeller, call.labels("self"), lambda t: t.expand(call.shape))


enter("expand", label=_expanded, rewrite=_expand, moves=True)
enter("expand_as", label=_expanded, rewrite=as_it_is, moves=True)


def _unflatten(narrower: Narrower, node: fx.Node, args: dict[str, Any]) -> fx.Node:
    count = len(args["sizes"])
    dim = args["dim"] % (len(narrower.labels[node].shape) - count + 1)
    return narrower.copy(node, {**args, "sizes": narrower.sizes(node)[dim : dim + count]})


enter("unflatten", label=_moved, rewrite=_unflatten, moves=True)


# Parts


def _split(narrower: Narrower, node: fx.Node, args: dict[str, Any]) -> fx.Node:
    outputs = narrower.labels[node]
    dim = args["dim"] % len(outputs[0].shape)
    sizes = [narrower.size(output, dim) for output in outputs]
    arguments = {"self": args["self"], "split_sizes": sizes, "dim": dim}
    return narrower.copy(node, arguments, torch.ops.aten.split_with_sizes.default)


enter("split", "split_with_sizes", "chunk", "tensor_split", label=_moved, rewrite=_split, moves=True)


def _slice(narrower: Narrower, node: fx.Node, args: dict[str, Any]) -> fx.Node:
    source = args["self"]
    dim = args["dim"] % len(narrower.labels[source].shape)
    indices = narrower.indices(source)[dim]
    if indices is None:
        return narrower.copy(node, args)
    wanted = torch.arange(narrower.labels[source].shape[dim])[args["start"] : args["end"] : args["step"]]
    positions = torch.isin(indices, wanted).nonzero().reshape(-1)
    if len(positions) == len(indices):  # of a dimension that grows with the batch too
        start, end = 0, sys.maxsize
    elif not len(positions):
        start, end = 0, 0
    else:
        start, end = int(positions[0]), int(positions[-1]) + 1
        if end - start != len(positions):
            arguments = {"self": source, "dim": dim, "index": narrower.constant(positions)}
            return narrower.copy(node, arguments, torch.ops.aten.index_select.default)
    return narrower.copy(node, {**args, "dim": dim, "start": start, "end": end, "step": 1})


enter("slice", label=_moved, rewrite=_slice, moves=True)


def _one_of_several(labeller: Labeller, call: Call) -> Labels:
    """`operator.getitem`, which torch.fx takes one of several outputs by."""
    source, index = call.node.args
    return labeller.env[source][index]  # type: ignore[index]


enter("getitem", label=_one_of_several, rewrite=as_it_is, moves=True)


# Indices


def _index(labeller: Labeller, call: Call) -> Labels:
    indices = [None if i is None else labeller.value(i, call.node) for i in call.args["indices"]]
    return move(labeller, call.labels("self"), lambda t: torch.ops.aten.index.Tensor(t.contiguous(), indices))


def _index_select(labeller: Labeller, call: Call) -> Labels:
    dim, index = call.plain("dim"), labeller.value(call.args["index"], call.node)
    return move(labeller, call.labels("self"), lambda t: t.index_select(dim, index))


enter("index", label=_index, rewrite=if_it_fits, moves=True)
enter("index_select", label=_index_select, rewrite=if_it_fits, moves=True)


# Views of memory, which do not look at elements


def _refused(labeller: Labeller, call: Call) -> Labels:
    raise refusal(call.node)


enter("as_strided", "view_as_complex", "view_as_real", label=_refused, rewrite=as_it_is)
