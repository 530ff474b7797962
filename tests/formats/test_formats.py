"""Networks in the formats of other runtimes: each file gives the network's logits, without dvn, or is not written."""

import hashlib
import json
import subprocess
import sys
import textwrap
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import dvn_cli
from dvn_cli import formats
from dvn_cli.cli import app
from dvn_cli.errors import DvnError, InputError
from dvn_cli.export import Form, slice_all
from dvn_cli.formats import FORMATS
from dvn_cli.network import DeepVirtualNetwork, VirtualNetwork

SHAPE = (1, 8, 8)


def divided(path: Path, name: str, least: float = 0.5, **options: int) -> Path:
    """Writes a fresh partition whose running statistics are not trivial, and a quarter of whose variances are least."""
    torch.manual_seed(0)
    network = dvn_cli.divide(name, units=2, num_classes=5, **options)
    for buffer, tensor in network.named_buffers():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5) if buffer.endswith("var") else tensor.normal_()
        if buffer.endswith("var"):
            tensor[::4] = least
    network.save(path / "dvn.safetensors")
    return path / "dvn.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    least = 0.01  # of which epsilon is a part that shows
    return divided(tmp_path_factory.mktemp("formats"), "wrn_10_1", least, in_chans=1, input_size=8)


@pytest.fixture(scope="module")
def of_timm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return divided(tmp_path_factory.mktemp("timm"), "test_resnet", input_size=32)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def random_images(batch: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))


def expected(checkpoint: Path, level: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    network = dvn_cli.load(dvn_cli.slice(checkpoint, 1, level, "expected.safetensors").file)
    assert isinstance(network, VirtualNetwork)
    with torch.no_grad():
        return network(random_images(3, shape))


def without(modules: str, source: str, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Logits that a program writes to `logits.pt`, run where some modules cannot be imported."""
    torch.save(random_images(3, shape), "images.pt")
    blocked = f"import sys, torch\nfor name in {modules.split()}: sys.modules[name] = None\n"
    program = blocked + "images = torch.load('images.pt')\n" + textwrap.dedent(source)
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
    return torch.load("logits.pt")


def test_pt2_runs_with_torch_alone(checkpoint: Path) -> None:
    cut = dvn_cli.slice(checkpoint, 1, 1, form=Form("pt2"))
    assert cut.file == Path("dvn-task1-level1.pt2")
    assert cut.check is not None
    assert (cut.check.difference, cut.check.same, cut.check.images) == (0, 5, 5)
    source = """
    said = {"classes": "", "preprocessing": ""}
    network = torch.export.load("dvn-task1-level1.pt2", extra_files=said).module()
    torch.save(torch.cat([network(images[:1]), network(images[1:])]).detach(), "logits.pt")
    print(said["classes"], said["preprocessing"], file=open("said", "w"))
    """
    torch.testing.assert_close(without("dvn_cli timm torchvision", source), expected(checkpoint, 1))
    assert '["0", "1", "2", "3", "4"] {"input_size": [8, 8], "mean": [0.5]' in Path("said").read_text()
    with zipfile.ZipFile(cut.file) as archive:
        assert [info.file_size for info in archive.infolist() if info.filename.endswith(".pt")] == [0]  # no pickle
        assert not any(str(Path(dvn_cli.__file__).parent).encode() in archive.read(name) for name in archive.namelist())
    assert dvn_cli.slice(checkpoint, 1, 1, "again.pt2", form=Form("pt2")).file.read_bytes() == cut.file.read_bytes()


def test_timm_loads_its_folder(of_timm: Path) -> None:
    lines: list[str] = []
    cuts = list(slice_all(of_timm, note=lines.append, form=Form("timm")))
    assert [(cut.task, cut.level) for cut in cuts] == [(1, 2), (2, 2)]
    assert lines[0].startswith("timm cannot express level 1 of task 'task1': ")
    assert len(lines) == 2
    assert sorted(path.name for path in cuts[0].file.iterdir()) == ["config.json", "model.safetensors"]
    source = """
    import timm
    network = timm.create_model("local-dir:dvn-slices/dvn-task1-level2-timm", pretrained=True).eval()
    assert list(network.pretrained_cfg["mean"]) == [0.5, 0.5, 0.5]
    torch.save(network(images).detach(), "logits.pt")
    """
    torch.testing.assert_close(without("dvn_cli", source, (3, 32, 32)), expected(of_timm, 2, (3, 32, 32)))

    said = json.loads(Path("dvn-slices/manifest.json").read_text())
    assert said["format"] == "timm"
    for cut, entry in zip(cuts, said["slices"], strict=True):
        assert (entry["task"], entry["level"], entry["params"]) == (cut.task, cut.level, cut.params)
        assert entry["macs"] == cut.macs is not None
        assert cut.bytes == sum(Path("dvn-slices", file["file"]).stat().st_size for file in entry["files"])
        for file in entry["files"]:
            content = Path("dvn-slices", file["file"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == file["sha256"]
    again = dvn_cli.slice(of_timm, 1, 2, "dvn-slices", form=Form("timm"))  # in the place of the old one
    assert again.file == cuts[0].file
    with pytest.raises(InputError, match="timm cannot express level 1 of task 'task1': "):
        dvn_cli.slice(of_timm, 1, 1, form=Form("timm"))
    assert not Path("dvn-task1-level1-timm").exists()


def test_a_folder_that_was_written_is_replaced(of_timm: Path) -> None:
    level, form, old = 2, Form("timm"), Path("net/model.safetensors")
    dvn_cli.slice(of_timm, 1, level, "net", form=form)
    written = old.read_bytes()
    old.write_bytes(b"old")
    assert dvn_cli.slice(of_timm, 1, level, "net", form=form).file == Path("net")
    assert old.read_bytes() == written
    assert {path.name for path in Path("net").iterdir()} == {"config.json", "model.safetensors"}
    Path("net/own.txt").touch()  # a folder with anything else in it is one for networks
    assert dvn_cli.slice(of_timm, 1, level, "net", form=form).file == Path("net/dvn-task1-level2-timm")


def test_timm_cannot_express_a_stem_of_another_stride(of_timm: Path) -> None:
    network = dvn_cli.load(of_timm)
    assert isinstance(network, DeepVirtualNetwork)
    tasks = [replace(network.tasks[0], input_size=(16, 16)), network.tasks[1]]
    DeepVirtualNetwork(network.partition, tasks, network.file_tensors()).save("sizes.safetensors")
    assert [cut.task for cut in slice_all("sizes.safetensors", form=Form("timm"))] == [2]
    with pytest.raises(InputError, match=r"conv1\.0\.weight has a stride of 1x1 for images of 16x16, in its .* 2x2"):
        dvn_cli.slice("sizes.safetensors", 1, 2, form=Form("timm"))


def test_timm_cannot_express_a_backbone_that_it_has_not_heard_of(checkpoint: Path) -> None:
    """In a process of its own, where nothing has built the backbone, which would register it."""
    command = [sys.executable, "-m", "dvn_cli", "slice", str(checkpoint), "--all", "--format", "timm", "-o", "folders"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == "timm cannot express level 1 of task 'task1': wrn_10_1 is not one of its models"
    assert len(lines) == 5
    assert lines[-1] == f"dvn: timm can express no network of '{checkpoint}': nothing is written"
    assert not Path("folders").exists()


@pytest.mark.parametrize("name", ["onnx", "executorch", "openvino", "litert"])
def test_other_runtimes(checkpoint: Path, name: str) -> None:
    if FORMATS[name].missing:
        pytest.skip(f"{FORMATS[name].missing} not installed")
    cut = dvn_cli.slice(checkpoint, 1, 1, form=Form(name))
    assert FORMATS[name].is_written_to(cut.file) == cut.file.is_dir()
    run = FORMATS[name].module.read(cut.file, threads=1)
    logits = expected(checkpoint, 1)
    torch.testing.assert_close(run(random_images(3)), logits, rtol=0, atol=1e-4 * float(logits.abs().max()))
    texts = [path.read_bytes() for path in cut.file.rglob("*")] if cut.file.is_dir() else [cut.file.read_bytes()]
    assert any(b'["0", "1", "2", "3", "4"]' in text.replace(b"&quot;", b'"') for text in texts)


def test_folded_norms_and_types(checkpoint: Path) -> None:
    plain = dvn_cli.slice(checkpoint, 1, 1, "plain.pt2", form=Form("pt2"))
    folded = dvn_cli.slice(checkpoint, 1, 1, "folded.pt2", form=Form("pt2", fold_norms=True))
    half = dvn_cli.slice(checkpoint, 1, 1, "half.pt2", form=Form("pt2", "bf16"))
    operators = {node.target for node in torch.export.load(folded.file).graph.nodes}
    assert torch.ops.aten.batch_norm.default not in operators
    assert folded.check is not None
    assert half.check is not None
    assert 0 < folded.check.difference < 1e-4 < half.check.difference < 1e-1
    assert plain.bytes - half.bytes > plain.params  # two bytes of each, as far as they are not padded
    assert torch.export.load(half.file).module()(random_images(2)).dtype is torch.float32
    cut = dvn_cli.slice(checkpoint, 1, 1, form=Form(dtype="fp16"))
    assert {p.dtype for p in dvn_cli.load(cut.file).parameters()} == {torch.float16}
    with pytest.raises(InputError, match="weights are fp32, fp16, bf16, int8, not 'fp8'; did you mean"):
        Form(dtype="fp8")
    with pytest.raises(InputError, match="--fold-norms: safetensors holds weights"):
        dvn_cli.slice(checkpoint, 1, 1, form=Form(fold_norms=True))


@pytest.mark.parametrize("name", [each.name for each in FORMATS.values() if each.has_int8])
def test_int8_says_what_it_costs(checkpoint: Path, name: str) -> None:
    if FORMATS[name].missing:
        pytest.skip(f"{FORMATS[name].missing} not installed")
    whole = dvn_cli.slice(checkpoint, 1, 2, f"whole{FORMATS[name].ending}", form=Form(name))
    words = ["slice", str(checkpoint), "--task", "1", "--level", "2", "--format", name, "--int8", "--json"]
    images = ["--calibrate", "source=digits", "--calibrate", "classes=0-4", "--calibrate", "test_images=50"]
    [cut] = json.loads(CliRunner().invoke(app, [*words, *images]).stdout)["slices"]
    assert cut["bytes"] < whole.bytes / 2
    assert cut["calibration"] is None
    assert 1e-4 < cut["check"]["difference"] < 0.5
    assert cut["check"]["images"] == 128
    assert all(0 <= share <= 100 for share in cut["int8"].values())


def test_int8_takes_a_convolution_and_its_relu6_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies between them is not quantised: its range is that of values that ReLU6 takes away."""
    if FORMATS["executorch"].missing:
        pytest.skip("executorch not installed")
    module, written = FORMATS["executorch"].module, []
    monkeypatch.setattr(module, "_write", lambda network, exported, path: written.append(exported))
    whole = divided(tmp_path, "mobilenetv2_035", input_size=32)
    network = dvn_cli.load(dvn_cli.slice(whole, 1, 1).file)
    module.write_int8(network, Path("network.pte"), [random_images(2, (3, 32, 32))])
    nodes = [node for node in written[0].graph.nodes if "hardtanh" in str(node.target)]
    assert len(nodes) > 30
    assert {node.args[0].target for node in nodes} == {torch.ops.aten.conv2d.default}
    assert {user.target.__name__ for node in nodes for user in node.users} == {"quantize_per_tensor.default"}


def test_int8_leaves_no_weights_in_float32(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ExecuTorch's conversion keeps those of layers that have a bias, unless it is told otherwise."""
    if FORMATS["executorch"].missing:
        pytest.skip("executorch not installed")
    module, written = FORMATS["executorch"].module, []
    monkeypatch.setattr(module, "_write", lambda network, exported, path: written.append(exported))
    network = dvn_cli.load(dvn_cli.slice(checkpoint, 1, 2).file)
    with torch.no_grad():
        module.write_int8(network, Path("network.pte"), [random_images(2)])
    weights = {name: tensor.dtype for name, tensor in written[0].state_dict.items() if tensor.ndim > 1}
    assert set(weights.values()) == {torch.int8}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "onnx", "--int8"], "int8 needs images for the ranges of activations: give --calibrate DATA"),
        (
            ["--format", "pt2", "--dtype", "int8", "--calibrate", "source=digits"],
            "pt2 is not written in int8: onnx and",
        ),
        (["--int8", "--dtype", "fp16"], "--int8 or --dtype, not both"),
    ],
)
def test_int8_is_refused_in_a_line(checkpoint: Path, words: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["slice", str(checkpoint), "--task", "1", "--level", "1", *words])
    assert isinstance(result.exception, InputError)
    assert str(result.exception).startswith(message)
    assert not list(Path().iterdir())


def test_images_of_ones_own_are_compared_too(checkpoint: Path) -> None:
    cut = dvn_cli.slice(checkpoint, 1, 1, form=Form("pt2", data=["source=digits", "test_images=7"]))
    assert cut.check is not None
    assert cut.check.images > 5


def test_what_differs_is_not_written(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("dvn-task1-level1.pt2").write_text("what was there")
    module = FORMATS["pt2"].module
    read = module.read
    wrong = torch.tensor([0.0, 0.01, 0, 0, 0])
    monkeypatch.setattr(module, "read", lambda path: lambda images: read(path)(images) * (1 + wrong))
    with pytest.raises(DvnError, match=r"is not the same network: its logits differ by up to .*most on image") as error:
        dvn_cli.slice(checkpoint, 1, 1, form=Form("pt2"))
    assert error.value.exit_code == 1
    monkeypatch.setattr(module, "read", lambda path: lambda images: read(path)(images).flip(0))  # each has another's
    with pytest.raises(DvnError, match="get another class"):
        dvn_cli.slice(checkpoint, 1, 1, form=Form("pt2"))
    assert [path.name for path in Path().iterdir()] == ["dvn-task1-level1.pt2"]
    assert Path("dvn-task1-level1.pt2").read_text() == "what was there"


def test_what_a_library_cannot_convert_is_one_line(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        print("noise")
        raise RuntimeError("no such operator\nand a page more")

    monkeypatch.setattr(FORMATS["pt2"].module, "write", fails)
    result = CliRunner().invoke(app, ["slice", str(checkpoint), "--task", "1", "--level", "1", "--format", "pt2"])
    assert str(result.exception) == "level 1 of task 'task1' cannot be written as pt2 in fp32: no such operator"
    assert "noise" not in result.output


def test_formats_are_listed_with_what_is_missing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    rows = json.loads(CliRunner().invoke(app, ["slice", "--list-formats", "--json"]).stdout)["formats"]
    assert {row["format"]: row["install"] for row in rows} == {
        **dict.fromkeys(["safetensors", "timm", "pt2"]),
        **{name: f"pip install 'dvn[{name}]'" for name in ("onnx", "executorch", "openvino", "litert")},
    }
    shown = CliRunner().invoke(app, ["slice", "--list-formats"]).stdout
    assert all(name in shown for name in FORMATS)
    result = CliRunner().invoke(app, ["slice", str(checkpoint), "--all", "--format", "onnx"])
    assert "needs onnx, onnxscript, onnxruntime, not installed here: pip install 'dvn[onnx]'" in str(result.exception)
    assert isinstance(result.exception, InputError)


def test_formats_are_the_extras_of_the_package() -> None:
    text = (Path(dvn_cli.__file__).parents[1] / "pyproject.toml").read_text()
    for each in FORMATS.values():
        assert bool(each.needs) == (f"\n{each.name} = [" in text)
