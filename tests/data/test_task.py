"""Classes, splits, limits and normalisation of a task."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dvn_cli.data import DataSpec, Split, batch_count, batches, load_task, load_test
from dvn_cli.data.spec import locate
from dvn_cli.errors import InputError


def digits(**fields):
    return load_task(DataSpec(source="digits", **fields), channels=1)


def rows(split):
    return {bytes(image.flatten().tolist()) for image in split.images}


@pytest.mark.parametrize(
    ("classes", "names"),
    [("0-4", "01234"), (["3", 1], "31"), (["8-9", "0"], "890"), ([5, "6-7"], "567"), ("0-9", "0123456789")],
)
def test_classes_are_relabelled_in_the_order_given(classes, names):
    whole, part = digits(), digits(classes=classes)
    assert part.classes == tuple(names)
    for name, split in (("train", part.train), ("validation", part.validation), ("test", part.test)):
        all_of = getattr(whole, name)
        for label, digit in enumerate(names):
            assert torch.equal(split.images[split.labels == label], all_of.images[all_of.labels == int(digit)])
        assert split.labels.max() == len(names) - 1


def test_groups():
    whole, task = digits(), digits(groups={"odd": [1, 3, 5, 7, 9], "even": ["0", "2", 4, "6", "8"]})
    assert task.classes == ("odd", "even")
    assert torch.equal(task.test.images, whole.test.images)
    assert torch.equal(task.test.labels, 1 - whole.test.labels % 2)
    some = digits(groups={"low": "0-1", "high": "8-9"})
    assert len(some.train) < len(whole.train)
    assert torch.equal(some.test.labels.unique(), torch.tensor([0, 1]))


def test_splits_do_not_overlap_and_lose_nothing():
    data = digits(validation=0.25)
    parts = [rows(split) for split in (data.train, data.validation, data.test)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 1797
    assert len(data.validation) == round(0.25 * 1297)
    assert torch.bincount(data.validation.labels).min() >= 30


def test_no_task_learns_from_what_another_task_chooses_by():
    tasks = [digits(), digits(classes="0-4"), digits(classes="5-9"), digits(classes="2-6", train_images=200)]
    held_out = set.union(*(rows(task.validation) for task in tasks))
    assert all(not rows(task.train) & held_out for task in tasks)


def test_no_validation():
    data = digits(validation=0)
    assert data.validation is None
    assert len(data.train) == 1297


def test_limits():
    whole, data = digits(), digits(train_images=100, test_images=40)
    assert (len(data.train), len(data.validation), len(data.test)) == (90, 10, 40)
    assert rows(data.train) <= rows(whole.train)
    assert torch.bincount(data.test.labels).tolist() == [4] * 10
    assert len(digits(train_images=10**6).train) == len(whole.train)


def test_the_seed_chooses_the_images_and_nothing_else_does():
    assert torch.equal(digits(validation=0.2).validation.images, digits(validation=0.2).validation.images)
    assert rows(digits(seed=1).validation) != rows(digits(seed=2).validation)
    assert rows(digits(seed=1).test) == rows(digits(seed=2).test)


def test_normalisation_is_that_of_the_training_images():
    data = load_task(DataSpec(source="digits"), channels=3)
    pixels = data.train.images.double() / 255
    torch.testing.assert_close(torch.tensor(data.mean), pixels.mean((0, 2, 3)).float())
    torch.testing.assert_close(torch.tensor(data.std), pixels.std((0, 2, 3), correction=0).float())
    given = digits(mean=[0.5], std=[0.25])
    assert (given.mean, given.std) == ((0.5,), (0.25,))


def test_test_images_alone():
    spec = DataSpec(source="digits", classes="5-9", test_images=30)
    alone, classes = load_test(spec, channels=1)
    whole = load_task(spec, channels=1)
    assert classes == whole.classes
    assert torch.equal(alone.images, whole.test.images)
    assert torch.equal(alone.labels, whole.test.labels)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"classes": "3"}, "at least 2 classes, not 1"),
        ({"classes": []}, "at least 2 classes, not 0"),
        ({"groups": {"all": "0-9"}}, "at least 2 classes, not 1"),
        ({"classes": ["1", "ten"]}, "no class 'ten'; there are 10: 0, 1, 2, 3, 4, 5, 6, 7, ..."),
        ({"classes": [1, -1]}, "no class '-1'"),
        ({"classes": "5-10"}, "no classes '5-10': they are numbered 0 to 9"),
        ({"classes": "5-4"}, "no classes '5-4'"),
        ({"classes": ["0-4", 3]}, "class '3' is named twice"),
        ({"groups": {"a": [1, 2], "b": [2, 3]}}, "class '2' is named twice"),
        ({"mean": [0.1, 0.2]}, "mean has 2 values for images of 1 channels"),
        ({"std": [0.1, 0.2]}, "std has 2 values"),
        ({"train_images": 4}, "4 images are too few"),
        ({"validation": 0.9999}, "too few to train on"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(fields, message):
    with pytest.raises(InputError, match=message) as caught:
        digits(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "digits", "labels": "x"}, "labels"),
        ({"source": "digit"}, "digits"),
        ({"source": "digits", "path": "x"}, "source digits takes no path"),
        ({"source": "folder", "path": "x", "label": "y"}, "source folder takes no label .it takes: path, test_split"),
        ({"source": "folder"}, "source folder needs path"),
        ({"source": "torchvision", "path": "x"}, "source torchvision needs name"),
        ({"source": "hf"}, "needs either name"),
        ({"source": "hf", "name": "a/b", "path": "x"}, "needs either name"),
        ({"source": "digits", "classes": "1", "groups": {}}, "classes or groups, not both"),
        ({"source": "digits", "validation": 1}, "less than 1"),
        ({"source": "digits", "std": [0]}, "greater than 0"),
        ({"source": "digits", "train_images": 0}, "greater than 0"),
        ({"source": "digits", "augment": "cutout"}, "crop-flip"),
    ],
)
def test_a_description_is_checked(fields, message):
    with pytest.raises(ValidationError, match=message):
        DataSpec(**fields)


def test_a_description_survives_json_and_every_field_is_explained():
    spec = DataSpec(source="digits", groups={"a": [1, "2"], "b": "3-4"}, size=(8, 9), mean=[0.1], std=[0.2])
    assert DataSpec(**json.loads(json.dumps(spec.model_dump()))) == spec
    assert all(field.description for field in DataSpec.model_fields.values())


def test_relative_paths_start_at_the_recipe_then_at_the_working_directory(tmp_path, monkeypatch):
    for folder in ("recipes/here", "work/here", "work/there"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    assert locate("here", tmp_path / "recipes").resolve() == tmp_path / "recipes" / "here"
    assert locate("there", tmp_path / "recipes").resolve() == tmp_path / "work" / "there"
    assert locate("here", None).resolve() == tmp_path / "work" / "here"


def numbered(count, height=4, width=5):
    """Image n is filled with the value n."""
    labels = torch.arange(count)
    return Split(labels.to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, height, width), labels)


@given(st.integers(1, 40), st.integers(1, 12))
@settings(max_examples=50)
def test_evaluation_sees_every_image_once_in_order(count, size):
    split = numbered(count)
    found = list(batches(split, size, mean=[0] * 3, std=[1] * 3))
    assert len(found) == batch_count(split, size, training=False)
    assert torch.equal(torch.cat([labels for _, labels in found]), split.labels)
    torch.testing.assert_close(torch.cat([images for images, _ in found]) * 255, split.images.float())


@given(st.integers(1, 40), st.integers(1, 12))
@settings(max_examples=50)
def test_training_sees_full_batches_of_different_images(count, size):
    split = numbered(count)
    found = list(batches(split, size, mean=[0] * 3, std=[1] * 3, generator=torch.Generator().manual_seed(count)))
    assert len(found) == batch_count(split, size, training=True)
    seen = torch.cat([labels for _, labels in found])
    assert len(seen) == (count // size * size or count)
    assert len(seen.unique()) == len(seen)
    assert all(torch.equal((images[:, 0, 0, 0] * 255).round().long(), labels) for images, labels in found)


def test_a_pass_is_repeated_by_its_generator_and_the_next_one_is_another():
    split = numbered(30)
    generator = torch.Generator().manual_seed(3)

    def one_pass(generator):
        options = {"mean": [0.2] * 3, "std": [0.3] * 3, "augment": "crop-flip", "pad": 2}
        return torch.cat([images.flatten(1) for images, _ in batches(split, 8, generator=generator, **options)])

    first, second = one_pass(generator), one_pass(generator)
    assert torch.equal(first, one_pass(torch.Generator().manual_seed(3)))
    assert not torch.equal(first, second)


def test_normalised_batches():
    images, _ = next(batches(numbered(3), 3, mean=[0.0, 0.1, 0.2], std=[1.0, 0.5, 0.25]))
    expected = (2 / 255 - torch.tensor([0.0, 0.1, 0.2])) / torch.tensor([1.0, 0.5, 0.25])
    torch.testing.assert_close(images[2, :, 0, 0], expected)
    assert images.dtype == torch.float32
    assert images.is_contiguous()


@pytest.mark.parametrize(("augment", "orientations"), [("crop", 1), ("crop-flip", 2)])
def test_augmented_images_are_crops_of_padded_ones(augment, orientations):
    pad, height, width = 2, 3, 4
    source = torch.randint(1, 256, (1, 3, height, width), dtype=torch.uint8)
    split = Split(source.repeat(400, 1, 1, 1), torch.zeros(400, dtype=torch.int64))
    padded = torch.zeros(3, height + 2 * pad, width + 2 * pad, dtype=torch.uint8)
    padded[:, pad : pad + height, pad : pad + width] = source[0]
    possible = set()
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            crop = padded[:, top : top + height, left : left + width]
            possible |= {tuple(image.flatten().tolist()) for image in (crop, crop.flip(2))[:orientations]}
    generator = torch.Generator().manual_seed(0)
    images, _ = next(batches(split, 400, mean=[0] * 3, std=[1] * 3, generator=generator, augment=augment, pad=pad))
    found = {tuple(image.flatten().tolist()) for image in (images * 255).round().to(torch.uint8)}
    assert found <= possible
    assert len(found) > 0.9 * len(possible)


def test_task_batches_augment_training_as_the_recipe_says():
    plain, moved = digits(), digits(augment="crop", pad=1)
    for data, same in ((plain, True), (moved, False)):
        images, _ = next(data.train_batches(64, torch.Generator().manual_seed(0)))
        untouched, _ = next(
            batches(data.train, 64, mean=data.mean, std=data.std, generator=torch.Generator().manual_seed(0))
        )
        assert torch.equal(images, untouched) == same
