"""Multiply-accumulates, counted without data."""

import torch
from torch import Tensor, nn

from dvn_cli.backbones import BackboneSpec
from dvn_cli.dividing import partition_backbone
from dvn_cli.units.count import macs


class Tables(nn.Module):
    """Tensors of the state that are no floats decide what is computed, as relative positions do in windows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([2, 0, 1, 3], dtype=torch.int32))
        self.register_buffer("there", torch.tensor([True, False, True, True]))
        self.stem, self.head = nn.Conv2d(3, 8, 1, bias=False), nn.Linear(8, 4)
        self.bias = nn.Parameter(torch.zeros(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.stem(x).mean(3).mT[:, self.order]
        rows = torch.where(self.there[:, None], rows, 0.0) + self.bias[self.order.long()]
        return self.head(rows.mean(1))


def test_integer_tables_of_the_state_keep_their_type():
    partition = partition_backbone(BackboneSpec("timm", "small", 4, 3, (4, 4)), 2, module=Tables())
    assert partition.dtypes["order"] == torch.int32
    for units, width in (((1,), 4), ((1, 2), 8)):
        narrowed, tensors = partition.network(units, 4), partition.tensors(units, 4)
        assert macs(narrowed, tensors, (3, 4, 4)) == 16 * 3 * width + 4 * width
