"""The input layers of a backbone, and the sizes of images that they take."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from dvn_cli.errors import InputError
from dvn_cli.graph.registry import entry_of
from dvn_cli.graph.trace import Shaped, Traced, bind, shape_of


@dataclass(frozen=True)
class StemLayer:
    """A first layer, all along height and width.

    Attributes:
        weight: its name; empty for what is no convolution of the image with a parameter.
        extent: pixels from one end of the kernel to the other.
        stride: at the backbone's own image size.
        padding: on each side, by the convolution.
        added: pixels by which its input is larger than the image, as by a padding before it.
    """

    weight: str
    extent: list[int]
    stride: list[int]
    padding: list[int]
    added: list[int]

    @classmethod
    def read(cls, traced: Traced, node: fx.Node, input_size: tuple[int, int]) -> "StemLayer":
        """Reads a contraction of the backbone's graph."""
        arguments = bind(node)
        name = traced.names.get(str(arguments["weight"].target), "")
        before, ok = arguments["input"], "stride" in arguments
        while ok and not (before.op == "placeholder" and str(before.target) == traced.input):
            ok = _keeps_pixels(before)
            before = before.all_input_nodes[0] if ok else before
        padding = arguments.get("padding")
        if not ok or not name or padding == "same":  # for which torch allows no stride
            return cls("", [], [], [], [])
        kernel = shape_of(traced.sources[str(arguments["weight"].target)])[2:]
        size = shape_of(arguments["input"].meta["val"])[2:]
        return cls(
            name,
            [d * (k - 1) + 1 for d, k in zip(arguments["dilation"], kernel, strict=True)],
            list(arguments["stride"]),
            [0] * len(kernel) if padding == "valid" else list(arguments["padding"]),
            [there - own for there, own in zip(size, input_size, strict=True)],
        )

    def scaled(self, own: tuple[int, int], size: tuple[int, int]) -> list[int]:
        """Returns the stride that grows with the images."""
        return [round(s * new / old) for s, new, old in zip(self.stride, size, own, strict=True)]

    def sees_all(self, stride: Sequence[int]) -> bool:
        """Tells whether with a stride no pixel is passed over, or none that is not at the backbone's own size."""
        each = zip(stride, self.extent, self.stride, strict=True)
        return all(0 < step <= max(extent, own) for step, extent, own in each)

    def resolution(self, size: Sequence[int], stride: Sequence[int]) -> list[int]:
        """Returns the height and width of what it makes of images."""
        each = zip(size, self.added, self.padding, self.extent, stride, strict=True)
        return [(n + more + 2 * pad - extent) // max(step, 1) + 1 for n, more, pad, extent, step in each]


@dataclass(frozen=True)
class Stem:
    """The input layers of a backbone.

    Attributes:
        backbone: its name, for messages.
        input_size: height and width of the images that it was traced with.
        layers: there may be several, one beside the other.
    """

    backbone: str
    input_size: tuple[int, int]
    layers: list[StemLayer]

    @classmethod
    def read(cls, traced: Traced, backbone: str, input_size: tuple[int, int]) -> "Stem":
        """Reads the stem of a backbone's graph."""
        return cls(backbone, input_size, [StemLayer.read(traced, node, input_size) for node in _nodes(traced)])

    def check_images(self, size: tuple[int, int]) -> None:
        """Raises InputError where it cannot take images of a size, or would look at a part of them only.

        The message says which sizes would do.
        """
        strides = self.strides(size)
        for layer in self.layers:
            stride = strides.get(layer.weight, layer.stride)
            if not layer.sees_all(stride):
                seen = math.prod(min(extent / now, 1.0) for now, extent in zip(stride, layer.extent, strict=True))
                raise InputError(
                    f"{self.backbone} would see {100 * seen:.0f} % of the pixels of images of {dims(size)}: "
                    f"against {dims(self.input_size)} its first layer {layer.weight.rpartition('.')[0]} has a "
                    f"stride of {dims(stride)}, its kernel {dims(layer.extent)} pixels; {self._advice(size)}"
                )

    def strides(self, size: tuple[int, int]) -> dict[str, list[int]]:
        """Returns the strides with which images of a size meet those of the backbone's, by the names of the weights.

        Raises:
            InputError: there are none; the message says which sizes would do.
        """
        if size == self.input_size:
            return {}
        if not self.layers or any(not layer.weight for layer in self.layers):
            raise InputError(
                f"{self.backbone} takes images of {dims(self.input_size)} only, not of {dims(size)}, "
                f"since the weights or the images of its first layer are computed: {self._advice(size)}"
            )
        if problem := self._mismatch(size):
            raise InputError(f"{problem}: {self._advice(size)}")
        return {layer.weight: layer.scaled(self.input_size, size) for layer in self.layers}

    def _mismatch(self, size: tuple[int, int]) -> str:
        """Why images of a size do not have the backbone's resolution after the stem; empty where they do."""
        own = self.input_size
        for layer in self.layers:
            stride = layer.scaled(own, size)
            if min(stride) < 1 or layer.resolution(size, stride) != layer.resolution(own, layer.stride):
                fixed = " and whose padding is a constant of its graph" if any(layer.added) else ""
                return (
                    f"images of {dims(size)} cannot meet those of {dims(own)} after the first layer of "
                    f"{self.backbone}, whose stride is {dims(layer.stride)} at {dims(own)}{fixed}"
                )
        return ""

    def _advice(self, refused: tuple[int, int]) -> str:
        """What to set in place of a size of images that it does not take."""
        own, sizes = self.input_size, {self.input_size}
        layers = self.layers if all(layer.weight for layer in self.layers) else []
        for step in range(1, max((n for layer in layers for n in layer.extent), default=0) + 1):
            size = (own[0] * step // layers[0].stride[0], own[1] * step // layers[0].stride[1])
            if min(size) and not self._mismatch(size) and all(x.sees_all(x.scaled(own, size)) for x in layers):
                sizes.add(size)
        nearest = sorted(sizes, key=lambda size: (abs(size[0] - refused[0]), size))[:4]
        shown = [str(h) if h == w else f"[{h}, {w}]" for h, w in sorted(nearest)]
        others = f"{', '.join(shown[:-1])} or {shown[-1]}" if len(shown) > 1 else shown[0]
        backwards = [
            [n * old // new for n, old, new in zip(layer.stride, own, refused, strict=True)] for layer in layers
        ]
        both = bool(layers) and all(
            layer.sees_all(stride) and layer.resolution(own, stride) == layer.resolution(refused, layer.stride)
            for layer, stride in zip(layers, backwards, strict=True)
        )
        anew = f", or make the backbone for {dims(refused)} (`backbone.input_size`, of a partition `--input-size`)"
        return f"set `size` in the task's data to {others}{anew if both else ''}"


def dims(size: Sequence[int]) -> str:
    """Writes a size as in messages: 224x224."""
    return "x".join(map(str, size))


def stem_tensors(traced: Traced) -> set[str]:
    """Names the tensors of which the weights and biases of the first layers are made."""
    return {
        name
        for node in _nodes(traced)
        for weight in node.all_input_nodes
        if weight is not node.args[0]
        for name in traced.names_of(_ancestors(weight))
    }


def _nodes(traced: Traced) -> Iterator[fx.Node]:
    """The first layers with weights that the image meets."""
    raw: set[fx.Node] = set()
    for node in traced.graph.nodes:
        if node.op == "placeholder" and str(node.target) == traced.input:
            raw.add(node)
        elif node.op == "call_function" and (entry := entry_of(node.target)) is not None and entry.reads is not None:
            if node.args[0] in raw:
                yield node
        elif any(n in raw for n in node.all_input_nodes) and isinstance(node.meta.get("val"), Shaped):
            raw.add(node)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """A node and what its value comes from, through any computation."""
    seen, stack = {node}, [node]
    while stack:
        new = set(stack.pop().all_input_nodes) - seen
        seen |= new
        stack += new
    return seen


def _keeps_pixels(node: fx.Node) -> bool:
    """Tells whether an operator gives an image as large as it was, or with a margin of so many pixels."""
    if node.op != "call_function" or not node.all_input_nodes:
        return False
    entry = entry_of(node.target)
    if entry is not None and entry.adds_margin:
        return True
    after, before = (n.meta.get("val") for n in (node, node.all_input_nodes[0]))
    return isinstance(after, Shaped) and isinstance(before, Shaped) and shape_of(after)[2:] == shape_of(before)[2:]
