"""Images brought to their size, beside what timm and PIL make of them."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from timm.data import create_transform

from dvn_cli.data import DataSpec, load_task
from dvn_cli.data.resize import Resize
from dvn_cli.data.spec import CropMode, Interpolation
from dvn_cli.errors import InputError

SIZES = st.tuples(st.integers(8, 40), st.integers(8, 40))


def photo(height: int, width: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@settings(max_examples=25, deadline=None)
@given(SIZES, SIZES, st.sampled_from(get_args(Interpolation)), st.floats(0.3, 1.2), st.sampled_from(get_args(CropMode)))
def test_pixels_are_those_of_timm(
    before: tuple[int, int], size: tuple[int, int], interpolation: str, crop_pct: float, crop_mode: str
) -> None:
    mean = (0.1, 0.5, 0.9)
    timms = create_transform(
        size,
        interpolation=interpolation,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        mean=mean,
        std=(1.0, 1.0, 1.0),
    )
    ours = Resize(interpolation, crop_pct, crop_mode, mean if crop_mode == "border" else None)(photo(*before), size)
    expected = timms(photo(*before)).numpy() + np.float32(mean)[:, None, None]
    np.testing.assert_array_equal(np.asarray(ours).transpose(2, 0, 1), np.rint(expected * 255))


@settings(max_examples=10, deadline=None)
@given(SIZES, SIZES, st.sampled_from(["L", "RGB"]))
def test_by_default_height_and_width_are_set_and_nothing_is_cut_off(
    before: tuple[int, int], size: tuple[int, int], mode: str
) -> None:
    expected = photo(*before, mode).resize(size[::-1], Image.Resampling.BILINEAR)
    assert Resize()(photo(*before, mode), size).tobytes() == expected.tobytes()


def test_what_a_tasks_data_says() -> None:
    assert Resize.of(DataSpec(source="digits")) == Resize()
    assert Resize.of(DataSpec(source="digits", size=9)) == Resize()
    said = DataSpec(source="digits", size=9, interpolation="bicubic", crop_pct=0.9, crop_mode="border", mean=[0.5])
    assert Resize.of(said) == Resize("bicubic", 0.9, "border", (0.5,))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"crop_pct": 0.9}, "crop_pct says how images are brought to a size: give size too"),
        ({"interpolation": "bicubic"}, "give size too"),
        ({"size": 8, "crop_pct": 87.5}, "less than or equal to 2"),
        ({"size": 8, "interpolation": "cubic"}, "bicubic"),
    ],
)
def test_what_says_nothing_is_refused(keys: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataSpec(source="digits", **keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"crop_mode": "center"}, "crop_mode center needs crop_pct, such as 1.0"),
        ({"crop_mode": "border", "crop_pct": 1.0}, "border fills what is missing with the mean: give mean and std too"),
    ],
)
def test_a_crop_that_lacks_what_it_goes_by_is_refused(keys: dict, message: str) -> None:
    """Weights may bring it, so it is told when a task is read."""
    with pytest.raises(InputError, match=message):
        load_task(DataSpec(source="digits", size=8, **keys))


@pytest.mark.parametrize("interpolation", get_args(Interpolation))
@pytest.mark.parametrize("crop_mode", get_args(CropMode))
@pytest.mark.parametrize("crop_pct", [None, 1.0])
def test_an_image_of_its_size_is_left_as_timm_leaves_it(
    interpolation: str, crop_mode: str, crop_pct: float | None
) -> None:
    image = photo(20, 30)
    timms = create_transform(
        (20, 30), interpolation=interpolation, crop_pct=1.0, crop_mode=crop_mode, use_prefetcher=True
    )
    ours = Resize(interpolation, crop_pct, crop_mode)(image, (20, 30))
    assert np.array_equal(np.asarray(ours).transpose(2, 0, 1), timms(image))
