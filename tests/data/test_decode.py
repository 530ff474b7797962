"""Images of every kind that Pillow reads."""

import io
import warnings
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from dvn_cli.data import DataSpec, load_task
from dvn_cli.data.decode import Item, eight_bit, suffixes, upright, white_of
from dvn_cli.errors import InputError

PHOTO = Image.fromarray(np.random.RandomState(0).randint(0, 256, (5, 7, 3), dtype=np.uint8))


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def stored(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def item(content, where="image x"):
    return Item(where, lambda: Image.open(io.BytesIO(content)))


def read(image, kind="PNG", mode="RGB", **options):
    """What becomes of an image that is saved and read again."""
    one = item(stored(image, kind, **options))
    return np.asarray(eight_bit(upright(one), mode, partial(white_of, [one])))


def classes_of(folder, files, test=None):
    """A folder of two classes with the same images, given by name."""
    for split, images in (("train", files), ("test", test or files)):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for file, image in images.items():
                image.save(folder / split / name / file)
    return DataSpec(source="folder", path=str(folder), validation=0)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_followed(kind, orientation):
    content = stored(PHOTO, kind, exif=exif(orientation))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    found = upright(item(content)).convert("RGB")
    assert found.size == ((5, 7) if orientation > 4 else (7, 5))
    assert np.array_equal(found, expected)


def test_images_of_a_phone_are_trained_upright(tmp_path):
    spec = classes_of(tmp_path, {"1.png": PHOTO})
    turned = PHOTO.transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "train" / "b" / "1.png", exif=exif(6))
    data = load_task(spec)
    assert data.input_size == (5, 7)
    assert np.array_equal(data.train.images[0], data.train.images[1])


@pytest.mark.parametrize("tags", [b"", b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", exif(99)])
def test_metadata_that_say_nothing_leave_the_image_as_it_is(tags):
    content = stored(PHOTO, "JPEG", exif=tags, quality=100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of this reading, which is not dvn's
        expected = np.asarray(Image.open(io.BytesIO(content)))
    assert np.array_equal(upright(item(content)), expected)


def transparent_images():
    """Images of a left half that is seen, of value 80, and a right half that is not, by how they say so."""
    half = Image.new("L", (4, 2), 0)
    half.paste(255, (0, 0, 2, 2))
    grey = Image.new("L", (4, 2), 10)
    grey.paste(80, (0, 0, 2, 2))
    palette = grey.convert("P")
    index = palette.getpixel((3, 0))
    by_index = [255] * 256
    by_index[index] = 0
    yield "RGBA", Image.merge("RGBA", [grey, grey, grey, half]), {}
    yield "LA", Image.merge("LA", [grey, half]), {}
    yield "P, an index", palette, {"transparency": index}
    yield "P, bytes", palette, {"transparency": bytes(by_index)}
    yield "L, a value", grey, {"transparency": 10}
    yield "RGB, a value", grey.convert("RGB"), {"transparency": (10, 10, 10)}
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    yield "16 bits, a value", deep, {"transparency": 2570}


@pytest.mark.parametrize(("image", "options"), [case[1:] for case in transparent_images()],
                         ids=[case[0] for case in transparent_images()])  # fmt: skip
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_what_is_transparent_is_white(image, options, mode):
    pixels = read(image, mode=mode, **options)
    assert (pixels[:, :2] == 80).all()
    assert (pixels[:, 2:] == 255).all()


def test_what_is_half_transparent_is_mixed_with_white_and_what_is_opaque_is_not():
    image = PHOTO.copy()
    image.putalpha(255)
    assert np.array_equal(read(image), PHOTO)
    image.putalpha(51)
    assert np.abs(read(image) - (np.asarray(PHOTO) * 0.2 + 255 * 0.8)).max() <= 1


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=9))
@settings(max_examples=30, deadline=None)
def test_sixteen_bits_are_scaled_by_their_range(values):
    image = Image.fromarray(np.array([values], dtype=np.uint16))
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(read(image, kind, "L")[0], np.rint(np.array(values) / 257))


@given(st.sampled_from([(np.float32, 1), (np.float32, 255), (np.float32, 65535), (np.int32, 255), (np.int32, 65535)]),
       st.lists(st.floats(0, 1), min_size=1, max_size=9))  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_floats_and_integers_are_scaled_by_what_the_data_set_holds(kind, shares):
    """However dark an image is, and whatever its neighbours show."""
    dtype, white = kind
    images = [np.array([row], dtype=dtype) for row in (np.array(shares) * white, [white * 0.9] * len(shares))]
    items = [item(stored(Image.fromarray(image), "TIFF")) for image in images]
    for image, one in zip(images, items, strict=True):
        found = np.asarray(eight_bit(upright(one), "L", partial(white_of, items)))
        assert np.array_equal(found, np.rint(image.astype(float) / white * 255))


def test_a_dark_float_image_is_dark_in_a_task(tmp_path):
    bright, dark = (Image.fromarray(np.full((2, 2), value, dtype=np.float32)) for value in (200, 1))
    data = load_task(classes_of(tmp_path, {"1.tif": dark, "2.tif": bright}))
    assert data.train.images[:, 0, 0, 0].tolist() == [1, 200, 1, 200]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5, float("nan")], "train image .*2.tif has values that are not numbers"),
        ([0.5, float("inf")], "train image .*2.tif has values that are not numbers"),
        ([-1, 1], "train image .*2.tif has values from -1 to 1: 0 to 1 or 0 to 255 or 0 to 65535 are read"),
        ([0, 1e6], "train image .*2.tif has values from 0 to 1e.06"),
    ],
)
def test_values_that_have_no_meaning_are_refused(tmp_path, values, message):
    good = Image.fromarray(np.full((1, 2), 0.5, dtype=np.float32))
    odd = Image.fromarray(np.array([values], dtype=np.float32))
    with pytest.raises(InputError, match=message):
        load_task(classes_of(tmp_path, {"1.tif": good, "2.tif": odd}))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "LA"])
@pytest.mark.parametrize("to", ["L", "RGB"])
def test_every_mode_becomes_grey_and_colour(mode, to):
    image = Image.new("RGB", (3, 2), (200, 200, 200)).convert(mode if mode != "I;16" else "L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    found = eight_bit(image, to, lambda _: 255)
    assert found.mode == to
    if mode != "1":
        assert np.abs(np.asarray(found).astype(int) - 200).max() <= 4  # 204 is in the usual palette


def test_every_kind_that_pillow_writes_is_read(tmp_path):
    written = []
    (tmp_path / "a").mkdir()
    for suffix in sorted(suffixes()):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of kinds that it will not write for ever
                PHOTO.resize((32, 32)).save(tmp_path / "a" / f"photo{suffix}")
            written.append(suffix)
        except (KeyError, OSError, ValueError):  # it writes no such files, or not in colour
            (tmp_path / "a" / f"photo{suffix}").unlink(missing_ok=True)
    assert {".jpg", ".jfif", ".png", ".gif", ".webp", ".tif", ".bmp", ".ppm", ".ico"} <= set(written)
    if ".eps" in written:  # is read by Ghostscript, which not every machine has
        for suffix in (".eps", ".ps"):
            (tmp_path / "a" / f"photo{suffix}").unlink()
            written.remove(suffix)
    (tmp_path / "b").mkdir()
    for file in (tmp_path / "a").iterdir():
        (tmp_path / "b" / file.name.upper()).write_bytes(file.read_bytes())
    data = load_task(DataSpec(source="folder", path=str(tmp_path), validation=0, size=32))
    assert len(data.train) + len(data.test) == 2 * len(written)
    assert not {".txt", ".h5", ".mpg", ".mpeg", ".pdf", ".npy"} & suffixes()


def test_of_a_film_the_first_frame_is_read():
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        pixels = read(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert (pixels == (255, 0, 0)).all()


@pytest.mark.parametrize("pixels", [60, 90])  # Pillow warns of the first and refuses the second
def test_an_image_above_the_limit_is_one_line(tmp_path, monkeypatch, pixels):
    spec = classes_of(tmp_path, {"1.png": PHOTO})
    Image.new("1", (pixels, 1)).save(tmp_path / "train" / "b" / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(InputError, match=r"train image .*/train/b/big.png has more pixels than Pillow's limit of 40"):
        load_task(spec)


CONTENTS = [stored(PHOTO.resize((40, 30)), kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")]


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_whatever_the_bytes_an_image_is_read_or_named(data):
    content = bytearray(data.draw(st.sampled_from(CONTENTS)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(0, len(content)))])
    one = item(content, "image 'x'")
    try:
        found = eight_bit(upright(one), "RGB", partial(white_of, [one]))
    except InputError as error:
        found, problem = None, str(error)
    if found is None:
        assert problem.startswith("image 'x' ")
        assert "\n" not in problem
    else:
        assert found.mode == "RGB"


def without_palette():
    """A PNG of indices into a palette that is not there: it is decoded, and cannot be converted."""
    content = stored(Image.new("P", (4, 4)), "PNG")
    start = content.index(b"PLTE") - 4
    return content[:start] + content[start + 12 + int.from_bytes(content[start : start + 4], "big") :]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-50]), "test image .*/test/b/1.png cannot be read: "),
        (lambda file: file.write_bytes(b""), "test image .*/test/b/1.png is not an image that Pillow can read"),
        (lambda file: file.write_text("<html>404</html>"), "test image .*/test/b/1.png is not an image"),
        (lambda file: file.write_bytes(without_palette()), "test image .*/test/b/1.png cannot be read: "),
        (lambda file: (file.unlink(), file.symlink_to("nowhere.png")), "test image .*/test/b/1.png is missing"),
        (lambda file: (file.unlink(), file.symlink_to(file)), "test image .*/test/b/1.png cannot be read: .*symbolic"),
    ],
)
def test_a_damaged_image_is_named(tmp_path, make, message):
    spec = classes_of(tmp_path, {"1.png": PHOTO.resize((30, 30))})
    make(tmp_path / "test" / "b" / "1.png")
    with pytest.raises(InputError, match=message):
        load_task(spec)
