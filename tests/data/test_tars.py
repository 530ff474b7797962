"""WebDataset's tars: the images and classes in them, and the same batches as from a folder."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dvn_cli.data import DataSpec, Reader, load_task, load_test
from dvn_cli.data.words import parse_data
from dvn_cli.errors import InputError

COUNT = 30


def png(number: int) -> bytes:
    """A picture of which every pixel says its number."""
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), number, dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def write(path: Path, files: dict[str, bytes], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def sample(number: int, label: str | None = None) -> dict[str, bytes]:
    label = str(number % 3) if label is None else label
    return {
        f"a/{number:03}.cls": f"{label}\n".encode(),
        f"a/{number:03}.png": png(number),
        f"a/{number:03}.json": b"{}",
    }


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two tars to train on and one to test on, of three classes."""
    for shard, numbers in {"x-train-000": range(12), "x-train-001": range(12, 24), "x-val-0": range(24, COUNT)}.items():
        write(tmp_path / "shards" / f"{shard}.tar", {k: v for number in numbers for k, v in sample(number).items()})
    return tmp_path / "shards"


@pytest.mark.parametrize("load", ["memory", "stream"])
def test_images_have_their_classes(shards: Path, load: str) -> None:
    data = load_task(DataSpec(source="webdataset", path=str(shards), load=load, workers=1))
    assert data.classes == ("0", "1", "2")
    assert data.test is not None
    assert data.counts == {"train": 22, "validation": 2, "test": 6}
    for split in (data.train, data.validation, data.test):
        numbers = split.images[:, 0, 0, 0]
        assert torch.equal(numbers % 3, split.labels)
    assert sorted(data.test.images[:, 0, 0, 0].tolist()) == list(range(24, COUNT))


def test_batches_are_those_of_a_folder(shards: Path, tmp_path: Path) -> None:
    """Of as many images in the same order."""
    for number in range(COUNT):
        path = tmp_path / "folder" / ("train" if number < 24 else "val") / "all" / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
        path = path.parent.parent / "none" / "0.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(99))
    for shard in ("x-train-000", "x-train-001"):
        with tarfile.open(shards / f"{shard}.tar") as tar:
            files = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
        files = {name: b"all" if name.endswith("cls") else content for name, content in files.items()}
        write(shards / f"{shard}.tar", files | (sample(99, "none") if shard.endswith("1") else {}))
    write(shards / "x-val-0.tar", sample(24, "all") | sample(99, "none"))
    keys = {"validation": 0, "mean": [0.5] * 3, "std": [0.5] * 3, "load": "stream"}
    of_tars, of_folder = (
        load_task(DataSpec.model_validate({"source": source, "path": str(path), **keys}))
        for source, path in (("webdataset", shards), ("folder", tmp_path / "folder"))
    )
    passes = [list(data.train_batches(5, torch.Generator().manual_seed(3))) for data in (of_tars, of_folder)]
    for ours, theirs in zip(*passes, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_tars_without_splits_are_split(tmp_path: Path) -> None:
    write(tmp_path / "all.tar", {name: content for number in range(20) for name, content in sample(number).items()})
    for path in (tmp_path, tmp_path / "all.tar"):
        data = load_task(DataSpec(source="webdataset", path=str(path), validation=0))
        assert data.counts == {"train": 16, "validation": 0, "test": 4}
        numbers = torch.cat([data.train.images, data.test.images])[:, 0, 0, 0]
        assert sorted(numbers.tolist()) == list(range(20))


@pytest.mark.parametrize("name", ["all.tar", "train-0.tar"])
def test_tasks_by_other_labels_take_the_same_images(tmp_path: Path, name: str) -> None:
    """Each with the labels that these have."""
    files: dict[str, bytes] = {}
    for number in range(60):
        files |= sample(number) | {f"a/{number:03}.shape": str(number % 2).encode()}
    write(tmp_path / name, files)
    write(tmp_path / "test-0.tar", files) if name != "all.tar" else None
    reader = Reader()
    plans = [
        reader.task(DataSpec(source="webdataset", path=str(tmp_path), label=label, validation=0.2))
        for label in (None, "shape")
    ]
    three, two = (plan.load() for plan in plans)
    for first, second in ((three.train, two.train), (three.validation, two.validation), (three.test, two.test)):
        assert first is not None
        assert second is not None
        numbers = first.images[:, 0, 0, 0]
        assert torch.equal(second.images[:, 0, 0, 0], numbers)
        assert torch.equal(first.labels, numbers % 3)
        assert torch.equal(second.labels, numbers % 2)


def test_a_pattern_names_some_tars(shards: Path) -> None:
    """From the recipe's folder; the parts of a pattern that names its split are one."""
    spec = DataSpec(source="webdataset", path="shards/x-{train-{000..001},val-0}.tar", validation=0)
    assert load_task(spec, base=shards.parent).counts == {"train": 24, "validation": 0, "test": 6}
    some = spec.model_copy(update={"path": "shards/{x-train-001,x-val-0}.tar"})
    assert load_task(some, base=shards.parent).counts == {"train": 12, "validation": 0, "test": 6}
    missing = spec.model_copy(update={"path": "shards/x-train-{000..999999999}.tar"})
    with pytest.raises(InputError, match=r"^there is no tar file .*/x-train-002.tar, of x-train-\{0"):
        load_task(missing, base=shards.parent)


def test_a_folder_of_tars_is_evaluated_on(shards: Path) -> None:
    spec, _ = parse_data(str(shards))
    split, classes = load_test(spec)
    assert (len(split), classes) == (6, ("0", "1", "2"))


def test_suffixes_are_named_as_they_are_written(tmp_path: Path) -> None:
    files = {"1.PNG": png(1), "1.Label": b"1", "2.PNG": png(2), "2.Label": b"2"}
    for split in ("train", "test"):
        write(tmp_path / f"{split}-0.tar", files)
    data = load_task(DataSpec(source="webdataset", path=str(tmp_path), image="PNG", label="Label", validation=0))
    assert data.classes == ("1", "2")


@pytest.mark.parametrize(
    ("files", "mode", "keys", "said"),
    [
        (sample(1), "w:gz", {}, r"train-0.tar cannot be read: .* \(an uncompressed tar\?\)"),
        ({"a.png": png(1)}, "w", {}, r"train-0.tar has a.png, and no .cls file that names its class: see label"),
        ({"a.png": png(1), "a.jpg": png(1)}, "w", {}, r"has a.png and a.jpg: name one's suffix with image"),
        ({"a.png": png(1), "a.cls": b" "}, "w", {}, r"a.cls of .*train-0.tar names no class"),
        (sample(1), "w", {"label": "txt"}, r"no .txt file"),
        ({"a.cls": b"1"}, "w", {}, r"has no train images"),
        (
            {"a.png": png(1)[:40], "a.cls": b"1", "b.png": png(2), "b.cls": b"2"},
            "w",
            {},
            r"train image a.png of .*train",
        ),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, files: dict[str, bytes], mode: str, keys: dict[str, str], said: str
) -> None:
    write(tmp_path / "train-0.tar", files, mode)
    write(tmp_path / "test-0.tar", {"b.png": png(2), "b.cls": b"2"})
    with pytest.raises(InputError, match=said):
        load_task(DataSpec.model_validate({"source": "webdataset", "path": str(tmp_path), "validation": 0, **keys}))


def test_a_tar_that_is_cut_off_is_named(shards: Path) -> None:
    path = shards / "x-train-001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"x-train-001\.tar cannot be read"):
        load_task(DataSpec(source="webdataset", path=str(shards)))
