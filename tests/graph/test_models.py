"""Whole backbones: the narrow networks of every task compute what the masked ones do."""

import copy

import pytest
import torch

from dvn_cli.backbones import resolve
from dvn_cli.check import Comparison, networks
from dvn_cli.graph.narrow import narrow
from dvn_cli.reference import first_tensor, masked
from dvn_cli.store.metadata import Rule
from dvn_cli.units.assign import label_mask

QUICK = [
    *(("wrn_10_1", 32), ("resnet18", 48), ("timm/test_vit", 160), ("timm/test_convnext", 64)),
    ("timm/test_byobnet", 64),
]
"""Backbones and the size of their images in pixels."""

SLOW = [
    *(("wrn_16_1", 32), ("resnet_10", 32), ("resnet_20", 32), ("timm/resnet18", 64), ("resnet50", 64)),
    *(("resnext50_32x4d", 64), ("wide_resnet50_2", 64), ("densenet121", 64), ("mobilenetv2_100", 64)),
    *(("mobilenetv3_large_100", 64), ("mobilenetv3_small_100", 64), ("mobilenetv3_small_050", 64)),
    *(("efficientnet_b0", 64), ("regnety_002", 64)),
    *(("regnety_008", 64), ("convnext_atto", 64), ("vgg11_bn", 64), ("torchvision/googlenet", 96)),
    *(("inception_v3", 96), ("torchvision/inception_v3", 96), ("vit_tiny_patch16_224", 224)),
    *(("vit_small_patch16_224", 224), ("deit_tiny_patch16_224", 224), ("torchvision/resnet18", 64)),
    *(("torchvision/mobilenet_v3_small", 64), ("torchvision/shufflenet_v2_x0_5", 64), ("torchvision/vit_b_16", 224)),
]


def comparison(name: str, size: int) -> Comparison:
    spec = resolve(name, num_classes=10, input_size=(size, size))
    return Comparison(spec.build(), (3, size, size))


def compare(name: str, size: int, every: bool) -> None:
    """Compares networks of two and of four units: every one in both modes, or most in one of them."""
    case = comparison(name, size)
    for units in (2, 4):
        case.divide(units)
        assert any(group.sizes for group in case.groups)
        for number, kept in enumerate(networks(units) if every or units == 4 else [(1,), (2,)]):
            for train in (False, True) if every or kept == (1,) else (number % 2 == 0,):
                assert case.error(kept, train) < 1e-8, (units, kept, train)
    assert not case.without_gradient((1,))


@pytest.mark.parametrize(("name", "size"), QUICK)
def test_narrowed_is_masked(name, size):
    compare(name, size, every=False)


@pytest.mark.parametrize(("name", "size"), [("timm/test_vit", 160), ("timm/test_byobnet", 64)])
def test_narrowed_is_masked_where_the_stream_is_whole(name, size):
    case = comparison(name, size)
    case.divide(4, Rule(divide="inner"))
    assert {bool(group.sizes) for group in case.groups} == {True, False}
    for train in (False, True):
        assert case.error((2, 4), train) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), SLOW)
def test_narrowed_is_masked_slow(name, size):
    compare(name, size, every=True)


@pytest.mark.parametrize(("name", "size"), [("resnet18", 48), ("timm/test_vit", 160)])
def test_all_units_are_the_module(name, size):
    case = comparison(name, size)
    case.divide(4)
    for train in (False, True):
        module = copy.deepcopy(case.module).train(train)
        with torch.no_grad():
            expected = module(case.x)
        result, after = case.narrowed((1, 2, 3, 4), train)
        exact = {"rtol": 1e-8, "atol": 1e-8}  # the fused attention kernel approximates exp, and is not always chosen
        torch.testing.assert_close(result, expected, **exact)
        for key, tensor in after.items():
            torch.testing.assert_close(tensor, module.state_dict()[key], **exact)


def test_a_narrow_network_takes_any_batch():
    case = comparison("resnet18", 48)
    case.divide(4)
    whole, _ = case.narrowed((2, 3), False)
    case.x = case.x[1:]
    torch.testing.assert_close(case.narrowed((2, 3), False)[0], whole[1:])


def test_the_first_classes_alone():
    case = comparison("resnet18", 48)
    case.divide(2)
    assert ("fc.weight", 0) in case.assignment.classes
    keep = label_mask(case.labeller, case.unit, (1,), 3)
    net = narrow(case.traced[False], case.labels, case.labeller, keep, {})
    tensors = dict(zip(net.names, case.tensors(net.names, (1,)), strict=True))
    tensors |= {name: tensors[name][:3] for name, _ in case.assignment.classes}
    whole, _ = case.narrowed((1,), False)
    with torch.no_grad():
        torch.testing.assert_close(net.module(case.x, *tensors.values()), whole[:, :3])


@pytest.mark.parametrize("kept", [(1, 2), (2,)])
def test_another_stride(kept):
    """The stem of another stride is the module of that stride, whole and in part."""
    case = comparison("resnet18", 48)
    case.divide(2)
    keep = label_mask(case.labeller, case.unit, kept, 10)
    net = narrow(case.traced[False], case.labels, case.labeller, keep, {"conv1.weight": [1, 1]})
    case.module.conv1.stride = (1, 1)
    expected, _ = case.reference(masked(case.module, case.assignment, kept), False)
    before, _ = case.narrowed(kept, False)
    with torch.no_grad():
        result = first_tensor(net.module(case.x, *case.tensors(net.names, kept)))
    torch.testing.assert_close(result, expected)
    assert not torch.allclose(before, expected)
