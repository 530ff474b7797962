"""Networks as slices of one store: equal to the backbone, to each other's files, and apart where they must be."""

import copy
import gc
import json
import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

import dvn_cli
from dvn_cli.backbones import BackboneSpec, resolve
from dvn_cli.data import Split
from dvn_cli.dividing import partition_backbone
from dvn_cli.errors import InputError
from dvn_cli.evaluation.measure import evaluate_all
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.partition import Partition
from dvn_cli.store.file import read_checkpoint
from dvn_cli.store.metadata import Task, TrainingRecord
from dvn_cli.store.slicing import count, slice_file
from dvn_cli.units.assign import Rule, label_mask

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


def task(name: str, classes: int, size: int, order: tuple[int, ...], levels: tuple[int, ...]) -> Task:
    return Task(name, tuple(f"{name} {i}" for i in range(classes)), (size, size), MEAN, STD, order, levels)


TASKS = [
    task("small", 10, 32, (1, 2, 3, 4), (1, 2, 3, 4)),
    task("medium", 7, 64, (2, 1, 3, 4), (2, 3, 4)),
    task("large", 3, 96, (4, 2, 3, 1), (1, 3)),
    task("again", 10, 32, (1, 3, 2, 4), (1, 4)),
]
NETWORKS = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (4, 1), (4, 2)]


def unlike(module: nn.Module, seed: int = 0) -> None:
    """Gives every tensor values of its own, so that nothing passes because all norms are alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point() and tensor.ndim < 2:
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))


@pytest.fixture(scope="module")
def backbone() -> nn.Module:
    torch.manual_seed(0)
    module = resolve("wrn_10_1", num_classes=10).build()
    unlike(module)
    return module


@pytest.fixture(scope="module")
def partition(backbone: nn.Module) -> Partition:
    return partition_backbone(resolve("wrn_10_1", num_classes=10), 4, module=backbone)


@pytest.fixture
def fresh(partition: Partition, backbone: nn.Module) -> DeepVirtualNetwork:
    return DeepVirtualNetwork.from_backbone(partition, backbone, TASKS).eval()


@pytest.fixture
def trained(fresh: DeepVirtualNetwork) -> DeepVirtualNetwork:
    """With private tensors that differ, as training leaves it."""
    fresh.make_private()
    unlike(fresh, seed=1)
    return fresh


def images(number: int, batch: int = 2, size: int | None = None) -> Tensor:
    size = size or TASKS[number - 1].input_size[0]
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(number))


def logits(network: nn.Module, *args) -> Tensor:
    with torch.no_grad():
        return network(*args)


def assert_close(one: Tensor, other: Tensor) -> None:
    assert one.shape == other.shape
    assert (one - other).abs().max().item() <= 1e-5
    assert other.abs().max().item() > 1e-3  # of nothing everything is close


def test_iterating_gives_every_task_and_level(fresh):
    assert list(fresh) == NETWORKS
    assert [fresh.number(name) for name in ("small", "large", 2, "4")] == [1, 3, 2, 4]


# Property 1: the top level is the backbone


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_convnext"])
def test_untrained_top_level_is_the_backbone(name, tmp_path):
    torch.manual_seed(0)
    spec = resolve(name, num_classes=5, input_size=(32, 32))
    module = spec.build()
    unlike(module)
    partition = partition_backbone(spec, 2, module=module)
    tasks = [task("one", 5, 32, (1, 2), (1, 2)), task("two", 3, 32, (2, 1), (1, 2))]
    network = DeepVirtualNetwork.from_backbone(partition, module, tasks).eval()
    x = images(1)
    assert_close(logits(network, x, 1, 2), logits(module, x))
    assert_close(logits(network, x, 2, 2), logits(module, x)[:, :3])
    network.make_private()
    assert_close(logits(network, x, 1, 2), logits(module, x))

    # Property 5 for them, and 4.
    network.save(tmp_path / "dvn.safetensors")
    for number, level in network:
        slice_file(read_checkpoint(tmp_path / "dvn.safetensors"), number, level, tmp_path / "s.safetensors")
        cut = dvn_cli.load(tmp_path / "s.safetensors")
        assert_close(logits(cut, x), logits(network, x, number, level))
    step(network, images(1, batch=4))
    assert_all_have_gradients(network)


def test_top_level_trains_as_the_backbone_does(fresh, backbone):
    module = copy.deepcopy(backbone).train()
    x = images(1, batch=4)
    fresh.make_private()
    fresh.train()
    assert_close(fresh(x, 1, 4), module(x))
    own = fresh.tensors(1, 4)
    for name, tensor in module.state_dict().items():  # the running statistics above all
        assert torch.allclose(own[name], tensor, atol=1e-6), name
    assert int(own["bn1.num_batches_tracked"]) == 1
    assert int(fresh.tensors(4, 2)["bn1.num_batches_tracked"]) == 0
    before, after = fresh.tensors(4, 2)["bn1.running_mean"], own["bn1.running_mean"]
    assert not torch.equal(before, after)  # keyed by task and level, not by width


# Input sizes


@pytest.mark.parametrize(("number", "stride"), [(1, 1), (2, 2), (3, 3)])
def test_tasks_of_other_sizes_meet_at_one_resolution(fresh, backbone, number, stride):
    module = copy.deepcopy(backbone)
    module.conv1.stride = (stride, stride)
    x = images(number)
    tasks = [task("all", 10, x.shape[-1], (1, 2, 3, 4), (4,))]
    network = DeepVirtualNetwork.from_backbone(fresh.partition, backbone, tasks).eval()
    assert module.conv1(x).shape[2:] == (32, 32)
    assert_close(logits(network, x, 1, 1), logits(module, x))


@pytest.mark.parametrize("size", [16, 40])
def test_sizes_that_do_not_meet_are_refused(partition, backbone, size):
    network = DeepVirtualNetwork.from_backbone(partition, backbone, [task("odd", 10, size, (1, 2, 3, 4), (4,))])
    with pytest.raises(InputError, match=f"images of {size}x{size} cannot meet those of 32x32"):
        network.check()


# Property 4: gradients


def step(network: DeepVirtualNetwork, x: Tensor | None = None) -> None:
    network.train()
    for number, level in network:
        batch = images(number, batch=4) if x is None else x
        labels = torch.arange(4) % len(network.tasks[number - 1].classes)
        nn.functional.cross_entropy(network(batch, number, level), labels).backward()


def assert_all_have_gradients(network: DeepVirtualNetwork) -> None:
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_every_parameter_has_a_gradient_after_a_step(trained):
    step(trained)
    assert_all_have_gradients(trained)


def test_gradients_meet_in_the_shared_store_and_nowhere_else(trained):
    """Eq. 5: those of all networks together are their sum, and a network moves only what it is made of."""
    trained.train()
    total = {name: torch.zeros_like(p) for name, p in trained.named_parameters()}
    for number, level in [(1, 2), (3, 1)]:
        single = copy.deepcopy(trained)
        single(images(number), number, level).square().sum().backward()
        for name, p in single.named_parameters():
            total[name] += 0 if p.grad is None else p.grad
        own = {n: t.shape for n, t in single.tensors(number, level).items()}
        moved = single.get_parameter("shared.layer2.0.conv2.weight").grad
        assert int((moved != 0).any(3).any(2).any(1).sum()) == own["layer2.0.conv2.weight"][0]
        assert int((moved != 0).any(3).any(2).any(0).sum()) == own["layer2.0.conv2.weight"][1]
        touched = {name for name, p in single.named_parameters() if p.grad is not None}
        foreign = [n for n in touched if not n.startswith(("shared.", f"task.{number}."))]
        assert foreign == []
        assert [n for n in touched if "level" in n and f"task.{number}.level.{level}." not in n] == []
        trained(images(number), number, level).square().sum().backward()
    for name, p in trained.named_parameters():
        assert torch.allclose(total[name], torch.zeros_like(p) if p.grad is None else p.grad, rtol=1e-4, atol=1e-4)


# Private tensors


def test_private_tensors_are_those_of_the_design(trained):
    names = set(trained.file_tensors())
    norms = {n for n in trained.partition.shapes if ".bn" in n or n.startswith("bn")}
    own = norms | {"fc.weight", "fc.bias"}
    shared = set(trained.partition.shapes) - own - {"conv1.weight"}
    assert names == {
        *(f"shared/{n}" for n in shared),
        *(f"task/{number}/conv1.weight" for number in range(1, 5)),
        *(f"task/{number}/level/{level}/{n}" for number, level in NETWORKS for n in own),
    }
    assert all(n.endswith(".weight") and "conv" in n for n in shared)


def test_becoming_private_changes_no_output_and_is_done_once(fresh):
    before = {key: logits(fresh, images(key[0]), *key) for key in fresh}
    fresh.make_private()
    tensors = fresh.file_tensors()
    fresh.make_private()
    assert all(fresh.file_tensors()[name] is tensor for name, tensor in tensors.items())
    for key, expected in before.items():
        assert torch.equal(logits(fresh, images(key[0]), *key), expected)


def test_what_is_private_is_private(trained):
    before = {key: logits(trained, images(key[0]), *key) for key in trained}
    with torch.no_grad():
        for name, tensor in trained.file_tensors().items():
            if name.startswith("task/1/level/1/") and name.endswith("bn1.bias"):
                tensor.add_(1)
    changed = [key for key in trained if not torch.equal(logits(trained, images(key[0]), *key), before[key])]
    assert changed == [(1, 1)]
    with torch.no_grad():
        trained.file_tensors()["task/3/conv1.weight"].mul_(2)
    changed = [key for key in trained if not torch.equal(logits(trained, images(key[0]), *key), before[key])]
    assert changed == [(1, 1), (3, 1), (3, 2)]


def test_levels_nest(fresh):
    """Each element of the store at level l is there at level l + 1."""
    with torch.no_grad():
        for tensor in fresh.file_tensors().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape))
    for number, of_task in enumerate(TASKS, 1):
        below: dict[str, set[float]] = {}
        for level in range(1, len(of_task.levels) + 1):
            here = {n: set(t.flatten().tolist()) for n, t in fresh.tensors(number, level).items()}
            assert all(len(here[n]) == t.numel() for n, t in fresh.tensors(number, level).items())
            assert all(below.get(n, set()) <= here[n] for n in here)
            assert below != here
            below = here


# Property 5: files


def test_slices_equal_the_supernet_and_hold_nothing_else(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained.save("dvn.safetensors")
    header = read_checkpoint("dvn.safetensors")
    for number, level in trained:
        file = Path(f"{number}-{level}.safetensors")
        counts = slice_file(header, number, level, file)
        plain = safetensors.torch.load_file(file)
        expected = trained.tensors(number, level)
        assert plain.keys() == expected.keys()
        assert all(torch.equal(plain[name], expected[name]) for name in plain)
        content = file.read_bytes()
        assert [other.name for other in TASKS if f'"{other.name}"'.encode() in content.replace(b"\\", b"")] == [
            TASKS[number - 1].name
        ]
        assert len(content) == sum(t.nbytes for t in plain.values()) + 8 + int.from_bytes(content[:8], "little")

        cut = dvn_cli.load(file)
        assert (cut.task, cut.level) == (TASKS[number - 1], level)
        assert_close(logits(cut, images(number)), logits(trained, images(number), number, level))
        assert counts == count(header, number, level)
        assert counts.params == sum(p.numel() for p in cut.parameters())
        assert counts.elements == sum(t.numel() for t in cut.state_dict().values())

        slice_file(header, number, level, "again.safetensors")
        assert Path("again.safetensors").read_bytes() == content


def test_a_checkpoint_comes_back_as_it_was(trained, tmp_path):
    trained.training_record = TrainingRecord({"method": "dvn"}, epochs=3)
    trained.save(tmp_path / "a.safetensors")
    loaded = dvn_cli.load(tmp_path / "a.safetensors")
    assert isinstance(loaded, DeepVirtualNetwork)
    assert not loaded.training
    assert (loaded.tasks, loaded.training_record) == (TASKS, trained.training_record)
    for number, level in loaded:
        assert torch.equal(
            logits(loaded, images(number), number, level), logits(trained, images(number), number, level)
        )
    loaded.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    step(loaded)
    assert_all_have_gradients(loaded)


@pytest.mark.parametrize(("name", "units"), [("wrn_10_1", 4), ("test_vit", 2), ("test_efficientnet", 2)])
def test_units_of_scattered_channels(name, units, tmp_path):
    """Top level, slices, private norms and files are right where a unit is no run of channels."""
    torch.manual_seed(0)
    spec = resolve(name, num_classes=5, input_size=(32, 32))
    module = spec.build()
    unlike(module)
    partition = partition_backbone(spec, units, module=module, rule=Rule("importance"))
    assert any(len(runs) > 1 for axis in partition.assignment.axes for runs in axis)
    order = tuple(range(1, units + 1))
    tasks = [task("one", 5, 32, order, order), task("two", 5, 32, order[::-1], (1, units))]
    network = DeepVirtualNetwork.from_backbone(partition, module, tasks).eval()
    x = images(1)
    assert_close(logits(network, x, 1, units), logits(module, x))
    before = {key: logits(network, x, *key) for key in network}
    network.make_private()
    assert all(torch.equal(logits(network, x, *key), expected) for key, expected in before.items())
    whole = module.state_dict()
    for key in network:
        graph = partition.graph(train=True)
        keep = label_mask(graph.labeller, graph.unit, network.tasks[key[0] - 1].units(key[1]), 5)
        for own, tensor in network.tensors(*key).items():
            expected = whole[own]
            sources = graph.labeller.sources[own]
            for dim, indices in enumerate(keep[vector].nonzero().flatten() for vector in sources):
                expected = expected.index_select(dim, indices)
            assert torch.equal(tensor, expected), own

    unlike(network, seed=1)
    network.save(tmp_path / "dvn.safetensors")
    loaded = dvn_cli.load(tmp_path / "dvn.safetensors")
    assert loaded.partition.rule == Rule("importance")
    for key in network:
        slice_file(read_checkpoint(tmp_path / "dvn.safetensors"), *key, tmp_path / "s.safetensors")
        expected = logits(network, x, *key)
        assert torch.equal(logits(loaded, x, *key), expected)
        assert_close(logits(dvn_cli.load(tmp_path / "s.safetensors"), x), expected)
    step(network, images(1, batch=4))
    assert_all_have_gradients(network)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations([1, 2, 3, 4]), st.sets(st.integers(1, 4), min_size=1), st.integers(2, 10), st.booleans())
def test_any_order_and_levels_make_slices_equal_to_the_supernet(
    partition, backbone, tmp_path, order, levels, classes, private
):
    drawn = task("drawn", classes, 32, tuple(order), tuple(sorted(levels)))
    network = DeepVirtualNetwork.from_backbone(partition, backbone, [TASKS[0], drawn]).eval()
    if private:
        network.make_private()
        unlike(network, seed=2)
    network.save(tmp_path / "dvn.safetensors")
    level = len(levels)
    slice_file(read_checkpoint(tmp_path / "dvn.safetensors"), 2, level, tmp_path / "slice.safetensors")
    cut = dvn_cli.load(tmp_path / "slice.safetensors")
    out = logits(cut, images(1))
    assert out.shape == (2, classes)
    assert_close(out, logits(network, images(1), 2, level))
    if max(levels) == 4 and not private:
        assert_close(out, logits(backbone, images(1))[:, :classes])


# Property 6


@pytest.mark.parametrize("batch_size", [1, 7])
def test_accuracy_does_not_depend_on_the_batch_size(trained, batch_size):
    rng = np.random.default_rng(0)
    splits = {
        n: Split(
            torch.from_numpy(rng.integers(0, 256, (30, 3, size, size), np.uint8)),
            torch.from_numpy(rng.integers(0, classes, 30)),
        )
        for n, size, classes in ((1, 32, 10), (2, 64, 7))
    }
    whole = evaluate_all(trained, splits, batch_size=256)
    parts = evaluate_all(trained, splits, batch_size=batch_size)
    assert [(row.task, row.level) for row in whole] == NETWORKS[:7]
    for one, other in zip(whole, parts, strict=True):
        assert (one.top1, one.top5) == (other.top1, other.top5)
        assert math.isclose(one.loss, other.loss, rel_tol=1e-5)
    assert len({row.loss for row in whole}) == len(whole)


# Networks of their own


def test_a_virtual_network_is_a_module_of_its_own(trained, backbone):
    before = logits(trained, images(1), 1, 2)
    network = trained.virtual_network("small", 2)
    assert list(network.state_dict()) == list(backbone.state_dict())
    assert [n for n, _ in network.named_parameters()] == [n for n, _ in backbone.named_parameters()]
    assert not network.training
    assert trained.train().virtual_network(1, 2).training
    trained.eval()
    assert torch.equal(logits(network, images(1)), before)
    network.train()
    logits(network, images(1))  # updates its running statistics
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.zero_()
    assert torch.equal(logits(trained, images(1), 1, 2), before)
    network.load_state_dict(trained.virtual_network(1, 2).state_dict())
    assert torch.equal(logits(network.eval(), images(1)), before)
    twin = copy.deepcopy(network)
    twin.fc.bias.data.add_(1)
    assert torch.equal(logits(network, images(1)), before)
    assert torch.allclose(logits(twin, images(1)), before + 1, atol=1e-5)


@pytest.mark.parametrize(
    ("number", "level", "message"),
    [
        ("smal", 1, "there is no task 'smal'; did you mean 'small'?"),
        (5, 1, "there is no task '5'"),
        (1, 5, "there is no level 5; task 'small' has levels 1 to 4"),
        (1, 0, "there is no level 0"),
    ],
)
def test_networks_that_are_not_there(fresh, number, level, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        fresh.virtual_network(number, level)


def test_a_deep_copy_shares_no_weights(trained):
    before = {key: logits(trained, images(key[0]), *key) for key in NETWORKS[:2]}
    twin = copy.deepcopy(trained)
    for key, expected in before.items():
        assert torch.equal(logits(twin, images(key[0]), *key), expected)
    with torch.no_grad():
        for tensor in twin.file_tensors().values():
            tensor.zero_()
    for key, expected in before.items():
        assert torch.equal(logits(trained, images(key[0]), *key), expected)
        assert not logits(twin, images(key[0]), *key).any()


def test_what_was_evaluated_in_inference_mode_can_be_trained(backbone):
    spec = resolve("wrn_10_1", num_classes=10)
    network = DeepVirtualNetwork.from_backbone(partition_backbone(spec, 4, module=backbone), backbone, TASKS).eval()
    with torch.inference_mode():
        network(images(1), 1, 2)
        network(images(4), 4, 1)
    network.make_private()
    step(network)
    assert_all_have_gradients(network)


class WithConstant(nn.Module):
    """Scales each channel by what is neither a parameter nor in the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.register_buffer("scale", torch.arange(1.0, 9).view(8, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((self.conv(x) * self.scale).relu().mean((2, 3)))


def test_constants_go_where_the_weights_go():
    module = WithConstant().eval()
    partition = partition_backbone(BackboneSpec("timm", "none", 4, 3, (8, 8)), 2, module=module)
    network = DeepVirtualNetwork.from_backbone(partition, module, [task("a", 4, 8, (1, 2), (1, 2))]).eval()
    x = images(1, size=8)
    assert_close(logits(network, x, 1, 2), logits(module, x))
    expected = logits(network, x, 1, 1)
    alone = network.virtual_network(1, 1)
    assert_close(logits(alone, x), expected)
    alone.to("meta")  # must leave the store's own graphs alone
    assert alone(x.to("meta")).is_meta
    network._plans.clear()
    assert torch.equal(logits(network, x, 1, 1), expected)
    assert network.to("meta")(x.to("meta"), 1, 1).is_meta


# Files that cannot be loaded


@pytest.fixture
def slice_tensors(trained, tmp_path) -> tuple[dict[str, Tensor], dict[str, str], Path]:
    trained.save(tmp_path / "dvn.safetensors")
    slice_file(read_checkpoint(tmp_path / "dvn.safetensors"), 1, 1, tmp_path / "slice.safetensors")
    return opened(tmp_path / "slice.safetensors")


def opened(path: Path) -> tuple[dict[str, Tensor], dict[str, str], Path]:
    with safe_open(path, framework="pt") as file:
        said = {key: value for key, value in json.loads(file.metadata()["dvn"]).items() if key != "checksums"}
        return safetensors.torch.load(path.read_bytes()), {"dvn": json.dumps(said)}, path


def test_a_tensor_of_another_shape_is_named(slice_tensors):
    tensors, metadata, path = slice_tensors
    tensors["layer1.0.bn1.weight"] = torch.zeros(17)
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(InputError, match=r"is damaged: layer1\.0\.bn1\.weight has shape \[17\], not \[4\]"):
        dvn_cli.load(path)


@pytest.mark.parametrize("name", ["shared/layer1.0.conv1.weight", "task/3/level/2/bn1.bias", "task/2/conv1.weight"])
def test_a_checkpoint_is_checked_as_a_whole(trained, tmp_path, name):
    trained.save(tmp_path / "dvn.safetensors")
    tensors, metadata, path = opened(tmp_path / "dvn.safetensors")
    wrong = tensors | {name: torch.zeros(*tensors[name].shape[:-1], tensors[name].shape[-1] + 1)}
    safetensors.torch.save_file(wrong, path, metadata)
    with pytest.raises(InputError, match=r"is damaged: .* has shape"):
        dvn_cli.load(path)
    del tensors[name]
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(InputError, match="is damaged: it has no tensor"):
        dvn_cli.load(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrn_10_one", "timm has no model 'wrn_10_one'"),
        ("wrn_16_1", "wrn_16_1 is not the backbone that was divided"),
    ],
)
def test_a_slice_of_a_backbone_that_is_not_there_or_has_changed(slice_tensors, name, message):
    tensors, metadata, path = slice_tensors
    dvn = json.loads(metadata["dvn"])
    dvn["backbone"]["name"] = name
    safetensors.torch.save_file(tensors, path, {"dvn": json.dumps(dvn)})
    with pytest.raises(InputError, match=message):
        dvn_cli.load(path)


def test_files_that_are_no_networks(slice_tensors):
    tensors, _, path = slice_tensors
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="is truncated"):
        dvn_cli.load(path)
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(InputError, match="holds plain weights, no checkpoint"):
        dvn_cli.load(path)
    with pytest.raises(InputError, match="there is no checkpoint"):
        dvn_cli.load(path.with_name("nothing.safetensors"))


def test_a_partition_holds_no_weights() -> None:
    spec = resolve("wrn_10_1")
    module = spec.build()
    weight = weakref.ref(module.conv1.weight)
    partition = partition_backbone(spec, 2, module=module)
    del module
    gc.collect()
    assert weight() is None
    assert partition.network((1,), 100).names
