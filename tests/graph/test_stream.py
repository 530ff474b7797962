"""What `divide: inner` leaves whole: the channels that a sum couples with what another layer makes, and no others."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvn_cli.backbones import BackboneSpec
from dvn_cli.dividing import partition_backbone
from dvn_cli.errors import InputError
from dvn_cli.store.metadata import Rule
from dvn_cli.undivided import whole

SPEC = BackboneSpec("timm", "small", 4, 3, (8, 8))
INNER = Rule(divide="inner")


class Net(nn.Module):
    """A stem, some layers that a function puts together, and a classifier."""

    def __init__(self, body: Callable[["Net", Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.body = body
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)
        self.other, self.gate = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(8, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.table = nn.Parameter(torch.randn(12, 8, 8))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self, self.stem(x)).mean((2, 3)))


def residual(net: Net, x: Tensor, hidden: Tensor) -> Tensor:
    return x + net.b(hidden.relu())


def by_hand(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + (0.8 * (x + 0.04 * x**3)).tanh())


INSIDE: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "plain": lambda net, x: residual(net, x, net.a(x)),
    "a pointwise function with a sum": lambda net, x: residual(net, x, by_hand(net.a(x))),
    "gates": lambda net, x: residual(net, x, net.a(x) * net.gate(x).sigmoid()),
    "a sum with its own gate": lambda net, x: residual(net, x, (y := net.a(x)) + y * net.gate(x).sigmoid()),
    "depthwise": lambda net, x: residual(net, x, (y := net.a(x)) + net.depthwise(y)),
    "a table": lambda net, x: residual(net, x, net.a(x) + net.table),
    "a table that a layer makes": lambda net, x: residual(net, x, net.a(x) + net.depthwise(net.table[None])),
}


@pytest.mark.parametrize("name", INSIDE)
def test_what_is_inside_of_a_block_is_divided(name):
    axes = partition_backbone(SPEC, 2, INNER, Net(INSIDE[name])).assignment.tensors
    assert axes["a.weight"][0] is not None
    assert axes["b.weight"][1] == axes["a.weight"][0]
    assert axes["stem.weight"][0] is axes["head.weight"][1] is axes["b.weight"][0] is None


STREAMS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "two layers added": lambda net, x: net.b(net.a(x) + net.other(x)),
    "in place": lambda net, x: net.b(net.a(x).add_(net.other(x))),
    "subtracted": lambda net, x: net.b(net.a(x) - net.other(x)),
    "through a view": lambda net, x: net.b((net.a(x).flatten(2) + net.other(x).flatten(2)).unflatten(2, (8, 8))),
}


@pytest.mark.parametrize("name", STREAMS)
def test_what_several_layers_add_to_is_whole(name):
    partition = partition_backbone(SPEC, 2, INNER, Net(STREAMS[name]))
    axes = partition.assignment.tensors
    assert axes["a.weight"][0] is axes["b.weight"][1] is None
    assert axes["stem.weight"][0] is not None  # which one layer makes
    reasons = {name: one.why for one in whole(partition) for name in one.places}
    assert reasons["a.bias"] == "channels that sums couple, the residual stream"


def test_of_channels_side_by_side_only_those_that_are_added_to_are_whole():
    def body(net: Net, x: Tensor) -> Tensor:
        first, second = net.a(x).chunk(2, 1)
        return net.b(torch.cat([first, second + net.other(x)[:, :6]], 1))

    partition = partition_backbone(SPEC, 2, INNER, Net(body))
    assert partition.assignment.axes[partition.assignment.tensors["a.weight"][0]] == (((0, 3),), ((3, 6),))


def test_heads_and_hidden_units_of_attention():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.qkv, self.proj = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 48), nn.Linear(16, 16)
            self.fc1, self.fc2, self.head = nn.Linear(16, 40), nn.Linear(40, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x).flatten(2).transpose(1, 2)
            q, k, v = self.qkv(x).unflatten(2, (3, 4, 4)).permute(2, 0, 3, 1, 4)
            x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return self.head((x + self.fc2(F.gelu(self.fc1(x)))).mean(1))

    partition = partition_backbone(SPEC, 2, INNER, Block())
    axes = partition.assignment.tensors
    assert partition.assignment.axes[axes["proj.weight"][1]] == (((0, 8),), ((8, 16),))  # two heads each
    assert axes["fc1.weight"] == (axes["fc2.weight"][1], None)
    assert axes["embed.weight"] == (None,) * 4
    assert {group.channels for group in partition.groups if group.is_stream} == {16}


def test_a_network_with_nothing_inside_is_refused():
    body = STREAMS["two layers added"]
    net = Net(lambda net, x: x + body(net, x))
    with pytest.raises(InputError, match=r"^small has no inner channels for 2 units: .* divide all$"):
        partition_backbone(SPEC, 2, INNER, net)
    assert any(group.sizes for group in partition_backbone(SPEC, 2, module=net).groups)
