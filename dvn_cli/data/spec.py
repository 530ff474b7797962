"""The data of one task, as a recipe's YAML and a checkpoint's metadata describe it."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, PositiveFloat, PositiveInt, model_validator

MAY_DIFFER = "may differ when a run is resumed"
"""Marks a key that says where or how something is computed, not what: a run goes on with another value of it."""

Kind = Literal["digits", "torchvision", "folder", "hf"]
Augmentation = Literal["none", "crop", "crop-flip"]
Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
CropMode = Literal["center", "squash", "border"]

_TAKES: dict[str, set[str]] = {
    "digits": set(),
    "torchvision": {"name", "path", "subset", "test_split"},
    "folder": {"path", "test_split"},
    "hf": {"name", "path", "image", "label", "subset", "test_split"},
}
"""Of the fields that say where images are, those that each kind of source takes."""


def _classes(value: Any) -> int | str | list[int | str]:
    """Checks the type of what is said of classes."""
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, int | str) or isinstance(item, bool):
            raise ValueError(f"give names, indices or ranges of classes, no {type(item).__name__}")
    return value


Classes = Annotated[int | str | list[int | str], PlainValidator(_classes)]


class DataSpec(BaseModel):
    """Where a task's images come from, which of them, and how they are prepared. `model_dump()` is JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Kind = Field(
        description="digits: the handwritten digits that come with dvn; torchvision: one of torchvision.datasets; "
        "folder: images, PATH/train/CLASS/* and PATH/test/CLASS/*, or PATH/CLASS/*, a fifth of which is tested on; "
        "hf: Hugging Face parquet files"
    )
    name: str | None = Field(
        default=None,
        description="torchvision: the data set, such as CIFAR10; hf: the one on the hub, such as user/name",
    )
    path: Annotated[str | None, MAY_DIFFER] = Field(
        default=None,
        description="a local folder, relative to the recipe's or to the working directory: folder, the images; hf, the "
        "parquet files (in place of name); torchvision, where the data set lies or is downloaded to",
    )
    image: str | None = Field(default=None, description="hf: the column of images; the only one by default")
    label: str | None = Field(default=None, description="hf: the column of classes; the only one by default")
    subset: str | None = Field(
        default=None, description="hf: the configuration or sub-folder; torchvision: the split of EMNIST and its like"
    )
    test_split: str | None = Field(
        default=None,
        description="the split to test on; by default test, else validation, valid, val or dev; of a folder, to "
        "evaluate on all its classes, `.`",
    )
    classes: Classes | None = Field(
        default=None,
        description="the classes to keep, in order: names, indices from 0, or ranges of them such as 0-4; all of them. "
        "A name goes before an index: where all names are numbers, 0-4 is the classes named 0, 1, 2, 3 and 4. Names "
        "are taken as written, so that 00009, yes or 1e3 is that class; a number in quotes is a name and no index",
    )
    groups: dict[str, Classes] | None = Field(
        default=None, description="in place of classes: each new class and the old ones that it is made of"
    )
    train_images: PositiveInt | None = Field(
        default=None,
        description="use only so many images of train, what is held out of it included, and of a validation split; all "
        "by default",
    )
    test_images: PositiveInt | None = Field(default=None, description="use only so many images of test; all by default")
    validation: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="the share of train held out to choose by; by default the data set's own validation split (called "
        "validation, valid, val or dev, where there is test beside it), else 0.1",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="of the choice of the images to hold out and of those that limits keep"
    )
    size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = Field(
        default=None, description="resize to so many pixels, or to [height, width]; as they are by default"
    )
    interpolation: Interpolation | None = Field(
        default=None, description="of the resizing, by timm's names; that of the weights to start from, else bilinear"
    )
    crop_pct: float | None = Field(
        default=None,
        ge=0.1,
        le=2,
        description="resize to size / crop_pct and cut size out of the middle; that of the weights to start from, else "
        "height and width are set and nothing is cut off",
    )
    crop_mode: CropMode | None = Field(
        default=None,
        description="with crop_pct, what is resized: center, the shorter side; squash, both; border, the longer one, "
        "the rest filled with the mean",
    )
    augment: Augmentation = Field(
        default="none",
        description="crop: shift at random by up to `pad` pixels; crop-flip: mirror half of them as well",
    )
    pad: PositiveInt = Field(default=4, description="pixels of black around an image before it is cropped at random")
    mean: list[float] | None = Field(
        default=None,
        description="per channel, of pixels in 0..1, subtracted; that of the weights to start from, else of the "
        "training images",
    )
    std: list[PositiveFloat] | None = Field(
        default=None,
        description="per channel, of pixels in 0..1, divided by; that of the weights to start from, else of the "
        "training images",
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
        for source, needed in (("torchvision", "name"), ("folder", "path")):
            if self.source == source and getattr(self, needed) is None:
                raise ValueError(f"source {source} needs {needed}")
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
        return self.path is not None and not Path(self.path).expanduser().is_absolute()


def locate(path: str, base: Path | None) -> Path:
    """Returns the path, a relative one below `base` if it is there, else below the working directory."""
    expanded = Path(path).expanduser()
    return base / expanded if base is not None and (base / expanded).exists() else expanded
