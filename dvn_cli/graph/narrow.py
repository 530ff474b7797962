"""The graph of a part of the channels: every tensor loses what is not kept, every size in the graph follows."""

import copy
import math
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dvn_cli.errors import InputError
from dvn_cli.graph.dtype import is_size, keep_out_of_autocast
from dvn_cli.graph.labels import Call, Labeller, Labels, base_name, bind
from dvn_cli.graph.rules import kind_of
from dvn_cli.graph.trace import Traced, is_inplace, is_view

Kept = list[Tensor | None]  # for each dimension the indices kept, in order; None means all


class NotOuterError(Exception):
    """What is kept of a tensor is no choice of indices along each dimension."""


@dataclass(frozen=True)
class Narrowed:
    """A narrow network as a function: `module(x, *tensors)` with a tensor for each of `names`, in order.

    Attributes:
        module: holds no parameters; constants (tables of indices and the like) are its buffers.
        names: the backbone's own names of the parameters and buffers that it takes.
    """

    module: fx.GraphModule
    names: tuple[str, ...]


def kept_indices(labeller: Labeller, labels: Labels, keep: Tensor) -> Kept:
    """What is kept of a tensor, along each dimension.

    Args:
        keep: for every label whether its class is kept, shape (number of labels,), bool.

    Raises:
        NotOuterError: see there.
    """
    masks: list[Tensor | None] = [None] * len(labels.shape)
    for layer in labels.layers:
        mask = keep[labeller.classes.find(layer)]
        if bool(mask.all()):
            continue
        outer = torch.ones((1,) * mask.ndim, dtype=torch.bool)
        for dim in range(mask.ndim):
            if mask.shape[dim] > 1:
                along = mask.movedim(dim, 0).flatten(1).any(1) if mask.ndim > 1 else mask
                outer = outer & along.reshape([-1 if d == dim else 1 for d in range(mask.ndim)])
                before = masks[dim]
                masks[dim] = along if before is None else before & along
        if not torch.equal(outer.expand(mask.shape), mask):
            raise NotOuterError
    return [None if mask is None or bool(mask.all()) else mask.nonzero().reshape(-1) for mask in masks]


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
    traced: Traced, labels: dict[fx.Node, Any], labeller: Labeller, keep: Tensor, strides: dict[str, list[int]]
) -> Narrowed:
    """Returns the network that has only the channels kept.

    Args:
        traced: the whole network.
        labels: of its nodes, by `labeller`.
        keep: for every label whether its class is kept, shape (number of labels,), bool.
        strides: other strides for convolutions, by the name of their weight.

    Raises:
        InputError: an operator cannot be narrowed so; the message names it and its module.
    """
    return _Narrower(traced, labels, labeller, keep, strides).run()


class _Narrower:
    def __init__(
        self,
        traced: Traced,
        labels: dict[fx.Node, Any],
        labeller: Labeller,
        keep: Tensor,
        strides: dict[str, list[int]],
    ) -> None:
        self.traced, self.labels, self.labeller, self.keep, self.strides = traced, labels, labeller, keep, strides
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}
        # Nodes that cannot be expressed: data on its way from the node `root` to one that can be. The value tells for
        # each element (at the full size) which element of the root it is.
        self.pending: dict[fx.Node, tuple[fx.Node, Any]] = {}
        self.constants: dict[str, Tensor] = {}
        self._kept: dict[int, Kept] = {}

    def run(self) -> Narrowed:
        names = []
        for node in self.traced.graph.nodes:
            key = str(node.target)
            if node.op == "placeholder" and key == self.traced.input:
                self.new[node] = self.graph.node_copy(node)
        for node in self.traced.graph.nodes:
            key = str(node.target)
            if node.op == "placeholder" and key in self.traced.names:
                names.append(self.traced.names[key])
                self.new[node] = self.graph.node_copy(node)
        for node in self.traced.graph.nodes:
            key = str(node.target)
            if node.op == "placeholder" and node not in self.new:
                self.new[node] = self.constant(take(self.traced.sources[key].detach(), self.kept(node)))
            elif node.op == "call_function":
                self.call(node)
            elif node.op == "output":
                self.graph.output(self.new[node.args[0]])
        root = torch.nn.Module()
        for name, tensor in self.constants.items():
            root.register_buffer(name, tensor, persistent=False)
        keep_out_of_autocast(self.graph)
        keep_traceable(self.graph)
        self.graph.lint()
        return Narrowed(fx.GraphModule(root, self.graph, "NarrowGraph"), tuple(names))

    def constant(self, tensor: Tensor) -> fx.Node:
        name = f"constant_{len(self.constants)}"
        self.constants[name] = tensor
        return self.graph.get_attr(name)

    def kept(self, node: fx.Node) -> Kept:
        return self.kept_of(self.labels[node])

    def kept_of(self, labels: Labels) -> Kept:
        if id(labels) not in self._kept:
            self._kept[id(labels)] = kept_indices(self.labeller, labels, self.keep)
        return self._kept[id(labels)]

    def changed(self, value: Any) -> bool:
        """Whether anything of the tensor (of one of several) is dropped."""
        if isinstance(value, list):
            return any(map(self.changed, value))
        if not isinstance(value, Labels):
            return False
        return any(not bool(self.keep[self.labeller.classes.find(layer)].all()) for layer in value.layers)

    def outer(self, value: Any) -> bool:
        try:
            for labels in value if isinstance(value, list) else [value]:
                if isinstance(labels, Labels):
                    self.kept_of(labels)
        except NotOuterError:
            return False
        return True

    def copy(self, node: fx.Node, args: dict[str, Any] | None = None, target: Any = None) -> None:
        """Enters the node into the new graph, with other arguments where `args` (by the schema's names) says so."""
        if any(n in self.pending for n in node.all_input_nodes) or (is_inplace(node) and self.written_to_a_copy(node)):
            raise self.refuse(node)
        if args is None:
            self.new[node] = self.graph.node_copy(node, lambda n: self.new[n])
            return
        target = target or node.target
        places = [a.name for a in target._schema.arguments if not a.kwarg_only]
        bound = fx.node.map_arg(args, lambda n: self.new.get(n, n))
        keywords = {a.name: bound[a.name] for a in target._schema.arguments if a.kwarg_only and a.name in bound}
        new = self.graph.call_function(target, tuple(bound[p] for p in places if p in bound), keywords)
        new.meta = dict(node.meta)
        self.new[node] = new

    def written_to_a_copy(self, node: fx.Node) -> bool:
        """Whether what the operator writes to was a view of what is read later, and is a copy in the new graph."""
        view = node.all_input_nodes[0]
        copied = False
        while is_view(view):
            copied = copied or not is_view(self.new[view])
            view = view.all_input_nodes[0]
            if copied and any(user > node for user in view.users):
                return True
        return False

    def refuse(self, node: fx.Node, why: str = "") -> InputError:
        return Call(node, base_name(node.target), {}, self.labeller).refuse(why or "where only a part of it is kept")

    def call(self, node: fx.Node) -> None:
        inputs = [self.labels[n] for n in node.all_input_nodes]
        name = base_name(node.target)
        if name == "getitem":
            self.getitem(node)
        elif stride := self.stride(node):
            self.copy(node, {**bind(node), "stride": stride})
        elif not self.changed(self.labels[node]) and not any(map(self.changed, inputs)):
            self.copy(node)
        elif name in MOVED or kind_of(node.target) in ("move", "reshape"):
            self.move(node, name)
        elif not self.outer(self.labels[node]) or not all(map(self.outer, inputs)):
            raise self.refuse(node)
        elif kind_of(node.target) == "factory":
            self.copy(node)
            self.select(node)
        elif kind_of(node.target) == "rule" and name not in JOINS and self.empty(node):
            raise self.refuse(node, "where nothing of its input is kept")
        else:
            self.copy(node, REWRITES[name](self, node, bind(node)) if name in REWRITES else None)
            for dim in self.spread(node):
                kept: Any = self.kept(node)[dim]
                self.new[node] = self.pick(self.new[node], dim, kept)

    def empty(self, node: fx.Node) -> bool:
        found = [self.labels[n] for n in node.all_input_nodes]
        return any(i is not None and not len(i) for x in found if isinstance(x, Labels) for i in self.kept_of(x))

    def stride(self, node: fx.Node) -> list[int] | None:
        weight = bind(node).get("weight") if hasattr(node.target, "_schema") else None
        return self.strides.get(self.traced.names.get(str(weight.target), "")) if isinstance(weight, fx.Node) else None

    def select(self, node: fx.Node) -> None:
        """What is kept of a tensor that the graph makes whole."""
        for dim, indices in enumerate(self.kept(node)):
            if indices is not None:
                self.new[node] = self.pick(self.new[node], dim, indices)

    def pick(self, new: fx.Node, dim: int, indices: Tensor) -> fx.Node:
        return self.graph.call_function(torch.ops.aten.index_select.default, (new, dim, self.constant(indices)))

    def spread(self, node: fx.Node) -> list[int]:
        """Dimensions along which a convolution mixes positions of which only some are kept."""
        if not base_name(node.target).startswith("conv"):
            return []
        arguments = bind(node)
        kernel = self.labels[arguments["weight"]].shape
        kept = self.kept(arguments["input"])
        return [dim for dim in range(2, len(kernel)) if kernel[dim] > 1 and kept[dim] is not None]

    # Data that moves

    def getitem(self, node: fx.Node) -> None:
        source, index = node.args
        if source not in self.pending:
            self.new[node] = self.graph.node_copy(node, lambda n: self.new[n])
            return
        root, positions = self.pending[source]  # type: ignore[index]
        self.arrive(node, root, positions[index])

    def move(self, node: fx.Node, name: str) -> None:
        source = node.all_input_nodes[0]
        if source in self.pending or not self.outer(self.labels[source]) or not self.outer(self.labels[node]):
            self.depart(node, source)
            return
        arguments, target = bind(node), node.target
        if name in MOVED:
            arguments, target = MOVED[name](self, node, arguments)
        if name in EXACT or name in MOVED or self.verified(node, source):
            self.copy(node, arguments if name in MOVED else None, target)
        else:
            self.depart(node, source)

    def positions(self, node: fx.Node, of: Tensor) -> Any:
        """Where every element comes from: the operator, run on numbers."""
        numbers = {n: (of if n is node.all_input_nodes[0] else self.labels[n]) for n in node.all_input_nodes}
        for n, value in numbers.items():
            if isinstance(value, Labels):
                index = base_name(node.target) in ("index", "index_select")
                numbers[n] = self.labeller.value(n, node) if index else torch.empty(value.shape)
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: numbers[n])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def verified(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether the operator, as it is, does to what is kept what it did to the whole."""
        shape = self.labels[source].shape
        whole = torch.arange(math.prod(shape)).reshape(shape)
        expected, part = self.positions(node, whole), take(whole, self.kept(source))
        try:
            result = self.positions(node, part)
        except (RuntimeError, IndexError):
            return False
        if isinstance(expected, Tensor):
            return torch.equal(take(expected, self.kept(node)), result)
        if len(expected) != len(result):  # fewer, where what it takes apart lost some
            return False
        pairs = zip(expected, result, self.labels[node], strict=True)
        return all(torch.equal(take(e, self.kept_of(x)), r) for e, r, x in pairs)

    def depart(self, node: fx.Node, source: fx.Node) -> None:
        if source in self.pending:
            root, positions = self.pending[source]
        elif self.outer(self.labels[source]):
            shape = self.labels[source].shape
            root, positions = source, torch.arange(math.prod(shape)).reshape(shape)
        else:
            raise self.refuse(node)
        self.arrive(node, root, self.positions(node, positions))

    def arrive(self, node: fx.Node, root: fx.Node, positions: Any) -> None:
        """Enters one gather from `root` if what is kept here can be expressed, else waits for a node where it can."""
        if not isinstance(positions, Tensor) or not self.outer(self.labels[node]):
            self.pending[node] = (root, positions)
            return
        shape = self.labels[root].shape
        whole = torch.arange(math.prod(shape)).reshape(shape)
        part = take(whole, self.kept(root))
        place = torch.full((whole.numel(),), -1)
        place[part.reshape(-1)] = torch.arange(part.numel())
        wanted = place[take(positions, self.kept(node))]
        if bool((wanted < 0).any()):
            raise self.refuse(node)
        numbers = torch.arange(part.numel()).reshape(part.shape)
        for dim in range(part.ndim if wanted.ndim == part.ndim else 0):
            if wanted.shape[:dim] + wanted.shape[dim + 1 :] == part.shape[:dim] + part.shape[dim + 1 :]:
                step = math.prod(part.shape[dim + 1 :])
                line = wanted.movedim(dim, -1).reshape(-1, wanted.shape[dim])[0] // step % part.shape[dim]
                if torch.equal(numbers.index_select(dim, line), wanted):
                    select = torch.ops.aten.index_select.default
                    self.new[node] = self.graph.call_function(select, (self.new[root], dim, self.constant(line)))
                    return
        line = wanted.flatten(1)[0] if wanted.ndim > 1 else wanted
        if wanted.ndim < 2 or not torch.equal(numbers.flatten(1).index_select(1, line), wanted.flatten(1)):
            raise self.refuse(node)
        flat = self.graph.call_function(torch.ops.aten.flatten.using_ints, (self.new[root], 1))
        flat = self.graph.call_function(torch.ops.aten.index_select.default, (flat, 1, self.constant(line)))
        self.new[node] = self.graph.call_function(torch.ops.aten.reshape.default, (flat, [-1, *wanted.shape[1:]]))

    def sizes(self, node: fx.Node, given: Sequence[Any] | None = None) -> list[Any]:
        """The sizes of the node's tensor. Those that depend on the batch are what `given` says, else -1."""
        sizes = []
        for dim, (size, kept) in enumerate(zip(node.meta["val"].shape, self.kept(node), strict=True)):
            if isinstance(size, int):
                sizes.append(size if kept is None else len(kept))
            else:
                sizes.append(given[dim] if given is not None and kept is None else -1)
        return sizes

    def scaled(self, number: Any, now: int) -> Any:
        """A number that is now another one; one that grows with the batch (`now`: at `EXAMPLE_BATCH`) still does."""
        if not isinstance(number, fx.Node):
            return now
        if self.labels[number] == now:
            return number
        times = self.graph.call_function(operator.mul, (self.new[number], now))
        scaled = self.graph.call_function(operator.floordiv, (times, self.labels[number]))
        times.meta, scaled.meta = {"val": number.meta["val"]}, {"val": number.meta["val"]}
        return scaled


def take(tensor: Tensor, kept: Kept) -> Tensor:
    """The part of a tensor that is kept, as a view wherever the indices are one run."""
    for dim, indices in enumerate(kept):
        if indices is not None:
            count = len(indices)
            first = int(indices[0]) if count else 0
            if not count or int(indices[-1]) - first + 1 == count:
                tensor = tensor.narrow(dim, first, count)
            else:
                tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor


# Moves whose arguments change with the sizes: (narrower, node, arguments) -> (arguments, operator). The order of
# elements is that of the whole, so these are right whenever what is kept is an outer product before and after.


def _view(narrower: _Narrower, node: fx.Node, args: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    size = next(n for n in ("size", "shape") if n in args)
    return {**args, size: narrower.sizes(node, args[size])}, node.target


def _expand(narrower: _Narrower, node: fx.Node, args: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    given, kept = args["size"], narrower.kept(node)
    sizes = [n if k is None or n == -1 else narrower.scaled(n, len(k)) for n, k in zip(given, kept, strict=True)]
    return {**args, "size": sizes}, node.target


def _like(narrower: _Narrower, node: fx.Node, args: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    return args, node.target  # the other tensor is narrow too


def _unflatten(narrower: _Narrower, node: fx.Node, args: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    dim = args["dim"] % (len(narrower.labels[node].shape) - len(args["sizes"]) + 1)
    return {**args, "sizes": narrower.sizes(node)[dim : dim + len(args["sizes"])]}, node.target


def _split(narrower: _Narrower, node: fx.Node, args: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    outputs = narrower.labels[node]
    dim = args["dim"] % len(outputs[0].shape)
    kept = [narrower.kept_of(output)[dim] for output in outputs]
    sizes = [o.shape[dim] if k is None else len(k) for o, k in zip(outputs, kept, strict=True)]
    return {"self": args["self"], "split_sizes": sizes, "dim": dim}, torch.ops.aten.split_with_sizes.default


def _slice(narrower: _Narrower, node: fx.Node, args: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    source = args["self"]
    dim = args["dim"] % len(narrower.labels[source].shape)
    kept = narrower.kept(source)[dim]
    if kept is None:
        return args, node.target
    numbers = torch.arange(narrower.labels[source].shape[dim])[args["start"] : args["end"] : args["step"]]
    places = torch.isin(kept, numbers).nonzero().reshape(-1)
    if len(places) == len(kept):  # of a dimension that grows with the batch too
        return {**args, "dim": dim, "start": 0, "end": sys.maxsize, "step": 1}, node.target
    if not len(places):
        return {**args, "dim": dim, "start": 0, "end": 0, "step": 1}, node.target
    if int(places[-1]) - int(places[0]) + 1 != len(places):
        return (
            {"self": source, "dim": dim, "index": narrower.constant(places)},
            torch.ops.aten.index_select.default,
        )
    return {**args, "dim": dim, "start": int(places[0]), "end": int(places[-1]) + 1, "step": 1}, node.target


MOVED: dict[str, Callable[[_Narrower, fx.Node, dict[str, Any]], tuple[dict[str, Any], Any]]] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view"), _view),
    **dict.fromkeys(("reshape_as", "view_as", "expand_as"), _like),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), _split),
    "expand": _expand,
    "unflatten": _unflatten,
    "slice": _slice,
}
# Moves that are right as they are whenever what is kept is an outer product before and after.
EXACT = {"alias", "clone", "contiguous", "flatten", "permute", "ravel", "squeeze", "unsqueeze", "transpose", "t"}
EXACT |= {"movedim", "moveaxis", "swapaxes"}

# Operators with a rule that may meet a tensor of which nothing is kept.
JOINS = {"cat", "concat", "concatenate"}

# Other operators with arguments that follow the sizes.


def _convolution(narrower: _Narrower, node: fx.Node, args: dict[str, Any]) -> dict[str, Any]:
    """Positions that are dropped are zeros to it: its input is spread out over all of them."""
    x, labels = args["input"], narrower.labels[args["input"]]
    for dim in narrower.spread(node):
        kept: Any = narrower.kept(x)[dim]
        place = torch.full((labels.shape[dim],), len(kept))
        place[kept] = torch.arange(len(kept))
        margins = [0] * (2 * (len(labels.shape) - dim) - 1) + [1]
        padded = narrower.graph.call_function(torch.ops.aten.constant_pad_nd.default, (narrower.new.get(x, x), margins))
        x = narrower.pick(padded, dim, place)
    return _groups_of_convolution(narrower, node, args) | {"input": x}


def _groups_of_convolution(narrower: _Narrower, node: fx.Node, args: dict[str, Any]) -> dict[str, Any]:
    if args["groups"] == 1:
        return args
    transposed = "transpose" in base_name(node.target) or args.get("transposed")
    channels, weight = narrower.kept(args["input"])[1], narrower.kept(args["weight"])
    count = narrower.labels[args["input"]].shape[1] if channels is None else len(channels)
    if transposed:  # the weight has the inputs of all groups, and the outputs of one
        outputs = narrower.kept(node)[1]
        count = narrower.labels[node].shape[1] if outputs is None else len(outputs)
    inside = narrower.labels[args["weight"]].shape[1] if weight[1] is None else len(weight[1])
    return {**args, "groups": narrower.scaled(args["groups"], count // inside)}


def _groups_of_norm(narrower: _Narrower, node: fx.Node, args: dict[str, Any]) -> dict[str, Any]:
    groups, channels = args["num_groups"], narrower.kept(args["input"])[1]
    if channels is None:
        return args
    size = narrower.labels[args["input"]].shape[1] // groups
    return {**args, "num_groups": len(torch.unique(channels // size))}


def _normalized_shape(narrower: _Narrower, node: fx.Node, args: dict[str, Any]) -> dict[str, Any]:
    count = len(args["normalized_shape"])
    return {**args, "normalized_shape": narrower.sizes(node)[-count:]}


def _scale(narrower: _Narrower, node: fx.Node, args: dict[str, Any]) -> dict[str, Any]:
    """By default attention is scaled by the size of a head: that of the whole, however much of it is kept."""
    size = narrower.labels[args["query"]].shape[-1]
    return {**args, "scale": 1 / math.sqrt(size) if args["scale"] is None else args["scale"]}


def _padding(narrower: _Narrower, node: fx.Node, args: dict[str, Any]) -> dict[str, Any]:
    before, after, amounts = narrower.kept(args["self"]), narrower.kept(node), list(args["pad"])
    rank = len(after)
    for i in range(0, len(amounts), 2):
        dim = rank - 1 - i // 2
        kept = after[dim]
        if kept is None and before[dim] is None:
            continue
        front, size = args["pad"][i], narrower.labels[args["self"]].shape[dim]
        indices = torch.arange(narrower.labels[node].shape[dim]) if kept is None else kept
        amounts[i] = int((indices < front).sum())
        amounts[i + 1] = int((indices >= front + size).sum())
    return {**args, "pad": amounts}


REWRITES: dict[str, Callable[[_Narrower, fx.Node, dict[str, Any]], dict[str, Any]]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalized_shape),
    **dict.fromkeys(("pad", "constant_pad_nd"), _padding),
    "group_norm": _groups_of_norm,
    "scaled_dot_product_attention": _scale,
}
