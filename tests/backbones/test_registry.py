"""Names to modules."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from dvn_cli.backbones import BackboneSpec, classifier_tensors, preprocessing, registry, resolve
from dvn_cli.data import memory
from dvn_cli.data.resize import Resize
from dvn_cli.errors import InputError
from dvn_cli.store.metadata import Preprocessing
from dvn_cli.store.schema import parse

IMAGENET_MEAN_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    ("name", "source", "member"),
    [
        ("resnet50", "timm", "resnet50"),  # torchvision has it too
        ("resnet50.a1_in1k", "timm", "resnet50.a1_in1k"),
        ("wrn_20_1", "timm", "wrn_20_1"),
        ("googlenet", "torchvision", "googlenet"),
        ("torchvision/resnet50", "torchvision", "resnet50"),
        ("timm/resnet50", "timm", "resnet50"),
        ("resnet", "timm", "resnet50"),
        ("torchvision/resnet", "torchvision", "resnet50"),
        ("squeezenet", "torchvision", "squeezenet1_1"),
    ],
)
def test_order_of_meanings(name, source, member):
    spec = resolve(name)
    assert (spec.source, spec.name) == (source, member)


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_every_family_has_a_usual_member_that_is_no_family(family):
    assert resolve(family).name == registry.FAMILIES[family]
    assert registry.FAMILIES[family] not in registry.FAMILIES


def test_defaults_are_the_models_own():
    assert resolve("inception_v3").input_size == (299, 299)
    assert resolve("torchvision/efficientnet_b1").input_size == (240, 240)
    assert resolve("vit_small_patch16_224.augreg_in21k").num_classes == 21843
    assert resolve("wrn_32_4") == BackboneSpec("timm", "wrn_32_4", 100, 3, (32, 32))
    assert resolve("resnet18", 7, 1, (64, 48)) == BackboneSpec("timm", "resnet18", 7, 1, (64, 48))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet-50",), "did you mean 'resnet50'"),
        (("resnet50.a1_in2k",), "did you mean 'resnet50.a1_in1k'"),
        (("torchvision/wrn_32_4",), "unknown backbone"),
        (("timm/googlenet",), "unknown backbone 'timm/googlenet'"),
        (("vit_tiny_patch16_224_in21k",), "unknown backbone"),  # timm has it only as a deprecated alias
        (("resnet_43",), "8m"),
        (("vit_small_patch14_dinov2",), "without a classifier"),
        (("resnet18", 1), "a classifier has 2 to 1,048,576 classes, not 1"),
        (("wrn_10_1", 10**9), "2 to 1,048,576 classes, not 1000000000"),
        (("wrn_999999_4",), "wrn_999999_4: wrn_N_S wants"),
        (("wrn_999998_4",), "wrn_999998_4 has 999,998 layers"),
        (("wrn_10_99999",), "wrn_10_99999 has 8 layers and 714,"),
        (("resnet_99999998",), "resnet_99999998 has 99,999,998 layers"),
        ((f"wrn_{'9' * 5000}_1",), "unknown backbone"),
        (("resnet18", 10, 0), "images have 1 to 1,024 channels"),
        (("resnet18", 10, 3, (0, 8)), "images have 1 to 8,192 pixels a side, not 0x8"),
        (("torchvision/resnet18", 10, 1), "takes 3 channels, not 1"),
        (("torchvision/vit_b_16", 10, 3, (32, 48)), "square"),
        (("torchvision/vit_b_16", 10, 3, (20, 20)), "patch size"),
        (("densenet121", 10, 3, (8, 8)), "cannot take images of 3x8x8"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        resolve(*arguments)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_the_memory_is_refused_before_it_is_built(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 40 << 20)
    with pytest.raises(InputError, match=r"resnet18 for images .* and 10 classes takes 42\.7 MiB, and 40\.0 MiB"):
        resolve("resnet18", 10)


@pytest.mark.parametrize(
    "name", ["wrn_8_1", "vit_tiny", "torchvision/shufflenet_v2_x0_5", "torchvision/regnet_x_400mf"]
)
def test_build_random_and_eval(name):
    """The last one reads tensors that it makes, which the meta device has none of."""
    spec = resolve(name, 5, input_size=(32, 32))
    module = spec.build()
    assert not module.training
    assert module(torch.randn(2, spec.in_chans, *spec.input_size)).shape == (2, 5)
    empty = spec.build("meta")
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in module.state_dict().items()}


def test_models_built_for_a_size_are_built_for_the_one_asked():
    assert resolve("vit_tiny", 10, 1, (32, 48)).build("meta").pos_embed.shape[1] == 2 * 3 + 1
    assert resolve("torchvision/vit_b_16", 10, 3, (32, 32)).build("meta").encoder.pos_embedding.shape[1] == 2 * 2 + 1


@pytest.mark.parametrize("name", ["googlenet", "torchvision/inception_v3"])
def test_auxiliary_heads_are_off(name, recwarn):
    names = resolve(name).build("meta").state_dict()
    assert not any(name.lower().startswith("aux") for name in names)
    assert not recwarn.list


def test_classifier_tensors():
    assert classifier_tensors(resolve("wrn_8_1")) == {"fc.weight": 0, "fc.bias": 0}
    assert classifier_tensors(resolve("torchvision/squeezenet1_1")) == {
        "classifier.1.weight": 0,
        "classifier.1.bias": 0,
    }
    two_heads = classifier_tensors(resolve("deit_tiny_distilled_patch16_224"))
    assert set(two_heads) == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


def test_preprocessing():
    timms = Preprocessing("timm's configuration of resnet50.a1_in1k", *IMAGENET_MEAN_STD, "bicubic", 0.95, "center")
    assert preprocessing(resolve("resnet50")) == timms
    assert preprocessing(resolve("resnet50.tv_in1k")).resize == {
        "interpolation": "bilinear",
        "crop_pct": 0.875,
        "crop_mode": "center",
    }
    assert preprocessing(resolve("wrn_32_4")) is None
    grey = preprocessing(resolve("resnet50", in_chans=1))
    assert (grey.mean, grey.std, grey.resize) == (None, None, timms.resize)
    assert parse(Preprocessing, json.loads(json.dumps(asdict(timms)))) == timms


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interpolation": "bicubik"}, "no interpolation 'bicubik'; did you mean 'bicubic'"),
        ({"crop_mode": "middle"}, "no crop mode 'middle'; there are center, squash, border"),
        ({"crop_pct": 87.5}, "such as 0.875, not 87.5"),
        ({"std": (0.2, 0.0, 0.2)}, "above 0"),
        ({"mean": (float("nan"),)}, r"pixels in 0\.\.1"),
    ],
)
def test_no_preprocessing(change, message):
    with pytest.raises(InputError, match=message):
        replace(preprocessing(resolve("resnet50")), **change)


def test_preprocessing_of_torchvision_is_its_own_to_the_pixel():
    from PIL import Image
    from torchvision import models

    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (61, 83, 3), dtype=np.uint8))
    seen = set()
    for name in models.list_models(module=models):
        transforms = models.get_model_weights(name).DEFAULT.transforms()
        how = preprocessing(resolve(f"torchvision/{name}"))
        if how.mean != (0.5, 0.5, 0.5):
            assert (how.mean, how.std) == (tuple(transforms.mean), tuple(transforms.std))
        key = (*transforms.resize_size, *transforms.crop_size, transforms.interpolation)
        if key not in seen:
            seen.add(key)
            size = transforms.crop_size * 2
            pixels = np.asarray(Resize(**how.resize)(photo, tuple(size))).transpose(2, 0, 1) / np.float32(255)
            mean, std = (np.float32(v)[:, None, None] for v in (transforms.mean, transforms.std))
            np.testing.assert_allclose((pixels - mean) / std, transforms(photo).numpy(), atol=1e-5)
    assert len(seen) > 10


def test_preprocessing_stands_in_for_the_conversion_inside_a_model():
    from torchvision import models

    pixels = torch.rand(2, 3, 4, 4)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in IMAGENET_MEAN_STD)
    with torch.device("meta"):
        published = models.googlenet(weights=None, transform_input=True, init_weights=False, aux_logits=False)
    own = preprocessing(resolve("googlenet"))
    own_mean, own_std = (torch.tensor(v).view(1, 3, 1, 1) for v in (own.mean, own.std))
    torch.testing.assert_close((pixels - own_mean) / own_std, published._transform_input((pixels - mean) / std))


def test_a_name_that_the_installed_library_lacks():
    with pytest.raises(InputError, match="has no model 'resnet9000'"):
        BackboneSpec("timm", "resnet9000", 10).build()


def test_a_fresh_process_builds_from_a_description_and_imports_nothing_before():
    code = (
        "import sys; from dvn_cli.backbones import BackboneSpec; assert not {'torch', 'timm'} & set(sys.modules);"
        "print(len(BackboneSpec('timm', 'wrn_14_5', 10).build('meta').state_dict()))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "80"
    )
