"""`dvn partition`: the paper's sizes, costs counted twice, narrow networks beside those written by hand, refusals."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dvn_cli
from dvn_cli.backbones import resolve
from dvn_cli.cli import main
from dvn_cli.cli.partition import partition_command
from dvn_cli.errors import InputError
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.reference import masks_by_axes
from dvn_cli.store.file import read_checkpoint, read_header
from dvn_cli.store.metadata import TrainingRecord
from dvn_cli.store.slicing import cut, slice_file
from dvn_cli.units.count import params_and_density


def dvn(*args: object) -> int:
    """Runs a command and returns its exit code."""
    before, sys.argv = sys.argv, ["dvn", *map(str, args)]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    raise AssertionError("main() returns by sys.exit")


def partition(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    """Runs `dvn partition ... --json` and returns its document."""
    assert dvn("partition", *args, "--json") == 0
    return json.loads(capsys.readouterr().out)


class Block(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride, self.added = stride, width - before
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added)))


class ByHand(nn.Module):
    """The paper's networks at any width, as anyone would write them down."""

    def __init__(self, stem: int, widths: tuple[int, ...], blocks: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layers = len(widths)
        for number, (before, width) in enumerate(zip((stem, *widths), widths, strict=False), 1):
            first = Block(before, width, 1 if number == 1 else 2)
            rest = [Block(width, width, 1) for _ in range(blocks - 1)]
            setattr(self, f"layer{number}", nn.Sequential(first, *rest))
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for number in range(1, self.layers + 1):
            x = getattr(self, f"layer{number}")(x)
        return self.fc(x.mean((2, 3)))


def macs_by_hooks(module: nn.Module, size: int) -> int:
    """Multiply-accumulates of the convolutions and linear layers of one image, by their own definition."""
    total = 0

    def count(layer: Any, inputs: Any, output: Tensor) -> None:
        nonlocal total
        total += output.numel() * math.prod(layer.weight.shape[1:])

    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        module.to("meta").eval()(torch.empty(1, 3, size, size, device="meta"))
    return total


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize(
    ("name", "classes", "shape", "blocks", "millions", "per_cent"),
    [
        ("wrn_32_4", 100, (16, 64, 128, 256), 5, [1.9, 7.4], [25.1, 100]),
        ("resnet_42", 50, (64, 64, 128, 256, 512), 5, [1.9, 7.5, 16.8, 29.8], [6.3, 25.0, 56.3, 100]),
    ],
)
def test_levels_are_those_of_the_paper_and_of_networks_written_by_hand(
    capsys: pytest.CaptureFixture[str],
    name: str,
    classes: int,
    shape: tuple[int, ...],
    blocks: int,
    millions: list[float],
    per_cent: list[float],
) -> None:
    units = len(millions)
    levels = partition(capsys, name, "--units", units, "--num-classes", classes)["levels"]
    assert [round(level["params"] / 1e6, 1) for level in levels] == millions
    assert [level["density"] for level in levels] == [level["params"] / levels[-1]["params"] for level in levels]
    assert [round(100 * level["density"], 1) for level in levels] == per_cent
    assert macs_by_hooks(resolve(name, classes).build(), 32) == levels[-1]["macs"]
    for number, level in enumerate(levels, 1):
        assert level["level"] == number
        stem, *widths = (width * number // units for width in shape)
        hand = ByHand(stem, tuple(widths), blocks, classes)
        assert sum(p.numel() for p in hand.parameters()) == level["params"]
        assert sum(t.nbytes for n, t in hand.state_dict().items()) == level["bytes"]
        assert macs_by_hooks(hand, 32) == level["macs"]
        assert level["divided"] == pytest.approx(1 - classes / level["params"])  # all but the classifier's bias


def test_the_papers_densities_are_those_of_its_rounded_millions() -> None:
    assert [round(100 * m / 29.8, 1) for m in (1.9, 7.5, 16.8, 29.8)] == [6.4, 25.2, 56.4, 100]


@pytest.mark.parametrize(
    ("name", "widths", "blocks", "rule"),
    [
        ("wrn_32_4", (32, 64, 128), 5, ()),
        ("wrn_16_2", (16, 32, 64), 2, ("--assign", "importance", "--round-to", 8)),
    ],
)
def test_a_half_is_the_network_written_by_hand_at_half_width(
    capsys: pytest.CaptureFixture[str], name: str, widths: tuple[int, ...], blocks: int, rule: tuple[object, ...]
) -> None:
    torch.manual_seed(1)
    state = resolve(name).build().state_dict()
    for key, tensor in state.items():
        if "bn" in key and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    save_file(state, "published.safetensors")
    partition(capsys, name, "--units", 2, "--weights", "published.safetensors", *rule)
    header = read_checkpoint("dvn.safetensors")
    images = torch.randn(4, 3, 32, 32)
    for task in (1, 2):
        slice_file(header, task, 1, "half.safetensors")
        hand = ByHand(8, widths, blocks, 100)
        hand.load_state_dict(load_file("half.safetensors"), strict=True)
        half = dvn_cli.load("half.safetensors")
        assert {n: p.shape for n, p in half.named_parameters()} == {n: p.shape for n, p in hand.named_parameters()}
        for train in (False, True):
            with torch.no_grad():
                assert (half.train(train)(images) - hand.train(train)(images)).abs().max() <= 1e-6
        for key, buffer in hand.named_buffers():  # what the batch did to the running statistics
            torch.testing.assert_close(half.get_buffer(key), buffer)


def test_the_top_level_is_the_backbone_with_its_weights(capsys: pytest.CaptureFixture[str]) -> None:
    save_file(resolve("wrn_10_1", 7).build().state_dict(), "published.safetensors")
    document = partition(capsys, "wrn_10_1", "--units", 4, "--weights", "published.safetensors", "--num-classes", 9)
    assert sorted(document["random"]) == ["fc.bias", "fc.weight"]
    stored = load_file("dvn.safetensors")
    for name, tensor in load_file("published.safetensors").items():
        assert name.startswith("fc.") or torch.equal(stored[f"shared/{name}"], tensor)


def test_widths_are_rounded_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    document = partition(capsys, "wrn_10_1", "--units", 3, "--round-to", 8)
    assert (document["round_to"], document["assign"]) == (8, "even")
    sizes = {group["channels"]: group["units"] for group in document["coupled"]}
    assert sizes == {16: [6, 5, 5], 32: [16, 8, 8], 64: [24, 24, 16]}
    header = read_checkpoint("dvn.safetensors")
    assert [cut(header, task, 1)["layer3.0.conv1.weight"].shape[0] for task in (1, 2, 3)] == [24, 24, 16]
    assert cut(header, 1, 3)["layer3.0.conv1.weight"].shape[0] == 64
    assert dvn("partition", "wrn_10_1", "--units", "3", "--round-to", "8") == 0
    out = capsys.readouterr().out
    for expected in ("in multiples of 8", "6+5+5", "16+8+8", "24+24+16", "Units are not all alike"):
        assert expected in out


def test_importance_leaves_the_backbone_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    module = resolve("wrn_10_1", 7).build()
    save_file(module.state_dict(), "published.safetensors")
    command = ("partition", "wrn_10_1", "--units", 4, "--num-classes", 7, "--assign", "importance")
    assert dvn(*command, "--weights", "published.safetensors", "--json") == 0
    document, err = capsys.readouterr()
    assert json.loads(document)["assign"] == "importance"
    assert "random" not in err
    header = read_checkpoint("dvn.safetensors")
    assert max(len(runs) for axis in header.metadata.axes for runs in axis) > 1  # channels of a unit lie apart
    slice_file(header, 1, 4, "top.safetensors")
    top, published = load_file("top.safetensors"), load_file("published.safetensors")
    assert top.keys() == published.keys()
    assert all(torch.equal(tensor, published[name]) for name, tensor in top.items())

    before = Path("dvn.safetensors").read_bytes()
    assert dvn(*command, "--weights", "published.safetensors") == 0
    assert Path("dvn.safetensors").read_bytes() == before
    assert "equally strong" in capsys.readouterr().out
    assert dvn(*command, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["warning"] is None
    assert "weights are random" in " ".join(err.split())


def test_inner_groups_alone_are_divided(capsys: pytest.CaptureFixture[str]) -> None:
    document = partition(capsys, "wrn_10_1", "--units", 2, "--divide", "inner")
    assert (document["divide"], document["warning"]) == ("inner", None)
    whole = {name: one["why"] for one in document["whole"] for name in one["places"]}
    assert whole["layer1.0.bn2.weight"] == "channels that sums couple, the residual stream"
    assert {group["places"][0][0]: group["units"] for group in document["coupled"] if group["units"]} == {
        **{f"layer{stage}.0.conv1.weight": [width // 2] * 2 for stage, width in ((1, 16), (2, 32), (3, 64))},
        "layer3.0.conv2.weight": [16, 16],  # the channels that the last block alone makes, where nothing is added
    }
    top = document["levels"][1]
    assert top["divided"] == pytest.approx(1 - sum(one["params"] for one in document["whole"]) / top["params"])
    loaded = dvn_cli.load("dvn.safetensors")
    assert isinstance(loaded, DeepVirtualNetwork)
    assert loaded.partition.rule.divide == "inner"
    assert dvn("partition", "wrn_10_1", "--units", 2, "--divide", "inner") == 0
    assert "the residual stream, channels that sums couple: 16 (" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("divide", ["all", "inner"])
def test_images_say_which_channels_matter_and_levels_make_up_for_the_others(
    capsys: pytest.CaptureFixture[str], divide: str
) -> None:
    torch.manual_seed(0)
    save_file(resolve("wrn_10_1", 7).build().state_dict(), "published.safetensors")
    command = ("wrn_10_1", "--units", 2, "--num-classes", 7, "--divide", divide, "--assign", "sorted")
    command = (*command, "--weights", "published.safetensors", "--mean", 0.5, "--std", 0.25)
    plain = partition(capsys, *command, "-o", "plain.safetensors")
    document = partition(capsys, *command, "--data", "source=digits")
    assert (plain["assign"], plain["notes"]) == ("sorted", [])
    assert document["notes"][-1].startswith("128 images tell which channels matter")
    assert document["levels"] == plain["levels"]
    axes = [read_checkpoint(file).metadata.axes for file in ("plain.safetensors", "dvn.safetensors")]
    assert axes[0] != axes[1]
    stored, published = load_file("dvn.safetensors"), load_file("published.safetensors")
    own = {name.split("/", 4)[4] for name in stored if name.startswith("task/")}
    assert own == {name for name in published if "running" in name} | {"fc.bias"}  # of some features it lacks the mean
    for level, is_changed in ((1, True), (2, False)):
        mean = stored[f"task/2/level/{level}/layer2.0.bn1.running_mean"]
        assert torch.equal(mean, published["layer2.0.bn1.running_mean"][: len(mean)]) is not is_changed
    assert dvn("slice", "--task", 1, "--level", 2, "-o", "top.safetensors") == 0
    assert all(torch.equal(tensor, published[name]) for name, tensor in load_file("top.safetensors").items())
    before = Path("dvn.safetensors").read_bytes()
    capsys.readouterr()
    partition(capsys, *command, "--data", "source=digits")
    assert Path("dvn.safetensors").read_bytes() == before


def test_a_classifier_of_zeros_says_nothing_of_widths(capsys: pytest.CaptureFixture[str]) -> None:
    """One drawn at random tells what channels are worth in its place."""
    torch.manual_seed(0)
    state = resolve("wrn_10_1", 7).build().state_dict()
    save_file(state | {"fc.weight": torch.zeros_like(state["fc.weight"])}, "zero.safetensors")
    command = ("wrn_10_1", "--units", 2, "--num-classes", 7, "--weights", "zero.safetensors", "--mean", 0.5, "--std", 1)
    options = ("--divide", "inner", "--assign", "sorted", "--widths", "macs", "--data", "source=digits")
    document = partition(capsys, *command, *options)
    assert any(max(group["units"]) - min(group["units"]) > 1 for group in document["coupled"] if group["units"])
    assert not load_file("dvn.safetensors")["shared/fc.weight"].any()


def test_units_are_as_wide_as_channels_are_worth(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    save_file(resolve("wrn_10_1", 7).build().state_dict(), "published.safetensors")
    command = ("wrn_10_1", "--units", 2, "--num-classes", 7, "--weights", "published.safetensors", "--mean", 0.5)
    command = (*command, "--std", 0.25, "--divide", "inner", "--assign", "sorted", "--data", "source=digits")
    even = partition(capsys, *command, "-o", "even.safetensors")
    document = partition(capsys, *command, "--widths", "macs", "--check")
    assert (even["widths"], document["widths"]) == ("even", "macs")
    assert all(max(group["units"]) - min(group["units"]) <= 1 for group in even["coupled"] if group["units"])
    assert any(max(group["units"]) - min(group["units"]) > 1 for group in document["coupled"] if group["units"])
    assert not document["check"]["differing"]
    assert document["levels"][0]["macs"] == pytest.approx(even["levels"][0]["macs"], rel=0.1)
    assert document["levels"][1] == even["levels"][1]
    assert read_checkpoint(Path("dvn.safetensors")).metadata.rule.widths == "macs"
    assert dvn("slice", "--task", 1, "--level", 1, "-o", "low.safetensors") == 0
    low = dvn_cli.load("low.safetensors")
    assert sum(p.numel() for p in low.parameters()) == document["levels"][0]["params"]


def test_a_folder_of_nothing_but_images_tells_as_much(capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    save_file(resolve("wrn_10_1", 7).build().state_dict(), "published.safetensors")
    command = ["wrn_10_1", "--units", 2, "--num-classes", 7, "--weights", "published.safetensors", "--data", "photos"]
    Path("photos").mkdir()
    assert dvn("partition", *command) == 2
    assert capsys.readouterr().err.endswith("photos has no images\n")
    for number in range(3):
        Image.new("RGB", (20, 30), (80 * number, 0, 0)).save(f"photos/{number}.png")
    document = partition(capsys, *command)
    assert document["notes"][-1].startswith("3 images tell which channels matter")
    assert dvn("partition", "wrn_10_1", "--units", 2, "--data", "photos") == 2
    assert "data tells which channels of weights matter: give weights or pretrained" in capsys.readouterr().err


def test_uneven_groups_are_shown_where_not_all_can_be(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dvn_cli.cli.rendering.ROWS", 1)
    assert dvn("partition", "wrn_10_1", "--units", "3", "--round-to", "32") == 0
    out = capsys.readouterr().out
    assert "6+5+5" in out
    assert "kinds of groups more" in out


def test_the_seed_decides_random_weights(capsys: pytest.CaptureFixture[str]) -> None:
    for file, seed in (("a", 0), ("b", 0), ("c", 1)):
        partition(capsys, "wrn_10_1", "--units", 2, "-o", file, "--seed", seed)
    assert Path("a").read_bytes() == Path("b").read_bytes() != Path("c").read_bytes()


def test_what_no_unit_owns_is_counted_and_warned_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 33 units all but the last stage's inner channels are too few."""
    monkeypatch.setattr(DeepVirtualNetwork, "check", lambda *_: None)  # of 33 networks, twice
    document = partition(capsys, "wrn_10_1", "--units", 33)
    network = dvn_cli.load("dvn.safetensors")
    assert isinstance(network, DeepVirtualNetwork)
    everywhere = 0  # elements that the lowest level of every task has, one unit each
    for name in network.partition.parameters:
        shape = network.partition.shapes[name]
        common = torch.ones(shape, dtype=torch.bool)
        for task in range(1, 34):
            here = torch.ones(shape, dtype=torch.bool)
            entry = network.tasks[task - 1]
            runs = network.partition.assignment.runs(name, shape, entry.units(1), len(entry.classes))
            for dim, along in enumerate(runs):
                gone = torch.ones(shape[dim], dtype=torch.bool)
                for start, stop in along:
                    gone[start:stop] = False
                here.index_fill_(dim, gone.nonzero().flatten(), False)
            common &= here
        everywhere += int(common.sum())
    top = document["levels"][-1]
    assert top["divided"] == pytest.approx(1 - everywhere / top["params"])
    assert sum(one["params"] for one in document["whole"]) == everywhere
    assert top["divided"] < 0.9
    assert document["warning"].startswith("less than 90 % of the parameters are divided; of the others most are those")
    assert "fewer channels than the 33 units" in document["warning"]
    assert dvn("partition", "wrn_10_1", "--units", 33) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Warning: less than 90 % of the parameters are divided; of the others most are those of conv1.weight" in out
    assert "groups of 16, fewer than 33 units: conv1.weight" in out


def test_the_report_names_what_a_person_can_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert dvn("partition", "wrn", "--units", "2", "--input-size", "16x32") == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "wrn -> wrn_32_4 (timm): images 3x16x32, 100 classes, 2 units"
    for expected in ("2 x 128", "layer3.0.conv1.weight", "7.4M", "7,380,276", "25.1 %", "99.9 %", "fc.bias", "31 norm"):
        assert expected in out
    assert len(lines) < 50
    assert "Warning" not in out


def test_a_slice_knows_the_size_of_its_top_level(capsys: pytest.CaptureFixture[str]) -> None:
    partition(capsys, "wrn_10_1", "--units", 3)
    header = read_checkpoint("dvn.safetensors")
    for task in (1, 2, 3):
        for level in (1, 2, 3):
            slice_file(header, task, level, "slice")
            assert params_and_density(read_header("slice")) == params_and_density(header, task, level)


def test_only_a_fresh_partition_is_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    command = ("partition", "wrn_10_1", "--units", "2")
    assert dvn(*command) == 0
    assert dvn(*command) == 0
    slice_file(read_checkpoint("dvn.safetensors"), 1, 1, "slice.safetensors")
    network = dvn_cli.load("dvn.safetensors")
    assert isinstance(network, DeepVirtualNetwork)
    network.training_record = TrainingRecord({}, epochs=1)
    network.save("trained.safetensors")
    Path("weights.bin").write_bytes(b"something else")
    capsys.readouterr()
    for file, why in (
        ("trained", "is a trained checkpoint"),
        ("slice", "is a slice"),
        ("weights", "not a safetensors"),
    ):
        path = next(Path().glob(f"{file}.*"))
        before = path.read_bytes()
        assert dvn(*command, "-o", path) == 2
        err = capsys.readouterr().err
        assert why in err
        assert "--force" in err
        assert err.count("\n") == 1
        assert path.read_bytes() == before
        assert dvn(*command, "-o", path, "--force") == 0
        assert path.read_bytes() == Path("dvn.safetensors").read_bytes()
        capsys.readouterr()


def test_what_cannot_be_narrowed_replaces_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dvn("partition", "wrn_10_1", "--units", "2") == 0
    before = Path("dvn.safetensors").read_bytes()
    capsys.readouterr()

    def refused(*_: object) -> None:
        raise InputError("aten.odd cannot be narrowed so")

    monkeypatch.setattr("dvn_cli.partition.narrow", refused)
    assert dvn("partition", "wrn_16_1", "--units", "2") == 2
    assert capsys.readouterr().err == "dvn: aten.odd cannot be narrowed so\n"
    assert Path("dvn.safetensors").read_bytes() == before


def test_a_command_that_fails_leaves_what_was_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails: counting, drawing the report, or whoever should read it."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def refused(*_: object) -> None:
        raise InputError("it cannot be counted")

    failing: dict[str, tuple[Any, ...]] = {
        "dvn_cli.units.count.macs": (refused, InputError),
        "dvn_cli.dividing.whole": (refused, InputError),
        "dvn_cli.cli.rendering._show_levels": (full, OSError),
        "dvn_cli.cli.partition.typer.echo": (full, OSError),
    }
    for number, (place, (fault, kind)) in enumerate(failing.items()):
        old = [b"old"] if number % 2 else []
        for content in old:
            Path("dvn.safetensors").write_bytes(content)
        with monkeypatch.context() as patch:
            patch.setattr(place, fault)
            with pytest.raises(kind):
                partition_command("wrn_10_1", units=2, input_size="8", output=Path("dvn.safetensors"), force=True)
        assert [file.read_bytes() for file in Path().iterdir()] == old
        Path("dvn.safetensors").unlink(missing_ok=True)


def test_a_check_says_that_narrow_networks_are_masked_ones(capsys: pytest.CaptureFixture[str]) -> None:
    rule = ("--assign", "importance", "--round-to", 8)
    document = partition(capsys, "wrn_10_1", "--units", 3, *rule, "--check", "--input-size", 8)
    assert document["check"]["networks"] == 4
    assert document["check"]["differing"] == []
    assert document["check"]["difference"] < 1e-12
    assert partition(capsys, "wrn_10_1", "--units", 2)["check"] is None


def test_a_check_tells_a_wrong_network_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four units the second is taken for the first."""

    def mistaken(assignment: Any, name: str, shape: Any, kept: tuple[int, ...]) -> list[Tensor]:
        return masks_by_axes(assignment, name, shape, (1,) if kept == (2,) else kept)

    monkeypatch.setattr("dvn_cli.check.masks_by_axes", mistaken)
    command = ("wrn_10_1", "--units", 4, "--input-size", 8, "--check", "--json")
    assert dvn("partition", *command) == 1
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["checkpoint"] is None
    assert [(one["units"], one["mode"]) for one in document["check"]["differing"]] == [([2], "eval"), ([2], "train")]
    for part in ("networks differ from the backbone", "units 2 in eval mode by ", "nothing is written"):
        assert part in err
    assert err.count("\n") == 1
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["wrn_10_1", "--units", "0"], "1 to 1,024 units, not 0"),
        (["wrn_10_1", "--units", "65"], "cannot be divided into 65 units: at most 64 channels"),
        (["wrn_10_1"], "units"),
        (["wrm_10_1", "--units", "2"], "unknown backbone 'wrm_10_1'"),
        (["wrn_10_1", "--units", "2", "--input-size", "big"], "--input-size takes pixels such as 224"),
        (["wrn_10_1", "--units", "2", "--pretrained", "--weights", "x"], "not both"),
        (["wrn_10_1", "--units", "2", "--weights", "none.safetensors"], "none.safetensors"),
        (["wrn_10_1", "--units", "2", "--round-to", "0"], "multiples of 1 or more (8, say), not 0"),
        (["wrn_10_1", "--units", "2", "--assign", "evenly"], "or sorted, not 'evenly'; did you mean 'even'?"),
        (["wrn_10_1", "--units", "2", "--widths", "macs"], "assign must be sorted with it"),
        (["wrn_10_1", "--units", "2", "--widths", "macs", "--assign", "sorted"], "give both weights and data"),
        (["wrn_10_1", "--units", "2", "-o", "none/dvn.safetensors"], "none"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert dvn("partition", *arguments) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert not out
    assert not list(Path().iterdir())
