"""Operators that put tensors together, or margins around one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from dvn_cli.graph.labels import Call, Labeller, Labels, from_vectors
from dvn_cli.graph.narrow import Narrower, as_it_is
from dvn_cli.graph.ops.moves import move
from dvn_cli.graph.registry import enter


def _joined(labeller: Labeller, parts: Sequence[Labels], dim: int, shape: tuple[int, ...]) -> Labels:
    """Along `dim` labels follow one another, along all other dimensions they are united."""
    vectors = [labeller.separate(part) for part in parts]
    result = {}
    for d in {d for v in vectors for d in v}:
        each = [v.get(d, p.zeros(d)) for v, p in zip(vectors, parts, strict=True)]
        if d == dim:
            result[d] = torch.cat(each)
        else:
            labeller.unite_all(each)
            result[d] = labeller.coupled.find(each[0])
    return from_vectors(shape, result)


def _cat(labeller: Labeller, call: Call) -> Labels:
    parts = [part for part in call.several("tensors") if part.shape != (0,)]
    return _joined(labeller, parts, call.plain("dim") % len(call.shape), call.shape)


def _stack(labeller: Labeller, call: Call) -> Labels:
    dim = call.plain("dim") % len(call.shape)
    parts = [move(labeller, part, lambda t: t.unsqueeze(dim)) for part in call.several("tensors")]
    return _joined(labeller, parts, dim, call.shape)


enter("cat", "concat", "concatenate", label=_cat, rewrite=as_it_is, takes_nothing=True)
enter("stack", label=_stack, rewrite=as_it_is)


def _padded(labeller: Labeller, call: Call) -> Labels:
    """Zeros may stand for any channel: padding along channels gets new labels. Copied margins move."""
    labels, amounts, rank = call.labels("self"), call.plain("pad"), len(call.shape)
    vectors = labeller.separate(labels)
    for i in range(0, len(amounts), 2):
        dim = rank - 1 - i // 2
        if dim not in vectors:
            continue
        if call.args.get("mode", "constant") != "constant" or min(amounts[i : i + 2]) < 0:
            labeller.pin(vectors.pop(dim))
        else:
            before, after = (labeller.coupled.fresh(n) for n in amounts[i : i + 2])
            vectors[dim] = torch.cat([before, vectors[dim], after])
    return from_vectors(call.shape, vectors)


def _pad(narrower: Narrower, node: fx.Node, args: dict[str, Any]) -> fx.Node:
    """Margins lose what is dropped of them."""
    before, after, amounts = narrower.indices(args["self"]), narrower.indices(node), list(args["pad"])
    rank = len(after)
    for i in range(0, len(amounts), 2):
        dim = rank - 1 - i // 2
        indices = after[dim]
        if indices is None and before[dim] is None:
            continue
        front, size = args["pad"][i], narrower.labels[args["self"]].shape[dim]
        indices = torch.arange(narrower.labels[node].shape[dim]) if indices is None else indices
        amounts[i] = int((indices < front).sum())
        amounts[i + 1] = int((indices >= front + size).sum())
    return narrower.copy(node, {**args, "pad": amounts})


enter("pad", "constant_pad_nd", label=_padded, rewrite=_pad, adds_margin=True)
