"""Images from where they lie."""

import io
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dvn_cli.data import DataSpec, Reader, load_task, load_test
from dvn_cli.data.listing import stratified_order
from dvn_cli.errors import DvnError, InputError

COLOURS = {"black": (0, 0, 0), "blue": (0, 0, 255), "red": (255, 0, 0), "white": (255, 255, 255)}


def picture(colour, size=(6, 4), mode="RGB"):
    return Image.new("RGB", size, colour).convert(mode)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Ten train and two test images of each of four colours, 4 pixels high and 6 wide."""
    for split, count in (("train", 10), ("test", 2)):
        for name, colour in COLOURS.items():
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                picture(colour).save(tmp_path / split / name / f"{number}.png")
    return tmp_path


def write_parquet(path, columns, features=None):
    """A parquet file as Hugging Face's `datasets` writes it."""
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def colours_table(count, fine=None):
    """`count` images of each colour; the fine label is the colour, the coarse one dark or light."""
    fine = [index for index in range(4) for _ in range(count)] if fine is None else fine
    images = [{"bytes": png(picture(list(COLOURS.values())[index])), "path": None} for index in fine]
    return {"img": images, "fine": fine, "coarse": [int(index == 3) for index in fine]}


FEATURES = {
    "img": {"_type": "Image"},
    "fine": {"_type": "ClassLabel", "names": list(COLOURS)},
    "coarse": {"_type": "ClassLabel", "names": ["dark", "light"]},
}


@pytest.fixture
def parquet(tmp_path):
    half = colours_table(5)
    for shard in range(2):
        write_parquet(tmp_path / "data" / f"train-0000{shard}-of-00002.parquet", half, FEATURES)
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", colours_table(2), FEATURES)
    return tmp_path


def check_colours(data):
    """Images of the class that their label says."""
    for split in (data.train, data.validation, data.test):
        for image, label in zip(split.images, split.labels, strict=True):
            assert tuple(image[:, 0, 0].tolist()) == COLOURS[data.classes[label]]


def test_digits():
    data = load_task(DataSpec(source="digits"), channels=1)
    assert data.classes == tuple("0123456789")
    assert (len(data.train) + len(data.validation), len(data.test)) == (1297, 500)
    assert data.train.images.shape[1:] == (1, 8, 8)
    assert (data.train.images.min(), data.train.images.max()) == (0, 255)
    assert torch.bincount(data.test.labels).min() >= 48  # stratified
    # The split must be the same in every version, or published accuracies mean nothing.
    assert data.test.labels[:20].tolist() == [1, 2, 4, 5, 6, 9, 4, 7, 8, 9, 2, 7, 9, 6, 9, 9, 3, 1, 0, 7]
    assert int(data.test.images.sum()) == 2480942


def test_train_and_test_digits_are_others_and_all_there():
    data = load_task(DataSpec(source="digits", validation=0), channels=1)
    rows = torch.cat([data.train.images, data.test.images]).flatten(1)
    assert len(rows) == 1797
    assert len(torch.unique(rows, dim=0)) == len(rows)  # no two images are alike, so no test image is in train


def test_folder(folder):
    data = load_task(DataSpec(source="folder", path=folder.name), base=folder.parent)
    assert data.classes == tuple(COLOURS)
    assert (len(data.train), len(data.validation), len(data.test)) == (36, 4, 8)
    assert data.input_size == (4, 6)
    check_colours(data)


def test_folder_with_val_for_test_and_fewer_classes_in_it(folder):
    (folder / "test").rename(folder / "val")
    for file in (folder / "val" / "black").iterdir():
        file.unlink()
    (folder / "val" / "black").rmdir()
    spec = DataSpec(source="folder", path=str(folder))
    check_colours(load_task(spec))
    assert load_test(spec)[1] == tuple(COLOURS)
    assert sorted(set(load_test(spec)[0].labels.tolist())) == [1, 2, 3]


def test_a_constant_channel_is_not_divided_by_zero(folder):
    data = load_task(DataSpec(source="folder", path=str(folder), classes=["black", "blue"]))
    assert data.mean[:2] == (0, 0)
    assert data.std[:2] == (1, 1)
    assert all(images.isfinite().all() for images, _ in data.train_batches(4, torch.Generator()))


def test_grey_colour_and_size(folder):
    picture((9, 9, 9), mode="L").save(folder / "train" / "black" / "grey.png")
    picture((0, 0, 0), mode="RGBA").save(folder / "train" / "black" / "alpha.png")
    picture((255, 0, 0), mode="P").save(folder / "train" / "red" / "palette.png")
    spec = DataSpec(source="folder", path=str(folder), size=8)
    assert load_task(spec).train.images.shape[1:] == (3, 8, 8)
    grey = load_task(spec, channels=1)
    assert grey.train.images.shape[1:] == (1, 8, 8)
    assert grey.test.images[grey.test.labels == grey.classes.index("white")].unique().tolist() == [255]
    assert load_task(DataSpec(source="folder", path=str(folder), size=[2, 3])).input_size == (2, 3)


def test_parquet_by_any_column(parquet):
    spec = DataSpec(source="hf", path=str(parquet), label="fine")
    data = load_task(spec)
    assert (len(data.train), len(data.validation), len(data.test)) == (36, 4, 8)
    check_colours(data)
    coarse = load_task(DataSpec(source="hf", path=str(parquet), label="coarse"))
    assert coarse.classes == ("dark", "light")
    assert coarse.test.labels.tolist() == [0, 0, 0, 0, 0, 0, 1, 1]


def test_tasks_by_different_columns_share_the_images_and_hold_out_the_same(parquet):
    # Images that tell themselves apart, in another order than their classes.
    fine = [0, 1, 2, 3] * 10
    images = [{"bytes": png(picture((n, n, n))), "path": None} for n in range(40)]
    columns = {"img": images, "fine": fine, "coarse": [int(index == 3) for index in fine]}
    write_parquet(parquet / "data" / "train-00000-of-00002.parquet", columns, FEATURES)
    (parquet / "data" / "train-00001-of-00002.parquet").unlink()
    held_out = set()
    reader = Reader()
    choices = (("fine", None), ("coarse", None), ("fine", ["red", "white"]))
    plans = [
        reader.task(DataSpec(source="hf", path=str(parquet), label=label, classes=classes, validation=0.2))
        for label, classes in choices
    ]
    tasks = [plan.load() for plan in plans]
    for data in tasks:
        train, validation = (set(part.images[:, 0, 0, 0].tolist()) for part in (data.train, data.validation))
        assert not train & held_out
        held_out |= validation
    assert len(held_out) == 8
    assert len({id(split.pool) for data in tasks for split in (data.train, data.validation)}) == 1
    assert len({id(data.test.pool) for data in tasks}) == 1


def test_parquet_layouts_and_subsets(tmp_path):
    for subset, names in (("day", ["a", "b"]), ("night", ["c", "d"])):
        features = FEATURES | {"coarse": {"_type": "ClassLabel", "names": names}}
        for split in ("train", "validation"):
            write_parquet(tmp_path / subset / split / "0000.parquet", colours_table(5), features)
    options = {"source": "hf", "path": str(tmp_path), "label": "coarse"}
    assert load_test(DataSpec(**options, subset="night"))[1] == ("c", "d")
    with pytest.raises(InputError, match="name one with subset: day, night"):
        load_test(DataSpec(**options))
    with pytest.raises(InputError, match="no subset 'dusk'; there is: day, night"):
        load_test(DataSpec(**options, subset="dusk"))


def test_parquet_without_metadata(tmp_path):
    for split in ("train", "test"):
        table = colours_table(5)
        names = [list(COLOURS)[index] for index in table["fine"]]
        write_parquet(tmp_path / "text" / f"{split}.parquet", {"picture": table["img"], "colour": names})
        raw = [image["bytes"] for image in table["img"]]
        write_parquet(tmp_path / "number" / f"{split}.parquet", {"picture": raw, "colour": table["fine"]})
    text = load_task(DataSpec(source="hf", path=str(tmp_path / "text")))
    check_colours(text)
    number = load_task(DataSpec(source="hf", path=str(tmp_path / "number"), image="picture"))
    assert number.classes == ("0", "1", "2", "3")
    assert torch.equal(number.train.images, text.train.images)


def test_hub_name_from_the_cache(tmp_path, monkeypatch):
    offline(monkeypatch, tmp_path)
    commit = "0" * 40
    for name, revision in (("main", "main"), ("converted", "refs/convert/parquet")):
        folder = tmp_path / f"datasets--someone--{name}"
        ref = folder / "refs" / revision
        ref.parent.mkdir(parents=True)
        ref.write_text(commit)
        for split in ("train", "test"):
            write_parquet(
                folder / "snapshots" / commit / "default" / split / "0000.parquet", colours_table(5), FEATURES
            )
        check_colours(load_task(DataSpec(source="hf", name=f"someone/{name}", label="fine")))
        check_colours(load_task(DataSpec(source="hf", name=f"someone/{name}", label="fine", subset="default")))


def test_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    offline(monkeypatch, tmp_path)
    with pytest.raises(DvnError, match="'someone/else' cannot be had from the hub") as caught:
        load_test(DataSpec(source="hf", name="someone/else"))
    assert not isinstance(caught.value, InputError)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="the hub gives no data set 'not a name'"):
        load_test(DataSpec(source="hf", name="not a name"))


def offline(monkeypatch, cache):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))


class Fake:
    """A data set as torchvision makes them: constructed by split, indexed as (PIL image, label)."""

    def __init__(self, root, split="train"):
        if split not in ("train", "val"):
            raise ValueError(f"Unknown value '{split}' for argument split.")
        self.items = [(picture(colour), label) for label, colour in enumerate(COLOURS.values())] * 10
        self.items += [(picture((1, 2, 3)), 3)] * (split == "val")

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class FakeByTrain(Fake):
    classes = tuple(COLOURS)

    def __init__(self, root, train=True, download=False):
        assert download
        super().__init__(root, "train" if train else "val")


class FakeBySubset(FakeByTrain):
    def __init__(self, root, split, **kwargs):
        if split != "letters":
            raise ValueError(f"Unknown value '{split}' for argument split.")
        super().__init__(root, **kwargs)


class FakeOfBoxes(Fake):
    def __getitem__(self, index):
        return self.items[index][0], {"boxes": []}


@pytest.fixture
def torchvision_fakes(monkeypatch):
    from torchvision import datasets

    fakes = [Fake, FakeByTrain, FakeBySubset, FakeOfBoxes]
    for fake in fakes:
        monkeypatch.setattr(datasets, fake.__name__, fake, raising=False)
    monkeypatch.setattr(datasets, "__all__", [*datasets.__all__, *(fake.__name__ for fake in fakes)])


@pytest.mark.parametrize(("name", "subset"), [("Fake", None), ("FakeByTrain", None), ("FakeBySubset", "letters")])
def test_torchvision_by_signature(torchvision_fakes, tmp_path, name, subset):
    data = load_task(DataSpec(source="torchvision", name=name, path=str(tmp_path), subset=subset))
    assert (len(data.train), len(data.validation), len(data.test)) == (36, 4, 41)
    assert data.classes == (tuple("0123") if name == "Fake" else tuple(COLOURS))
    assert data.test.images[-1, :, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "CIFAR11"}, "no data set 'CIFAR11'.*did you mean 'CIFAR10'"),
        ({"name": "FakeBySubset"}, "comes in several: name one with subset"),
        ({"name": "FakeBySubset", "subset": "digits"}, "Unknown value 'digits'"),
        ({"name": "FakeByTrain", "subset": "letters"}, "takes no subset"),
        ({"name": "FakeByTrain", "test_split": "val"}, "takes no test_split"),
        ({"name": "Fake", "test_split": "test"}, "Unknown value 'test'"),
        ({"name": "FakeOfBoxes"}, "does not label each image with one class"),
    ],
)
def test_torchvision_errors(torchvision_fakes, tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        load_task(DataSpec(source="torchvision", path=str(tmp_path), **fields))


def test_every_torchvision_data_set_has_a_signature_that_can_be_read():
    from torchvision import datasets

    from dvn_cli.data.sources import _parameters

    known = {name: _parameters(name) for name in datasets.__all__}
    assert "train" in known["CIFAR10"]
    assert {"train", "split"} <= known["EMNIST"]
    assert "split" in known["STL10"]
    assert "train" not in known["STL10"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "folder", "path": "nowhere"}, "no folder .*nowhere"),
        ({"source": "folder", "path": "empty"}, "has no train or trainval; there is: nothing"),
        ({"source": "folder", "path": "untested"}, "has no test or validation or valid or val or dev; there is: train"),
        ({"source": "folder", "path": "classless"}, "has no folders of classes"),
        ({"source": "folder", "path": "extra"}, "class 'bleu' that train has not; did you mean 'blue'"),
        ({"source": "folder", "path": "sizes"}, "different sizes .*set size"),
        ({"source": "folder", "path": "between"}, "train and test images have different sizes .4x6 and 5x5.: set size"),
        ({"source": "folder", "path": "broken"}, "train image .*/broken/train/blue/2.png is not an image"),
        ({"source": "folder", "path": "hollow"}, "has no test images"),
        ({"source": "hf", "path": "nowhere"}, "no folder"),
        ({"source": "hf", "path": "empty"}, "no parquet files"),
        ({"source": "hf", "path": "."}, "several columns of labels: name one with label: fine, coarse"),
        ({"source": "hf", "path": ".", "label": "fin"}, "no column 'fin'; did you mean 'fine'"),
        ({"source": "hf", "path": ".", "label": "fine", "image": "fine"}, "holds no image there"),
        ({"source": "hf", "path": ".", "label": "img"}, "holds dict, not integers or strings"),
        ({"source": "hf", "path": ".", "label": "fine", "test_split": "dev"}, "no split dev; there is: test, train"),
        ({"source": "hf", "path": "hidden", "label": "fine"}, r"8 test images .* no class \(label -1\)"),
    ],
)
def test_missing_and_broken_data_in_one_line(parquet, folder, fields, message):
    def one(path, image):
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)

    blue = picture((0, 0, 255))
    for name in ("empty", "untested/train/blue", "hollow/test/blue", "classless/train", "classless/test"):
        (folder / name).mkdir(parents=True)
    one(folder / "untested" / "train" / "blue" / "1.png", blue)
    one(folder / "untested" / "train" / "red" / "1.png", blue)
    for name in ("extra", "sizes", "between", "broken", "hollow"):
        one(folder / name / "train" / "blue" / "1.png", blue)
        one(folder / name / "train" / "red" / "1.png", blue)
        if name != "hollow":
            one(folder / name / "test" / "blue" / "1.png", blue)
    one(folder / "extra" / "test" / "bleu" / "1.png", blue)
    one(folder / "sizes" / "train" / "blue" / "2.png", picture((0, 0, 0), size=(5, 5)))
    one(folder / "between" / "test" / "blue" / "1.png", picture((0, 0, 0), size=(5, 5)))
    (folder / "broken" / "train" / "blue" / "2.png").write_bytes(b"no image")
    write_parquet(folder / "hidden" / "train.parquet", colours_table(2), FEATURES)
    hidden = colours_table(2) | {"fine": [-1] * 8}
    write_parquet(folder / "hidden" / "test.parquet", hidden, FEATURES)
    if fields["path"] == ".":  # of which the others are subsets
        for file in (folder / "hidden").iterdir():
            file.unlink()
    with pytest.raises(InputError, match=message) as caught:
        load_task(DataSpec(**fields, validation=0), base=folder)
    assert "\n" not in str(caught.value)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 2**32 - 1), st.data())
def test_every_prefix_of_a_stratified_order_is_in_proportion(counts, seed, data):
    strata = np.repeat(np.arange(len(counts)) * 7, counts)
    order = stratified_order(strata, seed)
    assert sorted(order) == list(range(len(strata)))
    assert np.array_equal(order, stratified_order(strata, seed))
    prefix = strata[order[: data.draw(st.integers(0, len(strata)))]]
    fractions = [(prefix == 7 * index).sum() / count for index, count in enumerate(counts)]
    # Stratum c is at fraction t within half an image of its own, whatever the others are.
    lowest = max(fraction - 0.5 / count for fraction, count in zip(fractions, counts, strict=True))
    highest = min(fraction + 0.5 / count for fraction, count in zip(fractions, counts, strict=True))
    assert lowest <= highest + 1e-9


def test_importing_the_package_imports_no_reader():
    code = "import sys, dvn_cli.data; sys.exit(str({'pyarrow', 'huggingface_hub', 'torchvision'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stderr.strip() == "set()"
