"""How much each channel matters: by its weights alone, by what it does on images, or by what logits make of that."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from dvn_cli.graph.consumers import Consumer, along, apart, consumers, observe
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


class Images:
    """What a network's layers are given of some images, observed once for all that is told by it."""

    def __init__(
        self, labels: Mapping[fx.Node, Any], traced: Traced, tensors: Mapping[str, Tensor], batches: Sequence[Tensor]
    ) -> None:
        """Runs a network.

        Args:
            labels: of the nodes of the graph.
            traced: the network in eval mode.
            tensors: its parameters and buffers by their names.
            batches: normalised images, float (batch, channels, height, width).
        """
        self.batches, self.module = batches, fx.GraphModule(nn.Module(), traced.graph)
        self.read: list[Consumer] = []
        self.channels: list[Tensor] = []  # labels of what each of these layers reads
        for consumer in consumers(traced.graph):
            channels = along(labels[consumer.input], consumer.dim)
            if channels is not None and along(labels[consumer.weight], consumer.weight_dim) is not None:
                self.read.append(consumer)
                self.channels.append(channels)
        self._keys = [str(node.target) for node in traced.graph.find_nodes(op="placeholder")]
        named = {key: tensors[name].detach() for key, name in traced.names.items()}
        self._input, self._sources = traced.input, {**traced.sources, **named}
        self.readings = observe(self.module, self.read, map(self.arguments, batches))

    def arguments(self, images: Tensor) -> list[Tensor]:
        """The arguments of the network for some images."""
        return [images if key == self._input else self._sources[key] for key in self._keys]


def by_images(labeller: Labeller, images: Images) -> np.ndarray:
    """What the outputs of the layers that read a channel would lose in variance without it, by its root label.

    That is the variance of the channel times the squared norm of the weights that read it, summed over these layers and
    over the channels of one class. It is zero for a class that no layer reads, such as the channels of queries.
    """
    roots = labeller.coupled.roots()
    score = np.zeros(len(roots))
    for consumer, channels, reading in zip(images.read, images.channels, images.readings, strict=True):
        squares = reading.weight.double().square().movedim(consumer.weight_dim, 0)
        groups = len(reading.variance) // len(squares)  # of a convolution
        norms = squares.reshape(len(squares), groups, -1).sum(2).T.reshape(-1)
        np.add.at(score, roots[channels.numpy()], (reading.variance * norms).cpu().numpy())
    return score


def with_classifier(state: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Returns a backbone's tensors with random ones for weights of its classifier, by their names, that are all zero.

    Logits of such a one, with which some backbones start, say nothing of any channel. They are small, so that other
    layers that read the same channels count as they did.
    """
    random = torch.Generator().manual_seed(0)
    return {
        name: 1e-3 * torch.randn(tensor.shape, generator=random).to(tensor)
        if name in names and tensor.ndim > 1 and not tensor.any()
        else tensor
        for name, tensor in state.items()
    }


DRAWS = 4
"""Directions in which the logits of each image are looked at."""

AT_ONCE = 4
"""Images whose activations are kept to differentiate by."""


def by_logits(labeller: Labeller, images: Images) -> np.ndarray:
    """By how much the logits would change, squared, if a channel were its mean for all images, by its root label.

    To first order: what the channel differs from its mean, times the gradient of a random direction of the logits with
    respect to it, summed over its positions and the layers that read it; squared; the mean over images and directions.
    All channels of a backbone can be compared by it. L. Theis et al., arXiv:1801.05787 (Fisher pruning), and L. Liu et
    al., ICML 2021 (of coupled channels), take the gradient of the loss.
    """
    roots = torch.from_numpy(labeller.coupled.roots())
    random = torch.Generator().manual_seed(0)
    score = torch.zeros(len(roots), dtype=torch.double)
    for some in (some for batch in images.batches for some in batch.split(AT_ONCE)):
        given, logits = apart(images.module, images.read, images.arguments(some.clone().requires_grad_()))
        where = [place for place, values in enumerate(given) if values.requires_grad]  # others do not see the images
        for draw in range(DRAWS if where else 0):
            direction = torch.randn(logits.shape, generator=random)
            gradients = torch.autograd.grad(
                logits, [given[place] for place in where], direction, retain_graph=draw < DRAWS - 1, allow_unused=True
            )
            change = torch.zeros(len(roots), len(some), dtype=torch.double)
            for place, gradient in zip(where, gradients, strict=True):
                dim, mean = images.read[place].dim, images.readings[place].mean
                if gradient is not None:
                    differs = given[place].detach().movedim(dim, -1) - mean
                    product = (differs * gradient.movedim(dim, -1)).reshape(len(some), -1, len(mean))
                    change.index_add_(0, roots[images.channels[place]], product.sum(1).T)
            score += change.square().sum(1)
    return (score / (DRAWS * sum(map(len, images.batches)))).numpy()
