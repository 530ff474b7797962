"""Runs that start from weights: how their images are prepared, what is said, and that evaluation gives the plain
backbone's logits."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from dvn_cli.cli import main
from dvn_cli.data import DataSpec, batches
from dvn_cli.data.resize import Resize
from dvn_cli.evaluation import measure
from dvn_cli.loading import load
from dvn_cli.network import DeepVirtualNetwork, VirtualNetwork
from dvn_cli.store.file import read_checkpoint, read_header
from dvn_cli.store.slicing import slice_file
from dvn_cli.training import experiment, recipes
from dvn_cli.training.experiment import prepare
from dvn_cli.training.session import Session

BACKBONE = "test_byobnet"  # of timm
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of different sizes by class, weights of a backbone for 7 classes, and a partition made from them."""
    root = tmp_path_factory.mktemp("weights")
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 4)):
        for label, name in enumerate(("ant", "bee")):
            (root / "photos" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 128 + 100 * label, (30 + index, 44 - 2 * index, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "photos" / split / name / f"{index}.png")
    torch.manual_seed(0)
    module = timm.create_model(BACKBONE, num_classes=7)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(buffer, 0, 0.2)
    save_file(module.state_dict(), root / "weights.safetensors")
    return root


def session(folder: Path, notes: list[str] | None = None, data: dict[str, Any] | None = None, **keys: Any) -> Session:
    photos = {"source": "folder", "path": str(folder / "photos"), "validation": 0, **(data or {})}
    content = {
        "backbone": {"name": BACKBONE, "weights": str(folder / "weights.safetensors")},
        "units": 2,
        "tasks": [{"name": "insects", "data": photos}],
        "epochs": 1,
        "batch_size": 10,
        "optimizer": {"lr": 0.01},
        "threads": 1,
        **keys,
    }
    recipe = recipes.parse(content, "r.yaml")
    notes = [] if notes is None else notes
    return prepare(recipe, folder, folder / "dvn.safetensors", small.CPU, force=True, note=notes.append)


def test_images_are_prepared_as_for_the_weights_and_it_is_said(folder: Path) -> None:
    notes: list[str] = []
    made = session(folder, notes, {"size": SIZE})
    task = made.run.network.tasks[0]
    assert (task.mean, task.std) == (MEAN, STD)
    assert (task.interpolation, task.crop_pct, task.crop_mode) == ("bicubic", 0.95, "center")
    own = timm.data.create_transform(SIZE, interpolation="bicubic", crop_pct=0.95, use_prefetcher=True)
    first = own(Image.open(folder / "photos" / "train" / "ant" / "0.png"))
    assert torch.equal(made.run.data[1].train.images[0], torch.as_tensor(np.asarray(first)))
    assert any("bicubic, crop_pct 0.95" in note and f"timm's configuration of {BACKBONE}" in note for note in notes)
    assert any("The weights have other classes: head.fc.weight, head.fc.bias are not loaded" in note for note in notes)
    made.train(small.nothing, small.nothing)
    header = read_checkpoint(folder / "dvn.safetensors")
    slice_file(header, 1, 1, folder / "slice.safetensors")
    of_slice = read_header(folder / "slice.safetensors").metadata.task
    for entry in (header.metadata.tasks[0], of_slice):
        assert (entry.interpolation, entry.crop_pct, entry.crop_mode) == ("bicubic", 0.95, "center")
        assert (entry.mean, entry.std) == (MEAN, STD)
    assert header.metadata.preprocessing.crop_pct == 0.95
    images = DataSpec(source="folder", path=str(folder / "photos"))
    (opened,) = measure.open_files([folder / "slice.safetensors"], data=images)
    assert torch.equal(opened.splits[1].images, made.run.data[1].test.images)


def test_the_recipe_goes_before_the_weights(folder: Path) -> None:
    keys = {"size": SIZE, "mean": [0.1, 0.2, 0.3], "crop_pct": 1.0, "crop_mode": "squash"}
    task = session(folder, data=keys).run.network.tasks[0]
    assert (task.mean, task.std) == ((0.1, 0.2, 0.3), STD)
    assert (task.interpolation, task.crop_pct, task.crop_mode) == ("bicubic", 1.0, "squash")


def test_random_weights_have_no_preprocessing(folder: Path) -> None:
    notes: list[str] = []
    made = session(folder, notes, {"size": SIZE}, backbone={"name": BACKBONE})
    task = made.run.network.tasks[0]
    assert (task.interpolation, task.crop_pct) == ("bilinear", None)
    assert task.mean != MEAN
    assert made.run.network.preprocessing is None
    assert not [note for note in notes if "prepared as" in note]


def test_images_that_are_taken_as_they_are_are_not_cut(folder: Path) -> None:
    keys = {"name": BACKBONE, "weights": str(folder / "weights.safetensors")}
    tasks = [{"name": "digits", "data": small.data()}]
    recipe = recipes.parse({"backbone": keys, "units": 2, "tasks": tasks}, "r.yaml")
    (data,) = experiment.load_data(recipe, folder)
    assert Resize.of(data.spec) == Resize()
    assert data.input_size == (8, 8)
    assert (data.mean, data.std) == (MEAN, STD)


def dvn(*words: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dvn", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)


def partition(folder: Path, *words: object, name: str = BACKBONE, size: object = SIZE) -> int:
    file = folder / f"p-{name.replace('/', '-')}.safetensors"
    weights = folder / "weights.safetensors"
    options = ("--units", 2, "--input-size", size, "--weights", weights, "-o", file, "--force")
    return dvn("partition", name, *options, "--num-classes", 7, *words)


def logits(file: Path, photos: Path) -> torch.Tensor:
    """Of the top level, for the images as `dvn eval` reads them."""
    opened = load(file)
    if isinstance(opened, VirtualNetwork):
        task, network = opened.task, opened
    else:
        assert isinstance(opened, DeepVirtualNetwork)
        task, network = opened.tasks[0], opened.virtual_network(1, 2)
    images = DataSpec(source="folder", path=str(photos), groups={"0": ["ant"], "1": ["bee"]})
    split = measure.open_files([file], None if network is opened else "1", data=images)[0].splits[1]
    with torch.inference_mode():
        return torch.cat([network(images) for images, _ in batches(split, 3, mean=task.mean, std=task.std)])


def test_a_top_level_gives_the_plain_backbones_logits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert partition(folder) == 0
    assert f"timm's configuration of {BACKBONE}" in capsys.readouterr().out
    file = folder / f"p-{BACKBONE}.safetensors"
    plain = timm.create_model(BACKBONE, num_classes=7, checkpoint_path=str(folder / "weights.safetensors")).eval()
    transform = timm.data.create_transform(
        **(timm.data.resolve_model_data_config(plain) | {"input_size": (3, SIZE, SIZE)})
    )
    photos = sorted((folder / "photos" / "test").glob("*/*.png"))
    with torch.inference_mode():
        expected = plain(torch.stack([transform(Image.open(photo)) for photo in photos]))
    torch.testing.assert_close(logits(file, folder / "photos"), expected, rtol=0, atol=1e-4)
    slice_file(read_checkpoint(file), 1, 2, folder / "slice.safetensors")
    torch.testing.assert_close(logits(folder / "slice.safetensors", folder / "photos"), expected, rtol=0, atol=1e-4)


def test_a_partition_made_from_weights_hands_their_preprocessing_on(folder: Path) -> None:
    flags = ("--mean", "0.4", "--std", "0.2,0.3,0.4", "--interpolation", "lanczos", "--crop-pct", "0.8")
    assert partition(folder, *flags, "--crop-mode", "squash") == 0
    notes: list[str] = []
    start = {"backbone": None, "units": None, "partition": str(folder / f"p-{BACKBONE}.safetensors")}
    made = session(folder, notes, {"size": SIZE, "crop_pct": 0.9}, **start)
    task = made.run.network.tasks[0]
    assert (task.mean, task.std) == ((0.4,) * 3, (0.2, 0.3, 0.4))
    assert (task.interpolation, task.crop_pct, task.crop_mode) == ("lanczos", 0.9, "squash")
    assert made.run.network.preprocessing is not None
    assert any("as given" in note for note in notes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--crop-pct", "87.5"), "crop_pct is a share"),
        (("--interpolation", "bicubik"), "did you mean 'bicubic'"),
        (("--mean", "0.5,0.5"), "mean has 2 values for images of 3 channels"),
        (("--std", "grey"), "--std takes numbers"),
        (("--std", "0"), "above 0"),
    ],
)
def test_flags_that_say_nothing_possible(
    folder: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, str], message: str
) -> None:
    assert partition(folder, *words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_flags_without_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert dvn("partition", "wrn_10_1", "--units", 2, "--crop-pct", 0.9, "-o", tmp_path / "x.safetensors") == 2
    assert "crop_pct says how images are prepared for weights" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_top_level_of_torchvision_gives_torchvisions_logits(folder: Path, tmp_path: Path) -> None:
    from torchvision import models

    torch.manual_seed(0)
    plain = models.shufflenet_v2_x0_5(weights=None, num_classes=7).eval()
    save_file(plain.state_dict(), tmp_path / "weights.safetensors")
    assert partition(tmp_path, name="torchvision/shufflenet_v2_x0_5", size=224) == 0
    transforms = models.ShuffleNet_V2_X0_5_Weights.DEFAULT.transforms()
    photos = sorted((folder / "photos" / "test").glob("*/*.png"))
    with torch.inference_mode():
        expected = plain(torch.stack([transforms(Image.open(photo)) for photo in photos]))
    found = logits(tmp_path / "p-torchvision-shufflenet_v2_x0_5.safetensors", folder / "photos")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
