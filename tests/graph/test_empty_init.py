from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dvn_cli.backbones import resolve
from dvn_cli.dividing import partition_backbone
from dvn_cli.graph.empty_init import empty_init
from dvn_cli.graph.labels import Labeller, Labels
from dvn_cli.graph.trace import trace


class Table(nn.Module):
    """A table of indices, a recurrent module, and a parameter that two modules share."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([2, 0, 1]), persistent=False)
        self.a, self.b, self.memory = nn.Linear(3, 3), nn.Linear(3, 3), nn.LSTM(3, 4)
        self.b.weight = self.a.weight
        self.scale = self.same = nn.Parameter(torch.ones(3))
        nn.init.normal_(self.a.weight)


class Derived(nn.Module):
    """A buffer that is computed from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(3.0))
        self.register_buffer("twice", self.weight.detach() * 2)


class Looked(nn.Module):
    """An initialisation that depends on a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.large = self.weight.sum().item() > 2


def test_parameters_are_there_in_shape_and_buffers_in_full():
    module, real = empty_init(Table), Table()
    assert {n: (p.shape, p.device) for n, p in module.named_parameters()} == {
        n: (p.shape, p.device) for n, p in real.named_parameters()
    }
    assert module.order.tolist() == [2, 0, 1]
    assert module.a.weight is module.b.weight
    assert module.scale is module.same
    assert module.memory(torch.zeros(2, 1, 3))[0].shape == (2, 1, 4)


@pytest.mark.parametrize(("build", "value"), [(Derived, [0, 1, 2]), (Looked, [1, 1, 1])])
def test_what_needs_its_parameters_has_them(build, value):
    assert empty_init(build).weight.tolist() == value


@pytest.mark.parametrize(
    ("name", "size"),
    [("wrn_10_1", 32), ("timm/test_vit", 32), pytest.param("timm/test_maxvit", 64, marks=pytest.mark.slow)],
)
def test_it_is_divided_as_with_weights(name, size):
    spec = resolve(name, num_classes=5, input_size=(size, size))
    assert partition_backbone(spec, 2).metadata() == partition_backbone(spec, 2, module=spec.build()).metadata()


def test_a_partition_takes_no_memory_for_weights():
    """The parameters of a model of 1.2 GB are never written to: what is resident is measured, as Linux tells it."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("no /proc here")
    before = int(statm.read_text().split()[1])
    module = empty_init(resolve("vit_large_patch16_224").build)
    assert sum(p.numel() for p in module.parameters()) * 4 > 1.2e9
    assert (int(statm.read_text().split()[1]) - before) * 4096 < 1e8


def test_labels_keep_no_more_than_what_varies():
    spec = resolve("timm/test_maxvit", num_classes=5, input_size=(64, 64))
    labels = Labeller(2).run(trace(empty_init(spec.build), (3, *spec.input_size), False)).values()
    layers = [layer for value in labels if isinstance(value, Labels) for layer in value.layers]
    assert layers
    kept: dict[int, Tensor] = {layer.data_ptr(): layer for layer in layers}
    assert all(layer.untyped_storage().nbytes() <= 16 * layer.numel() for layer in kept.values())
