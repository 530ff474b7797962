"""Operators that work on the map of every channel by itself: pooling, resizing, sampling, patches."""

import math

import torch
from torch import Tensor

from dvn_cli.graph.labels import Call, Labeller, Labels, from_vectors
from dvn_cli.graph.narrow import as_it_is
from dvn_cli.graph.registry import enter


def _channels_alone(labeller: Labeller, labels: Labels) -> dict[int, Tensor]:
    """Labels of the batch and the channels (dimensions 0 and 1); all positions are kept."""
    vectors = labeller.separate(labels, prefer=[1, 0])
    for dim in [d for d in vectors if d > 1]:
        labeller.pin(vectors.pop(dim))
    return vectors


def _each_channel(labeller: Labeller, call: Call) -> Labels | list[Labels]:
    vectors = _channels_alone(labeller, call.optional("self") or call.labels("input"))
    return call.outputs(lambda shape: from_vectors(shape, vectors))


enter(
    *("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "_adaptive_avg_pool2d", "lp_pool2d"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d"),
    *("_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa"),
    label=_each_channel,
    rewrite=as_it_is,
)


def _grid_sampler(labeller: Labeller, call: Call) -> Labels:
    grid = labeller.separate(call.labels("grid"))
    for dim in [d for d in grid if d > 0]:
        labeller.pin(grid.pop(dim))
    vectors = _channels_alone(labeller, call.labels("input"))
    if 0 in grid:
        labeller.coupled.unite(grid[0], vectors.setdefault(0, torch.zeros_like(grid[0])))
    return from_vectors(call.shape, vectors)


enter("grid_sampler", "grid_sampler_2d", label=_grid_sampler, rewrite=as_it_is)


def _im2col(labeller: Labeller, call: Call) -> Labels:
    """(N, C, H, W) to (N, C * places of the kernel, positions)."""
    vectors = _channels_alone(labeller, call.labels("self"))
    places = math.prod(call.plain("kernel_size"))
    return from_vectors(call.shape, {d: v.repeat_interleave(places) if d == 1 else v for d, v in vectors.items()})


def _col2im(labeller: Labeller, call: Call) -> Labels:
    """(N, C * places of the kernel, positions) to (N, C, H, W)."""
    vectors = _channels_alone(labeller, call.labels("self"))
    if 1 in vectors:
        table = vectors[1].reshape(call.shape[1], -1)
        labeller.coupled.unite(table, table[:, :1])
        vectors[1] = table[:, 0]
    return from_vectors(call.shape, vectors)


enter("im2col", label=_im2col, rewrite=as_it_is)
enter("col2im", label=_col2im, rewrite=as_it_is)
