"""What each operator does to labels: the one table that a new operator is added to.

Three things need no rule of their own: operators that only move data are run on the labels, pointwise operators
(`torch.Tag.pointwise`) unite the labels of their operands, and factories make new ones. What is in no table is refused.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dvn_cli.graph.labels import Call, Labeller, Labels, base_name, from_vectors
from dvn_cli.graph.trace import EXAMPLE_BATCH

Rule = Callable[[Labeller, Call], Labels | list[Labels]]
RULES: dict[str, Rule] = {}

# Run on labels as they are; `is_view` operators need not be named.
MOVES = {
    *("alias", "clone", "contiguous", "flatten", "flip", "narrow", "permute", "ravel", "reshape", "roll", "rot90"),
    *("squeeze", "tile", "repeat", "repeat_interleave", "select", "slice", "movedim", "moveaxis", "swapaxes"),
    *("unflatten", "unsqueeze", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "chunk", "tensor_split"),
    *("_unsafe_view", "view", "transpose", "t", "split", "split_with_sizes", "unbind", "expand", "unfold", "expand_as"),
}
# Move data to the shape of another tensor.
RESHAPES = {"reshape_as", "view_as"}
# Look at memory, not at elements.
STORAGE = {"as_strided", "view_as_complex", "view_as_real"}
# Give every element its own value without mixing elements, but carry no pointwise tag.
POINTWISE = {"dropout", "alpha_dropout", "feature_dropout", "hardswish", "log_sigmoid", "to", "_to_copy"}
POINTWISE |= {"bernoulli", "copy", "detach", "lift_fresh_copy", "fill", "floor_divide", "isnan", "masked_fill", "where"}
POINTWISE |= {"zero"}
# Make a tensor that takes nothing but its shape (and type) from others.
FACTORIES = {"arange", "empty", "eye", "full", "linspace", "new_empty", "new_full", "new_ones", "new_zeros", "ones"}
FACTORIES |= {"rand", "randn", "zeros", "scalar_tensor"}
POINTWISE |= {"empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like"}  # sized as its operand


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enters a function as the rule of these operators (base names: no overload, no trailing underscore)."""

    def enter(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, name
            RULES[name] = function
        return function

    return enter


def kind_of(target: Any) -> str:
    """`rule`, `move`, `reshape`, `pointwise`, `factory` or `` (unknown) for an operator."""
    name = base_name(target)
    if name in RULES:
        return "rule"
    if name in POINTWISE or torch.Tag.pointwise in getattr(target, "tags", ()):
        return "pointwise"
    if name in RESHAPES:
        return "reshape"
    if name in MOVES or (getattr(target, "is_view", False) and name not in STORAGE):
        return "move"
    return "factory" if name in FACTORIES else ""


def apply(labeller: Labeller, call: Call) -> Labels | list[Labels]:
    """Labels of the outputs of one operator; a list where it has several."""
    kind = kind_of(call.node.target)
    if kind == "rule":
        return RULES[call.name](labeller, call)
    if kind == "pointwise":
        return pointwise(labeller, call.tensors(), call.shape)
    if kind == "reshape":
        return move(labeller, call.labels("self"), lambda t: torch.ops.aten.reshape(t.contiguous(), list(call.shape)))
    if kind == "move":
        return _move(labeller, call)
    if kind == "factory":
        return from_vectors(call.shape, {d: labeller.classes.fresh(n) for d, n in enumerate(call.shape) if n > 1})
    raise call.refuse()


# Data that moves


def move(labeller: Labeller, labels: Labels, function: Callable[[Tensor], Any]) -> Any:
    """Runs `function` on every layer. A tensor without layers is run too, for the shapes that come out."""
    layers = labeller.refresh(labels).layers or (torch.zeros([1] * len(labels.shape), dtype=torch.int64),)
    results = [function(layer.expand(labels.shape)) for layer in layers]
    if isinstance(results[0], Tensor):
        return _gathered(labeller, results)
    return [_gathered(labeller, list(outputs)) for outputs in zip(*results, strict=True)]


def _gathered(labeller: Labeller, layers: Sequence[Tensor]) -> Labels:
    return labeller.refresh(Labels(tuple(layers[0].shape), tuple(layers)))


def _move(labeller: Labeller, call: Call) -> Any:
    names = list(call.args)
    others = {name: call.number(name) for name in names[1:]}
    if call.name == "expand_as":
        return move(labeller, call.labels(names[0]), lambda t: t.expand(call.shape))
    if call.name in ("view", "_unsafe_view"):  # layers are expanded, so only a reshape can look at them so
        return move(labeller, call.labels(names[0]), lambda t: t.reshape(call.shape))
    operator: Any = call.node.target
    return move(labeller, call.labels(names[0]), lambda t: operator(t, **others))


@rule("cat", "concat", "concatenate")
def _cat(labeller: Labeller, call: Call) -> Labels:
    parts = [labeller.env[node] for node in call.args["tensors"]]
    return joined(labeller, [p for p in parts if p.shape != (0,)], call.number("dim") % len(call.shape), call.shape)


@rule("stack")
def _stack(labeller: Labeller, call: Call) -> Labels:
    dim = call.number("dim") % len(call.shape)
    parts = [move(labeller, labeller.env[n], lambda t: t.unsqueeze(dim)) for n in call.args["tensors"]]
    return joined(labeller, parts, dim, call.shape)


def joined(labeller: Labeller, parts: Sequence[Labels], dim: int, shape: tuple[int, ...]) -> Labels:
    """Along `dim` labels follow one another, along all other dimensions they are united."""
    vectors = [labeller.separate(part) for part in parts]
    result = {}
    for d in {d for v in vectors for d in v}:
        found = [v.get(d, torch.zeros(p.shape[d], dtype=torch.int64)) for v, p in zip(vectors, parts, strict=True)]
        if d == dim:
            result[d] = torch.cat(found)
        else:
            labeller.unite_all(found)
            result[d] = labeller.classes.find(found[0])
    return from_vectors(shape, result)


@rule("pad", "constant_pad_nd")
def _pad(labeller: Labeller, call: Call) -> Labels:
    """Zeros may stand for any channel: padding along channels gets new labels. Copied margins move."""
    labels, amounts, rank = call.labels("self"), call.number("pad"), len(call.shape)
    vectors = labeller.separate(labels)
    for i in range(0, len(amounts), 2):
        dim = rank - 1 - i // 2
        if dim not in vectors:
            continue
        if call.args.get("mode", "constant") != "constant" or min(amounts[i : i + 2]) < 0:
            labeller.pin(vectors.pop(dim))
        else:
            before, after = (labeller.classes.fresh(n) for n in amounts[i : i + 2])
            vectors[dim] = torch.cat([before, vectors[dim], after])
    return from_vectors(call.shape, vectors)


@rule("index")
def _index(labeller: Labeller, call: Call) -> Labels:
    indices = [None if i is None else labeller.value(i, call.node) for i in call.args["indices"]]
    return move(labeller, call.labels("self"), lambda t: torch.ops.aten.index.Tensor(t.contiguous(), indices))


@rule("index_select")
def _index_select(labeller: Labeller, call: Call) -> Labels:
    dim, index = call.number("dim"), labeller.value(call.args["index"], call.node)
    return move(labeller, call.labels("self"), lambda t: t.index_select(dim, index))


@rule("meshgrid", "one_hot", "affine_grid_generator")
def _whole(labeller: Labeller, call: Call) -> Labels | list[Labels]:
    """Positions and their like: nothing of them is dropped."""
    for labels in call.tensors():
        for layer in labels.layers:
            labeller.pin(layer)
    outputs = [Labels(shape) for shape in call.shapes]
    return outputs if isinstance(call.node.meta["val"], tuple | list) else outputs[0]


# Operators that work on every element, or on every channel, by itself


def pointwise(labeller: Labeller, operands: Sequence[Labels], shape: tuple[int, ...]) -> Labels:
    """Unites the labels of operands that are broadcast together.

    An operand that has its full size along a dimension and no label there is kept whole, and so is what it meets.
    """
    rank = len(shape)
    aligned = []
    for operand in map(labeller.refresh, operands):
        front = (1,) * (rank - len(operand.shape))
        aligned.append(Labels(front + operand.shape, tuple(x.reshape(front + x.shape) for x in operand.layers)))

    layers: list[Tensor] = []
    joint = {x.vary(layer) for x in aligned for layer in x.layers if len(x.vary(layer)) > 1}
    for dims in joint:
        found = [next((y for y in x.layers if x.vary(y) == dims), None) for x in aligned]
        same = all(
            sum(bool(set(x.vary(y)) & set(dims)) for y in x.layers) == 1 if layer is not None
            else all(x.shape[d] == 1 for d in dims)
            for x, layer in zip(aligned, found, strict=True)
        )  # fmt: skip
        if same:
            present = [layer for layer in found if layer is not None]
            labeller.unite_all(present)
            layers.append(present[0])
            aligned = [Labels(x.shape, tuple(y for y in x.layers if x.vary(y) != dims)) for x in aligned]
            done = set(dims)
            aligned = [Labels(tuple(1 if d in done else n for d, n in enumerate(x.shape)), x.layers) for x in aligned]

    vectors = [labeller.separate(x) for x in aligned]
    result = {}
    for dim in {d for v in vectors for d in v}:
        present = [
            v.get(dim, torch.zeros(1, dtype=torch.int64)) for v, x in zip(vectors, aligned, strict=True)
            if x.shape[dim] > 1
        ]  # fmt: skip
        present.sort(key=len, reverse=True)
        labeller.unite_all(present)
        result[dim] = labeller.classes.find(present[0])
    single = from_vectors(shape, result)
    return labeller.refresh(Labels(shape, (*layers, *single.layers)))


@rule("type_as")
def _type_as(labeller: Labeller, call: Call) -> Labels:
    return call.labels("self")


@rule("prelu")
def _prelu(labeller: Labeller, call: Call) -> Labels:
    labels, weight = call.labels("self"), call.labels("weight")
    if max(weight.shape) > 1:
        _unite_affine(labeller, labeller.separate(labels, prefer=[1]), [weight])
    return labels


@rule("im2col")
def _im2col(labeller: Labeller, call: Call) -> Labels:
    """(N, C, H, W) to (N, C * places of the kernel, positions)."""
    vectors = _channels_alone(labeller, call.labels("self"))
    places = math.prod(call.number("kernel_size"))
    return from_vectors(call.shape, {d: v.repeat_interleave(places) if d == 1 else v for d, v in vectors.items()})


@rule("col2im")
def _col2im(labeller: Labeller, call: Call) -> Labels:
    """(N, C * places of the kernel, positions) to (N, C, H, W)."""
    vectors = _channels_alone(labeller, call.labels("self"))
    if 1 in vectors:
        table = vectors[1].reshape(call.shape[1], -1)
        labeller.classes.unite(table, table[:, :1])
        vectors[1] = table[:, 0]
    return from_vectors(call.shape, vectors)


@rule("glu")
def _glu(labeller: Labeller, call: Call) -> Labels:
    dim = call.number("dim")
    halves = move(labeller, call.labels("self"), lambda t: t.chunk(2, dim))
    return pointwise(labeller, halves, call.shape)


@rule("softmax", "_softmax", "log_softmax", "cumsum", "normalize")
def _along(labeller: Labeller, call: Call) -> Labels:
    """Over channels they are taken over those that are kept; where in a head or which head is not their choice."""
    labels, dims = call.labels("self"), call.dims()
    vectors = labeller.separate(labels, avoid=dims)
    if call.name == "cumsum" and dims[0] in vectors:
        labeller.pin(vectors.pop(dims[0]))
    return from_vectors(labels.shape, vectors)


@rule(
    *("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "_adaptive_avg_pool2d", "lp_pool2d"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d"),
    *("_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa"),
)
def _spatial(labeller: Labeller, call: Call) -> Labels | list[Labels]:
    """Every channel (dimension 1) by itself; positions cannot be dropped."""
    labels = call.optional("self") or call.labels("input")
    vectors = _channels_alone(labeller, labels)
    outputs = [from_vectors(shape, vectors) for shape in call.shapes]
    return outputs if isinstance(call.node.meta["val"], tuple | list) else outputs[0]


def _channels_alone(labeller: Labeller, labels: Labels) -> dict[int, Tensor]:
    """Labels of the batch and the channels (dimensions 0 and 1); all positions are kept."""
    vectors = labeller.separate(labels, prefer=[1, 0])
    for dim in [d for d in vectors if d > 1]:
        labeller.pin(vectors.pop(dim))
    return vectors


@rule("grid_sampler", "grid_sampler_2d")
def _grid_sampler(labeller: Labeller, call: Call) -> Labels:
    grid = labeller.separate(call.labels("grid"))
    for dim in [d for d in grid if d > 0]:
        labeller.pin(grid.pop(dim))
    vectors = _channels_alone(labeller, call.labels("input"))
    if 0 in grid:
        labeller.classes.unite(grid[0], vectors.setdefault(0, torch.zeros_like(grid[0])))
    return from_vectors(call.shape, vectors)


@rule(
    *("mean", "sum", "amax", "amin", "all", "any", "linalg_vector_norm", "var", "std", "var_mean", "std_mean", "norm"),
    "logsumexp",
)
def _reduce(labeller: Labeller, call: Call) -> Labels | list[Labels]:
    """Over channels they are taken over those that are kept."""
    return reduced(labeller, call, call.labels("self"), call.dims() if "dim" in call.args else call.dims("__all__"))


@rule("max", "min", "argmax")
def _reduce_max(labeller: Labeller, call: Call) -> Labels | list[Labels]:
    if "other" in call.args:
        return pointwise(labeller, call.tensors(), call.shape)
    dims = call.dims() if "dim" in call.args else list(range(len(call.labels("self").shape)))
    return reduced(labeller, call, call.labels("self"), dims)


def reduced(labeller: Labeller, call: Call, labels: Labels, dims: Sequence[int]) -> Labels | list[Labels]:
    vectors = labeller.separate(labels, avoid=dims)
    kept = [d for d in range(len(labels.shape)) if d not in dims]
    outputs = []
    for shape in call.shapes:
        place = {d: (d if len(shape) == len(labels.shape) else kept.index(d)) for d in kept}
        outputs.append(from_vectors(shape, {place[d]: v for d, v in vectors.items() if d in place}))
    return outputs if isinstance(call.node.meta["val"], tuple | list) else outputs[0]


# Normalisations


def _unite_affine(
    labeller: Labeller, vectors: dict[int, Tensor], parameters: Sequence[Labels | None], first: int = 1
) -> None:
    """Unites parameters with the dimensions of a tensor, from `first` on, that each index of theirs is for."""
    for parameter in parameters:
        if parameter is not None:
            for dim, vector in labeller.separate(parameter).items():
                labeller.classes.unite(vector, vectors.get(first + dim, torch.zeros(1, dtype=torch.int64)))


@rule("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training")
def _batch_norm(labeller: Labeller, call: Call) -> Labels:
    """Statistics of each channel are taken over what is kept; what varies within a channel may be dropped as it is."""
    labels = call.labels("input")
    affine = [call.optional(name) for name in ("weight", "bias", "running_mean", "running_var")]
    channels = Labels(labels.shape, tuple(layer for layer in labels.layers if layer.shape[1] > 1))
    _unite_affine(labeller, labeller.separate(channels, prefer=[1]), affine)
    return labeller.refresh(labels)


@rule("layer_norm", "rms_norm")
def _layer_norm(labeller: Labeller, call: Call) -> Labels:
    labels = call.labels("input")
    vectors = labeller.separate(labels)
    first = len(labels.shape) - len(call.number("normalized_shape"))
    _unite_affine(labeller, vectors, [call.optional("weight"), call.optional("bias")], first)
    return from_vectors(labels.shape, vectors)


@rule("group_norm")
def _group_norm(labeller: Labeller, call: Call) -> Labels:
    labels, groups = call.labels("input"), call.number("num_groups")
    vectors = labeller.separate(labels, prefer=[1])
    _unite_affine(labeller, vectors, [call.optional("weight"), call.optional("bias")])
    if groups > 1 and 1 in vectors:
        split_groups(labeller, groups, [vectors[1]])
    return labeller.refresh(labels)


def split_groups(labeller: Labeller, groups: int, sides: Sequence[Tensor]) -> bool:
    """Unites channels so that groups stay groups: whole groups are divided, or every group alike.

    Where both can be, the labeller says which.

    Args:
        sides: labels of the channels, a vector for each side of the operator (input, output), all in `groups` runs.

    Returns:
        Whether groups are divided among the units; otherwise the channels of each group are, at the same places.
    """
    units, sizes = labeller.units, [len(side) // groups for side in sides]
    whole, alike = groups % units == 0, not any(n % units for n in sizes)
    if whole and alike:
        labeller.had_choice = True
        whole = labeller.whole_groups
    whole = whole or max(sizes) == 1 or (groups >= units and not alike)
    for side in sides:
        table = side.reshape(groups, -1)
        labeller.classes.unite(table, table[:, :1] if whole else table[:1])
    if whole:
        labeller.unite_all([side.reshape(groups, -1)[:, 0] for side in sides])
    return whole


# Contractions


def contract(
    labeller: Labeller,
    call: Call,
    operands: Sequence[tuple[Labels, Sequence[str]]],
    output: Sequence[str],
    prefer: str = "",
) -> Labels:
    """A sum of products, written as in einsum: each operand with a letter for each of its dimensions.

    A letter is one dimension wherever it stands; a sum over it is taken over what is kept. Where labels vary along
    several dimensions, `prefer` is the one that stays.
    """
    found: dict[str, list[Tensor]] = {}
    for labels, letters in operands:
        vectors = labeller.separate(labels, prefer=[dim for dim, letter in enumerate(letters) if letter == prefer])
        for dim, letter in enumerate(letters):
            if labels.shape[dim] > 1:
                zeros = torch.zeros(labels.shape[dim], dtype=torch.int64)
                found.setdefault(letter, []).append(vectors.get(dim, zeros))
    for vectors_of in found.values():
        labeller.unite_all(vectors_of)
    return from_vectors(
        call.shape,
        {dim: labeller.classes.find(found[letter][0]) for dim, letter in enumerate(output) if letter in found},
    )


@rule("linear")
def _linear(labeller: Labeller, call: Call) -> Labels:
    x, weight = call.labels("input"), call.labels("weight")
    batch = [f"b{d}" for d in range(len(x.shape) - 1)]
    out = labeller.separate(weight).get(0)
    if out is not None:
        labeller.classes.mark_produced(out)
        _add_bias(labeller, call, out)
    return contract(labeller, call, [(x, [*batch, "k"]), (weight, ["j", "k"])], [*batch, "j"], prefer="k")


def _add_bias(labeller: Labeller, call: Call, out: Tensor) -> None:
    bias = call.optional("bias")
    if bias is not None:
        zeros = torch.zeros(1, dtype=torch.int64)
        labeller.classes.unite(out, labeller.separate(bias).get(0, zeros))


@rule("matmul", "bmm", "mm")
def _matmul(labeller: Labeller, call: Call) -> Labels:
    a, b = call.tensors()
    if len(a.shape) < 2 or len(b.shape) < 2:
        raise call.refuse("with a vector")
    rank = len(call.shape)
    letters = [f"b{d}" for d in range(rank - 2)]
    left = [*letters[rank - len(a.shape) :], "i", "k"]
    right = [*letters[rank - len(b.shape) :], "k", "j"]
    return contract(labeller, call, [(a, left), (b, right)], [*letters, "i", "j"])


@rule("einsum")
def _einsum(labeller: Labeller, call: Call) -> Labels:
    equation = call.number("equation").replace(" ", "")
    if "." in equation or "->" not in equation:
        raise call.refuse(f"as '{equation}'")
    left, output = equation.split("->")
    operands = [labeller.env[node] for node in call.args["tensors"]]
    return contract(labeller, call, list(zip(operands, left.split(","), strict=True)), output)


@rule("scaled_dot_product_attention")
def _attention(labeller: Labeller, call: Call) -> Labels:
    query, key, value = (call.labels(name) for name in ("query", "key", "value"))
    mask = call.optional("attn_mask")
    rank = len(query.shape)
    if call.number("enable_gqa"):  # a head of keys and values for several of queries
        times = query.shape[-3] // key.shape[-3]
        key, value = (move(labeller, x, lambda t: t.repeat_interleave(times, rank - 3)) for x in (key, value))
    batch = [f"b{d}" for d in range(rank - 2)]
    scores = Labels((*query.shape[:-1], key.shape[-2]))
    inner = Call(call.node, call.name, call.args, labeller)
    inner.shapes = [scores.shape]
    scores = contract(labeller, inner, [(query, [*batch, "i", "k"]), (key, [*batch, "s", "k"])], [*batch, "i", "s"])
    if mask is not None:
        scores = pointwise(labeller, [scores, mask], scores.shape)
    return contract(labeller, call, [(scores, [*batch, "i", "s"]), (value, [*batch, "s", "j"])], [*batch, "i", "j"])


@rule("lstm", "gru")
def _recurrent(labeller: Labeller, call: Call) -> list[Labels]:
    """Every layer and direction has weights (gates * H, inputs), (gates * H, H) and biases: all gates of a channel."""
    gates, directions = (4 if call.name == "lstm" else 3), 2 if call.number("bidirectional") else 1
    given = call.args["hx"]
    states = [labeller.env[node] for node in (given if isinstance(given, list | tuple) else [given])]
    weights = [labeller.env[node] for node in call.args["params"]]
    each = 4 if call.number("has_biases") else 2
    if len(weights) != each * call.number("num_layers") * directions:
        raise call.refuse("with projections")
    labels = call.labels("input")
    vectors = labeller.separate(labels, prefer=[2])
    inputs = vectors.get(2, torch.zeros(labels.shape[2], dtype=torch.int64))

    def along(of: Labels, dim: int) -> Tensor:
        return labeller.separate(of, prefer=[dim]).get(dim, torch.zeros(of.shape[dim], dtype=torch.int64))

    for layer in range(call.number("num_layers")):
        outputs = []
        for direction in range(directions):
            start = (layer * directions + direction) * each
            hidden = along(weights[start + 1], 1)
            for matrix in weights[start : start + each]:
                rows = along(matrix, 0)
                labeller.classes.mark_produced(rows)
                labeller.classes.unite(rows.reshape(gates, -1), hidden)
            labeller.classes.unite(inputs, along(weights[start], 1))
            for state in states:
                labeller.classes.unite(along(state, 2), hidden)
            outputs.append(hidden)
        inputs = torch.cat(outputs)
    last = {2: labeller.classes.find(outputs[0])}
    batch = {d: v for d, v in vectors.items() if d < 2}
    sequence = from_vectors(call.shape, {**batch, 2: labeller.classes.find(inputs)})
    return [sequence, *(from_vectors(shape, last) for shape in call.shapes[1:])]


@rule("conv1d", "conv2d", "conv3d", "convolution")
def _conv(labeller: Labeller, call: Call) -> Labels:
    if call.args.get("transposed"):
        return _convolution(labeller, call, call.number("groups"), weight_in=0, weight_out=1)
    return _convolution(labeller, call, call.number("groups"), weight_in=1, weight_out=0)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(labeller: Labeller, call: Call) -> Labels:
    return _convolution(labeller, call, call.number("groups"), weight_in=0, weight_out=1)


def _convolution(labeller: Labeller, call: Call, groups: int, weight_in: int, weight_out: int) -> Labels:
    x, weight = call.labels("input"), call.labels("weight")
    vectors = labeller.separate(x, prefer=[1])
    rows = labeller.separate(weight, prefer=[weight_out, weight_in])
    for where in (vectors, rows):
        for dim in [d for d in where if d > 1]:  # the places of a kernel cannot be dropped, and few positions can
            if where is rows or not _is_kept_in_place(call, dim):
                labeller.pin(where.pop(dim))

    def vector(found: dict[int, Tensor], labels: Labels, dim: int) -> Tensor:
        return found.get(dim, torch.zeros(labels.shape[dim], dtype=torch.int64))

    # Where every image has a filter of its own, the batch lies along the channels: images are all alike.
    images = EXAMPLE_BATCH if isinstance(call.args["groups"], fx.Node) else 1
    channels, first = (_all_alike(labeller, v, images) for v in (vector(vectors, x, 1), vector(rows, weight, 0)))
    second = vector(rows, weight, 1)
    w_in, w_out = (second, first) if weight_in else (first, second)
    if groups == images:
        labeller.classes.unite(channels, w_in)
        out = w_out
    else:
        out = _grouped(labeller, groups // images, channels, w_in, w_out, transposed=weight_in == 0)
    labeller.classes.mark_produced(w_out)
    out = out.repeat(images)
    _add_bias(labeller, call, out)
    return from_vectors(call.shape, {**vectors, 1: labeller.classes.find(out)})


def _all_alike(labeller: Labeller, vector: Tensor, times: int) -> Tensor:
    """The first of so many equal parts, which are united."""
    table = vector.reshape(times, -1)
    labeller.classes.unite(table, table[:1])
    return table[0]


def _is_kept_in_place(call: Call, dim: int) -> bool:
    """Whether a convolution's output has the positions of its input along a dimension, as over a row of channels."""
    stride = call.number("stride")
    stride = stride[(dim - 2) % len(stride)] if isinstance(stride, list | tuple) else stride
    return stride == 1 and call.shape[dim] == call.labels("input").shape[dim]


def _grouped(
    labeller: Labeller, groups: int, channels: Tensor, w_in: Tensor, w_out: Tensor, transposed: bool
) -> Tensor:
    """The weight has all channels of one side, and those of one group on the other. Returns the output's labels."""
    inside = w_out if transposed else w_in  # the dimension that counts within a group
    count = len(inside) * groups
    repeated = inside.repeat(groups)
    out = labeller.classes.fresh(count) if transposed else w_out
    side = out if transposed else channels
    if split_groups(labeller, groups, [channels, out]):
        labeller.pin(inside)
    else:
        labeller.classes.unite(side, repeated)
    if transposed:
        labeller.classes.unite(channels, w_in)
        labeller.classes.mark_produced(out)
    return out
