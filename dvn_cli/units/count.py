"""What a network costs: multiply-accumulates."""

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

from dvn_cli.graph.narrow import Narrowed


def macs(network: Narrowed, shapes: dict[str, tuple[int, ...]], image: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image: half of what `torch.utils.flop_counter` counts, run without data.

    Args:
        network: the narrow network, in its eval form.
        shapes: of its tensors.
        image: channels, height, width.
    """
    module = copy.deepcopy(network.module).to("meta")
    tensors = [torch.empty(shapes[name], device="meta") for name in network.names]
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        module(torch.empty(1, *image, device="meta"), *tensors)
    return counter.get_total_flops() // 2
