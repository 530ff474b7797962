"""A narrow network as a function of images alone, what depends on weights calculated once; and a part of a network."""

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dvn_cli.graph.dtype import without_autocast
from dvn_cli.graph.narrow import Narrowed, called
from dvn_cli.graph.trace import bind, is_inplace, writers

_FUSED = {torch.ops.aten.conv1d, torch.ops.aten.conv2d, torch.ops.aten.conv3d, torch.ops.aten.linear}
"""Layers that take the scale and shift of a norm that reads nothing else: output channels are their first dimension."""


@torch.no_grad()
def fold(narrowed: Narrowed, tensors: Mapping[str, Tensor], norms: bool = False) -> fx.GraphModule:
    """Returns the network with its weights inside, made of operators of torch alone.

    Args:
        narrowed: the graph of a network in eval mode; it stays as it is.
        tensors: by the backbone's names, which they keep where they are used as they are.
        norms: whether running statistics go into the layers before them, wherever one alone is read by a norm.
    """
    source = _plain(narrowed.module)
    images, *weights = source.graph.find_nodes(op="placeholder")
    known: dict[fx.Node, Any] = {
        node: tensors[name].detach() for node, name in zip(weights, narrowed.names, strict=True)
    }
    names = dict(zip(weights, narrowed.names, strict=True))
    root, graph = nn.Module(), fx.Graph()
    new = {images: graph.placeholder("images")}

    def constant(value: Any, name: str | None = None) -> Any:
        if not isinstance(value, Tensor):
            return value
        path = name or f"constant_{len(list(root.buffers()))}"
        *parents, key = path.split(".")
        module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module.register_buffer(key, value.contiguous())
        return graph.get_attr(path)

    def entered(node: fx.Node) -> Any:
        if node not in new:
            new[node] = constant(known[node], names.get(node))
        return new[node]

    for node in source.graph.nodes:
        if node.op == "get_attr":
            known[node] = source.get_buffer(str(node.target))
        elif node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], entered))
        elif node.op == "call_function":
            if all(n in known for n in node.all_input_nodes) and not _changes(node):
                args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: known[n])
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            elif norms and (fused := _fused(node, known)) is not None:
                layer, weight, bias = fused
                given = bind(layer) | {"weight": constant(weight), "bias": constant(bias)}
                new[node] = graph.call_function(
                    layer.target,  # type: ignore[arg-type]
                    tuple(fx.node.map_arg(list(given.values()), lambda n: n if n.graph is graph else entered(n))),
                )
            else:
                new[node] = graph.node_copy(node, entered)
    graph.eliminate_dead_code()
    return fx.GraphModule(root, graph, "Network")


def before(narrowed: Narrowed, names: Collection[str]) -> fx.GraphModule:
    """Returns the network up to what the first operator is given that joins some of its tensors with images.

    Args:
        narrowed: it stays as it is, and its constants are shared.
        names: of the tensors, by the backbone's names.
    """
    part = fx.GraphModule(narrowed.module, copy.deepcopy(narrowed.module.graph), "Before")
    images, *weights = part.graph.find_nodes(op="placeholder")
    seen = {images}
    reached = {node for node, name in zip(weights, narrowed.names, strict=True) if name in names}
    for node in part.graph.nodes:
        given = set(node.all_input_nodes)
        if given & reached and given & seen:
            result = next(n for n in node.all_input_nodes if n in seen)
            break
        seen |= {node} if given & seen else set()
        reached |= {node} if given & reached else set()
    (output,) = part.graph.find_nodes(op="output")
    output.args = (result,)
    part.graph.eliminate_dead_code()
    part.recompile()
    return part


def _plain(module: fx.GraphModule) -> fx.GraphModule:
    """A copy without the wrappers around operators, which are functions of dvn."""
    module = copy.deepcopy(module)
    for node in module.graph.nodes:
        wrapper = {called: 0, without_autocast: 2}.get(node.target)
        if wrapper is not None:
            node.target, node.args = node.args[wrapper], node.args[wrapper + 1 :]
            node.meta.pop("is_wrapped", None)
    return module


def _changes(node: fx.Node) -> bool:
    """Whether a node's value is another one at each run: it is drawn, written to, or written in place."""
    return bool(
        is_inplace(node) or writers(node) or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    )


def _fused(norm: fx.Node, known: Mapping[fx.Node, Any]) -> tuple[fx.Node, Tensor, Tensor] | None:
    """The layer that a norm follows, with the weight and bias that make up for the norm; None where there is none."""
    if getattr(norm.target, "overloadpacket", None) is not torch.ops.aten.batch_norm:
        return None
    layer, given = norm.all_input_nodes[0], bind(norm)
    if getattr(layer.target, "overloadpacket", None) not in _FUSED or len(layer.users) > 1:
        return None
    own = bind(layer)
    if own["weight"] not in known or given["running_mean"] not in known or given["training"]:
        return None
    mean, var = known[given["running_mean"]], known[given["running_var"]]
    layer_bias, scale, shift = (known.get(node) for node in (own["bias"], given["weight"], given["bias"]))
    weight, bias = fuse_conv_bn_weights(known[own["weight"]], layer_bias, mean, var, given["eps"], scale, shift)
    return layer, weight.detach(), bias.detach()
