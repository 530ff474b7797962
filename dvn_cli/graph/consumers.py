"""Which layers read the channels of a network, and what they are given."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dvn_cli.graph.labels import Labels, varying_dims
from dvn_cli.graph.registry import entry_of
from dvn_cli.graph.statistics import is_running_norm
from dvn_cli.graph.trace import bind, is_view


@dataclass(frozen=True)
class Consumer:
    """A linear layer or a convolution, which reads the channels of its input.

    Attributes:
        node: of the graph.
        input: the node that gives its input.
        dim: of the input, along which its channels are.
        weight: the node that gives its weight, a parameter or what is computed of one.
        weight_dim: of the weight, along which the input's channels (of one group of a convolution) are.
        bias: the node that gives its bias, where it has one.
    """

    node: fx.Node
    input: fx.Node
    dim: int
    weight: fx.Node
    weight_dim: int
    bias: fx.Node | None

    @property
    def is_plain(self) -> bool:
        """Whether every output reads every channel, all of them alike: no groups, nothing transposed."""
        return self.weight_dim == 1 and bind(self.node).get("groups", 1) == 1

    @property
    def is_normalised(self) -> bool:
        """Whether nothing but norms with running statistics read what it gives."""
        users = list(self.node.users)
        while users and all(is_view(user) for user in users):
            users = [user for view in users for user in view.users]
        return bool(users) and all(is_running_norm(user) for user in users)


def consumers(graph: fx.Graph) -> Iterator[Consumer]:
    """Yields the linear layers and convolutions of a graph, in order."""
    for node in graph.nodes:
        entry = entry_of(node.target) if node.op == "call_function" else None
        if entry is None or entry.reads is None or not isinstance((given := bind(node))["weight"], fx.Node):
            continue
        dim, weight_dim = entry.reads(given)
        yield Consumer(node, given["input"], dim, given["weight"], weight_dim, given["bias"])


def along(labels: Labels, dim: int) -> Tensor | None:
    """The labels along one dimension of a tensor; None where there are none that vary along it alone."""
    dim %= len(labels.shape)
    return next((layer.reshape(-1) for layer in labels.layers if varying_dims(layer) == (dim,)), None)


@dataclass(frozen=True)
class Reading:
    """What a consumer is given, and what it makes of it.

    Attributes:
        mean: of each channel of its input, float64, over all images and positions.
        variance: likewise.
        weight: as it is applied.
    """

    mean: Tensor
    variance: Tensor
    weight: Tensor


class _Observer(fx.Interpreter):
    """Runs a graph and sums up, for each consumer's input, every channel's values and their squares."""

    def __init__(self, module: fx.GraphModule, watched: Iterable[Consumer]) -> None:
        super().__init__(module)
        self.watched = {consumer.node: consumer for consumer in watched}
        self.sums: dict[fx.Node, Tensor] = {}  # (2, channels): of the values, and of their squares
        self.count: dict[fx.Node, int] = {}
        self.weights: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if (consumer := self.watched.get(n)) is not None:
            values = self.env[consumer.input].movedim(consumer.dim, 0).flatten(1)
            sums = torch.stack([values.sum(1, dtype=torch.double), values.square().sum(1, dtype=torch.double)])
            self.sums[n] = self.sums[n] + sums if n in self.sums else sums
            self.count[n] = self.count.get(n, 0) + values.shape[1]
            self.weights[n] = self.env[consumer.weight]
        return super().run_node(n)

    def reading(self, consumer: Consumer) -> Reading:
        mean, square = self.sums[consumer.node] / self.count[consumer.node]
        return Reading(mean, (square - mean.square()).clamp(min=0), self.weights[consumer.node])


@torch.no_grad()
def observe(module: fx.GraphModule, watched: Sequence[Consumer], runs: Iterable[Sequence[Tensor]]) -> list[Reading]:
    """Runs a network and returns what some of its layers are given.

    Args:
        module: the network, in eval mode.
        watched: layers of its graph.
        runs: its arguments, time after time.
    """
    observer = _Observer(module, watched)
    for arguments in runs:
        observer.run(*arguments)
    return [observer.reading(consumer) for consumer in watched]


class _Apart(fx.Interpreter):
    """Runs a graph, in which every watched consumer reads a copy of its own."""

    def __init__(self, module: fx.GraphModule, watched: Iterable[Consumer]) -> None:
        super().__init__(module)
        self.watched = {consumer.node: consumer for consumer in watched}
        self.given: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if (consumer := self.watched.get(n)) is None:
            return super().run_node(n)
        values = self.env[consumer.input]
        self.env[consumer.input] = self.given[n] = values.clone()
        result = super().run_node(n)
        self.env[consumer.input] = values
        return result


@torch.enable_grad()
def apart(
    module: fx.GraphModule, watched: Sequence[Consumer], arguments: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Runs a network, and returns the input of each of some layers, as a tensor that it alone reads, and the logits.

    So the derivative by such a tensor is what the layer makes of it, whatever else reads the same.
    """
    run = _Apart(module, watched)
    logits = run.run(*arguments)
    return [run.given[consumer.node] for consumer in watched], logits
