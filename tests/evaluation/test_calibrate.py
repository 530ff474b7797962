"""`dvn slice --calibrate`: what is written, and what is said of it."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import dvn_cli
from dvn_cli.backbones import resolve
from dvn_cli.cli import main
from dvn_cli.data import DataSpec, drawn, sample
from dvn_cli.dividing import partition_backbone
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.store.file import read_checkpoint
from dvn_cli.store.metadata import Rule
from dvn_cli.store.slicing import count, slice_file, slice_size
from dvn_cli.tasks import default_tasks


def digits(seed: int) -> torch.Tensor:
    return torch.cat(drawn(sample(DataSpec(source="digits"), seed=seed, channels=1), (0.3,), (0.4,), seed=seed))


@pytest.fixture(scope="module")
def partition(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh partition for the ten digits, whose images its running statistics are of."""
    torch.manual_seed(0)
    spec = resolve("wrn_10_1", 10, 1, (8, 8))
    module, tasks = spec.build(), default_tasks(2, 10, (8, 8), (0.3,), (0.4,))
    for norm in (norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)):
        norm.momentum = 1.0
    with torch.no_grad():
        module(digits(0))
    divided = partition_backbone(spec, 2, Rule(divide="inner"), module)
    file = tmp_path_factory.mktemp("partition") / "dvn.safetensors"
    DeepVirtualNetwork.from_backbone(divided, module, tasks).save(file)
    return file


@pytest.fixture(autouse=True)
def folder(partition: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(partition, "dvn.safetensors")


def dvn(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["dvn", "slice", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def calibration(file: str) -> Any:
    with safe_open(file, "numpy") as opened:
        return json.loads(opened.metadata()["dvn"]).get("calibration")


def test_a_calibrated_slice(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("--task", 2, "--level", 1, "--json")
    assert dvn(monkeypatch, *command, "-o", "plain.safetensors") == 0
    assert json.loads(capsys.readouterr().out)["slices"][0]["calibration"] is None
    assert dvn(monkeypatch, *command, "-o", "fitted.safetensors", "--calibrate", "source=digits") == 0
    (row,) = json.loads(capsys.readouterr().out)["slices"]
    plain, fitted = load_file("plain.safetensors"), load_file("fitted.safetensors")
    assert {name: t.shape for name, t in fitted.items()} == {name: t.shape for name, t in plain.items()}
    changed = {name for name in plain if not torch.equal(plain[name], fitted[name])}
    assert changed == {name for name in plain if name.endswith(("conv2.weight", "running_mean", "running_var"))} | {
        "fc.weight",
        "fc.bias",
    }
    assert calibration("plain.safetensors") is None
    assert calibration("fitted.safetensors") == {"images": 128, "ridge": 1e-3}

    whole = dvn_cli.load("dvn.safetensors")
    assert isinstance(whole, DeepVirtualNetwork)
    images = digits(1)
    networks = [dvn_cli.load("plain.safetensors"), dvn_cli.load("fitted.safetensors")]
    with torch.no_grad():
        wanted = whole(images, 2, 2)
        errors = [float((network(images) - wanted).square().mean()) for network in networks]  # type: ignore[operator]
    assert errors[1] < 0.5 * errors[0]
    assert (row["calibration"]["images"], row["params"]) == (128, sum(p.numel() for p in networks[0].parameters()))
    for when, file in (("before", "plain"), ("after", "fitted")):  # as `dvn eval` has it
        monkeypatch.setattr(sys, "argv", ["dvn", "eval", f"{file}.safetensors", "--data", "source=digits", "--json"])
        with pytest.raises(SystemExit):
            main()
        assert json.loads(capsys.readouterr().out)["results"][0]["top1"] == row["calibration"][f"top1_{when}"]

    before = Path("fitted.safetensors").read_bytes()
    assert dvn(monkeypatch, *command, "-o", "fitted.safetensors", "--calibrate", "source=digits") == 0
    assert Path("fitted.safetensors").read_bytes() == before


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_calibrated_slice_of_another_type(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    command = ("--task", 2, "--level", 1, "--json", "--dtype", dtype, "-o", "half.safetensors")
    assert dvn(monkeypatch, *command, "--calibrate", "source=digits") == 0
    (row,) = json.loads(capsys.readouterr().out)["slices"]
    monkeypatch.setattr(sys, "argv", ["dvn", "eval", "half.safetensors", "--data", "source=digits", "--json"])
    with pytest.raises(SystemExit):
        main()
    out, err = capsys.readouterr()
    assert json.loads(out)["results"][0]["top1"] == row["calibration"]["top1_after"], err


def test_images_without_labels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And the top levels, which lack nothing, are cut out as they are."""
    Path("photos").mkdir()
    for number in range(4):
        Image.effect_noise((20, 20), 90).save(f"photos/{number}.png")
    assert dvn(monkeypatch, "--all", "--calibrate", "photos") == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.endswith("MB  calibrated on 4 images") for line in lines] == [True, False, True, False]
    assert err.count("accuracy is not measured: ") == 2
    slice_file(read_checkpoint("dvn.safetensors"), 1, 2, "top.safetensors")
    assert Path("dvn-slices/dvn-task1-level2.safetensors").read_bytes() == Path("top.safetensors").read_bytes()


def test_classes_without_splits_are_fitted_and_measured_as_training_splits_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On four fifths and on the other fifth."""
    for label in range(10):
        Path(f"photos/class{label}").mkdir(parents=True)
        for number in range(5):
            Image.effect_noise((20, 20), 10 + 20 * label).save(f"photos/class{label}/{number}.png")
    classes = [f"class{label}" for label in range(10)]
    network = dvn_cli.load("dvn.safetensors")
    tasks = [replace(task, classes=tuple(classes)) for task in network.tasks]  # type: ignore[union-attr]
    DeepVirtualNetwork(network.partition, tasks, network.file_tensors()).save("dvn.safetensors")  # type: ignore
    command = ("--task", 1, "--level", 1, "--calibrate", "photos", "-o", "fitted.safetensors", "--json")
    assert dvn(monkeypatch, *command) == 0
    fitted = json.loads(capsys.readouterr().out)["slices"][0]["calibration"]
    assert fitted["images"] == 40
    data = ["source=folder", "path=photos"]
    before, after = dvn_cli.evaluate(["dvn.safetensors", "fitted.safetensors"], 1, 1, data=data)
    assert (before.images, before.top1, after.top1) == (10, fitted["top1_before"], fitted["top1_after"])


def test_a_calibrated_file_of_another_format(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("--task", 2, "--level", 1, "--calibrate", "source=digits", "--json")
    found = []
    for form in ("safetensors", "pt2"):
        assert dvn(monkeypatch, *command, "--format", form) == 0
        out, err = capsys.readouterr()
        assert "accuracy is not measured" not in err
        found.append(json.loads(out)["slices"][0]["calibration"])
    assert found[0] == found[1]
    assert found[0]["top1_before"] != found[0]["top1_after"]


def test_the_manifest_has_no_accuracy_of_what_is_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    header = read_checkpoint("dvn.safetensors")
    rows = [
        {"task": task, "name": f"task{task}", "level": level, "params": count(header, task, level).params, "top1": 50.0}
        for task, level in header.metadata.networks
    ]
    Path("eval.json").write_text(json.dumps({"results": rows}))
    assert dvn(monkeypatch, "--all", "--calibrate", "source=digits", "--results", "eval.json") == 0
    slices = json.loads(Path("dvn-slices/manifest.json").read_text())["slices"]
    told = [(entry["top1"], entry["calibration"]) for entry in slices]
    assert told == 2 * [(None, {"images": 128, "ridge": 1e-3}), (50, None)]


def test_bytes_are_those_of_the_calibrated_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrate = ("--calibrate", "source=digits", "--json")
    assert dvn(monkeypatch, "--task", 1, "--level", 1, *calibrate, "-o", "fitted.safetensors") == 0
    size = Path("fitted.safetensors").stat().st_size
    assert slice_size(read_checkpoint("dvn.safetensors"), 1, 1) < size
    assert dvn(monkeypatch, "--task", 1, "--max-bytes", size, *calibrate) == 0
    assert Path("dvn-task1-level1.safetensors").stat().st_size == size
    capsys.readouterr()
    assert dvn(monkeypatch, "--task", 1, "--max-bytes", size - 1, *calibrate) == 1
    assert "the nearest is level 1" in capsys.readouterr().err


@pytest.mark.parametrize("chosen", [("--task", 1, "--min-accuracy", 1), ("--plan", "--budget", "1MB")])
@pytest.mark.parametrize("changed", [(), ("--int8", "--format", "onnx")])
def test_recorded_accuracies_are_not_of_calibrated_networks(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    chosen: tuple[object, ...],
    changed: tuple[object, ...],
) -> None:
    assert dvn(monkeypatch, *chosen, "--calibrate", "source=digits", *changed) == 2
    assert capsys.readouterr().err.startswith("dvn: --min-accuracy and --plan go by recorded accuracies")
    assert [path.name for path in Path().iterdir()] == ["dvn.safetensors"]


def test_what_cannot_be_done_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dvn(monkeypatch, "--task", 1, "--level", 1, "--calibrate", "nowhere") == 2
    assert capsys.readouterr().err.startswith("dvn: --data nowhere: there is no such folder")
    assert [path.name for path in Path().iterdir()] == ["dvn.safetensors"]
