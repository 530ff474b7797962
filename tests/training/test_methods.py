"""Which networks a method has, and what each one learns from in which stage of a run."""

from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch.nn.functional as F

from dvn_cli.errors import InputError
from dvn_cli.loading import load
from dvn_cli.store.file import read_checkpoint
from dvn_cli.store.metadata import Task
from dvn_cli.store.slicing import slice_file
from dvn_cli.training.methods import METHODS, Stage, plan
from dvn_cli.units.order import paper_order


def tasks(units: int, *levels: tuple[int, ...], order: str = "paper") -> list[Task]:
    orders = [paper_order(n, units) if order == "paper" else range(1, units + 1) for n in range(1, len(levels) + 1)]
    return [
        Task(f"task{n}", ("a", "b"), (8, 8), (0.5,), (0.5,), tuple(of), given)
        for n, (of, given) in enumerate(zip(orders, levels, strict=True), 1)
    ]


def stages(method: str, of: list[Task], **keys: Any) -> list[Stage]:
    return plan(
        METHODS[method], of, **{"sequential": True, "old": None, "grow": False, "epochs": 5, "warmup_epochs": 0} | keys
    )


# Stages


@pytest.mark.parametrize("method", ["dvn", "baseline", "nestednet"])
def test_together(method: str) -> None:
    (stage,) = stages(method, tasks(2, (1, 2), (1, 2)), sequential=False, warmup_epochs=3, grow=True)
    assert stage == Stage((1, 2), ((1, 1), (1, 2), (2, 1), (2, 2)), (), (), "all", 5)


def test_baseline_knows_no_sequence() -> None:
    of = tasks(2, (1, 2), (1, 2))
    assert stages("baseline", of) == stages("baseline", of, sequential=False)


@pytest.mark.parametrize("method", ["packnet", "feature_extraction", "da_cnn", "lwf"])
@pytest.mark.parametrize("sequential", [False, True])
def test_one_by_one(method: str, sequential: bool) -> None:
    """Whatever the recipe says of learning; and growth is a matter of methods with several levels."""
    levels = [(1,), (2,)] if method == "packnet" else [(2,), (2,)]
    first, second = stages(method, tasks(2, *levels, order="same"), sequential=sequential, grow=True)
    assert first == Stage((1,), ((1, 1),), (), (), "all", 5)
    held = method == "lwf"
    hold = (((1, 1), (1, 1)),) if held else ()
    assert second == Stage((2,), ((2, 1),), hold, ((1, 1),), "all" if held else "new", 5)


def test_dvn_with_all_units_from_the_start() -> None:
    """Every level of an old task is held by what it was itself."""
    first, second, third = stages("dvn", tasks(3, (1, 2, 3), (1, 2, 3), (1, 2, 3)))
    ones, twos, threes = (tuple((task, level) for level in (1, 2, 3)) for task in (1, 2, 3))
    assert first == Stage((1,), ones, (), (), "all", 5)
    assert second == Stage((2,), twos, tuple(zip(ones, ones, strict=True)), ones, "all", 5)
    old = ones + twos
    assert third == Stage((3,), threes, tuple(zip(old, old, strict=True)), old, "all", 5)


def test_dvn_that_grows() -> None:
    """A level with the new unit in it is taught by the highest that there was."""
    first, second, third = stages("dvn", tasks(3, (1, 2, 3), (1, 2, 3), (1, 2, 3)), old="distilled", grow=True)
    assert first == Stage((1,), ((1, 1),), (), (), "all", 5)
    hold = (((1, 1), (1, 1)), ((1, 2), (1, 1)))
    assert second == Stage((2,), ((2, 1), (2, 2)), hold, ((1, 1),), "all", 5)
    old = ((1, 1), (1, 2), (2, 1), (2, 2))
    hold = (
        ((1, 1), (1, 1)),
        ((1, 2), (1, 2)),
        ((1, 3), (1, 2)),
        ((2, 1), (2, 1)),
        ((2, 2), (2, 2)),
        ((2, 3), (2, 2)),
    )
    assert third == Stage((3,), ((3, 1), (3, 2), (3, 3)), hold, old, "all", 5)


def test_dvn_that_leaves_the_old_as_it_is() -> None:
    """By default while a unit is free; a task that comes then is held by distillation."""
    of = tasks(3, (1,), (1, 2), (1, 2, 3))
    first, second, third = stages("dvn", of, warmup_epochs=3)
    ones, twos, threes = ((1, 1),), ((2, 1), (2, 2)), ((3, 1), (3, 2), (3, 3))
    assert first == Stage((1,), ones, (), (), "all", 5)
    assert second == Stage((2,), twos, (), ones, "new", 5)
    assert third == Stage((3,), threes, (), ones + twos, "new", 5)
    assert stages("dvn", of, grow=True) == stages("dvn", of, old="frozen") == [first, second, third]
    of = tasks(2, (1,), (1, 2), (1, 2))
    assert [stage.trainable for stage in stages("dvn", of)] == ["all", "new", "all"]
    assert [stage.trainable for stage in stages("dvn", of, old="frozen")] == ["all", "new", "new"]
    assert [stage.trainable for stage in stages("dvn", of, old="distilled")] == ["all", "all", "all"]


def test_more_units_than_tasks() -> None:
    """The last task brings the last unit: as J3 has them, two, three and four of four units for three tasks."""
    of = tasks(4, (2, 3, 4), (2, 3, 4), (2, 3, 4))
    first, second, third = stages("dvn", of, old="distilled", grow=True)
    assert first.learn == ((1, 1),)
    assert second.learn == ((2, 1), (2, 2))
    assert second.distilled == (((1, 1), (1, 1)), ((1, 2), (1, 1)))
    assert third.learn == ((3, 1), (3, 2), (3, 3))
    assert third.before == ((1, 1), (1, 2), (2, 1), (2, 2))


def test_warmup() -> None:
    """Of what is new alone, a grown level of an old task included; a first task has none."""
    first, warm, main = stages("dvn", tasks(2, (1, 2), (1, 2)), old="distilled", grow=True, warmup_epochs=3)
    assert first == Stage((1,), ((1, 1),), (), (), "all", 5)
    assert warm == Stage((2,), ((2, 1), (2, 2)), (((1, 2), (1, 1)),), ((1, 1),), "new", 3, warmup=True)
    assert main == Stage((2,), warm.learn, (((1, 1), (1, 1)), ((1, 2), (1, 1))), ((1, 1),), "all", 5)
    _, warm, _ = stages("lwf", tasks(1, (1,), (1,), order="same"), warmup_epochs=3)
    assert warm == Stage((2,), ((2, 1),), (), ((1, 1),), "new", 3, warmup=True)


@pytest.mark.parametrize("method", ["packnet", "feature_extraction", "da_cnn"])
def test_no_warmup_where_the_old_is_frozen_anyway(method: str) -> None:
    of = tasks(2, (2,), (2,), order="same")
    assert stages(method, of, warmup_epochs=3) == stages(method, of)


def test_nestednet_one_by_one() -> None:
    first, second = stages("nestednet", tasks(2, (1,), (2,), order="same"), grow=True)
    assert first == Stage((1,), ((1, 1),), (), (), "all", 5)
    assert second == Stage((2,), ((2, 1),), (((1, 1), (1, 1)),), ((1, 1),), "all", 5)


@pytest.mark.parametrize("grow", [False, True])
def test_on_what_an_earlier_run_has_left(grow: bool) -> None:
    """Task 3 after a run of the first two is what it is in a run of all three."""
    of = tasks(3, (1, 2, 3), (1, 2, 3), (1, 2, 3))
    keys: dict[str, Any] = {"old": "distilled", "grow": grow, "warmup_epochs": 2}
    whole = stages("dvn", of, **keys)
    assert stages("dvn", of, **keys, before=whole[-1].before) == whole[-2:]


def test_a_task_without_a_network_when_it_comes() -> None:
    with pytest.raises(InputError, match=r"task 'task1' has no level within 1 of the 2 units, .* sequential.grow=fals"):
        stages("dvn", tasks(2, (2,), (1, 2)), grow=True)
    with pytest.raises(InputError, match="task 'task1' has no level within 0 of the 2 units"):
        stages("dvn", tasks(2, (1, 2), (1, 2), (1, 2)), grow=True)


# Networks


FC = {"fc.weight", "fc.bias"}
HIDDEN = {f"fc.{place}.{name}" for place in (0, 2, 4) for name in ("weight", "bias")}
ALL, UNIT = (1, 2), (1,)


@pytest.mark.parametrize(
    ("method", "units", "private"),
    [
        ("dvn", {(1, 1): UNIT, (1, 2): ALL, (2, 1): (2,), (2, 2): ALL}, None),
        ("baseline", {(1, 1): UNIT, (1, 2): ALL, (2, 1): (2,), (2, 2): ALL}, None),
        ("nestednet", {(1, 1): UNIT, (2, 1): ALL}, None),
        ("packnet", {(1, 1): UNIT, (2, 1): ALL}, None),
        ("feature_extraction", {(1, 1): ALL, (2, 1): ALL}, FC),
        ("da_cnn", {(1, 1): ALL, (2, 1): ALL}, HIDDEN),
        ("lwf", {(1, 1): ALL, (2, 1): ALL}, None),
    ],
)
def test_networks(tmp_path: Path, method: str, units: dict[Any, Any], private: set[str] | None) -> None:
    """Which there are, what each one has of its own, and that it can be cut out of what was written."""
    network = small.trained(tmp_path, "epochs=1", method=method).run.network
    assert {of: network.tasks[of[0] - 1].units(of[1]) for of in network} == units
    orders = [(1, 2), (2, 1)] if method in ("dvn", "baseline") else [(1, 2), (1, 2)]
    assert [task.order for task in network.tasks] == orders
    own: dict[Any, set[str]] = {}
    for name in network.file_tensors():
        prefix, _, backbones = name.rpartition("/")
        own.setdefault(prefix, set()).add(backbones)
    networks = {f"task/{task}/level/{level}" for task, level in network}
    everything = set(network.partition.shapes)
    norms = {name for name in everything if ".bn" in name or name.startswith("bn")}
    if method == "baseline":
        assert own == dict.fromkeys(networks, everything), "nothing is shared"
    elif private is not None:
        assert own == {"shared": everything - private, **dict.fromkeys(networks, private)}
    else:
        shared = everything - norms - FC - {"conv1.weight"}
        stems = {f"task/{task}": {"conv1.weight"} for task in (1, 2)}
        assert own == {"shared": shared, **stems, **dict.fromkeys(networks, norms | FC)}
    opened = load(tmp_path / "dvn.safetensors")
    header = read_checkpoint(tmp_path / "dvn.safetensors")
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        for task, level in opened:
            slice_file(header, task, level, tmp_path / "slice.safetensors")
            alone = load(tmp_path / "slice.safetensors")
            torch.testing.assert_close(alone(images), opened(images, task, level), rtol=0, atol=1e-5)


def test_hidden_layers(tmp_path: Path) -> None:
    """As wide as the features, each followed by ReLU."""
    network = small.session(tmp_path, method="da_cnn").run.network.eval()
    images = torch.randn(3, 1, 8, 8)
    tensors = network.tensors(1, 1)
    assert [tuple(tensors[f"fc.{place}.weight"].shape) for place in (0, 2, 4)] == [(64, 64), (64, 64), (5, 64)]
    with torch.no_grad():
        before = network(images, 1, 1)
        tensors["fc.0.bias"].sub_(1e6)  # nothing comes through it any more
        silent = F.linear(F.relu(tensors["fc.2.bias"]), tensors["fc.4.weight"], tensors["fc.4.bias"])
        torch.testing.assert_close(network(images, 1, 1), silent.expand(3, -1))
    assert (before - silent).abs().max() > 1e-3


@pytest.mark.parametrize(("method", "kept"), [("nestednet", [(1,), (1, 2)]), ("packnet", [(1,), (1, 2)])])
def test_one_task_has_all_levels(tmp_path: Path, method: str, kept: list[tuple[int, ...]]) -> None:
    network = small.session(tmp_path, method=method, tasks=small.content()["tasks"][:1]).run.network
    assert [network.tasks[0].units(level) for _, level in network] == kept


def test_a_task_for_which_there_is_no_level(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="task 'all' takes the recipe's level 2; the recipe has 1"):
        small.session(tmp_path, "levels=[2]", method="packnet")


def test_an_order_of_ones_own_where_all_have_the_same(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tasks.1.order: with method=lwf all tasks have the same order"):
        small.session(tmp_path, "tasks.1.order=[2, 1]", method="lwf")
