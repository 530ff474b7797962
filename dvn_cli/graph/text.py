"""A traced graph as text, and back: what a file keeps so that nobody has to build and export the backbone again.

The text is compressed JSON, followed by the bytes of the constants. Nothing in it is run as code: operators are looked
up by name among those that dvn has entries for. It says the shape of every tensor, but not the number of classes, which
is that of the file's own backbone: files of one backbone have one text. To read it takes no more of torch than tensors.
"""

import base64
import math
import operator
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dvn_cli.errors import InputError
from dvn_cli.files import reason
from dvn_cli.graph.registry import entry_of
from dvn_cli.graph.trace import (
    AUTOCAST_OFF,
    EXAMPLE_BATCH,
    Batched,
    Shaped,
    Traced,
    arguments_of,
    described,
    hint,
    shape_of,
)
from dvn_cli.store.schema import dumps, loads

MOST_BYTES = 64 << 20
"""Of a text that is opened, decompressed."""

MOST_ELEMENTS = 1 << 26
"""Of a tensor in a graph that is opened, at a batch of `EXAMPLE_BATCH`."""

SMALL = 64 << 10
"""Characters that a text may have in any case; beyond, it has at most a hundredth of what the weights have."""

_NUMBERS = {f.__name__: f for f in (operator.add, operator.floordiv, operator.getitem, operator.mul, operator.sub)}
"""What is done to sizes, and to operators with several outputs."""

_SIZES = ("sym_numel", "sym_size", "sym_stride")
"""Operators of torch that dvn needs no entry for."""

_KINDS: dict[str, type] = {"dtype": torch.dtype, "layout": torch.layout, "memory": torch.memory_format}
"""Arguments that are constants of torch's, by what they are called in the text."""


class UnknownError(Exception):
    """A graph has what this text, or this torch, has no word for."""


@dataclass(frozen=True)
class Kept:
    """What a text says of a backbone in eval mode.

    Attributes:
        traced: its graph.
        shapes: of its tensors, in the backbone's order.
        dtypes: of these.
    """

    traced: Traced
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]


# Writing


def write(
    traced: Traced,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    classes: Collection[tuple[str, int]],
) -> str | None:
    """Returns a graph as text; None where that cannot be said, or takes too much room.

    Args:
        traced: of a backbone in eval mode.
        shapes: of all of the backbone's tensors, in its order.
        dtypes: of these.
        classes: names and dimensions that hold one index for each class.
    """
    listed = sorted(shapes)
    sizes = {name: [None if (name, dim) in classes else n for dim, n in enumerate(shapes[name])] for name in shapes}
    constants = list[Tensor]()
    numbers: dict[fx.Node, int] = {}
    nodes, output = list[Any](), 0
    try:
        values = _values(traced, shapes), _values(traced, shapes, classes)
        for node in traced.graph.nodes:
            key = str(node.target)
            if node.op == "placeholder":
                tensor, name = traced.sources.get(key), traced.names.get(key)
                nodes.append([None if name is None else listed.index(name)])
                if tensor is not None and (name is None or not tensor.is_floating_point()):
                    nodes[-1].append([_word(tensor.dtype), list(tensor.shape)])
                    constants.append(tensor.detach().contiguous())
            elif node.op == "call_function":
                seen = _marked(node.meta["val"], *(of_node[node] for of_node in values))
                given = [_named(node.target), _said(node.args, numbers), _said(node.kwargs, numbers), seen]
                nodes.append(given + ([node.meta[AUTOCAST_OFF]] if AUTOCAST_OFF in node.meta else []))
            else:
                output = numbers[node.args[0]]
            numbers[node] = len(numbers)
    except (UnknownError, RuntimeError, NotImplementedError):  # not all operators run without data
        return None
    tensors = [[listed.index(name), _word(dtypes[name]), sizes[name]] for name in shapes]
    content = dumps({"tensors": tensors, "nodes": nodes, "output": output}).encode()
    data = b"".join(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in constants)
    text = base64.b64encode(zlib.compress(content + b"\0" + data, 9)).decode()
    weights = sum(math.prod(shapes[name]) * dtypes[name].itemsize for name in shapes)
    return text if len(text) <= max(SMALL, weights // 100) else None


def _values(
    traced: Traced, shapes: Mapping[str, tuple[int, ...]], more: Collection[tuple[str, int]] = ()
) -> dict[fx.Node, Any]:
    """What the nodes of a graph are without data, some dimensions of the tensors being larger by one."""
    values: dict[fx.Node, Any] = {}
    for node in traced.graph.nodes:
        key = str(node.target)
        if node.op == "placeholder" and key in traced.sources:
            name, tensor = traced.names.get(key, ""), traced.sources[key]
            shape = [size + ((name, dim) in more) for dim, size in enumerate(tensor.shape)]
            values[node] = torch.empty(shape, dtype=tensor.dtype, device="meta")
        elif node.op == "placeholder":
            values[node] = torch.empty(shape_of(node.meta["val"]), device="meta")
        elif node.op == "call_function":
            args, kwargs = fx.node.map_aggregate(  # type: ignore[misc]
                (node.args, node.kwargs), lambda x: torch.device("meta") if isinstance(x, torch.device) else x
            )
            args, kwargs = fx.node.map_arg((args, kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return values


def _marked(said: Any, value: Any, wider: Any) -> Any:
    """A node's `meta["val"]` as JSON: sizes that follow the batch are negative, that of the classes null.

    Args:
        said: it.
        value: the node's value, without data.
        wider: likewise, with one class more.
    """
    if isinstance(said, list):
        return {"several": [_marked(*each) for each in zip(said, value, wider, strict=True)]}
    if not isinstance(said, Shaped):
        if value != wider or not isinstance(said, Batched | int | float):
            raise UnknownError
        return {"batched": said.hint} if isinstance(said, Batched) else said
    sizes = list[int | None]()
    for size, one, other in zip(said.shape, value.shape, wider.shape, strict=True):
        if hint(size) != one or (other != one and (other != one + 1 or isinstance(size, Batched))):
            raise UnknownError
        sizes.append(None if one != other else -size.hint if isinstance(size, Batched) else size)
    return sizes


# Reading


def read(text: str, names: Sequence[str], image: tuple[int, int, int], classes: int) -> Kept | None:
    """Returns what a text says; None where this torch or this dvn has not all of its operators.

    Args:
        text: as `write` returned it.
        names: of all of the backbone's tensors, sorted.
        image: channels, height and width.
        classes: of the classifier.

    Raises:
        InputError: it is not as it was written.
    """
    try:
        unpacked = zlib.decompressobj()
        data = unpacked.decompress(base64.b64decode(text, validate=True), MOST_BYTES)
        if not unpacked.eof:
            raise ValueError("it is too long, or not all of it is there")
        content, _, constants = data.partition(b"\0")
        return _Reader(names, image, classes, constants).run(loads(content))
    except UnknownError:
        return None
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, AttributeError, zlib.error) as error:
        raise InputError(f"'graph' is not usable: {reason(error)}") from None


class _Reader:
    """Builds a graph from parsed JSON."""

    def __init__(self, names: Sequence[str], image: tuple[int, int, int], classes: int, constants: bytes) -> None:
        self.names, self.image, self.classes, self.constants = names, image, classes, constants
        self.graph, self.nodes = fx.Graph(), list[fx.Node]()

    def run(self, content: Any) -> Kept:
        tensors = {
            self.names[number]: (_constant("dtype", dtype), sizes) for number, dtype, sizes in content["tensors"]
        }
        shapes = {name: self._sizes(sizes) for name, (_, sizes) in tensors.items()}
        dtypes = {name: dtype for name, (dtype, _) in tensors.items()}
        sources: dict[str, Tensor] = {}
        names: dict[str, str] = {}
        images: str | None = None
        for entry in content["nodes"]:
            if len(entry) > 2:
                self.nodes.append(self._call(*entry))
                continue
            node = self.graph.placeholder(f"input_{len(self.nodes)}")
            key, number = str(node.target), entry[0]
            if number is not None:
                name = names[key] = self.names[number]
                sources[key] = torch.empty(shapes[name], dtype=dtypes[name], device="meta")
            if len(entry) > 1:
                sources[key] = self._stored(*entry[1])
            if key in sources:
                node.meta["val"] = described(sources[key])
            elif images is None:
                images, node.meta["val"] = key, Shaped((Batched(EXAMPLE_BATCH), *self.image))
            else:
                raise ValueError("it takes images twice")
            self.nodes.append(node)
        if images is None:
            raise ValueError("it takes no images")
        self.graph.output(self.nodes[content["output"]])
        return Kept(Traced(self.graph, images, sources, names), shapes, dtypes)

    def _stored(self, dtype: str, sizes: list[int]) -> Tensor:
        """The next of the constants."""
        tensor = torch.empty(self._sizes(sizes), dtype=_constant("dtype", dtype), device="meta")
        data, self.constants = self.constants[: tensor.nbytes], self.constants[tensor.nbytes :]
        if len(data) != tensor.nbytes:
            raise ValueError("constants are missing")
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return flat.view(tensor.dtype).reshape(tensor.shape)

    def _call(self, name: str, args: list[Any], kwargs: dict[str, Any], value: Any, *autocast: str | None) -> fx.Node:
        target, keywords = _operator(name), {key: self._meant(each) for key, each in kwargs.items()}
        node = self.graph.call_function(target, tuple(map(self._meant, args)), keywords)
        known = [argument.name for argument in arguments_of(node)]
        if known and (len(args) > len(known) or not set(kwargs) <= set(known)):
            raise ValueError(f"{name:.80} takes other arguments")
        node.meta["val"] = self._value(value)
        if autocast:
            node.meta[AUTOCAST_OFF] = autocast[0]
        return node

    def _value(self, value: Any) -> Any:
        """A node's `meta["val"]`: the inverse of `_marked`."""
        if isinstance(value, dict):
            ((kind, inner),) = value.items()
            return [self._value(each) for each in inner] if kind == "several" else Batched(_size(inner))
        if not isinstance(value, list):
            return value
        following = {place: Batched(-size) for place, size in enumerate(value) if type(size) is int and size < 0}
        sizes = self._sizes([0 if place in following else size for place, size in enumerate(value)])
        shape = tuple(following.get(place, size) for place, size in enumerate(sizes))
        if math.prod(map(hint, shape)) > MOST_ELEMENTS:
            raise ValueError("a tensor is too large")
        return Shaped(shape)

    def _sizes(self, sizes: Sequence[int | None]) -> tuple[int, ...]:
        return tuple(self.classes if size is None else _size(size) for size in sizes)

    def _meant(self, value: Any) -> Any:
        """An argument: the inverse of `_said`."""
        if isinstance(value, list):
            return [self._meant(each) for each in value]
        if not isinstance(value, dict):
            return value
        ((kind, word),) = value.items()
        if kind == "node":
            return self.nodes[word]
        if kind == "float":
            return float(word)
        return torch.device("cpu") if kind == "device" else _constant(kind, word)


# Words


def _said(value: Any, numbers: Mapping[fx.Node, int]) -> Any:
    """An argument as JSON."""
    if isinstance(value, fx.Node):
        return {"node": numbers[value]}
    if isinstance(value, list | tuple):
        return [_said(each, numbers) for each in value]
    if isinstance(value, dict):
        return {key: _said(each, numbers) for key, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if value == torch.device("cpu"):
        return {"device": "cpu"}
    for kind, known in _KINDS.items():
        if isinstance(value, known):
            return {kind: _word(value)}
    raise UnknownError


def _word(constant: object) -> str:
    return str(constant).removeprefix("torch.")


def _constant(kind: str, name: str) -> Any:
    found = getattr(torch, name, None)
    if not isinstance(found, _KINDS[kind]):
        raise UnknownError
    return found


def _named(target: Any) -> str:
    name = getattr(target, "__name__", "")
    if _operator(name) is not target:
        raise UnknownError
    return name


def _operator(name: str) -> Any:
    """The operator of a name, such as `conv2d.default`."""
    if name in _NUMBERS:
        return _NUMBERS[name]
    base, _, overload = name.partition(".")
    found = getattr(getattr(torch.ops.aten, base, None), overload, None)
    if not isinstance(found, torch._ops.OpOverload) or (entry_of(found) is None and base not in _SIZES):
        raise UnknownError
    return found


def _size(value: object) -> int:
    if type(value) is not int or not 0 <= value <= MOST_ELEMENTS:
        raise ValueError("a size is none, or too large")
    return value
