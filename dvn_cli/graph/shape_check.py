"""Run a narrow network without data: to see that its shapes fit, and what it would compute."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from dvn_cli.errors import InputError
from dvn_cli.graph.narrow import Narrowed
from dvn_cli.graph.trace import located

META = torch.device("meta")


class _OnMeta(fx.Interpreter):
    """Runs a graph as it stands on the meta device, whatever device its constants are on."""

    at: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.at = n
        return super().run_node(n)

    def fetch_attr(self, target: str) -> Any:
        return super().fetch_attr(target).to("meta")

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = fx.node.map_aggregate(
            (args, kwargs), lambda value: META if isinstance(value, torch.device) else value
        )
        return super().call_function(target, args, kwargs)


def shape_check(network: Narrowed, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], image: Tensor) -> Tensor:
    """Runs a network on the meta device.

    Args:
        tensors: shape and dtype of each tensor that the network takes, by name.
        image: a batch of images on the meta device.

    Returns:
        The logits, without data.

    Raises:
        InputError: an operator does not take what it is given; the message names it.
    """
    interpreter = _OnMeta(network.module)
    arguments = [
        torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in map(tensors.__getitem__, network.names)
    ]
    try:
        with torch.no_grad():
            return interpreter.run(image, *arguments)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        where = "the network" if interpreter.at is None else f"operator {located(interpreter.at)}"
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{where} cannot be narrowed so: {reason}") from error
