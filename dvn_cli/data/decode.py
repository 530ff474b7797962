"""Any image that Pillow opens, as 8-bit grey or colour: upright, opaque, and scaled by what it holds."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dvn_cli.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image, Transpose

FULL_SCALES = {"I": (255, 65535), "F": (1, 255, 65535)}
"""Of images of 32-bit integers and of floats, the values that white may have."""


class Item(NamedTuple):
    """One image of a data set, not decoded yet.

    Attributes:
        where: What a message calls it, such as `train image /data/train/cat/1.jpg`.
        open: Opens it, as `PIL.Image.open` does.
    """

    where: str
    open: Callable[[], "Image"]


@functools.cache
def suffixes() -> frozenset[str]:
    """Returns the suffixes of the files that Pillow decodes, in small letters and with their dots.

    Left out are the formats that it only identifies (HDF5, GRIB and their like need a handler) and films.
    """
    from PIL import Image, ImageFile

    def decoded(kind: str) -> bool:
        factory = Image.OPEN[kind][0] if kind in Image.OPEN else ImageFile.StubImageFile
        stub = isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
        return not stub and not Image.MIME.get(kind, "").startswith("video/")

    return frozenset(suffix.lower() for suffix, kind in Image.registered_extensions().items() if decoded(kind))


def upright(item: Item) -> "Image":
    """Opens and decodes the first frame of an image, turned as the orientation in its metadata says.

    Raises:
        InputError: It is missing, damaged, no image, or larger than Pillow's limit; the message names it.
    """
    with _opened(item) as image:
        image.load()
        method = _transposition(image)
        return image if method is None else image.transpose(method)


def size(item: Item) -> tuple[int, int]:
    """Returns the width and height that an image has upright, from its first bytes. Errors as `upright`."""
    with _opened(item) as image:
        method, (width, height) = _transposition(image), image.size
        return (height, width) if method is not None and method.name in _TURNS else (width, height)


@contextlib.contextmanager
def _opened(item: Item) -> Iterator["Image"]:
    with named(item), item.open() as image:
        yield image


@contextlib.contextmanager
def named(item: Item) -> Iterator[None]:
    """Says of an image what Pillow raises while it is opened, decoded or converted.

    Raises:
        InputError: Pillow refuses it; the message names it.
    """
    from PIL import Image, UnidentifiedImageError

    with warnings.catch_warnings():
        # What Pillow warns of is either no fault of the pixels (odd metadata) or, above its limit of pixels, refused.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except (InputError, MemoryError):
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            limit = f"{Image.MAX_IMAGE_PIXELS:,}"
            raise InputError(f"{item.where} has more pixels than Pillow's limit of {limit}: make it smaller") from None
        except UnidentifiedImageError:
            raise InputError(f"{item.where} is not an image that Pillow can read") from None
        except FileNotFoundError:
            raise InputError(f"{item.where} is missing") from None
        except Exception as error:  # Pillow raises nearly anything at damaged bytes; nothing else runs here
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{item.where} cannot be read: {reason}") from error


_TURNS = {"TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"}


def _transposition(image: "Image") -> "Transpose | None":
    """What brings an image upright, None where it is. Metadata that cannot be read says nothing of the orientation."""
    from PIL.Image import Transpose

    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # as in `_opened`, of the metadata alone: the pixels are whole
        return None
    by_orientation = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return by_orientation.get(orientation) if isinstance(orientation, int) else None


def eight_bit(image: "Image", mode: str, full_scale: Callable[[str], int]) -> "Image":
    """Converts an image to 8-bit grey or colour.

    What is transparent is laid over white. 16-bit values are scaled by their type's range, 0 to 65535; 32-bit integers
    and floats by `full_scale`.

    Args:
        image: As `upright` returns it.
        mode: `L` or `RGB`.
        full_scale: Given `I` or `F`, the value that is white in the images of that mode of the data set.
    """
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        white = full_scale(image.mode) if image.mode in FULL_SCALES else 65535
        values = np.asarray(image)
        pixels = np.empty(values.shape, dtype=np.uint8)
        for start in range(0, len(values), 256):  # some rows at a time, for memory
            rows = slice(start, start + 256)
            pixels[rows] = np.rint(values[rows].astype(np.float64).clip(0, white) * (255 / white))
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            pixels[values == transparent] = 255
        return Image.fromarray(pixels).convert(mode)
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours).convert("RGB").convert(mode)
    return (image.convert("RGB") if image.mode == "LAB" else image).convert(
        mode
    )  # Lab becomes grey by way of RGB alone


def white_of(items: Iterable[Item], mode: str, *, skip: bool = False) -> int:
    """Returns the value that is white in a data set's images of mode `I` or `F`, all of which it decodes.

    It is the smallest of `FULL_SCALES` that none exceeds: one for all images, since a dark one is no measure.

    Args:
        items: The images.
        mode: `I` or `F`; images of other modes do not count.
        skip: Whether images that cannot be read are left out.

    Raises:
        InputError: There are values that are negative, larger or not numbers; the message names the image.
    """
    highest = 0.0
    for item in items:
        with contextlib.suppress(*[InputError] * skip):
            highest = max(highest, _highest(item, mode))
    return next(scale for scale in FULL_SCALES[mode] if highest <= scale)


def _highest(item: Item, mode: str) -> float:
    image, scales = upright(item), FULL_SCALES[mode]
    if image.mode != mode:
        return 0.0
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise InputError(f"{item.where} has values that are not numbers (NaN or infinite)")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > scales[-1]:
        ranges = " or ".join(f"0 to {scale}" for scale in scales)
        raise InputError(f"{item.where} has values from {low:g} to {high:g}: {ranges} are read")
    return high
