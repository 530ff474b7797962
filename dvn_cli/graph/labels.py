"""Which channel every element of every activation belongs to.

A graph is run on integers instead of numbers. Each index of each dimension of each parameter gets a label of its own;
operators that move data are run on the labels as they are, pointwise operators unite the labels of their operands, and
contractions and normalisations have a rule each (`ops`). What is united in the end is a coupled group: channels that
are only kept or dropped together (`coupling`).

An activation carries *layers* of labels. A layer is an integer tensor with as many dimensions as the activation, of
size 1 wherever the label does not vary, so that an image of any size costs no more than its channels. An element is
kept when its labels in all layers are kept; almost everything has one layer, weights have one for each dimension.
Label 0 is kept always.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from dvn_cli.errors import InputError
from dvn_cli.graph.coupling import CoupledGroups
from dvn_cli.graph.registry import entry_of
from dvn_cli.graph.trace import Batched, Traced, bind, hint, refusal, shape_of, writers


@dataclass(frozen=True)
class Labels:
    """The labels of one tensor.

    Attributes:
        shape: of the tensor, at batch size `EXAMPLE_BATCH`.
        layers: see the module; none means that every element is kept always.
    """

    shape: tuple[int, ...]
    layers: tuple[Tensor, ...] = ()

    def zeros(self, dim: int) -> Tensor:
        """Returns the labels of a dimension's indices where all units have all of them."""
        return torch.zeros(self.shape[dim], dtype=torch.int64)


@dataclass
class Call:
    """One operator of a graph, as its label rule sees it.

    Attributes:
        args: the arguments by the names of the operator's schema, defaults filled in.
        shapes: of the outputs.
        shape: of the first.
    """

    node: fx.Node
    labeller: "Labeller"

    @cached_property
    def args(self) -> dict[str, Any]:
        return bind(self.node)

    @cached_property
    def has_several_outputs(self) -> bool:
        return isinstance(self.node.meta["val"], tuple | list)

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        value = self.node.meta["val"]
        return [shape_of(output) for output in (value if self.has_several_outputs else [value])]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[0]

    def outputs(self, label: Callable[[tuple[int, ...]], Labels]) -> Labels | list[Labels]:
        """Labels the output by its shape, each where there are several."""
        outputs = [label(shape) for shape in self.shapes]
        return outputs if self.has_several_outputs else outputs[0]

    def labels(self, argument: str) -> Labels:
        """Returns the labels of a tensor argument."""
        labels = self.optional(argument)
        if labels is None:
            raise refusal(self.node, f"without its argument {argument}")
        return labels

    def optional(self, argument: str) -> Labels | None:
        """Returns the labels of a tensor argument, None where it is absent."""
        node = self.args.get(argument)
        return self.labeller.env[node] if isinstance(node, fx.Node) else None

    def several(self, argument: str) -> list[Labels]:
        """Returns the labels of an argument that is a list of tensors, or one tensor."""
        nodes = self.args[argument]
        return [self.labeller.env[node] for node in (nodes if isinstance(nodes, list | tuple) else [nodes])]

    def tensors(self) -> list[Labels]:
        """Returns the labels of all tensor arguments, in order, lists of tensors included."""
        nodes = [n for n in torch.utils._pytree.tree_leaves(list(self.args.values())) if isinstance(n, fx.Node)]
        return [v for v in (self.labeller.env[n] for n in nodes) if isinstance(v, Labels)]

    def plain(self, argument: str) -> Any:
        """Returns an argument that is no tensor; sizes that depend on the batch are numbers, at `EXAMPLE_BATCH`."""
        return fx.node.map_arg(self.args[argument], lambda node: self.labeller.env[node])

    def dims(self) -> list[int]:
        """Returns the dimensions of `self` that `dim` names, from 0; all where it is None, empty or missing."""
        value, rank = self.plain("dim") if "dim" in self.args else None, len(self.labels("self").shape)
        if value is None or value == []:
            return list(range(rank))
        return [dim % rank for dim in ([value] if isinstance(value, int) else value)]


@dataclass
class Labeller:
    """Runs graphs of one module on labels.

    Attributes:
        units: how many units there will be. What can be divided along one dimension or another (heads or the
            dimensions of each head) is divided where this number fits.
        whole_groups: whether units get whole groups of a convolution or a norm, or a part of every group, where the
            units divide both.
        had_choice: whether there was such a case.
        coupled: which labels belong together.
        sources: for each tensor that the graphs read (by its name in the module, or its placeholder's name where the
            module's state_dict does not hold it) the labels of its indices, a vector for each dimension.
        output: labels of the classes, a vector; None when the classes cannot be told apart.
    """

    units: int
    whole_groups: bool = True
    had_choice: bool = False
    coupled: CoupledGroups = field(default_factory=CoupledGroups)
    sources: dict[str, list[Tensor]] = field(default_factory=dict)
    output: Tensor | None = None
    env: dict[fx.Node, Any] = field(default_factory=dict)
    _values: dict[tuple[fx.Node, fx.Node], Any] = field(default_factory=dict)

    def run(self, traced: Traced) -> dict[fx.Node, Any]:
        """Labels every node of a graph; graphs of the same module share the labels of its tensors.

        Returns:
            For each node its `Labels` (a list for several outputs), or the number that it stands for.

        Raises:
            InputError: an operator has no rule, or its rule cannot tell which channels belong together.
        """
        self.traced, env = traced, self.env
        self.depends: set[fx.Node] = set()
        for node in traced.graph.nodes:
            key = str(node.target)
            if node.op == "placeholder" and key == traced.input:
                self.depends.add(node)
                env[node] = Labels(shape_of(node.meta["val"]))
            elif node.op == "placeholder":
                env[node] = self._source(traced.names.get(key, key), tuple(traced.sources[key].shape))
            elif node.op == "output":
                self._finish(env[node.args[0]])
            elif node.op == "call_function":
                if any(n in self.depends for n in node.all_input_nodes):
                    self.depends.add(node)
                env[node] = self._call(node)
            else:
                raise InputError(f"the graph has a node that is not supported: {node.format_node()}")
        return {node: env[node] for node in traced.graph.nodes if node.op != "output"}

    def _call(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if isinstance(value, int | float | bool | Batched | torch.SymFloat | torch.SymBool):
            return hint(value) if isinstance(value, int | Batched) else value
        entry, call = entry_of(node.target), Call(node, self)
        if entry is None:
            raise refusal(node)
        self.coupled.at = node
        try:
            result = entry.label(self, call)
        except (RuntimeError, IndexError, TypeError, ValueError, NotImplementedError) as error:
            reason = next(iter(str(error).splitlines()), "")[:100]
            raise refusal(node, f"as it stands ({reason})") from error
        for labels, shape in zip(result if isinstance(result, list) else [result], call.shapes, strict=True):
            if labels.shape != shape:  # a rule that is wrong must not go unseen
                raise refusal(node, f"(its rule gives shape {labels.shape}, the graph {shape})")
        return result

    def _source(self, name: str, shape: tuple[int, ...]) -> Labels:
        if name not in self.sources:
            self.sources[name] = [self.coupled.fresh(n) if n > 1 else torch.zeros(n, dtype=torch.int64) for n in shape]
        return from_vectors(shape, dict(enumerate(self.sources[name])))

    def _finish(self, labels: Labels) -> None:
        vectors = self.separate(labels, prefer=[len(labels.shape) - 1])
        classes = vectors.pop(len(labels.shape) - 1, None)
        for vector in vectors.values():
            self.pin(vector)
        if classes is not None and self.output is not None:
            self.coupled.unite(classes, self.output)
        self.output = classes

    # What rules are made of

    def value(self, node: Any, reader: fx.Node) -> Any:
        """Computes what `reader` finds in a node that depends on no parameter and no image, such as a table of indices.

        Raises:
            InputError: the node depends on the input or on a parameter.
        """
        if not isinstance(node, fx.Node):
            return node
        if (node, reader) not in self._values:
            needed: set[fx.Node] = set()
            waiting = [node]
            while waiting:
                n = waiting.pop()
                if n in self.depends:
                    raise refusal(n, "as an index: it depends on the input")
                if n.op == "placeholder" and isinstance(self.traced.sources[str(n.target)], torch.nn.Parameter):
                    raise refusal(reader, "with an index that depends on a parameter")
                if n not in needed:
                    needed.add(n)
                    waiting += [] if isinstance(self.env[n], int) else n.all_input_nodes
                    waiting += [user for user in writers(n) if user < reader]
            values: dict[fx.Node, Any] = {}
            for n in sorted(needed):
                if n.op == "placeholder":
                    values[n] = self.traced.sources[str(n.target)].detach().clone()
                elif isinstance(self.env[n], int):
                    values[n] = self.env[n]
                else:
                    args, kwargs = fx.node.map_arg((n.args, dict(n.kwargs)), values.__getitem__)
                    values[n] = n.target(*args, **kwargs)  # type: ignore[operator]
            self._values[node, reader] = values[node]
        return self._values[node, reader]

    def looked_up(self, node: fx.Node, reader: fx.Node) -> Tensor | None:
        """Returns what `value` found when the reader was labelled; None where it was not asked."""
        return self._values.get((node, reader))

    def pin(self, labels: Tensor) -> None:
        """Gives channels to all units."""
        self.coupled.unite(labels, torch.zeros(1, dtype=torch.int64))

    def compress(self, labels: Tensor) -> Tensor | None:
        """Returns a layer of size 1 wherever its groups do not vary; None where they never do: then it is pinned."""
        if not labels.numel():
            return None
        for dim in range(labels.ndim):
            if labels.shape[dim] > 1 and labels.stride(dim) == 0:
                labels = labels.narrow(dim, 0, 1)
        labels = whole = self.coupled.find(labels.contiguous())
        for dim in range(labels.ndim):
            first = labels.narrow(dim, 0, 1)
            if labels.shape[dim] > 1 and bool((labels == first).all()):
                labels = first
        if labels.numel() > 1:
            return labels if labels is whole else labels.clone()  # a view would keep the whole
        self.pin(labels)
        return None

    def refresh(self, labels: Labels) -> Labels:
        """Returns the same labels by the groups of now."""
        return Labels(labels.shape, tuple(x for x in map(self.compress, labels.layers) if x is not None))

    def separate(self, labels: Labels, prefer: Sequence[int] = (), avoid: Iterable[int] = ()) -> dict[int, Tensor]:
        """Returns labels as one vector for each dimension; unites what varies along several dimensions jointly.

        Of several dimensions the one that stays is the first of `prefer`, else (not in `avoid`, where there is a
        choice) the first whose size the number of units divides, else the largest: whole heads where they can be
        divided among the units, dimensions of every head otherwise.
        """
        vectors: dict[int, Tensor] = {}
        for layer in self.refresh(labels).layers:
            varying = varying_dims(layer)
            if len(varying) == 1 and varying[0] not in vectors:
                vectors[varying[0]] = layer.reshape(-1)
                continue
            candidates = [d for d in varying if d not in avoid] or list(varying)
            stay = next(
                (d for d in [*prefer, *(c for c in candidates if layer.shape[c] % self.units == 0)] if d in varying),
                max(candidates, key=lambda d: layer.shape[d]),
            )
            least = layer.movedim(stay, 0).flatten(1).amin(1) if layer.ndim > 1 else layer
            self.coupled.unite(layer.movedim(stay, -1), least)
            if stay in vectors:
                self.coupled.unite(least, vectors[stay])
            vectors[stay] = least
        return {dim: self.coupled.find(vector) for dim, vector in vectors.items()}

    def split_groups(self, groups: int, sides: Sequence[Tensor]) -> bool:
        """Unites channels so that groups stay groups: whole groups are divided, or every group alike.

        Where both can be, `whole_groups` says which.

        Args:
            sides: labels of the channels, a vector for each side of the operator (input, output), all in `groups` runs.

        Returns:
            Whether groups are divided among the units; otherwise the channels of each group are, at the same places.
        """
        sizes = [len(side) // groups for side in sides]
        whole, alike = groups % self.units == 0, not any(n % self.units for n in sizes)
        if whole and alike:
            self.had_choice = True
            whole = self.whole_groups
        whole = whole or max(sizes) == 1 or (groups >= self.units and not alike)
        for side in sides:
            table = side.reshape(groups, -1)
            self.coupled.unite(table, table[:, :1] if whole else table[:1])
        if whole:
            self.unite_all([side.reshape(groups, -1)[:, 0] for side in sides])
        return whole

    def unite_parameters(
        self, vectors: Mapping[int, Tensor], parameters: Iterable[Labels | None], first: int = 1
    ) -> None:
        """Unites parameters with the dimensions of a tensor, from `first` on, that each index of theirs is for."""
        for parameter in parameters:
            if parameter is not None:
                for dim, vector in self.separate(parameter).items():
                    self.coupled.unite(vector, vectors.get(first + dim, torch.zeros(1, dtype=torch.int64)))

    def unite_all(self, vectors: Sequence[Tensor]) -> None:
        """Unites several vectors of labels, index by index."""
        for vector in vectors[1:]:
            self.coupled.unite(vectors[0], vector)


def varying_dims(layer: Tensor) -> tuple[int, ...]:
    """Returns the dimensions along which a layer varies."""
    return tuple(dim for dim, size in enumerate(layer.shape) if size > 1)


def from_vectors(shape: tuple[int, ...], vectors: Mapping[int, Tensor]) -> Labels:
    """Returns labels with a layer for each dimension that has a vector (of length 1 or the dimension's size)."""
    rank = len(shape)
    layers = [
        vector.reshape([-1 if d == dim else 1 for d in range(rank)])
        for dim, vector in vectors.items()
        if vector.numel() > 1 and bool(vector.any())
    ]
    return Labels(shape, tuple(layers))
