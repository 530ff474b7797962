"""A norm that would take the variance of a single value is found, wherever its map has become one pixel."""

import pytest
import torch
from torch import nn

from dvn_cli.backbones import resolve
from dvn_cli.dividing import partition_backbone
from dvn_cli.graph.statistics import norm_of_a_single_value
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.tasks import default_tasks


def refused_by_torch(module: nn.Module, size: int) -> bool:
    """torch's own modules look at the shape at every call."""
    try:
        module.train()(torch.randn(1, 3, size, size))
    except ValueError as error:
        return "Expected more than 1 value per channel" in str(error)
    return False


@pytest.mark.parametrize(
    ("name", "size", "one_pixel"),
    [("wrn_10_1", 8, False), ("wrn_10_1", 4, True), ("test_resnet", 32, True), ("test_vit", 160, False)],
)
def test_as_torch_refuses(name: str, size: int, one_pixel: bool) -> None:
    spec = resolve(name, num_classes=3, in_chans=3, input_size=(size, size))
    module = spec.build()
    partition = partition_backbone(spec, 2, module=module)
    tasks = default_tasks(2, 3, (size, size), (0.5,) * 3, (0.2,) * 3)
    network = DeepVirtualNetwork.from_backbone(partition, module, tasks)
    tensors = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in network.tensors(1, 1).items()}
    found = norm_of_a_single_value(network.narrowed(1, 1, training=True), tensors, (3, size, size))
    assert (found is not None) == one_pixel == refused_by_torch(module, size)
    assert found is None or isinstance(module.get_submodule(found), nn.BatchNorm2d)
