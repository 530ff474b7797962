"""The paper's own backbones."""

import pytest
import timm
import torch

from dvn_cli.backbones import paper
from dvn_cli.errors import InputError


def parameters(name: str, num_classes: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name, num_classes=num_classes).parameters())


def test_parameter_counts_are_the_papers():
    assert round(parameters("wrn_32_4", 100) / 1e6, 1) == 7.4
    assert parameters("resnet_42", 50) == 29_832_818  # 29.8M
    assert round(parameters("cifar_resnet_20", 10) / 1e6, 2) == 0.27  # He et al., table 6
    assert round(parameters("resnet_110", 10) / 1e6, 1) == 1.7


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("wrn_32_4", (16, (64, 128, 256), 5)),
        ("wrn_28_10", (16, (160, 320, 640), 4)),
        ("wrn_8_1", (16, (16, 32, 64), 1)),
        ("resnet_42", (64, (64, 128, 256, 512), 5)),
        ("resnet_26", (64, (64, 128, 256, 512), 3)),
        ("cifar_resnet_26", (16, (16, 32, 64), 4)),
        ("resnet_56", (16, (16, 32, 64), 9)),
    ],
)
def test_names_mean_shapes(name, shape):
    assert paper.shape_of(name) == shape


@pytest.mark.parametrize("name", ["resnet50", "wrn_32", "wrn_32_4x", "wide_resnet_42", "resnet_42.tag"])
def test_other_names_are_not_the_papers(name):
    assert paper.shape_of(name) is None
    assert not paper.register(name)


@pytest.mark.parametrize("name", ["resnet_43", "resnet_2", "cifar_resnet_42", "wrn_31_4", "wrn_4_1", "wrn_32_0"])
def test_depths_that_do_not_exist_say_which_do(name):
    with pytest.raises(InputError, match=r"6m \+ 2"):
        paper.register(name)


def test_any_other_member_is_registered_on_demand():
    assert not timm.is_model("wrn_14_3")
    assert paper.register("wrn_14_3")
    assert paper.register("wrn_14_3")
    model = timm.create_model("wrn_14_3", num_classes=7, in_chans=1)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 7)
    assert len(model.layer1) == 2


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("name", ["wrn_8_1", "resnet_10"])
def test_forward_follows_timm(name, size):
    assert paper.register(name)
    model = timm.create_model(name, num_classes=5).eval()
    images = torch.randn(2, 3, size, size)
    features = model.forward_features(images)
    assert features.shape == (2, model.num_features, *[size // 2 ** (len(model.stages) - 1)] * 2)
    assert torch.equal(model.forward_head(features), model(images))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features)


def test_shortcuts_have_no_parameters_and_carry_the_input():
    block = paper.BasicBlock(2, 5, stride=2).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    images = torch.rand(1, 2, 4, 4)
    out = block(images)
    assert torch.equal(out[:, :2], images[:, :, ::2, ::2])
    assert out[:, 2:].abs().max() == 0
    assert {name.split(".")[0] for name, _ in block.named_parameters()} == {"conv1", "bn1", "conv2", "bn2"}


def test_names_and_initialisation():
    model = timm.create_model("wrn_8_1", num_classes=4)
    names = set(model.state_dict())
    assert {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer3.0.bn2.running_var", "fc.bias"} <= names
    assert not any(name.endswith("conv1.bias") for name in names)
    weight = model.layer3[0].conv2.weight  # Xavier: uniform within sqrt(6 / (fan in + fan out))
    assert weight.abs().max().item() == pytest.approx((6 / (2 * 64 * 9)) ** 0.5, rel=0.01)
    assert model.fc.bias.abs().max() == 0
