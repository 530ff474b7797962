"""Convolutions, of groups and transposed ones too."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from dvn_cli.graph.labels import Call, Labeller, Labels, from_vectors
from dvn_cli.graph.narrow import Narrower
from dvn_cli.graph.ops.contractions import unite_bias
from dvn_cli.graph.registry import enter
from dvn_cli.graph.trace import EXAMPLE_BATCH


def _convolution(labeller: Labeller, call: Call, transposed: bool = False) -> Labels:
    """The weight has outputs first, the transposed one's inputs."""
    transposed = transposed or bool(call.args.get("transposed"))
    weight_in, weight_out = (0, 1) if transposed else (1, 0)
    x, weight, groups = call.labels("input"), call.labels("weight"), call.plain("groups")
    vectors = labeller.separate(x, prefer=[1])
    rows = labeller.separate(weight, prefer=[weight_out, weight_in])
    for dim in [d for d in vectors if d > 1 and not _is_kept_in_place(call, d)]:
        labeller.pin(vectors.pop(dim))
    for dim in [d for d in rows if d > 1]:  # the places of a kernel cannot be dropped
        labeller.pin(rows.pop(dim))

    # Where every image has a filter of its own, the batch lies along the channels: images are all alike.
    images = EXAMPLE_BATCH if isinstance(call.args["groups"], fx.Node) else 1
    channels = _all_alike(labeller, vectors.get(1, x.zeros(1)), images)
    sides = _all_alike(labeller, rows.get(0, weight.zeros(0)), images), rows.get(1, weight.zeros(1))
    w_in, w_out = sides[weight_in], sides[weight_out]
    if groups == images:
        labeller.coupled.unite(channels, w_in)
        out = w_out
    else:
        out = _grouped(labeller, groups // images, channels, w_in, w_out, transposed)
    labeller.coupled.mark_produced(w_out)
    out = out.repeat(images)
    unite_bias(labeller, call, out)
    return from_vectors(call.shape, {**vectors, 1: labeller.coupled.find(out)})


def _all_alike(labeller: Labeller, vector: Tensor, times: int) -> Tensor:
    """The first of so many equal parts, which are united."""
    table = vector.reshape(times, -1)
    labeller.coupled.unite(table, table[:1])
    return table[0]


def _is_kept_in_place(call: Call, dim: int) -> bool:
    """Whether the output has the positions of the input along a dimension, as over a row of channels."""
    stride = call.plain("stride")
    stride = stride[(dim - 2) % len(stride)] if isinstance(stride, list | tuple) else stride
    return stride == 1 and call.shape[dim] == call.labels("input").shape[dim]


def _grouped(
    labeller: Labeller, groups: int, channels: Tensor, w_in: Tensor, w_out: Tensor, transposed: bool
) -> Tensor:
    """The weight has all channels of one side, and those of one group on the other. Returns the output's labels."""
    inside = w_out if transposed else w_in  # the dimension that counts within a group
    repeated = inside.repeat(groups)
    out = labeller.coupled.fresh(len(repeated)) if transposed else w_out
    side = out if transposed else channels
    if labeller.split_groups(groups, [channels, out]):
        labeller.pin(inside)
    else:
        labeller.coupled.unite(side, repeated)
    if transposed:
        labeller.coupled.unite(channels, w_in)
        labeller.coupled.mark_produced(out)
    return out


def _narrowed(narrower: Narrower, node: fx.Node, args: dict[str, Any], transposed: bool = False) -> fx.Node:
    """Positions that are dropped are zeros to it: its input is spread out over all of them, and taken of its output."""
    x = args["input"]
    kernel, shape, indices = narrower.labels[args["weight"]].shape, narrower.labels[x].shape, narrower.indices(x)
    spread = {dim: index for dim in range(2, len(kernel)) if kernel[dim] > 1 and (index := indices[dim]) is not None}
    new_x = narrower.new[x]
    for dim, index in spread.items():
        place = torch.full((shape[dim],), len(index))
        place[index] = torch.arange(len(index))
        margins = [0] * (2 * (len(shape) - dim) - 1) + [1]
        padded = narrower.graph.call_function(torch.ops.aten.constant_pad_nd.default, (new_x, margins))
        new_x = narrower.pick(padded, dim, place)
    groups = _groups(narrower, node, args, transposed or bool(args.get("transposed")))
    new = narrower.copy(node, {**args, "groups": groups, "input": new_x})
    for dim, index in spread.items():  # positions of the output are those of the input
        new = narrower.pick(new, dim, index)
    return new


def _groups(narrower: Narrower, node: fx.Node, args: dict[str, Any], transposed: bool) -> Any:
    """How many groups are left: the weight has all outputs and the inputs of one group, transposed the reverse."""
    if args["groups"] == 1:
        return 1
    channels = narrower.size(narrower.labels[node if transposed else args["input"]], 1)
    return narrower.scaled(args["groups"], channels // narrower.size(narrower.labels[args["weight"]], 1))


enter(
    *("conv1d", "conv2d", "conv3d", "convolution"),
    label=_convolution,
    rewrite=_narrowed,
    reads=lambda arguments: (1, 0 if arguments.get("transposed") else 1),
)
enter(
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    label=partial(_convolution, transposed=True),
    rewrite=partial(_narrowed, transposed=True),
    reads=lambda arguments: (1, 0),
)
