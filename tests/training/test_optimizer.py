"""The optimizer of a recipe: timm's by their names, and which parameters have which learning rate and weight decay."""

from typing import Any

import pytest
import timm.optim
import torch
from pydantic import ValidationError
from torch import nn

import dvn_cli
from dvn_cli.errors import InputError
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.training.optimizer import load_state, make_optimizer, state_tensors
from dvn_cli.training.recipe import OptimizerKeys


def groups_of(network: DeepVirtualNetwork, **keys: Any) -> dict[str, tuple[float, float]]:
    """The factor on the learning rate and the weight decay of each parameter, by the backbone's name."""
    names = {id(tensor): name.partition("/")[2] for name, tensor in network.file_tensors().items()}
    groups = make_optimizer(OptimizerKeys(weight_decay=0.3, **keys), network).param_groups
    return {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}


@pytest.fixture(scope="module")
def vit() -> DeepVirtualNetwork:
    return dvn_cli.divide("test_vit", 2, num_classes=5, input_size=32)


@pytest.fixture(scope="module")
def wrn() -> DeepVirtualNetwork:
    return dvn_cli.divide("wrn_10_1", 2, num_classes=5, input_size=8)


def test_layers_are_timms(vit: DeepVirtualNetwork) -> None:
    """The classifier has the whole rate; each block below has a share of that above, and what is before them the least.

    No weight decay where timm names a tensor, nor on vectors.
    """
    found = groups_of(vit, layer_decay=0.5, decay_norms=False)
    depth = 1 + max(int(name.split(".")[1]) for name in found if name.startswith("blocks."))
    for name, (scale, decay) in found.items():
        stem, _, block = name.partition(".")
        layer = {
            "blocks": int(block.partition(".")[0]) + 1 if stem == "blocks" else 0,
            "head": depth + 1,
            "norm": depth,
        }
        assert scale == pytest.approx(0.5 ** (depth + 1 - layer.get(stem, 0))), name
        assert decay == (0 if name.endswith(("bias", "pos_embed", "cls_token")) or "norm" in name else 0.3), name
    assert {decay for _, decay in groups_of(vit, layer_decay=0.5).values()} == {0.3}
    assert {scale for scale, _ in groups_of(vit, decay_norms=False).values()} == {1}


def test_layers_of_a_backbone_that_timm_has_not(wrn: DeepVirtualNetwork) -> None:
    scales = {name: scale for name, (scale, _) in groups_of(wrn, layer_decay=0.5).items()}
    assert scales["fc.weight"] == scales["fc.bias"] == 1
    assert scales["conv1.weight"] == min(scales.values())
    assert len(set(scales.values())) > 2


class Named(nn.Sequential):
    """A backbone of one's own that names its tensors in its own ways."""

    no_weight_decay = ("0.weight",)

    def __init__(self, num_classes: int) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)
        )


class Matched(Named):
    def group_matcher(self) -> dict[str, str]:
        return {}


def test_what_a_backbone_of_ones_own_says_of_its_tensors() -> None:
    """Names without decay may be an attribute; layers are said as timm has them, or that is one line."""
    network = dvn_cli.divide("test_optimizer:Named", 2, num_classes=5, input_size=8)
    decays = {name: decay for name, (_, decay) in groups_of(network, decay_norms=False).items()}
    assert decays == {"0.weight": 0, "0.bias": 0, "4.weight": 0.3, "4.bias": 0}
    with pytest.raises(InputError, match=r"norm_lr_factor: no operator of test_optimizer:Named is a norm with weights"):
        groups_of(network, norm_lr_factor=0.5)
    network = dvn_cli.divide("test_optimizer:Matched", 2, num_classes=5, input_size=8)
    with pytest.raises(InputError, match=r"test_optimizer:Matched: group_matcher or no_weight_decay .*: .* 'coarse'"):
        groups_of(network, layer_decay=0.5)


def test_norms_have_a_rate_of_their_own(vit: DeepVirtualNetwork, wrn: DeepVirtualNetwork) -> None:
    """With running statistics or without."""
    for network in (vit, wrn):
        scales = {name: scale for name, (scale, _) in groups_of(network, norm_lr_factor=0.1).items()}
        norms = {name for name in scales if "norm" in name or "bn" in name}
        assert norms == {name for name, scale in scales.items() if scale == 0.1}
    both = groups_of(vit, norm_lr_factor=0.1, layer_decay=0.5)
    assert both["blocks.0.norm1.weight"][0] == pytest.approx(0.1 * both["blocks.0.attn.qkv.weight"][0])


def possible() -> list[str]:
    def is_taken(name: str) -> bool:
        try:
            return bool(OptimizerKeys(name=name))
        except ValidationError:
            return False

    return list(filter(is_taken, timm.optim.list_optimizers()))


def test_every_optimizer_goes_on_as_it_was() -> None:
    """From the tensors of its state alone, to the bit, after three steps and for three more."""
    assert {"sgd", "adamw", "lamb", "lion", "muon", "adan"} <= set(possible())

    def parameters() -> list[torch.nn.Parameter]:
        generator = torch.Generator().manual_seed(3)
        shapes = ((4, 3, 3, 3), (8, 4), (5,), ())
        return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]

    def made(name: str, of: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return timm.optim.create_optimizer_v2([{"params": of[:2]}, {"params": of[2:]}], name, 0.01, 0.001)

    def steps(optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # some are stochastic
        for _ in range(3):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    for name in possible():
        whole, resumed = parameters(), parameters()
        first, second = made(name, whole), made(name, resumed)
        steps(first, 1)
        with torch.no_grad():
            for ours, theirs in zip(resumed, whole, strict=True):
                ours.copy_(theirs)
        load_state(second, {key: tensor.clone() for key, tensor in state_tensors(first).items()})
        steps(first, 2)
        steps(second, 2)
        assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True)), name
