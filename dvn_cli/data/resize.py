"""How a decoded image is brought to its size: interpolation and crop, with timm's own evaluation transform."""

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from dvn_cli.data.spec import DataSpec

if TYPE_CHECKING:
    from PIL.Image import Image


class Resize(NamedTuple):
    """The way to a size; names and values are timm's, and so are the pixels.

    Attributes:
        interpolation: One of PIL's filters.
        crop_pct: The share of each side that a crop from the middle keeps of the resized image; above 1 it is padded
            instead. None: height and width are set and nothing is cropped.
        crop_mode: `center`: the shorter side is resized to size / crop_pct; `squash`: both; `border`: the longer side,
            and what is missing is filled.
        fill: Per channel, of pixels in 0..1, what it is filled with; None where nothing is.
    """

    interpolation: str = "bilinear"
    crop_pct: float | None = None
    crop_mode: str = "center"
    fill: tuple[float, ...] | None = None

    @classmethod
    def of(cls, spec: DataSpec) -> "Resize":
        """What a task's data says; where it sets no size, images stay as they are and this says nothing."""
        if spec.size is None:
            return cls()
        fill = tuple(spec.mean) if spec.crop_mode == "border" and spec.mean is not None else None
        return cls(spec.interpolation or "bilinear", spec.crop_pct, spec.crop_mode or "center", fill)

    def __call__(self, image: "Image", size: tuple[int, int]) -> "Image":
        """Returns the image at a size, height and width in pixels."""
        if self.crop_pct in (None, 1) and (image.height, image.width) == size:
            return image  # as timm leaves it; to import timm takes seconds
        return _steps(self, size)(image)


@functools.lru_cache(maxsize=16)
def _steps(resize: Resize, size: tuple[int, int]) -> Any:
    """timm's transform without its last step, which makes a tensor of a PIL image."""
    from timm.data import create_transform
    from torchvision.transforms import Compose

    mode = "squash" if resize.crop_pct is None else resize.crop_mode
    options: dict[str, Any] = {"mean": resize.fill} if resize.fill else {}
    transform = create_transform(
        size,
        interpolation=resize.interpolation,
        crop_pct=resize.crop_pct or 1.0,
        crop_mode=mode,
        use_prefetcher=True,
        **options,
    )
    return Compose(transform.transforms[:-1])
