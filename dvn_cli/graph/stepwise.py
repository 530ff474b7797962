"""A network that is run on several batches side by side, and can be changed between two of its operators."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, fx

from dvn_cli.graph.statistics import is_running_norm
from dvn_cli.graph.trace import bind


class Stepwise:
    """Runs a network operator by operator, each on all batches before the next.

    What is read later is kept for all batches, as in a forward pass of all images at once.

    Attributes:
        nodes: the operators, in order.
    """

    def __init__(self, module: fx.GraphModule, runs: Iterable[Sequence[Tensor]]) -> None:
        """`runs`: the arguments of the network, for each batch."""
        self.nodes = list(module.graph.nodes)
        self._position = 0
        self._runs = []
        for arguments in runs:
            self._runs.append(fx.Interpreter(module))
            self._runs[-1].args_iter = iter(arguments)

    def run_to(self, node: fx.Node) -> None:
        """Runs all that comes before an operator."""
        while (now := self.nodes[self._position]) is not node:
            for run in self._runs:
                run.env[now] = run.run_node(now)
                for used in run.user_to_last_uses.get(now, ()):
                    del run.env[used]
            self._position += 1

    def rows(self, node: fx.Node, dim: int) -> Iterator[Tensor]:
        """Yields what a node has given, for each batch: a row for each position, a column for each index of `dim`."""
        for run in self._runs:
            value = run.env[node].movedim(dim, -1)
            yield value.reshape(-1, value.shape[-1])

    def mean(self, node: fx.Node, dim: int) -> Tensor:
        """Returns the mean of the rows, float64."""
        sums, counts = zip(
            *((rows.sum(0, dtype=torch.double), len(rows)) for rows in self.rows(node, dim)), strict=True
        )
        return torch.stack(sums).sum(0) / sum(counts)

    def set(self, node: fx.Node, value: Tensor) -> Tensor:
        """Gives an argument of the network another value, of its type, which is returned."""
        value = value.to(self._runs[0].env[node].dtype)
        for run in self._runs:
            run.env[node] = value
        return value

    def estimate_statistics(self) -> Iterator[tuple[fx.Node, Tensor]]:
        """Runs the network, and sets the running statistics of every norm to those of what the norm is given.

        Yields:
            the argument that they are, and their values.
        """
        for norm in filter(is_running_norm, self.nodes):
            self.run_to(norm)
            yield from self.estimate_statistics_of(norm)

    def estimate_statistics_of(self, norm: fx.Node) -> Iterator[tuple[fx.Node, Tensor]]:
        """Does so for a norm that is next."""
        given = bind(norm)
        mean = self.mean(given["input"], 1)
        squares = [(rows - mean).square().sum(0) for rows in self.rows(given["input"], 1)]
        count = sum(len(rows) for rows in self.rows(given["input"], 1))
        variance = torch.stack(squares).sum(0) / max(count - 1, 1)
        yield given["running_mean"], self.set(given["running_mean"], mean)
        yield given["running_var"], self.set(given["running_var"], variance)
