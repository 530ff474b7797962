"""Random changes of training images: timm's own, each key with its effect, repeatable by the seed."""

import random
import re

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from dvn_cli.data import DataSpec, load_task
from dvn_cli.data.augment import Mixing, ResizedCrop, seeded
from dvn_cli.errors import InputError

CROPPED = {"source": "digits", "size": 12, "augment": "resized-crop", "train_images": 40, "test_images": 10}


def batch(seed=0, **keys):
    data = load_task(DataSpec(**{**CROPPED, "workers": 0, **keys}))
    return next(data.train_batches(36, torch.Generator().manual_seed(seed)))


def spec(**keys):
    return DataSpec(**{"source": "digits", "augment": "resized-crop", "size": 20, **keys})


@pytest.mark.parametrize(
    "keys",
    [
        {"scale": [0.9, 1]},
        {"ratio": [1, 1]},
        {"hflip": 0.0},
        {"color_jitter": 0.0},
        {"aa": "rand-m9-mstd0.5"},
        {"aa": "original"},
        {"aa": "augmix-m5-w4-d2"},
        {"reprob": 1.0},
        {"mixup": 0.4},
        {"cutmix": 0.4},
    ],
    ids=str,
)
def test_no_key_is_without_effect(keys):
    (images, labels), (others, other_labels) = batch(), batch(**keys)
    assert not torch.equal(images, others)
    assert {"mixup", "cutmix"} & set(keys) or torch.equal(labels, other_labels)


@pytest.mark.parametrize("aa", [None, "rand-m9-mstd0.5"])
def test_images_are_those_of_timm(aa):
    from timm.data import create_transform

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    transform = ResizedCrop.of(spec(aa=aa, interpolation="bicubic"))
    theirs = create_transform(20, is_training=True, interpolation="bicubic", auto_augment=aa, use_prefetcher=True)
    for index in range(5):
        with seeded(3, index):
            expected = np.asarray(theirs(image))
        assert np.array_equal(np.asarray(transform(image, 3, index)).transpose(2, 0, 1), expected)


def test_nobody_elses_random_numbers_are_moved():
    states = [random.getstate(), torch.get_rng_state(), np.random.get_state()[1]]
    with seeded(1, 2):
        drawn = random.random(), float(np.random.rand()), float(torch.rand(()))
    assert states[0] == random.getstate()
    assert torch.equal(states[1], torch.get_rng_state())
    assert np.array_equal(states[2], np.random.get_state()[1])
    with seeded(1, 2):
        assert drawn == (random.random(), float(np.random.rand()), float(torch.rand(())))
    with seeded(2, 1):
        assert drawn[0] != random.random()


def test_grey_images_stay_grey():
    assert batch(aa="rand-m9-mstd0.5")[0].shape == (36, 3, 12, 12)
    data = load_task(DataSpec(**CROPPED, workers=0, aa="rand-m9-mstd0.5"), channels=1)
    assert next(data.train_batches(36, torch.Generator()))[0].shape == (36, 1, 12, 12)


def test_labels_are_mixed_as_images_are():
    """Each image of a constant value is its class: what a mixture shows is what its labels say."""
    images = torch.arange(8.0).view(-1, 1, 1, 1).expand(-1, 1, 32, 32).contiguous()
    labels = torch.arange(8)
    for alphas in ({"mixup": 1.0, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}):
        mixing = Mixing(reprob=0.0, classes=8, **alphas)
        shares = []
        for seed in range(4):
            mixed, soft = mixing(images, labels, seed, range(8), 8)
            torch.testing.assert_close(soft.sum(1), torch.ones(8))
            torch.testing.assert_close(mixed.mean((1, 2, 3)), soft @ torch.arange(8.0), atol=1e-4, rtol=1e-4)
            shares.append(float(soft.max()))
        assert len(set(shares)) > 1
    both = Mixing(reprob=0.0, mixup=1.0, cutmix=1.0, classes=8)
    flat = [len(both(images, labels, seed, range(8), 8)[0][0].unique()) == 1 for seed in range(12)]
    assert 0 < sum(flat) < 12  # by mixup, of which nothing but one value comes
    assert Mixing.of(spec(), 8) is None


def test_evaluated_images_are_not_changed():
    data, plain = (
        load_task(DataSpec(**CROPPED, workers=0, reprob=1.0)),
        load_task(DataSpec(**{**CROPPED, "augment": "none"})),
    )
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(data, part).images, getattr(plain, part).images)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"augment": "crop", "aa": "v0"}, "aa goes with augment: resized-crop"),
        ({"augment": "none", "scale": [0.1, 1]}, "scale goes with augment: resized-crop"),
        ({"load": "memory"}, "augment resized-crop reads images anew in every epoch: set load to stream or auto"),
        ({"scale": [1, 0.1]}, "scale is the least and the largest: give the smaller number first"),
        ({"ratio": [2, 1]}, "ratio is the least and the largest"),
        ({"scale": [0, 1]}, "greater than 0"),
        ({"reprob": 1.5}, "less than or equal to 1"),
    ],
)
def test_what_goes_together(keys, told):
    with pytest.raises(ValidationError, match=re.escape(told)):
        spec(**keys)


@pytest.mark.parametrize("aa", ["rand-x9", "random", "imagenet", "augmix-q3"])
def test_what_timm_does_not_know_is_refused(aa):
    with pytest.raises(InputError, match=f"^aa '{aa}' is nothing that timm knows, such as rand-m9-mstd0.5 or v0$"):
        load_task(spec(aa=aa))


def test_a_size_is_needed():
    with pytest.raises(InputError, match=r"^augment resized-crop brings images to a size: set size$"):
        load_task(spec(size=None))
