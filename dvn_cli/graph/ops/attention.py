"""Fused attention: two contractions with a softmax between them."""

import math
from typing import Any

from torch import fx

from dvn_cli.graph.labels import Call, Labeller, Labels
from dvn_cli.graph.narrow import Narrower
from dvn_cli.graph.ops.contractions import contract
from dvn_cli.graph.ops.moves import move
from dvn_cli.graph.ops.pointwise import pointwise
from dvn_cli.graph.registry import enter


def _attention(labeller: Labeller, call: Call) -> Labels:
    query, key, value = (call.labels(name) for name in ("query", "key", "value"))
    mask = call.optional("attn_mask")
    rank = len(query.shape)
    if call.plain("enable_gqa"):  # a head of keys and values for several of queries
        times = query.shape[-3] // key.shape[-3]
        key, value = (move(labeller, x, lambda t: t.repeat_interleave(times, rank - 3)) for x in (key, value))
    batch = [f"b{d}" for d in range(rank - 2)]
    shape = (*query.shape[:-1], key.shape[-2])
    scores = contract(labeller, [(query, [*batch, "i", "k"]), (key, [*batch, "s", "k"])], [*batch, "i", "s"], shape)
    if mask is not None:
        scores = pointwise(labeller, [scores, mask], shape)
    operands = [(scores, [*batch, "i", "s"]), (value, [*batch, "s", "j"])]
    return contract(labeller, operands, [*batch, "i", "j"], call.shape)


def _scale(narrower: Narrower, node: fx.Node, args: dict[str, Any]) -> fx.Node:
    """By default attention is scaled by the size of a head: that of the whole, however much of it is left."""
    size = narrower.labels[args["query"]].shape[-1]
    return narrower.copy(node, {**args, "scale": 1 / math.sqrt(size) if args["scale"] is None else args["scale"]})


enter("scaled_dot_product_attention", label=_attention, rewrite=_scale)
