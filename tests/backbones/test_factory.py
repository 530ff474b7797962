"""Backbones of one's own, by `package.module:factory`."""

import contextlib
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_cli_partition import dvn

import dvn_cli
from dvn_cli import partition
from dvn_cli.backbones import BackboneSpec, factory, resolve
from dvn_cli.errors import InputError
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.store.file import read_header

MODULE = """
import torch
from torch import nn
from .parts import conv

class Net(nn.Module):
    def __init__(self, num_classes, in_chans=3, width=8):
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]  # of which the meta device knows nothing
        self.first, self.norm, self.second = conv(in_chans, width), nn.BatchNorm2d(width), conv(width, width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.second(self.norm(self.first(x)).relu()).mean((2, 3)))

def coloured(*, num_classes):
    return Net(num_classes)

def raising(num_classes):
    raise KeyError("width")

def nothing(num_classes):
    return {}

def fixed():
    return Net(10)

class Zoo:
    @staticmethod
    def small(num_classes):
        return Net(num_classes, width=4)
"""


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package `own` in the working directory, forgotten afterwards."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own/__init__.py").touch()
    (tmp_path / "own/parts.py").write_text(
        "from torch import nn\ndef conv(a, b):\n    return nn.Conv2d(a, b, 3, padding=1)\n"
    )
    (tmp_path / "own/nets.py").write_text(MODULE)
    (tmp_path / "own/broken.py").write_text("raise OSError('no disk\\nat all')\n")
    (tmp_path / "own/needy.py").write_text("import not_to_be_had\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    for name in [name for name in sys.modules if name.partition(".")[0] == "own"]:
        monkeypatch.delitem(sys.modules, name)
    partition._restored.cache_clear()  # what a file holds is opened once


@pytest.mark.parametrize("name", ["own.nets:Net", "own.nets:coloured"])
def test_every_file_builds_it_again(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--num-classes", 5, "--input-size", 8, "--units", 2, "--json")
    assert dvn("partition", name, *options) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["backbone"]["source"], document["backbone"]["name"]) == ("python", name)
    assert dvn("slice", "--task", 1, "--level", 2, "-o", "top.safetensors") == 0
    module = factory.find(name)(num_classes=5)
    module.load_state_dict(load_file("top.safetensors"))
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(dvn_cli.load("top.safetensors")(images), module.eval()(images))


def test_it_is_trained_and_evaluated() -> None:
    recipe = "backbone: {name: 'own.nets:Zoo.small'}\nunits: 2\nepochs: 1\nbatch_size: 8\ntasks:\n"
    recipe += "  - {name: few, data: {source: digits, classes: 0-2, train_images: 12, test_images: 3}}\n"
    Path("recipe.yaml").write_text(recipe)
    assert dvn("train", "recipe.yaml", "-o", "trained.safetensors", "--json") == 0
    assert dvn("eval", "trained.safetensors", "--json") == 0


def change(before: str, after: str) -> None:
    """Edits the module and imports it again, as in a notebook."""
    path = Path("own/nets.py")
    path.write_text(path.read_text().replace(before, after))
    importlib.reload(sys.modules["own.nets"])


def test_code_that_was_edited_is_divided_as_it_is_now() -> None:
    """A division that depends on no weights is kept for the next one, but not of such a backbone."""
    images = torch.rand(2, 3, 8, 8)
    for _ in ("relu", "sigmoid"):
        network = dvn_cli.divide("own.nets:Net", 2, num_classes=5, input_size=8).eval()
        module = factory.find("own.nets:Net")(num_classes=5)
        module.load_state_dict(network.virtual_network(1, 2).state_dict())
        torch.testing.assert_close(network.virtual_network(1, 2)(images), module.eval()(images))
        change("relu()", "sigmoid()")


RECIPE = """
backbone: {name: 'own.nets:Net'}
units: 2
epochs: 2
batch_size: 8
tasks:
  - {name: few, data: {source: digits, classes: 0-2, train_images: 12, test_images: 3}}
"""
MORE = """
continues: dvn.safetensors
learning: sequential
epochs: 1
batch_size: 8
tasks:
  - {name: more, data: {source: digits, classes: 3-8, train_images: 12, test_images: 3}}
"""


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def trained(how: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Leaves what can be trained on: an interrupted run, a finished one, or a fresh partition; and says how it is."""
    Path("recipe.yaml").write_text(RECIPE)
    Path("more.yaml").write_text(MORE)
    if how == "divided":
        options = ("--num-classes", 3, "--input-size", 8, "--units", 2, "-o", "fresh.safetensors")
        assert dvn("partition", "own.nets:Net", *options) == 0
    else:
        with monkeypatch.context() as patch:
            if how == "interrupted":
                patch.setattr(DeepVirtualNetwork, "save", interrupt)
            assert dvn("train", "recipe.yaml") == (130 if how == "interrupted" else 0)
    return {
        "interrupted": ["recipe.yaml", "--resume"],
        "finished": ["recipe.yaml", "epochs=3", "--resume"],
        "continued": ["more.yaml", "-o", "new.safetensors"],
        "divided": ["recipe.yaml", "backbone=", "units=", "partition=fresh.safetensors", "-o", "new.safetensors"],
    }[how]


@pytest.mark.parametrize("how", ["interrupted", "finished", "continued", "divided"])
def test_networks_are_not_trained_on_with_other_code(
    how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though its tensors are the same."""
    words = trained(how, monkeypatch)
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    change("relu()", "sigmoid()")
    capsys.readouterr()
    assert dvn("train", *words) == 2
    err = capsys.readouterr().err
    assert err.endswith("not the backbone that was divided: its code has changed since, and computes something else\n")
    assert err.count("dvn: ") == 1
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


@pytest.mark.parametrize(("padding", "only"), [("same", True), ("valid", False)])
def test_padding_in_words(padding: str, only: bool) -> None:
    """Of a stem, whose stride follows the size of the images."""
    Path(f"padded_{padding}.py").write_text(
        "from torch import nn\n"
        "def make(num_classes, in_chans=3):\n"
        f"    stem = nn.Conv2d(in_chans, 8, 3, padding='{padding}'), nn.ReLU()\n"
        "    return nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))\n"
    )
    partition = dvn_cli.divide(f"padded_{padding}:make", 2, num_classes=4, input_size=8).partition
    partition.check_images((8, 8))
    with pytest.raises(InputError, match="takes images of 8x8 only") if only else contextlib.nullcontext():
        partition.check_images((14, 14))


def test_norms_by_hand_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    """As in ConvNeXt's own code: what is left out of a mean is left out of the next one, of what differs from it."""
    Path("by_hand.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Norm(nn.Module):\n"
        "    def __init__(self, channels):\n"
        "        super().__init__()\n"
        "        self.weight = nn.Parameter(torch.ones(channels))\n"
        "    def forward(self, x):\n"
        "        x = x - x.mean(1, keepdim=True)\n"
        "        return self.weight[:, None, None] * x / (x.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()\n"
        "def make(num_classes, in_chans=3):\n"
        "    layers = nn.Conv2d(in_chans, 8, 2, 2), Norm(8), nn.Conv2d(8, 16, 2, 2), nn.GELU(), Norm(16)\n"
        "    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))\n"
    )
    assert dvn("partition", "by_hand:make", "--units", 2, "--num-classes", 4, "--input-size", 8, "--check") == 0
    assert "networks differ" not in capsys.readouterr().err


def test_they_are_with_code_that_says_the_same_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    words = trained("continued", monkeypatch)
    change("relu()", "clamp(min=0)")
    assert dvn("train", *words) == 0


def test_a_slice_is_not_put_into_train_mode_with_other_code() -> None:
    network = dvn_cli.divide("own.nets:Net", 2, num_classes=5, input_size=8)
    network.save("fresh.safetensors")
    assert dvn("slice", "fresh.safetensors", "--task", 1, "--level", 1, "-o", "slice.safetensors") == 0
    change("relu()", "sigmoid()")
    loaded = dvn_cli.load("slice.safetensors")
    assert loaded(torch.rand(2, 3, 8, 8)).shape == (2, 5)
    with pytest.raises(InputError, match=r"and computes something else$"):
        loaded.train()(torch.rand(2, 3, 8, 8))


def test_slices_are_cut_where_it_cannot_be_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dvn("partition", "own.nets:Net", "--num-classes", 5, "--input-size", 8, "--units", 2) == 0
    Path("own").rename("elsewhere")
    for name in [name for name in sys.modules if name.partition(".")[0] == "own"]:
        del sys.modules[name]
    capsys.readouterr()
    assert dvn("slice", "--task", 1, "--level", 1, "-o", "slice.safetensors") == 0
    header = read_header("slice.safetensors")
    with pytest.raises(InputError, match=r"'own.nets:Net' cannot be imported: there is no module 'own', neither"):
        BackboneSpec(**vars(header.metadata.backbone)).build()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own.net:Net", "there is no module 'own.net', neither installed nor in "),
        ("own.nets:Nett", "own.nets has no 'Nett'; did you mean 'Net'?"),
        ("own.broken:Net", "OSError: no disk (broken.py, line 1)"),
        ("own.needy:Net", "own.needy needs a module 'not_to_be_had'"),
        ("own.nets:raising", "own.nets:raising(num_classes=5) failed with KeyError: 'width' (nets.py, line 20)"),
        ("own.nets:nothing", "own.nets:nothing returned a dict, not a torch.nn.Module"),
        ("own.nets:fixed", "'own.nets:fixed' is no factory: dvn calls it with num_classes=..., which it does not take"),
        ("os:abort", "'os:abort' is no factory"),
        ("own.nets:Net()", "named package.module:factory, not 'own.nets:Net()'"),
        ("./own/nets.py:Net", "named package.module:factory, not './own/nets.py:Net'"),
    ],
)
def test_what_cannot_be_built_is_told_in_one_line(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dvn("partition", name, "--num-classes", 5, "--input-size", 8, "--units", 2) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert not out
    assert not list(Path().glob("*.safetensors"))


def test_what_it_is_for_has_to_be_said() -> None:
    with pytest.raises(InputError, match=r"give --num-classes and --input-size$"):
        resolve("own.nets:Net")
    with pytest.raises(InputError, match=r"give --input-size$"):
        resolve("own.nets:Net", num_classes=5)
    assert resolve("own.nets:Net", 5, 1, (8, 8)).build().first.in_channels == 1
    with pytest.raises(InputError, match=r"own.nets:coloured cannot take images of 1x8x8"):
        resolve("own.nets:coloured", 5, 1, (8, 8))
