import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dvn_cli import compensation
from dvn_cli.backbones import BackboneSpec
from dvn_cli.dividing import partition_backbone
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.store.metadata import Rule
from dvn_cli.tasks import default_tasks
from dvn_cli.units import count

SPEC = BackboneSpec("timm", "small", 4, 3, (8, 8))
HIDDEN = 12
CONSTANT = [0, 2, 5, 7, 8, 11]


class Block(nn.Module):
    """A residual block whose hidden channels are, half of them, the same on all images; with a norm or without."""

    def __init__(self, norm: bool, linear: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 1)
        self.a: nn.Module = nn.Linear(8, HIDDEN) if linear else nn.Conv2d(8, HIDDEN, 1)
        self.b: nn.Module = nn.Linear(HIDDEN, 8) if linear else nn.Conv2d(HIDDEN, 8, 1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.head, self.linear = nn.Linear(8, 4), linear
        with torch.no_grad():
            self.a.weight[CONSTANT] = 0
            self.a.bias[CONSTANT] = torch.rand(len(CONSTANT)) + 1

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = x.permute(0, 2, 3, 1) if self.linear else x
        y = self.b(self.a(y).relu())
        y = y.permute(0, 3, 1, 2) if self.linear else y
        return self.head((x + self.norm(y)).mean((2, 3)))


@pytest.fixture
def images() -> list[Tensor]:
    return list(torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(12))


def compensated(
    module: nn.Module, images: list[Tensor], levels: tuple[int, ...] = (1, 2), **rule: str
) -> DeepVirtualNetwork:
    partition = partition_backbone(SPEC, 2, Rule("sorted", 1, **rule), module, images)
    tasks = default_tasks(2, 4, SPEC.input_size, (0.0,) * 3, (1.0,) * 3)
    tasks = [replace(task, levels=levels) for task in tasks]
    network = DeepVirtualNetwork.from_backbone(partition, module, tasks)
    own = [*compensation.statistics(partition), *compensation.biases(partition)]
    network.make_private(dict.fromkeys(own, "network"), keep_shared=True)
    compensation.compensate(network, {1: images, 2: images})
    return network.eval()


@pytest.mark.parametrize("divide", ["all", "inner"])
@pytest.mark.parametrize("linear", [False, True])
def test_the_first_unit_has_the_channels_that_vary(images, linear, divide):
    partition = partition_backbone(SPEC, 2, Rule("sorted", 1, divide), Block(False, linear), images)
    first, second = partition.assignment.axes[partition.assignment.tensors["a.weight"][0] or 0]
    assert [index for start, stop in second for index in range(start, stop)] == CONSTANT
    assert not set(CONSTANT) & {index for start, stop in first for index in range(start, stop)}


@pytest.mark.parametrize("linear", [False, True])
def test_what_is_lacking_and_constant_is_made_up_for_exactly(images, linear):
    module = Block(False, linear).eval()
    network = compensated(module, images, divide="inner")
    with torch.no_grad():
        torch.testing.assert_close(network(images[0], 1, 1), module(images[0]))
        assert (network(images[0], 2, 1) - module(images[0])).abs().max() > 0.01  # which has the constant ones alone
        torch.testing.assert_close(network(images[0], 2, 2), module(images[0]))


def test_the_biases_are_private_and_counted(images):
    network = compensated(Block(False), images, divide="inner")
    assert {name for name in network.file_tensors() if "/level/" in name} == {
        f"task/{task}/level/{level}/b.bias" for task in (1, 2) for level in (1, 2)
    }
    params, _ = count.params_and_density(network.header("dvn.safetensors"), 1, 1)
    half = HIDDEN // 2
    assert params == (3 * 8 + 8) + (8 * half + half) + (half * 8 + 8) + (8 * 4 + 4)
    assert "shared/b.bias" in network.file_tensors()  # what other tasks start from


def test_a_norm_takes_the_statistics_of_its_own_network(images):
    module = Block(True).eval()
    network = compensated(module, images, divide="inner")
    assert not any(name.endswith("b.bias") for name in network.file_tensors() if "/level/" in name)
    for task in (1, 2):
        level = network.virtual_network(task, 1)
        norm, trained = copy.deepcopy(level.norm), copy.deepcopy(level).train()
        trained.norm.running_mean.zero_(), trained.norm.running_var.zero_()
        trained(torch.cat(images))
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(norm, name), getattr(trained.norm, name) / 0.1)
        assert torch.equal(network.virtual_network(task, 2).norm.running_mean, module.norm.running_mean)


def test_a_top_level_that_lacks_units_is_made_up_for(images):
    module = Block(True).eval()
    alone, lowest = (
        compensated(module, images, levels, divide="inner").virtual_network(1, 1) for levels in ((1,), (1, 2))
    )
    assert not torch.equal(lowest.norm.running_mean, module.norm.running_mean)
    assert torch.equal(alone.norm.running_mean, lowest.norm.running_mean)


def test_a_norm_makes_up_for_what_is_constant(images):
    """But for the estimate: with these images' statistics the whole network is the first half of it."""
    network = compensated(Block(True), images, divide="inner")
    for name, tensor in compensation.estimated(network, 1, 2, images).items():
        network.file_tensors()[f"task/1/level/2/{name}"].copy_(tensor)
    with torch.no_grad():
        torch.testing.assert_close(network(images[0], 1, 1), network(images[0], 1, 2))


MODES: dict[str, Callable[[nn.Module], nn.Module]] = {"train": nn.Module.train, "eval": nn.Module.eval}


@pytest.mark.parametrize("mode", MODES)
def test_the_backbone_stays_as_it_was(images, mode):
    module = MODES[mode](Block(True))
    before = copy.deepcopy(module.state_dict())
    compensated(module, images)
    assert module.training == (mode == "train")
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
