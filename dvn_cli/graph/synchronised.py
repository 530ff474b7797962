"""Batch norms by the mean and variance of all processes' images, as torch.nn.SyncBatchNorm has them, on any device."""

import copy
from typing import Any

import torch
from torch import Tensor, fx

from dvn_cli import processes
from dvn_cli.graph.registry import base_name
from dvn_cli.graph.trace import bind


def synchronised(module: fx.GraphModule) -> fx.GraphModule:
    """Returns a graph in train mode whose batch norms see what those of all processes see."""
    module = copy.deepcopy(module)
    for node in module.graph.nodes:
        if node.op == "call_function" and base_name(node.target) == "batch_norm" and bind(node)["training"]:
            *given, _ = bind(node).values()  # cudnn or not
            node.target, node.args, node.kwargs = batch_norm, tuple(given), {}
    module.recompile()
    return module


class _Sum(torch.autograd.Function):
    """The sum over all processes; of its gradients too, since each one's output depends on all inputs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return processes.total(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return processes.total(gradients[0])


def batch_norm(
    images: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Computes aten.batch_norm in training, over the images of all processes, whose parts are of one size."""
    values = images.float()
    dims = [dim for dim in range(images.ndim) if dim != 1]
    shape = [-1 if dim == 1 else 1 for dim in range(images.ndim)]
    count = processes.count() * values.numel() // values.shape[1]
    mean = _Sum.apply(values.sum(dims)) / count
    centred = values - mean.view(shape)
    var = _Sum.apply(centred.square().sum(dims)) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    scale = torch.rsqrt(var + eps) if weight is None else weight * torch.rsqrt(var + eps)
    normed = centred * scale.view(shape)
    return (normed if bias is None else normed + bias.view(shape)).to(images.dtype)
