"""How many channels of each group a unit gets, where that is to follow what they are worth."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, fx

from dvn_cli.graph.consumers import along, consumers
from dvn_cli.graph.labels import Labeller
from dvn_cli.graph.trace import EXAMPLE_BATCH, Traced, shape_of


@dataclass(frozen=True)
class Worth:
    """What channels are worth and what they cost, by their root labels.

    Attributes:
        score: by how much they matter; see `score.by_logits`.
        cost: multiply-accumulates, or parameters, that go with a channel.
    """

    score: np.ndarray
    cost: np.ndarray


def macs(labeller: Labeller, labels: Mapping[fx.Node, Any], traced: Traced) -> np.ndarray:
    """The multiply-accumulates of linear layers and convolutions that go with a channel, by its root label."""
    roots = labeller.coupled.roots()
    cost = np.zeros(len(roots))
    for consumer in consumers(traced.graph):
        weight, given = (shape_of(node.meta["val"]) for node in (consumer.weight, consumer.node))
        positions = math.prod(given) / given[consumer.dim] / EXAMPLE_BATCH
        for dim in range(len(weight)):
            if (found := along(labels[consumer.weight], dim)) is not None:
                np.add.at(cost, roots[found.numpy()], positions * math.prod(weight) / len(found))
    return cost


def params(labeller: Labeller, parameters: Mapping[str, Tensor]) -> np.ndarray:
    """The elements of parameters that go with a channel, by its root label."""
    roots = labeller.coupled.roots()
    cost = np.zeros(len(roots))
    for name, parameter in parameters.items():
        for labels in labeller.sources[name]:
            np.add.at(cost, roots[labels.numpy()], parameter.numel() / len(labels))
    return cost


def by_worth(
    scores: Sequence[np.ndarray], costs: Sequence[float], steps: Sequence[int], units: int
) -> list[np.ndarray]:
    """Returns the channels of each unit in each group: the first unit has those that are worth most for their cost.

    The units cost alike, but for each having at least one step of every group.

    Args:
        scores: of the channels of each group.
        costs: of one channel of each group.
        steps: what units are multiples of in each group, which has as many at least as there are units; the last unit
            has what is left over.
        units: how many.
    """
    if not scores:
        return []
    blocks = [
        -np.sort(-score)[: len(score) // step * step].reshape(-1, step)
        for score, step in zip(scores, steps, strict=True)
    ]
    group = np.repeat(np.arange(len(blocks)), list(map(len, blocks)))
    cost = np.multiply(costs, steps)[group]
    order = np.argsort(-np.concatenate([block.sum(1) for block in blocks]) / cost, kind="stable")
    paid = np.cumsum(cost[order])
    unit = ((paid - cost[order] / 2) * units // paid[-1]).astype(np.int64)
    least = np.arange(1, units + 1)
    sizes = []
    for number, (block, step) in enumerate(zip(blocks, steps, strict=True)):
        ends = np.cumsum(np.bincount(unit[group[order] == number], minlength=units))
        ends = np.clip(np.maximum.accumulate(ends - least), 0, len(block) - units) + least
        size = np.diff(ends, prepend=0) * step
        size[-1] += len(scores[number]) - size.sum()
        sizes.append(size)
    return sizes
