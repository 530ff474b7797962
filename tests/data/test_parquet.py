"""Which columns of parquet files are images and labels, and which classes labels without names are."""

import io
import json
import os
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dvn_cli.data import DataSpec, load_task, load_test
from dvn_cli.errors import InputError

IMAGE = {"_type": "Image"}


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(buffer, "png")
    return buffer.getvalue()


PIXELS = [png(value) for value in range(60)]


def struct(count: int) -> list[dict]:
    return [{"bytes": PIXELS[number], "path": None} for number in range(count)]


def write(root, features=None, **splits):
    """Parquet files of columns by split; `features` is the data set's own description, as `datasets` writes it."""
    for split, columns in splits.items():
        table = pa.table(columns)
        if features is not None:
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        root.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, root / f"{split}-0.parquet")


def rows(labels, **columns):
    return {"image": struct(len(labels)), "label": labels, **columns}


def task(root, **fields):
    return load_task(DataSpec(source="hf", path=str(root), **fields))


def labels_of(data):
    """The name of the class of each image by its pixels, of train and validation."""
    return {
        int(image[0, 0, 0]): data.classes[label]
        for split in (data.train, data.validation)
        for image, label in zip(split.images, split.labels, strict=True)
    }


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=5, unique=True),
    st.sampled_from(["int64", "dictionary"]),
    st.randoms(use_true_random=False),
)
def test_integers_without_names_are_the_names(tmp_path_factory, values, kind, random):
    root = tmp_path_factory.mktemp("integers")
    column = [*values * 6]
    random.shuffle(column)
    typed = pa.array(column, pa.int64())
    write(root, train=rows(typed.dictionary_encode() if kind == "dictionary" else typed), test=rows(values[:1] * 2))
    data = task(root)
    assert data.classes == tuple(map(str, sorted(values)))
    assert labels_of(data) == {number: str(value) for number, value in enumerate(column)}
    assert {data.classes[label] for label in data.test.labels} == {str(values[0])}
    some = task(root, classes=[str(value) for value in values[:2]], validation=0)
    assert some.classes == (str(values[0]), str(values[1]))


def test_memory_follows_the_number_of_images(tmp_path):
    write(tmp_path, train=rows([7, 2_000_000_000] * 10), test=rows([7, 2_000_000_000]))
    tracemalloc.start()
    try:
        assert task(tmp_path).classes == ("7", "2000000000")
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("column", "classes"),
    [
        (pa.array([True, False] * 5), ("false", "true")),
        (pa.array([1, 0] * 5, pa.uint8()), ("0", "1")),
        (pa.array([2**64 - 1, 5] * 5, pa.uint64()), ("5", "18446744073709551615")),
        (pa.array(["no", "1e3"] * 5, pa.large_string()), ("1e3", "no")),
        (pa.array(["b", "a"] * 5).dictionary_encode(), ("a", "b")),
        (pa.array(["10", "9"] * 5), ("10", "9")),
    ],
)
@pytest.mark.parametrize("images", [pa.large_binary(), pa.binary(), None])
def test_columns_are_found_by_their_types(tmp_path, column, classes, images):
    pixels = struct(10) if images is None else pa.array(PIXELS[:10], images)
    columns = {"what": column, "picture": pixels, "width": [1.5] * 10, "note": pa.nulls(10)}
    write(tmp_path, train=columns, test=columns)
    data = task(tmp_path)
    assert data.classes == classes
    if len(set(column.to_pylist())) == 2:
        assert labels_of(data)[1] == labels_of(data)[3] != labels_of(data)[0]


NAMES = {"_type": "ClassLabel", "names": ["ant", "bee"]}


@pytest.mark.parametrize("features", [None, {"sample": {"photo": IMAGE, "meta": {"class": NAMES}}}])
@pytest.mark.parametrize("fields", [{}, {"image": "sample.photo", "label": "sample.meta.class"}])
def test_nested_columns(tmp_path, features, fields):
    nested = {"sample": [{"photo": image, "meta": {"class": n % 2}} for n, image in enumerate(struct(20))]}
    write(tmp_path, features, train=nested, test=nested)
    data = task(tmp_path, **fields)
    assert data.classes == (("0", "1") if features is None else ("ant", "bee"))
    assert all(name == data.classes[number % 2] for number, name in labels_of(data).items())


def test_a_column_with_a_dot_in_its_name(tmp_path):
    columns = {"a.b": [0, 1] * 10, "a": [{"b": "x"}] * 20, "image": struct(20)}
    write(tmp_path, train=columns, test=columns)
    assert task(tmp_path, label="a.b").classes == ("0", "1")


def test_names_that_only_one_split_has_or_has_in_another_order(tmp_path):
    features = {"image": IMAGE, "label": NAMES}
    write(tmp_path, features, train=rows([0, 1] * 10))
    write(tmp_path, None, test=rows([0, 1, 1]))
    assert task(tmp_path, label="label").test.labels.tolist() == [0, 1, 1]
    write(tmp_path, {**features, "label": {**NAMES, "names": ["bee", "ant"]}}, validation=rows([0, 1, 1]))
    assert task(tmp_path, test_split="validation").test.labels.tolist() == [1, 0, 0], "by name"


def test_test_images_alone_are_of_the_classes_that_they_have(tmp_path):
    write(tmp_path, test=rows([3, 17, 3]))
    assert load_test(DataSpec(source="hf", path=str(tmp_path)))[1] == ("3", "17")


@pytest.mark.parametrize(
    ("columns", "fields", "told"),
    [
        ({"label": range(30)}, {}, "no column of labels, unless it is 'label', which is another for every image"),
        ({"uid": [f"x{n}" for n in range(30)]}, {}, "unless it is 'uid', .* name one with label: image, uid"),
        ({"label": [0, 1] * 15, "image_id": range(30)}, {}, "several columns of labels: .* label, image_id"),
        ({"labels": [[0, 1]] * 30}, {}, "no column of labels: 'labels' has several for each image; .*: image, labels"),
        ({"labels": [[0, 1]] * 30, "id": [0, 1] * 15}, {}, "several columns of labels: .* labels, id"),
        ({"labels": [[0, 1]] * 30}, {"label": "labels"}, "'labels' of .* holds list, not integers or strings"),
        ({"score": [0.5, 1.0] * 15}, {}, "no column of labels: name one with label: image, score"),
        ({"score": [0.5, 1.0] * 15}, {"label": "score"}, "holds float, not integers or strings; .* image, score"),
        ({"label": [None, 1] * 15}, {}, "'label' of .* has no label for 15 of 30 images"),
        ({"label": [0, 1] * 15}, {"label": "image"}, "holds dict, not integers or strings; the columns are image, l"),
        ({"raw": PIXELS[:30]}, {"image": "image", "label": "raw"}, "holds bytes, not integers or strings"),
        ({"a": [{"b": 1}] * 30}, {"label": "a.c"}, "no column 'a.c'; did you mean 'a.b'.; it has: image, a.b"),
        ({"ant": [0, 1] * 15, "bee": [1, 0] * 15}, {}, "several columns of labels: name one with label: ant, bee"),
        ({"label": [0, 1] * 15, "mask": struct(30)}, {}, "several columns of images: name one with image: image, mask"),
    ],
)
def test_a_column_is_not_guessed(tmp_path, columns, fields, told):
    columns = {"image": struct(30), **{name: list(column) for name, column in columns.items()}}
    write(tmp_path, train=columns, test=columns)
    with pytest.raises(InputError, match=told) as caught:
        task(tmp_path, **fields)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400, "no image's bytes"


def test_ids_that_are_asked_for_are_classes(tmp_path):
    columns = rows(list(range(30)))
    write(tmp_path, train=columns, test=columns)
    assert len(task(tmp_path, label="label", validation=0).classes) == 30


def test_tasks_by_other_columns_hold_out_the_same_images(tmp_path):
    """Where nothing says which columns are of classes, too; ids do not count."""
    numbers = range(60)
    columns = {
        "id": [f"x{n}" for n in numbers],
        "animal": [f"a{n % 3}" for n in numbers],
        "tint": [n % 2 for n in numbers],
    }
    images = {"image": struct(60), **columns}
    write(tmp_path, train=images, test=images)
    held_out = [task(tmp_path, label=label, validation=0.2).validation.images for label in ("animal", "tint", "id")]
    assert all(torch.equal(images, held_out[0]) for images in held_out)


def test_images_that_are_not_there_are_named_each(tmp_path):
    labels = list("ab" * 5)
    train = rows(labels) | {"image": [None if n in (3, 4) else each for n, each in enumerate(struct(10))]}
    write(tmp_path, train=train, test=rows(labels))
    with pytest.raises(InputError, match=r"^train image in row 3 of .*train-0.parquet: column 'image' holds no image "):
        task(tmp_path, validation=0)
    data = task(tmp_path, validation=0, on_bad_image="skip")
    assert len(data.train.bad) == 2
    assert data.counts["train"] == 8


def test_classes_that_are_only_tested(tmp_path):
    write(tmp_path, train=rows([1, 2] * 10), test=rows([1, -1, -1]))
    with pytest.raises(InputError, match="there are test images of '-1' and no train images"):
        task(tmp_path)
    assert task(tmp_path, classes="1-2").classes == ("1", "2")


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:100],
        lambda content: content[:-4] + b"xxxx",
        lambda content: b"PAR1" + bytes(900) + content[904:],
        lambda content: content[: len(content) // 2] + b"\xff" * 50 + content[len(content) // 2 + 50 :],
        lambda content: content.replace(b"image", b"\xff\xff\xff\xff\xff"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage):
    write(tmp_path, train=rows([0, 1] * 10), test=rows([0, 1] * 10))
    file = tmp_path / "train-0.parquet"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=f"{file} cannot be read: "):
        task(tmp_path)


def test_a_file_of_more_rows_than_bytes_is_refused(tmp_path):
    write(tmp_path, train=rows([0, 1] * 10), test=rows([0, 1] * 10))
    table = pq.read_table(tmp_path / "train-0.parquet")
    pq.write_table(table.take(pa.array([0] * 10**6)), tmp_path / "train-0.parquet")
    with pytest.raises(InputError, match=r"train-0.parquet .* said to have 1,000,000 rows, in [\d,]+ bytes"):
        task(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path):
    write(tmp_path, test=rows([0, 1] * 10))
    os.mkfifo(tmp_path / "train-0.parquet")
    with pytest.raises(InputError, match="has no split train"):
        task(tmp_path)


@pytest.mark.parametrize("names", [[["a"], "b"], 3, [1, 2]])
def test_names_that_are_none_are_left_out(tmp_path, names):
    features = {"image": IMAGE, "label": {"_type": "ClassLabel", "names": names}}
    write(tmp_path, features, train=rows([0, 1] * 10), test=rows([0, 1] * 10))
    assert task(tmp_path).classes == ("0", "1")
