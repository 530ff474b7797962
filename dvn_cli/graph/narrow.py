"""The graph of a part of the channels: every tensor loses what is dropped, every size in the graph follows."""

import copy
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from dvn_cli.graph.dtype import is_size, keep_out_of_autocast
from dvn_cli.graph.labels import Labeller, Labels
from dvn_cli.graph.registry import Entry, entry_of
from dvn_cli.graph.trace import Traced, bind, is_inplace, is_view, refusal

Indices = list[Tensor | None]
"""What is left of a tensor: the indices of each dimension, in order; None means all."""

ONLY_A_PART = "where only a part of it is kept"


class NotOuterError(Exception):
    """What is left of a tensor is no choice of indices along each dimension."""


@dataclass(frozen=True)
class Narrowed:
    """A narrow network as a function: `module(x, *tensors)` with a tensor for each of `names`, in order.

    Attributes:
        module: holds no parameters; constants (tables of indices and the like) are its buffers.
        names: the backbone's own names of the parameters and buffers that it takes.
    """

    module: fx.GraphModule
    names: tuple[str, ...]


def indices_of(labeller: Labeller, labels: Labels, mask: Tensor) -> Indices:
    """Returns what is left of a tensor, along each dimension.

    Args:
        mask: for every label whether it is left, shape (number of labels,), bool.

    Raises:
        NotOuterError: see there.
    """
    masks: list[Tensor | None] = [None] * len(labels.shape)
    for layer in labels.layers:
        left = mask[labeller.coupled.find(layer)]
        if bool(left.all()):
            continue
        outer = torch.ones((1,) * left.ndim, dtype=torch.bool)
        for dim in range(left.ndim):
            if left.shape[dim] > 1:
                along = left.movedim(dim, 0).flatten(1).any(1) if left.ndim > 1 else left
                outer = outer & along.reshape([-1 if d == dim else 1 for d in range(left.ndim)])
                before = masks[dim]
                masks[dim] = along if before is None else before & along
        if not torch.equal(outer.expand(left.shape), left):
            raise NotOuterError
    return [None if along is None or bool(along.all()) else along.nonzero().reshape(-1) for along in masks]


def take(tensor: Tensor, indices: Indices) -> Tensor:
    """Returns what is left of a tensor, as a view wherever the indices are one run."""
    for dim, index in enumerate(indices):
        if index is not None:
            count = len(index)
            first = int(index[0]) if count else 0
            if not count or int(index[-1]) - first + 1 == count:
                tensor = tensor.narrow(dim, first, count)
            else:
                tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def called(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function."""
    return function(*args, **kwargs)


def keep_traceable(graph: fx.Graph) -> None:
    """Makes the nodes that take sizes alone, such as `zeros([batch, 8])`, calls of `called`, in place.

    When a pickled graph is opened, torch.fx traces it again, but an operator of torch does not see that a number within
    a list stands for a node. Functions that are noted as torch.fx.wrap does it are not run, whatever they are given.
    """
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if isinstance(node.target, torch._ops.OpOverload) and inputs and all(map(is_size, inputs)):
            node.args, node.target = (node.target, *node.args), called
            node.meta["is_wrapped"] = True


def on_device(module: fx.GraphModule, device: torch.device | str) -> fx.GraphModule:
    """A copy of a narrow network with its constants on a device, where it also makes the tensors that it makes."""
    module = copy.deepcopy(module).to(device)
    device = torch.device(device)
    for node in module.graph.nodes:
        moved = fx.node.map_aggregate(
            (node.args, node.kwargs), lambda value: device if isinstance(value, torch.device) else value
        )
        node.args, node.kwargs = moved  # type: ignore[misc]
    module.recompile()
    return module


def narrow(
    traced: Traced, labels: Mapping[fx.Node, Any], labeller: Labeller, mask: Tensor, strides: Mapping[str, list[int]]
) -> Narrowed:
    """Returns the network that has only a part of the channels.

    Args:
        traced: the whole network.
        labels: of its nodes, by `labeller`.
        mask: for every label whether it is left, shape (number of labels,), bool.
        strides: other strides for convolutions, by the name of their weight.

    Raises:
        InputError: an operator cannot be narrowed so; the message names it and its module.
    """
    return Narrower(traced, labels, labeller, mask, strides).run()


@dataclass(eq=False)
class Narrower:
    """Writes the graph of a part of the channels, one node after the other, as the operators' entries say.

    Attributes:
        traced, labels, labeller, mask, strides: see `narrow`. Shapes of labels are those before anything is dropped.
        graph: the new graph.
        new: for nodes of the whole graph those of the new one that stand for them.
        pending: nodes that cannot be expressed: elements on their way from a node `root` to one that can be. The value
            tells for each of them (at the full size) which element of the root it is.
        constants: of the new graph.
    """

    traced: Traced
    labels: Mapping[fx.Node, Any]
    labeller: Labeller
    mask: Tensor
    strides: Mapping[str, list[int]]
    graph: fx.Graph = field(default_factory=fx.Graph)
    new: dict[fx.Node, fx.Node] = field(default_factory=dict)
    pending: dict[fx.Node, tuple[fx.Node, Any]] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    _indices: dict[int, Indices] = field(default_factory=dict)

    def run(self) -> Narrowed:
        """Returns the network."""
        traced, placeholders = self.traced, self.traced.graph.find_nodes(op="placeholder")
        weights = [node for node in placeholders if str(node.target) in traced.names]
        for node in [node for node in placeholders if str(node.target) == traced.input] + weights:
            self.new[node] = self.graph.node_copy(node)
        for node in traced.graph.nodes:
            if node.op == "placeholder" and node not in self.new:
                self.new[node] = self.constant(take(traced.sources[str(node.target)].detach(), self.indices(node)))
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                self.graph.output(self.new[node.args[0]])
        root = torch.nn.Module()
        for name, tensor in self.constants.items():
            root.register_buffer(name, tensor, persistent=False)
        keep_out_of_autocast(self.graph)
        keep_traceable(self.graph)
        self.graph.lint()
        names = tuple(traced.names[str(node.target)] for node in weights)
        return Narrowed(fx.GraphModule(root, self.graph, "NarrowGraph"), names)

    # What rewrites are made of

    def copy(self, node: fx.Node, args: dict[str, Any] | None = None, target: Any = None) -> fx.Node:
        """Enters a node into the new graph.

        Args:
            args: what the operator is called with, by the names of its schema; nodes of either graph. By default the
                node's own.
            target: another operator.

        Raises:
            InputError: it would read what cannot be expressed, or write to a copy of what it should write to.
        """
        if any(n in self.pending for n in node.all_input_nodes) or (is_inplace(node) and self._writes_to_a_copy(node)):
            raise refusal(node, ONLY_A_PART)
        if args is None:
            return self.graph.node_copy(node, lambda n: self.new[n])
        target = target or node.target
        arguments = target._schema.arguments
        bound = fx.node.map_arg(args, lambda n: self.new.get(n, n))
        positional = tuple(bound[a.name] for a in arguments if not a.kwarg_only and a.name in bound)
        keywords = {a.name: bound[a.name] for a in arguments if a.kwarg_only and a.name in bound}
        new = self.graph.call_function(target, positional, keywords)
        new.meta = dict(node.meta)
        return new

    def constant(self, tensor: Tensor) -> fx.Node:
        """Enters a constant, which is a buffer of the network."""
        name = f"constant_{len(self.constants)}"
        self.constants[name] = tensor
        return self.graph.get_attr(name)

    def pick(self, new: fx.Node, dim: int, index: Tensor) -> fx.Node:
        """Enters a choice of indices along a dimension of a node of the new graph."""
        return self.graph.call_function(torch.ops.aten.index_select.default, (new, dim, self.constant(index)))

    def indices(self, node: fx.Node) -> Indices:
        """Returns what is left of a node's tensor, along each dimension."""
        return self._indices_of(self.labels[node])

    def size(self, labels: Labels, dim: int) -> int:
        """Returns how many indices are left of a tensor's dimension."""
        index = self._indices_of(labels)[dim]
        return labels.shape[dim] if index is None else len(index)

    def sizes(self, node: fx.Node, given: Sequence[Any] | None = None) -> list[Any]:
        """Returns the sizes that are left of a node's tensor.

        Those that depend on the batch are what `given` says, or -1 where they change or nothing is given.
        """
        labels, sizes = self.labels[node], []
        for dim, size in enumerate(node.meta["val"].shape):
            if isinstance(size, int):
                sizes.append(self.size(labels, dim))
            else:
                sizes.append(given[dim] if given is not None and self.indices(node)[dim] is None else -1)
        return sizes

    def scaled(self, number: Any, now: int) -> Any:
        """Returns a number that is now another one; what grows with the batch (`now`: at its example) still does."""
        if not isinstance(number, fx.Node):
            return now
        if self.labels[number] == now:
            return number
        times = self.graph.call_function(operator.mul, (self.new[number], now))
        scaled = self.graph.call_function(operator.floordiv, (times, self.labels[number]))
        times.meta, scaled.meta = {"val": number.meta["val"]}, {"val": number.meta["val"]}
        return scaled

    def fits(self, node: fx.Node) -> bool:
        """Tells whether a move, as it is, does to what is left what it did to the whole: it is run on numbers."""
        source = node.all_input_nodes[0]
        whole = self._numbers(source)
        expected, part = self._positions(node, whole), take(whole, self.indices(source))
        try:
            result = self._positions(node, part)
        except (RuntimeError, IndexError):
            return False
        if isinstance(expected, Tensor):
            return torch.equal(take(expected, self.indices(node)), result)
        if len(expected) != len(result):  # fewer, where what it takes apart lost some
            return False
        pairs = zip(expected, result, self.labels[node], strict=True)
        return all(torch.equal(take(e, self._indices_of(x)), r) for e, r, x in pairs)

    # One node after the other

    def _call(self, node: fx.Node) -> None:
        inputs, entry = node.all_input_nodes, entry_of(node.target)
        tensors = [self.labels[n] for n in (node, *inputs)]
        stride = self._stride(node)
        if entry is None or not any(map(self._is_changed, tensors)):  # without an entry: a number
            self.new[node] = self.copy(node, {**bind(node), "stride": stride} if stride else None)
        elif entry.moves:
            self._move(node, entry)
        elif not all(map(self._is_outer, tensors)):
            raise refusal(node, ONLY_A_PART)
        elif not entry.takes_nothing and any(map(self._is_empty, tensors[1:])):
            raise refusal(node, "where nothing of its input is kept")
        else:
            self.new[node] = entry.rewrite(self, node, bind(node) | ({"stride": stride} if stride else {}))

    def _stride(self, node: fx.Node) -> list[int] | None:
        weight = bind(node).get("weight")
        name = self.traced.names.get(str(weight.target), "") if isinstance(weight, fx.Node) else ""
        return self.strides.get(name)

    def _indices_of(self, labels: Labels) -> Indices:
        if id(labels) not in self._indices:
            self._indices[id(labels)] = indices_of(self.labeller, labels, self.mask)
        return self._indices[id(labels)]

    def _is_changed(self, value: Any) -> bool:
        """Whether anything of the tensor (of one of several) is dropped."""
        layers = [layer for labels in _tensors(value) for layer in labels.layers]
        return any(not bool(self.mask[self.labeller.coupled.find(layer)].all()) for layer in layers)

    def _is_outer(self, value: Any) -> bool:
        try:
            for labels in _tensors(value):
                self._indices_of(labels)
        except NotOuterError:
            return False
        return True

    def _is_empty(self, value: Any) -> bool:
        return any(index is not None and not len(index) for x in _tensors(value) for index in self._indices_of(x))

    def _writes_to_a_copy(self, node: fx.Node) -> bool:
        """Whether what the operator writes to was a view of what is read later, and is a copy in the new graph."""
        view = node.all_input_nodes[0]
        copied = False
        while is_view(view):
            copied = copied or not is_view(self.new[view])
            view = view.all_input_nodes[0]
            if copied and any(user > node for user in view.users):
                return True
        return False

    # Elements that move

    def _move(self, node: fx.Node, entry: Entry) -> None:
        source = node.all_input_nodes[0]
        if source not in self.pending and self._is_outer(self.labels[source]) and self._is_outer(self.labels[node]):
            new = entry.rewrite(self, node, bind(node))
            if new is not None:
                self.new[node] = new
                return
        if source in self.pending:
            root, positions = self.pending[source]
        elif self._is_outer(self.labels[source]):
            root, positions = source, self._numbers(source)
        else:
            raise refusal(node, ONLY_A_PART)
        positions = self._positions(node, positions)
        if isinstance(positions, Tensor) and self._is_outer(self.labels[node]):
            self.new[node] = self._gathered(node, root, positions)
        else:
            self.pending[node] = (root, positions)

    def _numbers(self, node: fx.Node) -> Tensor:
        """Numbers the elements of a node's tensor."""
        shape = self.labels[node].shape
        return torch.arange(math.prod(shape)).reshape(shape)

    def _positions(self, node: fx.Node, source: Any) -> Any:
        """Where every element comes from: the operator, run on numbers."""
        numbers = {n: self.labels[n] for n in node.all_input_nodes} | {node.all_input_nodes[0]: source}
        for n in node.all_input_nodes[1:]:
            if isinstance(numbers[n], Labels):  # a table of indices, or one whose shape alone matters
                known = self.labeller.looked_up(n, node)
                numbers[n] = torch.empty(numbers[n].shape) if known is None else known
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: numbers[n])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _gathered(self, node: fx.Node, root: fx.Node, positions: Tensor) -> fx.Node:
        """Enters one gather of what is left of a node's tensor from what is left of the root's."""
        whole = self._numbers(root)
        part = take(whole, self.indices(root))
        place = torch.full((whole.numel(),), -1)
        place[part.reshape(-1)] = torch.arange(part.numel())
        wanted = place[take(positions, self.indices(node))]
        if bool((wanted < 0).any()):
            raise refusal(node, ONLY_A_PART)
        numbers = torch.arange(part.numel()).reshape(part.shape)
        for dim in range(part.ndim if wanted.ndim == part.ndim else 0):
            if wanted.shape[:dim] + wanted.shape[dim + 1 :] == part.shape[:dim] + part.shape[dim + 1 :]:
                step = math.prod(part.shape[dim + 1 :])
                line = wanted.movedim(dim, -1).reshape(-1, wanted.shape[dim])[0] // step % part.shape[dim]
                if torch.equal(numbers.index_select(dim, line), wanted):
                    return self.pick(self.new[root], dim, line)
        line = wanted.flatten(1)[0] if wanted.ndim > 1 else wanted
        if wanted.ndim < 2 or not torch.equal(numbers.flatten(1).index_select(1, line), wanted.flatten(1)):
            raise refusal(node, ONLY_A_PART)
        flat = self.graph.call_function(torch.ops.aten.flatten.using_ints, (self.new[root], 1))
        flat = self.pick(flat, 1, line)
        return self.graph.call_function(torch.ops.aten.reshape.default, (flat, [-1, *wanted.shape[1:]]))


def _tensors(value: Any) -> list[Labels]:
    """What is labelled of a node's value: a tensor, several, or a number."""
    return [labels for labels in (value if isinstance(value, list) else [value]) if isinstance(labels, Labels)]


# Rewrites of operators whose arguments do not change


def as_it_is(narrower: Narrower, node: fx.Node, args: dict[str, Any]) -> fx.Node:
    """Copies an operator that is right as it is, whatever is left of its operands."""
    return narrower.copy(node)


def if_it_fits(narrower: Narrower, node: fx.Node, args: dict[str, Any]) -> fx.Node | None:
    """Copies a move where, as it is, it does to what is left what it did to the whole."""
    return narrower.copy(node) if narrower.fits(node) else None
