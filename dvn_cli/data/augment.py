"""Random changes of training images: of single ones while they are read, and of whole batches where they are used."""

import contextlib
import functools
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dvn_cli.data.spec import DataSpec
from dvn_cli.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Lets what Python, numpy and torch's CPU draw at random depend on some numbers alone; afterwards all is as before.

    timm's and torchvision's transforms draw from all three, and take no generator.
    """
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


class ResizedCrop(NamedTuple):
    """timm's transform of training images: a random part resized, mirrored, its colours changed; keys of `DataSpec`.

    Attributes:
        size: Height and width that images get.
        mean: Per channel, of pixels in 0..1, what `aa` fills with.
    """

    size: tuple[int, int]
    interpolation: str
    scale: tuple[float, float]
    ratio: tuple[float, float]
    hflip: float
    color_jitter: float
    aa: str | None
    mean: tuple[float, ...]

    @classmethod
    def of(cls, spec: DataSpec) -> "ResizedCrop | None":
        """What a task's data says, with timm's defaults; None where its images are not cropped so.

        Raises:
            InputError: There is no size, or `aa` is nothing that timm knows.
        """
        if spec.augment != "resized-crop":
            return None
        from timm.data import IMAGENET_DEFAULT_MEAN

        if spec.height_width is None:
            raise InputError("augment resized-crop brings images to a size: set size")
        mean = tuple(spec.mean) if spec.mean is not None and len(spec.mean) == 3 else IMAGENET_DEFAULT_MEAN
        transform = cls(
            spec.height_width,
            spec.interpolation or "bilinear",
            spec.scale or (0.08, 1.0),
            spec.ratio or (3 / 4, 4 / 3),
            0.5 if spec.hflip is None else spec.hflip,
            0.4 if spec.color_jitter is None else spec.color_jitter,
            spec.aa,
            mean,
        )
        try:
            _steps(transform)
        except Exception as error:  # timm asserts and converts numbers: whatever it raises, the text is wrong
            raise InputError(f"aa '{spec.aa}' is nothing that timm knows, such as rand-m9-mstd0.5 or v0") from error
        return transform

    def __call__(self, image: "Image", seed: int, index: int) -> "Image":
        """Returns an image in colour at the size, changed as the seed and the image's index have it."""
        with seeded(seed, index):
            return _steps(self)(image)


@functools.lru_cache(maxsize=16)
def _steps(crop: ResizedCrop) -> Any:
    """timm's transform without its last step, which makes a tensor of a PIL image."""
    from timm.data import create_transform
    from torchvision.transforms import Compose

    transform = create_transform(
        crop.size,
        is_training=True,
        scale=crop.scale,
        ratio=crop.ratio,
        hflip=crop.hflip,
        color_jitter=crop.color_jitter,
        auto_augment=crop.aa,
        interpolation=crop.interpolation,
        mean=crop.mean,
        use_prefetcher=True,
    )
    return Compose(transform.transforms[:-1])


class Mixing(NamedTuple):
    """Changes of whole batches, normalised and on their device; keys of `DataSpec`.

    Attributes:
        classes: How many the task has.
    """

    reprob: float
    mixup: float
    cutmix: float
    classes: int

    @classmethod
    def of(cls, spec: DataSpec, classes: int) -> "Mixing | None":
        """What a task's data says; None where batches stay as they are."""
        mixing = cls(spec.reprob, spec.mixup, spec.cutmix, classes)
        return mixing if any(mixing[:3]) else None

    @property
    def mixes(self) -> bool:
        """Whether an image is mixed with the one before it in the batch, and the first one with the last."""
        return self.mixup > 0 or self.cutmix > 0

    def __call__(
        self, images: Tensor, labels: Tensor, seed: int, places: Sequence[int], count: int
    ) -> tuple[Tensor, Tensor]:
        """Returns the images with parts erased, and mixed with others of the batch; then labels are (B, classes).

        Args:
            images: (B, C, H, W), a batch or some of it.
            labels: (B,).
            seed: Of the batch.
            places: Of each image in the batch.
            count: How many images the batch has: what is done to one does not depend on which others are given.
        """
        from timm.data.random_erasing import RandomErasing
        from torchvision.transforms import v2

        mixes = [v2.MixUp(alpha=self.mixup, num_classes=self.classes)] if self.mixup else []
        mixes += [v2.CutMix(alpha=self.cutmix, num_classes=self.classes)] if self.cutmix else []
        with seeded(seed):
            if self.reprob:
                # The noise is drawn on the CPU, so that every device has the same.
                erase = RandomErasing(self.reprob, mode="pixel", device="cpu")
                given, absent = dict(zip(places, images, strict=True)), torch.empty_like(images[0])
                for place in range(count):
                    erase(given.get(place, absent))
            return v2.RandomChoice(mixes)(images, labels) if mixes else (images, labels)
