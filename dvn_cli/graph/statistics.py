"""Norms: which tensors they are of, and whether one with statistics would take the variance of a single value."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from dvn_cli.graph.narrow import Narrowed, on_device
from dvn_cli.graph.registry import base_name
from dvn_cli.graph.trace import Traced, arguments_of, bind, is_inplace

Described = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def is_running_norm(node: fx.Node) -> bool:
    """Tells whether an operator is a norm that has running statistics."""
    return isinstance(bind(node).get("running_mean"), fx.Node)


def running_tensors(traced: Traced) -> set[str]:
    """Names the tensors of norms with running statistics, and those that are written to in place.

    Those of a norm are whatever an operator with a `running_mean` takes besides its input.
    """
    names: set[str] = set()
    for node in traced.graph.nodes:
        if is_running_norm(node):
            names |= traced.names_of(node.all_input_nodes[1:])
        elif is_inplace(node):
            names |= traced.names_of(node.all_input_nodes[:1])
    return names


def norm_parameters(traced: Traced) -> set[str]:
    """Names the weights and biases of norms, those without running statistics included."""
    nodes = (node for node in traced.graph.nodes if node.op == "call_function" and "norm" in base_name(node.target))
    given = ((bind(node).get(name) for name in ("weight", "bias")) for node in nodes)
    return traced.names_of(node for each in given for node in each if isinstance(node, fx.Node))


class _Found(Exception):
    """A batch norm that has one value for each channel."""

    def __init__(self, norm: fx.Node) -> None:
        self.norm = norm


class _Search(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        if "running_mean" in (names := [argument.name for argument in arguments_of(n)]):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            given = dict(zip(names, args, strict=False)) | kwargs
            by_batch = given.get("training", given.get("train", False))
            if by_batch and given["input"].numel() == given["input"].shape[1]:
                raise _Found(n)
        return super().run_node(n)


def norm_of_a_single_value(network: Narrowed, tensors: Described, image: tuple[int, ...]) -> str | None:
    """Returns the name of the first batch norm that has one value for each channel in a batch of one image, if any.

    Args:
        network: in train mode.
        tensors: shape and dtype of each tensor that the network takes, by name.
        image: channels, height and width of an image.
    """
    module = on_device(network.module, "meta")
    arguments = [
        torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in map(tensors.__getitem__, network.names)
    ]
    try:
        with torch.no_grad():
            _Search(module).run(torch.empty(1, *image, device="meta"), *arguments)
    except _Found as found:
        placeholders = (node for node in module.graph.nodes if node.op == "placeholder")
        names = dict(zip(placeholders, ("", *network.names), strict=False))
        own = next((names[node] for node in found.norm.all_input_nodes if names.get(node)), found.norm.name)
        return own.rpartition(".")[0] or own
    return None
