"""Recurrent layers: their sizes are those of their weights."""

from functools import partial

import torch
from torch import Tensor

from dvn_cli.graph.labels import Call, Labeller, Labels, from_vectors
from dvn_cli.graph.narrow import as_it_is
from dvn_cli.graph.registry import enter
from dvn_cli.graph.trace import refusal


def _recurrent(labeller: Labeller, call: Call, gates: int) -> list[Labels]:
    """Every layer and direction has weights (gates * H, inputs), (gates * H, H) and biases: all gates of a channel."""
    layers, directions = call.plain("num_layers"), 2 if call.plain("bidirectional") else 1
    states, weights = call.several("hx"), call.several("params")
    each = 4 if call.plain("has_biases") else 2
    if len(weights) != each * layers * directions:
        raise refusal(call.node, "with projections")

    def along(labels: Labels, dim: int) -> Tensor:
        return labeller.separate(labels, prefer=[dim]).get(dim, labels.zeros(dim))

    vectors = labeller.separate(call.labels("input"), prefer=[2])
    inputs = vectors.get(2, call.labels("input").zeros(2))
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            start = (layer * directions + direction) * each
            hidden = along(weights[start + 1], 1)
            for matrix in weights[start : start + each]:
                rows = along(matrix, 0)
                labeller.coupled.mark_produced(rows)
                labeller.coupled.unite(rows.reshape(gates, -1), hidden)
            labeller.coupled.unite(inputs, along(weights[start], 1))
            for state in states:
                labeller.coupled.unite(along(state, 2), hidden)
            outputs.append(hidden)
        inputs = torch.cat(outputs)
    last = {2: labeller.coupled.find(outputs[0])}
    batch = {d: v for d, v in vectors.items() if d < 2}
    sequence = from_vectors(call.shape, {**batch, 2: labeller.coupled.find(inputs)})
    return [sequence, *(from_vectors(shape, last) for shape in call.shapes[1:])]


enter("lstm", label=partial(_recurrent, gates=4), rewrite=as_it_is)
enter("gru", label=partial(_recurrent, gates=3), rewrite=as_it_is)
