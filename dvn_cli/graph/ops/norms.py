"""Normalisations: statistics are taken over what is left."""

from typing import Any

import torch
from torch import fx

from dvn_cli.graph.labels import Call, Labeller, Labels, from_vectors
from dvn_cli.graph.narrow import Narrower, as_it_is
from dvn_cli.graph.registry import enter


def _batch_norm(labeller: Labeller, call: Call) -> Labels:
    """Statistics are those of each channel; what varies within a channel may be dropped as it is."""
    labels = call.labels("input")
    parameters = [call.optional(name) for name in ("weight", "bias", "running_mean", "running_var")]
    channels = Labels(labels.shape, tuple(layer for layer in labels.layers if layer.shape[1] > 1))
    labeller.unite_parameters(labeller.separate(channels, prefer=[1]), parameters)
    return labeller.refresh(labels)


enter("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training", label=_batch_norm, rewrite=as_it_is)


def _layer_norm(labeller: Labeller, call: Call) -> Labels:
    labels = call.labels("input")
    vectors = labeller.separate(labels)
    first = len(labels.shape) - len(call.plain("normalized_shape"))
    labeller.unite_parameters(vectors, [call.optional("weight"), call.optional("bias")], first)
    return from_vectors(labels.shape, vectors)


def _normalized_shape(narrower: Narrower, node: fx.Node, args: dict[str, Any]) -> fx.Node:
    sizes = narrower.sizes(node)[-len(args["normalized_shape"]) :]
    return narrower.copy(node, {**args, "normalized_shape": sizes})


enter("layer_norm", "rms_norm", label=_layer_norm, rewrite=_normalized_shape)


def _group_norm(labeller: Labeller, call: Call) -> Labels:
    labels, groups = call.labels("input"), call.plain("num_groups")
    vectors = labeller.separate(labels, prefer=[1])
    labeller.unite_parameters(vectors, [call.optional("weight"), call.optional("bias")])
    if groups > 1 and 1 in vectors:
        labeller.split_groups(groups, [vectors[1]])
    return labeller.refresh(labels)


def _num_groups(narrower: Narrower, node: fx.Node, args: dict[str, Any]) -> fx.Node:
    groups, channels = args["num_groups"], narrower.indices(args["input"])[1]
    if channels is not None:
        size = narrower.labels[args["input"]].shape[1] // groups
        groups = len(torch.unique(channels // size))
    return narrower.copy(node, {**args, "num_groups": groups})


enter("group_norm", label=_group_norm, rewrite=_num_groups)
