"""A slice, loaded, is an ordinary module: whatever people do with one works, and its file is the backbone's own."""

import copy
import json
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dvn_cli
from dvn_cli.backbones import BackboneSpec, resolve
from dvn_cli.dividing import partition_backbone
from dvn_cli.errors import InputError
from dvn_cli.network import DeepVirtualNetwork, VirtualNetwork, to_data
from dvn_cli.store.file import Header, read_checkpoint, read_header
from dvn_cli.store.file import write as write_file
from dvn_cli.store.slicing import count, slice_file
from dvn_cli.tasks import default_tasks

Images = Callable[..., Tensor]  # of a batch size

CLASSES = 5
ATTENTION, CONVOLUTION = ("test_vit", 160), ("test_efficientnet", 32)


def partition_file(spec: BackboneSpec, module: nn.Module, path: Path) -> Header:
    """Writes a fresh partition of two units."""
    tasks = default_tasks(2, spec.num_classes, spec.input_size, (0.5,) * 3, (0.25,) * 3)
    DeepVirtualNetwork.from_backbone(partition_backbone(spec, 2, module=module), module, tasks).save(path)
    return read_checkpoint(path)


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes slices of timm's models with random weights; each model is divided once."""

    @cache
    def header(name: str, size: int) -> Header:
        torch.manual_seed(0)
        spec = resolve(name, num_classes=CLASSES, input_size=(size, size))
        return partition_file(spec, spec.build(), tmp_path_factory.mktemp("slices") / "dvn.safetensors")

    @cache
    def path(name: str, size: int, level: int = 1) -> Path:
        file = header(name, size).path.with_name(f"level{level}.safetensors")
        slice_file(header(name, size), 1, level, file)
        return file

    return path


def loaded(path: Path) -> VirtualNetwork:
    network = dvn_cli.load(path)
    assert isinstance(network, VirtualNetwork)
    return network


@pytest.fixture(params=[ATTENTION, CONVOLUTION])
def network(request: pytest.FixtureRequest, cut: Callable[..., Path]) -> VirtualNetwork:
    return loaded(cut(*request.param))


@pytest.fixture
def images(request: pytest.FixtureRequest) -> Images:
    """Batches of images of the network's size."""
    size = request.node.callspec.params["network"][1]
    return lambda batch=4: random_images(batch, size)


def random_images(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def logits(network: Callable[..., Tensor], *args: object) -> Tensor:
    with torch.no_grad():
        return network(*args)


def gradients(network: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    F.cross_entropy(forward(x), torch.arange(len(x)) % CLASSES).backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def test_it_trains(network: VirtualNetwork, images: Images) -> None:
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    x, labels = images(8), torch.arange(8) % CLASSES
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(network(x), labels)
        optimizer.zero_grad()
        loss.backward()
        assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    torch.testing.assert_close(logits(network.eval(), x), torch.cat([logits(network, one[None]) for one in x]))


def test_freezing_and_modes(network: VirtualNetwork, images: Images) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.requires_grad_(False)
    assert not network.train()(images()).requires_grad
    assert all(not module.training for module in network.eval().modules())
    head = next(module for name, module in network.named_modules() if name in ("head", "classifier"))
    head.requires_grad_(True)
    found = gradients(network, network, images())
    assert set(found) == {n for n, p in network.named_parameters() if n.startswith(("head.", "classifier."))}
    network.load_state_dict(before)
    network.eval()(images())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def compiled_equals_eager(network: VirtualNetwork, images: Images, backend: str) -> None:
    compiled = torch.compile(network, backend=backend, fullgraph=True)
    expected = logits(network, images())
    torch.testing.assert_close(logits(compiled, images()), expected, rtol=1e-4, atol=1e-5)
    network.train()
    state = copy.deepcopy(network.state_dict())
    wanted = gradients(network, network, images())
    network.load_state_dict(state)
    found = gradients(network, compiled, images())
    assert found.keys() == wanted.keys() == {name for name, _ in network.named_parameters()}
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 + 1e-3 * float(gradient.abs().max()))


@pytest.mark.slow
def test_it_compiles(network: VirtualNetwork, images: Images) -> None:
    compiled_equals_eager(network, images, "aot_eager")


@pytest.mark.slow
def test_it_compiles_with_inductor(network: VirtualNetwork, images: Images) -> None:
    compiled_equals_eager(network, images, "inductor")


def test_channels_last(network: VirtualNetwork, images: Images) -> None:
    expected, wanted = logits(network, images()), gradients(network, network, images())
    network.to(memory_format=torch.channels_last)
    weights = [p for p in network.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    x = images().to(memory_format=torch.channels_last)
    torch.testing.assert_close(logits(network, x), expected, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients(network, network, x).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(network: VirtualNetwork, images: Images, dtype: torch.dtype) -> None:
    expected = logits(network, images())
    network.to(dtype)
    assert {p.dtype for p in network.parameters()} == {dtype}
    result = logits(network, images().to(dtype))
    assert result.dtype is dtype
    limit = 0.1 if dtype is not torch.float64 else 1e-5
    assert float((result.float() - expected).abs().max() / expected.abs().max()) < limit
    assert all(
        g.isfinite().all() and g.dtype is dtype for g in gradients(network, network, images().to(dtype)).values()
    )


def test_autocast(network: VirtualNetwork, images: Images) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(network.train(), lambda x: network(x).float(), images())
    assert found.keys() == {name for name, _ in network.named_parameters()}
    assert all(gradient.dtype is torch.float32 for gradient in found.values())


def test_another_device(network: VirtualNetwork, images: Images) -> None:
    assert network.to("meta")(images().to("meta")).shape == (4, CLASSES)
    assert {tensor.device.type for tensor in [*network.parameters(), *network.buffers()]} == {"meta"}


def test_a_copy_is_independent(network: VirtualNetwork, images: Images) -> None:
    expected = logits(network, images())
    twin = copy.deepcopy(network)
    assert torch.equal(logits(twin, images()), expected)
    twin.train()
    torch.optim.SGD(twin.parameters(), 1.0).step()
    gradients(twin, twin, images())
    torch.optim.SGD(twin.parameters(), 1.0).step()
    assert not torch.allclose(logits(twin.eval(), images()), expected)
    assert torch.equal(logits(network, images()), expected)
    assert all(p.grad is None for p in network.parameters())


def test_its_weights_are_saved_and_come_back(network: VirtualNetwork, images: Images, tmp_path: Path) -> None:
    expected = logits(network, images())
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    safetensors.torch.save_file(network.state_dict(), tmp_path / "weights.safetensors")
    for state in (
        torch.load(tmp_path / "weights.pt", weights_only=True),
        safetensors.torch.load_file(tmp_path / "weights.safetensors"),
    ):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.zero_()
        network.load_state_dict(state, strict=True)
        assert torch.equal(logits(network, images()), expected)


def test_it_is_exported_again(network: VirtualNetwork, images: Images) -> None:
    program = torch.export.export(network, (images(),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    for batch in (1, 3, 7):
        torch.testing.assert_close(program.module()(images(batch)), network(images(batch)))
    assert set(program.state_dict) == set(network.state_dict())


def test_features_are_what_the_classifier_is_given(network: VirtualNetwork, images: Images) -> None:
    own = [p for name, p in network.named_parameters() if name.startswith(("head.", "classifier."))]
    bias, weight = sorted(own, key=lambda p: p.ndim)
    for dtype, mode in ((torch.float32, True), (torch.float32, False), (torch.float64, False)):
        network.train(mode).to(dtype)
        state = copy.deepcopy(network.state_dict())
        features = network.features(images().to(dtype))
        assert features.shape == (4, weight.shape[1])
        network.load_state_dict(state)
        expected = network(images().to(dtype))
        torch.testing.assert_close(F.linear(features, weight, bias), expected, rtol=1e-4, atol=1e-5)
    assert copy.deepcopy(network).features(images().double()).equal(features)
    found = gradients(network, lambda x: network.features(x)[:, :CLASSES], images().double())
    assert not any(name.startswith(("head.", "classifier.")) for name in found)
    assert len(found) == len(list(network.parameters())) - 2


class Named(nn.Module):
    """Has a part that is named as a method of a slice, as DenseNet and torchvision's models have."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).relu().mean((2, 3)))


def test_a_backbone_with_a_name_of_ours(tmp_path: Path) -> None:
    module, x = Named().eval(), random_images(3, 8)
    networks_apart(module, BackboneSpec("timm", "named", CLASSES, 3, (8, 8))).save(tmp_path / "dvn.safetensors")
    cut = dvn_cli.slice(tmp_path / "dvn.safetensors", 1, 2, tmp_path / "cut.safetensors")
    whole = dvn_cli.load(cut.file).eval()
    assert isinstance(whole, VirtualNetwork)
    torch.testing.assert_close(module.fc(whole.features(x)), module(x))
    program = torch.export.export(whole, (x,)).module()
    for again in (whole, copy.deepcopy(whole), pickle.loads(pickle.dumps(whole)), program):
        torch.testing.assert_close(again(x), module(x))
    assert set(whole.state_dict()) == set(module.state_dict())
    whole.load_state_dict(module.state_dict())


def test_features_of_a_convolution_that_classifies() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, CLASSES, 1))
    module = nn.Sequential(layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    network = networks_apart(module, BackboneSpec("timm", "convolutions", CLASSES, 3, (8, 8))).virtual_network(1, 2)
    features = network.features(random_images(2, 8))
    assert features.shape == (2, 8, 6, 6)
    torch.testing.assert_close(layers[2](features).mean((2, 3)), network(random_images(2, 8)))


# What a backbone casts


class Casting(nn.Module):
    """Takes some steps in float32, as backbones do to be precise, and casts what is in the weights' type already."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.weight = nn.Parameter(torch.rand(8) + 0.5)
        self.mix = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = x.float()
        y = y / (1e-3 + y.square().mean((2, 3), keepdim=True)).sqrt()
        x = x + y.to(x.dtype) * self.weight.view(-1, 1, 1).to(x.dtype)
        x = self.mix(x.to(self.mix.weight.dtype))
        x = x * torch.softmax(x, 2, dtype=torch.float32).to(x.dtype)
        scale = torch.ones(8, dtype=x.dtype, device=x.device)
        return self.fc(x.float().mean((2, 3)).to(self.fc.weight.dtype) * scale)


@pytest.mark.parametrize("dtypes", [[torch.bfloat16], [torch.float64], [torch.bfloat16, torch.float16, torch.float32]])
def test_casts_follow_the_weights(dtypes: list[torch.dtype]) -> None:
    torch.manual_seed(0)
    module = Casting().eval()
    partition = partition_backbone(BackboneSpec("timm", "casting", CLASSES, 3, (8, 8)), 2, module=module)
    tasks = default_tasks(2, CLASSES, (8, 8), (0.5,) * 3, (0.25,) * 3)
    network = DeepVirtualNetwork.from_backbone(partition, module, tasks).eval().virtual_network(1, 2)
    for dtype in dtypes:
        module.to(dtype), network.to(dtype)
        x = random_images(4, 8).to(dtype)
        result, expected = logits(network, x), logits(module, x)
        assert result.dtype is expected.dtype is dtype
        limit = 0.02 if dtype.itemsize == 2 else 1e-5
        assert float((result - expected).abs().max() / expected.abs().max()) < limit
        assert gradients(network, network, x).keys() == gradients(module, module, x).keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_casts_follow_the_weights_of_a_file(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = networks_apart(Casting().eval(), BackboneSpec("timm", "casting", CLASSES, 3, (8, 8)))
    whole.save(tmp_path / "dvn.safetensors")
    network = loaded(dvn_cli.slice(tmp_path / "dvn.safetensors", 1, 2, tmp_path / "cut.safetensors").file).to(dtype)
    x = random_images(4, 8).to(dtype)
    write_file(tmp_path / "cut.safetensors", to_data(network.state_dict()), network.metadata)
    torch.testing.assert_close(logits(loaded(tmp_path / "cut.safetensors"), x), logits(network, x), rtol=0, atol=0)


# What a backbone keeps out of autocast


class Apart(nn.Module):
    """Computes some of it outside of autocast, in regions with operators of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        with torch.autocast(x.device.type, enabled=False):
            x = x + self.conv(x.float())
        q, k, v = self.qkv(x.flatten(2).mT).chunk(3, -1)
        with torch.autocast(x.device.type, enabled=False):
            scale = (q.float() @ k.float().mT).abs().mean((1, 2), keepdim=True)
        with torch.autocast(x.device.type, enabled=False):
            y = F.scaled_dot_product_attention(q.float(), k.float(), v.float()) / (1 + scale)
            y = torch.einsum("bnc,bmc->bnm", y, v.float()) @ y
        with torch.autocast("cuda", enabled=False):  # which says nothing of the CPU's
            y = self.out(y) @ y.mT @ y
        return self.fc(y.mean(1))


class Contractions(TorchDispatchMode):
    """Notes every matmul and convolution that is run, and the types of what goes in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[torch.dtype, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if any(part in name for part in ("mm", "convolution", "attention")):
            self.seen.append((name, tuple(a.dtype for a in args if isinstance(a, Tensor))))
        return func(*args, **(kwargs or {}))


def under_autocast(network: Callable[..., Tensor], x: Tensor) -> tuple[list[Any], Tensor]:
    network(x)  # whatever is made at the first call
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Contractions() as mode:
        result = network(x)
    return mode.seen, result.float()


def networks_apart(module: nn.Module, spec: BackboneSpec) -> DeepVirtualNetwork:
    partition = partition_backbone(spec, 2, module=module)
    tasks = default_tasks(2, CLASSES, spec.input_size, (0.5,) * 3, (0.25,) * 3)
    return DeepVirtualNetwork.from_backbone(partition, module, tasks).eval()


@pytest.fixture(scope="module")
def apart() -> tuple[nn.Module, DeepVirtualNetwork]:
    torch.manual_seed(0)
    module = Apart().eval()
    return module, networks_apart(module, BackboneSpec("timm", "apart", CLASSES, 3, (8, 8)))


def test_what_is_kept_out_of_autocast_stays_out(apart: tuple[nn.Module, DeepVirtualNetwork]) -> None:
    module, network = apart
    x = random_images(3, 8)
    wanted, expected = under_autocast(module, x)
    assert {torch.float32, torch.bfloat16} == {dtype for _, dtypes in wanted for dtype in dtypes}
    for whole in (lambda x: network(x, 1, 2), network.virtual_network(1, 2)):
        seen, result = under_autocast(whole, x)
        assert seen == wanted
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert under_autocast(network.virtual_network(1, 1), x)[0] == wanted


def test_it_stays_out_after_whatever_is_done_to_a_slice(apart: tuple[nn.Module, DeepVirtualNetwork]) -> None:
    module, network = apart
    x = random_images(3, 8)
    wanted, expected = under_autocast(module, x)
    whole = network.virtual_network(1, 2)
    for again in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole)), whole.double().float()):
        seen, result = under_autocast(again, x)
        assert seen == wanted
        assert torch.equal(result, expected)
    program = torch.export.export(whole, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.testing.assert_close(program.module()(x), module(x))
    regions = [node for node in program.graph.nodes if "wrap_with_autocast" in str(node.target)]
    assert {node.args[:1] + node.args[2:3] for node in regions} == {("cpu", False)}
    alone = torch.export.export(whole.standalone(), (x,))
    torch.testing.assert_close(alone.module()(x), module(x))
    compiled = torch.compile(whole, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x).float(), expected, rtol=0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(whole, lambda x: whole(x).float(), x)
        theirs = gradients(module, lambda x: module(x).float(), x)
    for name, gradient in theirs.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0.02 * float(gradient.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientvit_b0", "efficientvit_b1", "efficientvit_l1"])
def test_a_backbone_that_keeps_its_attention_out(name: str) -> None:
    torch.manual_seed(0)
    spec = resolve(name, CLASSES, input_size=(64, 64))
    module = spec.build()
    network = networks_apart(module, spec)
    x = random_images(2, 64)
    wanted, expected = under_autocast(module, x)
    seen, result = under_autocast(lambda x: network(x, 1, 2), x)
    assert seen == wanted
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    for dtype in (torch.bfloat16, torch.float16):
        plain, ours = copy.deepcopy(module).to(dtype), network.virtual_network(1, 2).to(dtype)
        torch.testing.assert_close(logits(ours, x.to(dtype)), logits(plain, x.to(dtype)), rtol=0, atol=1e-3)


class Meeting(nn.Module):
    """Steps in float32 of several casts that meet only on their way, as in linear attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 12, 3), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.stem(x).flatten(2).mT.chunk(3, -1)
        y = q.float() @ (k.float().mT @ v.float())
        return self.fc((y / (1 + y.abs().mean(-1, keepdim=True))).to(v.dtype).mean(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_that_meet_on_their_way(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = Meeting().eval()
    network = networks_apart(module, BackboneSpec("timm", "meeting", CLASSES, 3, (8, 8))).virtual_network(1, 2)
    module.to(dtype), network.to(dtype)
    x = random_images(4, 8).to(dtype)
    with Contractions() as theirs:
        expected = logits(module, x)
    with Contractions() as ours:
        result = logits(network, x)
    assert ours.seen == theirs.seen
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


# The file of the whole is the backbone's


def load_as_published(path: Path, module: nn.Module, size: int) -> None:
    """The top level's file, loaded by safetensors and torch alone, gives what the slice gives."""
    module.load_state_dict(safetensors.torch.load_file(path), strict=True)
    x = random_images(2, size)
    torch.testing.assert_close(logits(module.eval(), x), logits(loaded(path), x))


@pytest.mark.parametrize("name_and_size", [ATTENTION, CONVOLUTION])
def test_the_top_level_is_a_file_of_the_backbone(cut: Callable[..., Path], name_and_size: tuple[str, int]) -> None:
    name, size = name_and_size
    model = timm.create_model(name, num_classes=CLASSES, **({"img_size": size} if "vit" in name else {}))
    load_as_published(cut(name, size, level=2), model, size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [("coat_tiny", 224), ("swin_tiny_patch4_window7_224", 224), ("torchvision/swin_t", 224), ("densenet121", 64)],
)
def test_the_top_level_is_a_file_of_the_backbone_slow(cut: Callable[..., Path], name: str, size: int) -> None:
    load_as_published(cut(name, size, level=2), resolve(name, CLASSES, input_size=(size, size)).build(), size)


class Tied(nn.Module):
    """Two blocks that share a convolution and a norm, each under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.shared = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.blocks = nn.ModuleList([self.shared, nn.Sequential(nn.ReLU(), self.shared)])
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.fc(x.mean((2, 3)))


def test_what_has_two_names_has_both_in_a_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = Tied().eval()
    monkeypatch.setattr(BackboneSpec, "build", lambda self: Tied().eval())
    header = partition_file(BackboneSpec("timm", "tied", CLASSES, 3, (8, 8)), module, tmp_path / "dvn.safetensors")
    assert len([name for name in header.tensors if "0.weight" in name]) == 1  # a checkpoint holds it once
    x = random_images(4, 8)
    for level in (1, 2):
        path = tmp_path / f"{level}.safetensors"
        counts = slice_file(header, 1, level, path)
        assert counts == count(header, 1, level) == count(read_header(path))
        plain = safetensors.torch.load_file(path)
        assert plain.keys() == module.state_dict().keys()
        assert counts.elements == sum(tensor.numel() for tensor in plain.values())
        network = loaded(path)
        assert counts.params == sum(p.numel() for p in network.parameters())
        one, other = (network.get_parameter(f"{place}.0.weight") for place in ("shared", "blocks.1.1"))
        assert one is other
        assert network.get_buffer("shared.1.running_mean") is network.get_buffer("blocks.0.1.running_mean")
        assert network.state_dict().keys() == plain.keys()
        twin = copy.deepcopy(network)
        assert twin.get_parameter("shared.0.weight") is twin.get_parameter("blocks.0.0.weight") is not one
        torch.testing.assert_close(logits(network, x), logits(dvn_cli.load(header.path), x, 1, level))
    module.load_state_dict(plain, strict=True)
    torch.testing.assert_close(logits(module, x), logits(network, x))


def with_metadata(path: Path, changes: dict[str, object], to: Path) -> Path:
    """The same file with other metadata; what is changed to None is taken out."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = {**json.loads(file.metadata()["dvn"]), **changes}
    text = json.dumps({key: value for key, value in metadata.items() if value is not None and key != "checksums"})
    safetensors.torch.save_file(safetensors.torch.load_file(path), to, {"dvn": text})
    return to


def test_a_file_of_before_there_were_rules_and_aliases(cut: Callable[..., Path], tmp_path: Path) -> None:
    path = cut(*CONVOLUTION)
    old = loaded(with_metadata(path, {"rule": None, "aliases": None}, tmp_path / "old.safetensors"))
    x = random_images(2, CONVOLUTION[1])
    assert torch.equal(logits(old, x), logits(loaded(path), x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aliases": {"other.weight": "nothing.weight"}}, "is not another name of a tensor that is listed"),
        ({"aliases": {"other.weight": "conv_stem.weight"}}, "does not hold the tensors that its metadata lists"),
        ({"aliases": ["conv_stem.weight"]}, "'aliases' is a list, not an object"),
        ({"rule": {"assign": "even", "round_to": "2"}}, "'rule.round_to' is '2', not an integer"),
        ({"rule": {"assign": "odd", "round_to": 1}}, "not 'odd'"),
    ],
)
def test_damaged_rules_and_aliases(
    cut: Callable[..., Path], tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        dvn_cli.load(with_metadata(cut(*CONVOLUTION), changes, tmp_path / "damaged.safetensors"))
