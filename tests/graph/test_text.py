"""Graphs as text: what a file keeps of a backbone is read as it was, is the same for any classes, and runs nothing."""

import base64
import json
import math
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dvn_cli
from dvn_cli.backbones import resolve
from dvn_cli.dividing import partition_backbone
from dvn_cli.graph import text
from dvn_cli.graph.compare import same_graph
from dvn_cli.graph.trace import trace
from dvn_cli.partition import Partition
from dvn_cli.store.file import read_header

NAMES = ["test_resnet", "test_vit", pytest.param("test_efficientnet", marks=pytest.mark.slow)]
NAMES += [pytest.param(name, marks=pytest.mark.slow) for name in ("test_convnext", "swin_s3_tiny_224")]


def divided(name: str, classes: int = 5) -> Partition:
    return partition_backbone(resolve(name, classes), 2)


def unpacked(packed: str) -> tuple[Any, bytes]:
    content, _, constants = zlib.decompress(base64.b64decode(packed)).partition(b"\0")
    return json.loads(content), constants


def packed(content: Any, constants: bytes = b"") -> str:
    return base64.b64encode(zlib.compress(json.dumps(content).encode() + b"\0" + constants)).decode()


@pytest.mark.parametrize("name", NAMES)
def test_networks_are_those_of_the_backbone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    partition = divided(name)
    metadata = replace(partition.metadata(), graph=partition.graph_text)
    assert 0 < len(metadata.graph or "") < 64 << 10
    monkeypatch.setattr("dvn_cli.backbones.BackboneSpec.build", None)
    restored = Partition.restore(metadata)
    assert (restored.shapes, restored.dtypes) == (partition.shapes, partition.dtypes)
    assert list(restored.shapes) == list(partition.shapes)
    for units, classes in (((1,), 5), ((2,), 3), ((1, 2), 5)):
        ours, theirs = (each.network(units, classes) for each in (restored, partition))
        assert ours.names == theirs.names
        assert same_graph(ours.module, theirs.module)


class Tables(nn.Module):
    """Picks pixels by a table that is no tensor of its files, and adds a mask with infinities."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.register_buffer("places", torch.tensor([0, 5, 10, 15]), persistent=False)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf, 1.0, 2.0]), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.sum(1).flatten(1)[:, self.places] + self.mask
        return self.fc(x.masked_fill(x == -math.inf, -math.inf).softmax(-1))


def test_constants_are_kept() -> None:
    module = Tables()
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    traced, places = trace(module, (2, 4, 4), train=False), [("fc.weight", 0), ("fc.bias", 0)]
    written = text.write(traced, shapes, dict.fromkeys(shapes, torch.float32), places)
    found = text.read(written or "", sorted(shapes), (2, 4, 4), 3)
    assert found is not None
    nodes = list(zip(traced.graph.nodes, found.traced.graph.nodes, strict=True))
    assert all(ours.meta.get("val") == theirs.meta.get("val") for ours, theirs in nodes)
    images, weights = torch.randn(2, 2, 4, 4), module.state_dict()
    given = [
        images
        if key == found.traced.input
        else weights[found.traced.names[key]]
        if key in found.traced.names
        else found.traced.sources[key]
        for key in (str(node.target) for node in found.traced.graph.find_nodes(op="placeholder"))
    ]
    assert torch.equal(torch.fx.GraphModule(nn.Module(), found.traced.graph)(*given), module(images))


def test_the_number_of_classes_is_not_in_it() -> None:
    assert divided("test_vit", 5).graph_text == divided("test_vit", 7).graph_text


def test_files_open_without_the_backbone(tmp_path: Path) -> None:
    """Neither its library nor torch's exporter and compiler are imported, and a file is written again as it was."""
    path = tmp_path / "dvn.safetensors"
    dvn_cli.divide("wrn_10_1", 2, num_classes=5, in_chans=1, input_size=8).save(path)
    cut = dvn_cli.slice(path, 1, 1, tmp_path)
    dvn_cli.load(path).save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    code = """
import sys, torch, dvn_cli
network = dvn_cli.load(sys.argv[1])
print(network(torch.zeros(1, 1, 8, 8)).shape, dvn_cli.load(sys.argv[2]).virtual_network(1, 2).level)
[result] = dvn_cli.evaluate(sys.argv[1], data={"source": "digits", "classes": "0-4", "test_images": 9})
print(result.images)
print([name for name in ("timm", "torchvision", "torch._dynamo", "sympy") if name in sys.modules])
print(network.train().training, "timm" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, cut.file, path], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["torch.Size([1, 5]) 2", "9", "[]", "True True"]


def test_operators_that_are_not_known_are_no_reason_to_refuse_a_file() -> None:
    """As of a newer torch: the backbone is built again."""
    partition = divided("test_resnet")
    content, constants = unpacked(partition.graph_text or "")
    next(node for node in content["nodes"] if node[0] == "relu_.default")[0] = "relu_.yet_to_come"
    restored = Partition.restore(replace(partition.metadata(), graph=packed(content, constants)))
    assert restored.kept is None
    assert same_graph(restored.network((1,), 5).module, partition.network((1,), 5).module)


def test_operators_that_dvn_has_no_entry_for_are_never_called(tmp_path: Path) -> None:
    """Such as the one that opens files."""
    partition, target = divided("test_resnet"), tmp_path / "made"
    content, constants = unpacked(partition.graph_text or "")
    content["nodes"].append(["from_file.default", [str(target), True, 4], {}, [4]])
    content["output"] = len(content["nodes"]) - 1
    assert Partition.restore(replace(partition.metadata(), graph=packed(content, constants))).kept is None
    assert not target.exists()


def _first(content: Any, name: str) -> list[Any]:
    return next(node for node in content["nodes"] if node[0] == name)


DAMAGES: dict[str, Callable[[Any], Any]] = {
    "no nodes": lambda content: content.pop("nodes"),
    "a node that comes later": lambda content: _first(content, "conv2d.default")[1].__setitem__(0, {"node": 10**6}),
    "another shape": lambda content: _first(content, "conv2d.default")[3].__setitem__(1, 7),
    "a huge shape": lambda content: _first(content, "conv2d.default")[3].__setitem__(3, 1 << 40),
    "a negative size": lambda content: content["tensors"][0][2].__setitem__(0, -4),
    "a tensor less": lambda content: content["tensors"].pop(),
    "no such dtype": lambda content: content["tensors"][0].__setitem__(1, 3),
    "an argument of no kind": lambda content: _first(content, "conv2d.default")[1].__setitem__(0, {"run": "me"}),
    "a number for a node": lambda content: content["nodes"].__setitem__(0, 7),
    "too many arguments": lambda content: _first(content, "relu_.default")[1].append(1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_texts_are_refused(damage: str) -> None:
    partition = divided("test_resnet")
    content, constants = unpacked(partition.graph_text or "")
    DAMAGES[damage](content)
    with pytest.raises(dvn_cli.InputError):
        Partition.restore(replace(partition.metadata(), graph=packed(content, constants)))


@pytest.mark.parametrize(
    "content", ["", "no base64!", "AAAA", base64.b64encode(zlib.compress(bytes(80 << 20))).decode()]
)
def test_no_text_at_all(content: str) -> None:
    with pytest.raises(dvn_cli.InputError, match="'graph' is not usable"):
        Partition.restore(replace(divided("test_resnet").metadata(), graph=content))


def test_a_slice_has_what_its_checkpoint_has(tmp_path: Path) -> None:
    path = tmp_path / "dvn.safetensors"
    dvn_cli.divide("test_resnet", 2, num_classes=5, input_size=32).save(path)
    kept = read_header(dvn_cli.slice(path, 2, 1, tmp_path).file).metadata
    assert kept.graph == read_header(path).metadata.graph is not None
    assert torch.is_tensor(dvn_cli.load(path)(torch.zeros(1, 3, 32, 32), 1, 1))


def test_a_text_without_its_checksum_is_not_believed(tmp_path: Path) -> None:
    """The backbone is built again, as for a file that keeps no graph."""
    dvn_cli.divide("wrn_10_1", units=2, num_classes=4, in_chans=1, input_size=8).save(tmp_path / "dvn.safetensors")
    cut = dvn_cli.slice(tmp_path / "dvn.safetensors", 1, 1, tmp_path / "cut.safetensors").file
    images = torch.randn(2, 1, 8, 8)
    expected = dvn_cli.load(cut)(images)
    content = cut.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    metadata = json.loads(header["__metadata__"]["dvn"])
    del metadata["checksums"]
    said, constants = unpacked(metadata["graph"])
    said["nodes"] = [[*node[:1], node[1][:1] * 2, *node[2:]] if len(node) > 2 else node for node in said["nodes"]]
    metadata["graph"] = packed(said, constants)
    header["__metadata__"]["dvn"] = json.dumps(metadata)
    lead = json.dumps(header).encode()
    cut.write_bytes(len(lead).to_bytes(8, "little") + lead + content[length:])
    assert torch.equal(dvn_cli.load(cut)(images), expected)
