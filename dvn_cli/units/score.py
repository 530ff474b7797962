"""How much each channel matters: by its weights alone, or by what it does on images."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from dvn_cli.graph.consumers import along, consumers, observe
from dvn_cli.graph.labels import Labeller
from dvn_cli.graph.trace import Traced


def by_weights(labeller: Labeller, parameters: Mapping[str, Tensor]) -> np.ndarray:
    """The squared L2 norm of all weights of each class of coupled channels, by its root label.

    Li et al., ICLR 2017; the group norm of Fang et al., CVPR 2023.
    """
    roots = labeller.coupled.roots()
    score = np.zeros(len(roots))
    for name, parameter in parameters.items():
        for dim, labels in enumerate(labeller.sources[name]):
            squares = parameter.detach().double().square().movedim(dim, 0).reshape(len(labels), -1).sum(1)
            np.add.at(score, roots[labels.numpy()], squares.cpu().numpy())
    return score


@torch.no_grad()
def by_images(
    labeller: Labeller, labels: Mapping[fx.Node, Any], traced: Traced, tensors: Mapping[str, Tensor],
    batches: Iterable[Tensor],
) -> np.ndarray:  # fmt: skip
    """What the outputs of the layers that read a channel would lose in variance without it, by its root label.

    That is the variance of the channel times the squared norm of the weights that read it, summed over these layers and
    over the channels of one class. It is zero for a class that no layer reads, such as the channels of queries.

    Args:
        labels: of the nodes of the graph.
        traced: the network in eval mode.
        tensors: its parameters and buffers by their names.
        batches: normalised images, float (batch, channels, height, width).
    """
    read = [
        consumer
        for consumer in consumers(traced.graph)
        if along(labels[consumer.weight], consumer.weight_dim) is not None
        and along(labels[consumer.input], consumer.dim) is not None
    ]
    keys = [str(node.target) for node in traced.graph.find_nodes(op="placeholder")]
    sources = {**traced.sources, **{key: tensors[name] for key, name in traced.names.items()}}
    runs = ([images if key == traced.input else sources[key] for key in keys] for images in batches)
    readings = observe(fx.GraphModule(nn.Module(), traced.graph), read, runs)
    roots = labeller.coupled.roots()
    score = np.zeros(len(roots))
    for consumer, reading in zip(read, readings, strict=True):
        squares = reading.weight.double().square().movedim(consumer.weight_dim, 0)
        groups = len(reading.variance) // len(squares)  # of a convolution
        norms = squares.reshape(len(squares), groups, -1).sum(2).T.reshape(-1)
        channels = along(labels[consumer.input], consumer.dim)
        assert channels is not None
        np.add.at(score, roots[channels.numpy()], (reading.variance * norms).cpu().numpy())
    return score
