"""Operators that work on every element by itself, or on elements that stand at the same place."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dvn_cli.graph.labels import Call, Labeller, Labels, from_vectors, varying_dims
from dvn_cli.graph.narrow import as_it_is
from dvn_cli.graph.ops.moves import move
from dvn_cli.graph.registry import enter


def pointwise(labeller: Labeller, operands: Sequence[Labels], shape: tuple[int, ...], is_sum: bool = False) -> Labels:
    """Unites the labels of operands that are broadcast together.

    An operand that has its full size along a dimension and no label there is kept whole, and so is what it meets.

    Args:
        is_sum: whether it adds up what is computed from the images.
    """

    def unite(vectors: Sequence[Tensor]) -> None:
        if is_sum:
            labeller.coupled.mark_summed(vectors)
        labeller.unite_all(vectors)

    rank = len(shape)
    aligned = []
    for operand in map(labeller.refresh, operands):
        front = (1,) * (rank - len(operand.shape))
        aligned.append(Labels(front + operand.shape, tuple(x.reshape(front + x.shape) for x in operand.layers)))

    layers: list[Tensor] = []
    joint = {varying_dims(layer) for x in aligned for layer in x.layers if len(varying_dims(layer)) > 1}
    for dims in joint:
        matching = [next((y for y in x.layers if varying_dims(y) == dims), None) for x in aligned]
        same = all(
            sum(bool(set(varying_dims(y)) & set(dims)) for y in x.layers) == 1 if layer is not None
            else all(x.shape[d] == 1 for d in dims)
            for x, layer in zip(aligned, matching, strict=True)
        )  # fmt: skip
        if same:
            present = [layer for layer in matching if layer is not None]
            unite(present)
            layers.append(present[0])
            aligned = [Labels(x.shape, tuple(y for y in x.layers if varying_dims(y) != dims)) for x in aligned]
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
        unite(present)
        result[dim] = labeller.coupled.find(present[0])
    single = from_vectors(shape, result)
    return labeller.refresh(Labels(shape, (*layers, *single.layers)))


def _pointwise(labeller: Labeller, call: Call) -> Labels:
    return pointwise(labeller, call.tensors(), call.shape)


def _sum(labeller: Labeller, call: Call) -> Labels:
    is_sum = sum(node in labeller.depends for node in call.node.all_input_nodes) > 1
    return pointwise(labeller, call.tensors(), call.shape, is_sum)


def _is_pointwise(target: Any) -> bool:
    return torch.Tag.pointwise in getattr(target, "tags", ())


enter(
    *("bernoulli", "clone", "copy", "detach", "fill", "floor_divide", "isnan", "lift_fresh_copy", "masked_fill"),
    *("to", "_to_copy", "where", "zero", "hardswish", "log_sigmoid", "dropout", "alpha_dropout", "feature_dropout"),
    *("empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like"),  # sized as their operand
    _is_pointwise,
    label=_pointwise,
    rewrite=as_it_is,
    takes_nothing=True,
)
enter("add", "sub", "rsub", label=_sum, rewrite=as_it_is, takes_nothing=True)
enter("type_as", label=lambda labeller, call: call.labels("self"), rewrite=as_it_is)


def _prelu(labeller: Labeller, call: Call) -> Labels:
    labels, weight = call.labels("self"), call.labels("weight")
    if max(weight.shape) > 1:
        labeller.unite_parameters(labeller.separate(labels, prefer=[1]), [weight])
    return labels


enter("prelu", label=_prelu, rewrite=as_it_is)


def _glu(labeller: Labeller, call: Call) -> Labels:
    dim = call.plain("dim")
    halves = move(labeller, call.labels("self"), lambda t: t.chunk(2, dim))
    return pointwise(labeller, halves, call.shape)


enter("glu", label=_glu, rewrite=as_it_is)
