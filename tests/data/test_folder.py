"""Folders of images: what is a class, what is an image, and what each split is for."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from dvn_cli.data import DataSpec, Reader, load_task, load_test
from dvn_cli.errors import InputError


def put(folder, count, seed=0):
    """So many different images."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(seed)
    for number in range(count):
        Image.fromarray(random.randint(0, 256, (3, 4, 3), dtype=np.uint8)).save(folder / f"{number}.png")


def splits(root, **counts):
    """A folder with splits of two classes with so many images each."""
    for place, (split, count) in enumerate(counts.items()):
        for label, name in enumerate(("ant", "bee")):
            put(root / split / name, count, seed=2 * place + label)
    return root


def told(path, **fields):
    """The data of a task, and what was said of it."""
    reader = Reader()
    return reader.task(DataSpec(source="folder", path=str(path), **fields)).load(), reader.notes


def rows(split):
    return {image.numpy().tobytes() for image in split.images}


HIDDEN = [".ipynb_checkpoints", ".git", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"]


@pytest.mark.parametrize("name", HIDDEN)
def test_folders_of_the_system_are_no_classes(tmp_path, name):
    splits(tmp_path, train=5, test=2)
    for place in (".", "train", "test", "train/ant"):
        put(tmp_path / place / name, 1)
    data, notes = told(tmp_path, validation=0)
    assert data.classes == ("ant", "bee")
    assert (len(data.train), len(data.test)) == (10, 4)
    assert notes[1:] == [f"{tmp_path}: left out 3 {name}/"]
    assert load_test(DataSpec(source="folder", path=str(tmp_path / "test"), test_split="."))[1] == ("ant", "bee")


def test_what_is_left_out_is_counted_by_kind_once(tmp_path):
    splits(tmp_path, train=5, test=2)
    for file in ("train/ant/a.txt", "train/bee/deep/b.TXT", "test/ant/c.npy", "train/bee/._0.png", "train/bee/noname"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"x")
    (tmp_path / "train" / "list.csv").write_text("x")
    reader = Reader()
    for classes in (None, ["bee", "ant"]):
        plan = reader.task(DataSpec(source="folder", path=str(tmp_path), classes=classes))
    assert len(plan.load().test) == 4
    assert reader.notes[1:] == [
        f"{tmp_path}: left out 1 .csv beside the classes, 1 .npy, 2 .txt, 1 hidden, 1 without suffix"
    ]


def test_nothing_is_said_where_nothing_is_left_out(tmp_path):
    assert len(told(splits(tmp_path, train=5, test=2))[1]) == 1


@pytest.mark.parametrize(
    ("make", "there"),
    [
        (lambda folder: folder.mkdir(), "it is empty"),
        (lambda folder: put(folder / "deep" / ".hidden", 2), "there is nothing but 1 .hidden/"),
        (lambda folder: (folder.mkdir(), (folder / "0.npy").touch(), (folder / "1.npy").touch()),
         "there is nothing but 2 .npy"),
    ],
)  # fmt: skip
def test_a_class_without_train_images_is_named(tmp_path, make, there):
    splits(tmp_path, train=5, test=2)
    make(tmp_path / "train" / "cat")
    spec = DataSpec(source="folder", path=str(tmp_path))
    with pytest.raises(InputError, match=f"class 'cat' has no train images: in .*/train/cat, {there}"):
        load_task(spec)
    with pytest.raises(InputError, match="class 'cat'"):
        load_task(spec.model_copy(update={"groups": {"a": ["ant"], "b": ["bee", "cat"]}}))
    assert load_task(spec.model_copy(update={"classes": ["ant", "bee"]})).classes == ("ant", "bee")


def test_classes_and_images_are_those_of_torchvision_in_its_order(tmp_path):
    for place, name in enumerate(("b", "a b", "a", "B", "Ünï", "猫 [x]", "a/deep", "a/deep er", "a/deep/er", "a-1")):
        put(tmp_path / "train" / name, 2, seed=place)
        put(tmp_path / "test" / name.split("/")[0], 1, seed=50 + place)
    data = load_task(DataSpec(source="folder", path=str(tmp_path), validation=0))
    expected = ImageFolder(tmp_path / "train")
    assert data.classes == tuple(expected.classes)
    assert data.train.labels.tolist() == expected.targets
    for image, (other, _) in zip(data.train.images, expected, strict=True):
        assert np.array_equal(image.permute(1, 2, 0), other)


def test_links_in_a_circle_come_to_an_end(tmp_path):
    splits(tmp_path, train=5, test=2)
    for number in range(12):
        (tmp_path / "train" / "ant" / f"up{number}").symlink_to(tmp_path / "train" / "ant", target_is_directory=True)
        (tmp_path / "train" / "bee" / f"over{number}").symlink_to("..", target_is_directory=True)
    (tmp_path / "train" / "bee" / "self").symlink_to("self")
    data, notes = told(tmp_path, validation=0)
    assert (data.train.labels == 0).sum() == 5
    assert "link to a folder that is read already" in notes[-1]


def test_links_to_classes_and_images_are_followed(tmp_path):
    splits(tmp_path, train=5, test=2)
    put(tmp_path / "elsewhere" / "cat", 4)
    (tmp_path / "elsewhere" / "cat" / "0.png").rename(tmp_path / "0.png")
    (tmp_path / "elsewhere" / "cat" / "0.png").symlink_to(tmp_path / "0.png")
    (tmp_path / "train" / "cat").symlink_to(tmp_path / "elsewhere" / "cat", target_is_directory=True)
    data = load_task(DataSpec(source="folder", path=str(tmp_path), validation=0))
    assert data.classes == ("ant", "bee", "cat")
    assert torch.bincount(data.train.labels).tolist() == [5, 5, 4]


def test_folders_a_thousand_deep(tmp_path, monkeypatch):
    splits(tmp_path, train=5, test=2)
    monkeypatch.chdir(tmp_path / "train" / "ant")
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    put(Path(), 1, seed=9)
    os.chdir(tmp_path)
    assert len(told(tmp_path, validation=0)[0].train) == 11
    with pytest.raises(InputError, match="no parquet files"):
        load_task(DataSpec(source="hf", path=str(tmp_path)))
    subprocess.run(["rm", "-r", tmp_path / "train"], check=True)  # which pytest could not


@pytest.mark.parametrize("path", ["a\0b", "x" * 4000, "~nobody/x", "loop"])
@pytest.mark.parametrize("source", ["folder", "hf"])
def test_paths_that_no_system_has(tmp_path, monkeypatch, path, source):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(InputError, match=r"there is a NUL in the path|no folder"):
        load_task(DataSpec(source=source, path=path))


def test_a_pipe_with_the_name_of_an_image_is_not_waited_for(tmp_path):
    splits(tmp_path, train=5, test=2)
    os.mkfifo(tmp_path / "train" / "ant" / "pipe.png")
    (tmp_path / "train" / "bee" / "link.png").symlink_to(tmp_path / "train" / "ant" / "pipe.png")
    assert len(told(tmp_path, validation=0)[0].train) == 10


TENTH = " (10 % of that is held out to validate on)"


@pytest.mark.parametrize(
    ("counts", "fields", "sizes", "uses"),
    [
        ({"train": 10, "test": 3}, {}, (18, 2, 6), f"train{TENTH} and tests on test"),
        *(({"train": 10, name: 4, "test": 3}, {}, (20, 8, 6), f"train, validates on {name} and tests on test")
          for name in ("validation", "valid", "val", "dev")),
        *(({"train": 10, name: 4}, {}, (18, 2, 8), f"train{TENTH} and tests on {name} (there is no test split)")
          for name in ("validation", "valid", "val", "dev")),
        ({"train": 10, "val": 4, "dev": 3}, {}, (20, 6, 8),
         "train, validates on dev and tests on val (there is no test split)"),
        ({"trainval": 10, "test": 3}, {}, (18, 2, 6), f"trainval{TENTH} and tests on test"),
        ({"train": 10, "val": 4, "test": 3}, {"validation": 0.25}, (15, 5, 6),
         "train (25 % of that is held out to validate on) and tests on test"),
        ({"train": 10, "val": 4, "test": 3}, {"validation": 0}, (20, 0, 6), "train and tests on test"),
        ({"train": 10, "val": 4, "test": 3}, {"test_split": "val"}, (18, 2, 8), f"train{TENTH} and tests on val"),
        ({"train": 10, "val": 4, "other": 3}, {"test_split": "other"}, (20, 8, 6),
         "train, validates on val and tests on other"),
        ({"train": 10, "val": 4, "test": 3}, {"train_images": 6}, (6, 6, 6),
         "train, validates on val and tests on test"),
        ({"train": 10, "val": 4, "test": 3}, {"test_images": 2}, (20, 8, 2),
         "train, validates on val and tests on test"),
    ],
)  # fmt: skip
def test_what_each_split_is_for(tmp_path, counts, fields, sizes, uses):
    splits(tmp_path, **counts)
    data, notes = told(tmp_path, **fields)
    found = [rows(split) if split else set() for split in (data.train, data.validation, data.test)]
    assert tuple(map(len, found)) == sizes
    assert len(set.union(*found)) == sum(sizes)  # no image is in two of them
    assert notes == [f"{tmp_path}: trains on {uses}"]


def test_the_validation_split_may_lack_classes_and_has_no_others(tmp_path):
    splits(tmp_path, train=5, val=3, test=2)
    for file in (tmp_path / "val" / "ant").iterdir():
        file.unlink()
    assert load_task(DataSpec(source="folder", path=str(tmp_path))).validation.labels.tolist() == [1, 1, 1]
    put(tmp_path / "val" / "cat", 1)
    with pytest.raises(InputError, match="val has a class 'cat' that train has not"):
        load_task(DataSpec(source="folder", path=str(tmp_path)))


def test_no_image_to_validate_on(tmp_path):
    splits(tmp_path, train=5, val=3, test=2)
    put(tmp_path / "train" / "cat", 5)
    put(tmp_path / "train" / "dog", 5)
    spec = DataSpec(source="folder", path=str(tmp_path), classes=["cat", "dog"], test_images=1)
    put(tmp_path / "test" / "cat", 2)
    with pytest.raises(InputError, match=r"no validation images of the classes cat, dog; with validation=0.1"):
        load_task(spec)
    assert len(load_task(spec.model_copy(update={"validation": 0.2})).validation) == 2


def flat(root, *counts):
    for label, count in enumerate(counts):
        put(root / f"class {label}", count, seed=label)
    return root


def test_a_folder_of_classes_is_split_whatever_the_seed(tmp_path):
    flat(tmp_path, 50, 20, 5)
    data, notes = told(tmp_path)
    found = [rows(split) for split in (data.train, data.validation, data.test)]
    assert sum(map(len, found)) == len(set.union(*found)) == 75
    assert torch.bincount(data.test.labels).tolist() == [10, 4, 1]
    assert (len(data.validation), len(data.train)) == (6, 54)
    assert notes == [
        f"{tmp_path}: trains on 80 % of its images (10 % of that is held out to validate on) and tests on 20 % of its "
        "images"
    ]
    for fields in ({"seed": 1}, {"classes": ["class 1", "class 0"]}, {"validation": 0.5}):
        other, _ = told(tmp_path, **fields)
        assert rows(other.test) <= found[2]
        assert not (rows(other.train) | rows(other.validation)) & found[2]
    assert rows(load_test(data.spec)[0]) == found[2]  # as `dvn eval` reads it


def test_a_folder_of_classes_that_cannot_be_split(tmp_path):
    with pytest.raises(InputError, match=r"class 'class .' has no train images: it has too few to test on some"):
        told(flat(tmp_path, 1, 1, 1))


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["Train/ant", "Train/bee", "Test/ant"], "has no train or trainval; there is: Test, Train"),
        (["training/ant", "testing/ant"], "has no train or trainval; there is: testing, training"),
        (["train_images/ant", "test_images/ant"], "has no train or trainval; there is: test_images, train_images"),
        (["set/train/ant", "set/test/ant"], "there are splits in 'set': is .*/set the path?"),
        (["ant/train", "ant/test", "bee/train", "bee/test"], "there are splits in 'ant'"),
        (["val/ant", "val/bee"], "has no train or trainval; there is: val"),
        (["train/ant", "train/bee"], "has no test .*; with .*/train for path, a fifth of its images is to test on"),
        ([".hidden"], "has no train or trainval; there is: nothing"),
    ],
)
def test_folders_that_are_no_classes_are_not_taken_for_some(tmp_path, folders, message):
    for folder in folders:
        put(tmp_path / folder, 5)
    with pytest.raises(InputError, match=message):
        told(tmp_path)


def test_a_folder_is_not_trained_on_what_it_is_tested_on(tmp_path):
    with pytest.raises(InputError, match="leave test_split out to train"):
        told(flat(tmp_path, 5, 5), test_split=".")
