"""Run a narrow network without data: to see that its shapes fit, and what it would compute."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from dvn_cli.errors import InputError
from dvn_cli.graph.narrow import Narrowed, on_device
from dvn_cli.graph.trace import located


class _Interpreter(fx.Interpreter):
    at: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.at = n
        return super().run_node(n)


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
    interpreter = _Interpreter(on_device(network.module, "meta"))
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
