"""The data of one task, as a recipe's YAML and a checkpoint's metadata describe it."""

import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PlainValidator,
    PositiveFloat,
    PositiveInt,
    WithJsonSchema,
    model_validator,
)

from dvn_cli.errors import InputError
from dvn_cli.store.metadata import CropMode, Interpolation

MAY_DIFFER = "may differ when a run is resumed"
"""Marks a key that says where or how something is computed, not what: a run goes on with another value of it."""

Kind = Literal["digits", "torchvision", "folder", "hf", "webdataset"]
Augmentation = Literal["none", "crop", "crop-flip", "resized-crop"]

Share = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]

_TAKES: dict[str, set[str]] = {
    "digits": set(),
    "torchvision": {"name", "path", "subset", "test_split"},
    "folder": {"path", "test_split"},
    "hf": {"name", "path", "image", "label", "subset", "test_split"},
    "webdataset": {"path", "image", "label", "test_split"},
}
"""Of the fields that say where images are, those that each kind of source takes."""


def _classes(value: Any) -> int | str | list[int | str]:
    """Checks the type of what is said of classes."""
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, int | str) or isinstance(item, bool):
            raise ValueError(f"give names, indices or ranges of classes, no {type(item).__name__}")
    return value


_CLASS = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
Classes = Annotated[
    int | str | list[int | str],
    PlainValidator(_classes),
    WithJsonSchema({"anyOf": [*_CLASS["anyOf"], {"type": "array", "items": _CLASS}]}),
]


class DataSpec(BaseModel):
    """Where a task's images come from, which of them, and how they are prepared. `model_dump()` is JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    source: Kind = Field(
        description="digits: the handwritten digits that come with dvn. torchvision: a data set of "
        "torchvision.datasets. folder: images in PATH/train/CLASS/* and PATH/test/CLASS/*, or in "
        "PATH/CLASS/*, a fifth of which becomes the test images. hf: Hugging Face parquet files. webdataset: tar files "
        "of images and labels, called train-0000.tar and test-0000.tar or their like; without such names, a fifth of "
        "the images becomes the test images."
    )
    name: str | None = Field(
        default=None,
        description="torchvision: name of the data set, such as CIFAR10. hf: its name on the hub, such as user/name.",
    )
    path: Annotated[str | None, MAY_DIFFER] = Field(
        default=None,
        description="Local folder, relative to the recipe's or to the working directory. folder: of the images. hf:"
        " of the parquet files (instead of `name`). torchvision: where the data set is or is downloaded"
        " to. webdataset: of the tar files, or one of them, or several such as data-{000..123}.tar.",
    )
    image: str | None = Field(
        default=None,
        description="hf: column of the images. By default the only column of images. webdataset: suffix of the "
        "images, such as jpg or seg.png. By default any that is an image's.",
    )
    label: str | None = Field(
        default=None,
        description="hf: column of the classes. By default the only such column. webdataset: suffix of the files that "
        "hold a class, as a number or a name. By default cls.",
    )
    subset: str | None = Field(
        default=None,
        description="hf: configuration or sub-folder. torchvision: the split of EMNIST and data sets like it.",
    )
    test_split: str | None = Field(
        default=None,
        description="Split to test on. By default test, otherwise validation, valid, val or dev. In a folder, `.` "
        "stands for all of its classes.",
    )
    classes: Classes | None = Field(
        default=None,
        description="Classes to keep, in this order: names, indices from 0, or ranges of indices such as 0-4. By "
        "default all. A name takes precedence over an index: where all names are numbers, 0-4 stands "
        "for the classes named 0, 1, 2, 3 and 4. Names are taken as written, so 00009, yes and 1e3 are "
        "those names; a number in quotes is always a name.",
    )
    groups: dict[str, Classes] | None = Field(
        default=None, description="New classes, each with the old ones that it is made of; instead of `classes`."
    )
    train_images: PositiveInt | None = Field(
        default=None,
        description="Maximum number of training images, including those held out for validation; it also limits a "
        "validation split. By default all.",
    )
    test_images: PositiveInt | None = Field(default=None, description="Maximum number of test images. By default all.")
    validation: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Fraction of the training images to hold out for validation. By default the data set's own "
        "validation split is used (named validation, valid, val or dev, beside a test split), otherwise"
        " 0.1.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="Seed for choosing the images to hold out and those kept by `train_images` and `test_images`.",
    )
    size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = Field(
        default=None,
        description="Size to resize images to in pixels, one number or [height, width]. By default images keep "
        "their size.",
    )
    interpolation: Interpolation | None = Field(
        default=None,
        description="Interpolation used in resizing, by timm's names. By default that of the weights to start from,"
        " otherwise bilinear.",
    )
    crop_pct: float | None = Field(
        default=None,
        ge=0.1,
        le=2,
        description="Resize to size / crop_pct, then crop the center to size, as timm does. By default as for the "
        "weights to start from; without any, images are resized to size without a crop.",
    )
    crop_mode: CropMode | None = Field(
        default=None,
        description="With crop_pct: center resizes the shorter side, squash both sides, border the longer side, "
        "filling the rest with the mean.",
    )
    augment: Augmentation = Field(
        default="none",
        description="Augmentation of training images. crop: random shifts by up to `pad` pixels. crop-flip: random "
        "horizontal flips too. resized-crop: timm's transform of training images, set by `scale`, `ratio`, `hflip`, "
        "`color_jitter` and `aa`; the images are then read anew in every epoch.",
    )
    pad: PositiveInt = Field(default=4, le=10**6, description="Pixels of black border added before a random crop.")
    scale: tuple[Share, Share] | None = Field(
        default=None,
        description="resized-crop: least and largest share of an image's area that a random crop has, before it is "
        "resized to `size`. By default 0.08 and 1.",
    )
    ratio: tuple[PositiveFloat, PositiveFloat] | None = Field(
        default=None,
        description="resized-crop: least and largest ratio of width to height of a random crop. By default 3/4 and "
        "4/3.",
    )
    hflip: Probability | None = Field(
        default=None, description="resized-crop: probability of a horizontal flip. By default 0.5."
    )
    color_jitter: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="resized-crop: by how much brightness, contrast and saturation vary. By default 0.4; with `aa` not "
        "at all.",
    )
    aa: str | None = Field(
        default=None,
        description="resized-crop: RandAugment, AutoAugment or AugMix by timm's names, such as rand-m9-mstd0.5, "
        "original or augmix-m5-w4-d2. By default none.",
    )
    reprob: Probability = Field(
        default=0.0, description="Probability that a random rectangle of a training image is replaced by noise."
    )
    mixup: float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="Mixup alpha: training images and labels are mixed with another one's in a share drawn from the "
        "beta distribution of this parameter. 0: they are not. With `cutmix`, each batch gets one of the two.",
    )
    cutmix: float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="Cutmix alpha: a rectangle of each training image is replaced by that of another one, and labels "
        "are mixed by its area, drawn as for `mixup`. 0: it is not.",
    )
    mean: list[float] | None = Field(
        default=None,
        description="Mean of each channel, for pixels in 0..1, subtracted from images. By default that of the "
        "weights to start from, otherwise of the training images.",
    )
    std: list[PositiveFloat] | None = Field(
        default=None,
        description="Standard deviation of each channel, for pixels in 0..1, by which images are divided. By "
        "default that of the weights to start from, otherwise of the training images.",
    )

    load: Annotated[Literal["auto", "memory", "stream"], MAY_DIFFER] = Field(
        default="auto",
        description="memory: images are decoded once, at one size, and kept. stream: they are read anew in every "
        "epoch, by `workers`. auto: memory for what takes at most 1.5 GiB and half of what is free, the smallest "
        "splits first.",
    )
    workers: Annotated[NonNegativeInt | None, MAY_DIFFER] = Field(
        default=None,
        le=1024,
        description="Processes that read the images of the task where they are streamed; 0: the one that trains. The "
        "batches do not depend on it. By default as many as there are cores, at most 4.",
    )
    on_bad_image: Annotated[Literal["stop", "skip"], MAY_DIFFER] = Field(
        default="stop",
        description="What is done at an image that cannot be read. stop: it is named, and the command ends. skip: it "
        "is left out, named and counted.",
    )

    @model_validator(mode="after")
    def _fields_of_the_source(self) -> "DataSpec":
        takes = _TAKES[self.source]
        given = {field for field in set.union(*_TAKES.values()) if getattr(self, field) is not None}
        if given - takes:
            allowed = ", ".join(sorted(takes)) or "none of them"
            raise ValueError(f"source {self.source} takes no {sorted(given - takes)[0]} (it takes: {allowed})")
        if self.source == "hf" and (self.name is None) == (self.path is None):
            raise ValueError("source hf needs either name (on the hub) or path (a local folder)")
        for source, needed in (("torchvision", "name"), ("folder", "path"), ("webdataset", "path")):
            if self.source == source and getattr(self, needed) is None:
                raise ValueError(f"source {source} needs {needed}")
        of_crop = [key for key in ("scale", "ratio", "hflip", "color_jitter", "aa") if getattr(self, key) is not None]
        if of_crop and self.augment != "resized-crop":
            raise ValueError(f"{of_crop[0]} goes with augment: resized-crop")
        if self.augment == "resized-crop" and self.load == "memory":
            raise ValueError("augment resized-crop reads images anew in every epoch: set load to stream or auto")
        for key in ("scale", "ratio"):
            limits = getattr(self, key)
            if limits is not None and limits[0] > limits[1]:
                raise ValueError(f"{key} is the least and the largest: give the smaller number first")
        if self.classes is not None and self.groups is not None:
            raise ValueError("give classes or groups, not both")
        resizing = [key for key in ("interpolation", "crop_pct", "crop_mode") if getattr(self, key) is not None]
        if resizing and self.size is None:
            raise ValueError(f"{resizing[0]} says how images are brought to a size: give size too")
        return self

    @property
    def height_width(self) -> tuple[int, int] | None:
        """The size to resize to, or None."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def has_relative_path(self) -> bool:
        """Whether the path is relative, so that the folder it starts from must be known to read the data again."""
        return self.path is not None and not os.path.isabs(os.path.expanduser(self.path))


def locate(path: str, base: Path | None) -> Path:
    """Returns the path, a relative one below `base` if it is there, else below the working directory.

    Raises:
        InputError: There is a NUL in it, which no system takes.
    """
    if "\0" in path:
        raise InputError(f"there is a NUL in the path {path!r}")
    expanded = os.path.expanduser(path)
    if base is not None and any(os.path.exists(base / one) for one in (expanded, *islice(braces(expanded), 1))):
        return base / expanded
    return Path(expanded)


def braces(pattern: str) -> Iterator[str]:
    """Yields the paths of a pattern as shells and WebDataset have them: `{000..123}` and `{a,b}`."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if found is None:
        yield pattern
        return
    first, last, words = found.groups()
    numbers = () if words else (f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))
    for part in words.split(",") if words else numbers:
        yield from braces(pattern[: found.start()] + part + pattern[found.end() :])
