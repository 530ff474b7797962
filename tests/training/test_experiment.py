"""What a run starts from: a checkpoint that other tasks are added to, and a backbone's blocks that begin at zero."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small
import timm
import torch
from safetensors.torch import save_file

from dvn_cli.backbones import resolve
from dvn_cli.dividing import build
from dvn_cli.errors import InputError
from dvn_cli.loading import load
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.store.file import read_checkpoint
from dvn_cli.store.slicing import slice_file
from dvn_cli.training.experiment import prepare
from dvn_cli.training.session import Session

LOW = {"name": "low", "weight": 3, "data": small.data(classes="0-4", augment="crop", pad=1)}
HIGH = {"name": "high", "data": small.data(classes="5-9", augment="crop", pad=1)}
MIDDLE = {"name": "middle", "data": small.data(classes="3-7")}
ALL = {"name": "all", "data": small.data()}
SEQUENTIAL = "learning=sequential"


def first(folder: Path, *words: str, task: dict[str, Any] = LOW, **keys: Any) -> Path:
    """The checkpoint of a run of one task."""
    folder.mkdir()
    small.trained(folder, *words, tasks=[task], **keys)
    return folder / "dvn.safetensors"


def added(folder: Path, checkpoint: Path, *words: str, task: dict[str, Any] = HIGH, note: Any = None) -> Session:
    """A session that adds a task."""
    folder.mkdir(exist_ok=True)
    keys = {"continues": str(checkpoint), "backbone": None, "units": None, "tasks": [dict(task)]}
    return small.session(folder, *words, note=note, **keys)


def slices(checkpoint: Path) -> dict[tuple[int, int], bytes]:
    """The files of all networks."""
    header, file, found = read_checkpoint(checkpoint), checkpoint.with_name("slice.safetensors"), {}
    for task, level in header.metadata.networks:
        slice_file(header, task, level, file)
        found[task, level] = file.read_bytes()
    return found


def opened(path: Path) -> DeepVirtualNetwork:
    network = load(path)
    assert isinstance(network, DeepVirtualNetwork)
    return network


GROW = "sequential={old: distilled, grow: true, warmup_epochs: 1}"


@pytest.mark.parametrize(
    ("words", "of_the_first"),
    [
        ([SEQUENTIAL, "sequential.warmup_epochs=1"], []),
        ([SEQUENTIAL, GROW], ["levels=[1]"]),
        ([SEQUENTIAL, "sequential.grow=true"], ["levels=[1]"]),
        (["method=nestednet", SEQUENTIAL], ["levels=[1]"]),
        (["method=packnet"], ["levels=[1]"]),
        (["method=lwf"], []),
        (["method=feature_extraction"], []),
        (["method=da_cnn"], []),
        ([SEQUENTIAL, GROW, "backbone.name=small:Dropping"], ["levels=[1]"]),
    ],
    ids=["dvn", "growing", "frozen", "nestednet", "packnet", "lwf", "feature_extraction", "da_cnn", "dropout"],
)
def test_as_if_both_tasks_had_been_there(tmp_path: Path, words: list[str], of_the_first: list[str]) -> None:
    """To the bit, the losses too; the file that it started from is what it was."""
    whole = small.trained(tmp_path, *words, tasks=[LOW, HIGH]).run
    path = first(tmp_path / "first", *words, *of_the_first)
    before = path.read_bytes()
    session = added(tmp_path / "second", path, *(word for word in words if not word.startswith("backbone")))
    session.train(small.nothing, small.nothing)
    run = session.run
    assert path.read_bytes() == before
    assert [replace(task, data=None) for task in run.network.tasks] == [
        replace(task, data=None) for task in whole.network.tasks
    ]
    expected = whole.network.file_tensors()
    written = opened(session.files.checkpoint).file_tensors()
    assert written.keys() == expected.keys()
    assert [name for name, tensor in written.items() if not torch.equal(tensor, expected[name])] == []
    last = [entry["loss"] for entry in whole.history if entry["stage"] > 1]
    assert [entry["loss"] for entry in run.history] == last


def test_a_sandwich_is_drawn_as_if_both_tasks_had_been_there(tmp_path: Path) -> None:
    """To the bit: which levels a step of a task trains depends on no task before it."""
    words = (SEQUENTIAL, "sequential.old=distilled", "levels_per_step=sandwich")
    whole = small.trained(tmp_path, *words, tasks=[LOW, HIGH], units=4, epochs=3).run
    path = first(tmp_path / "first", *words, units=4, epochs=3)
    session = added(tmp_path / "second", path, *words, "epochs=3")
    session.train(small.nothing, small.nothing)
    assert [entry["loss"] for entry in session.run.history] == [entry["loss"] for entry in whole.history[3:]]


def test_one_unit_with_each_run(tmp_path: Path) -> None:
    """Three tasks in three runs; no run leaves a network that was not trained."""
    whole = small.trained(tmp_path, SEQUENTIAL, GROW, units=3, tasks=[LOW, HIGH, MIDDLE]).run
    path = first(tmp_path / "1", SEQUENTIAL, GROW, "levels=[1]", units=3)
    kept = []
    for number, task in ((2, HIGH), (3, MIDDLE)):
        session = added(tmp_path / str(number), path, SEQUENTIAL, GROW, task=task)
        session.train(small.nothing, small.nothing)
        path = session.files.checkpoint
        network = opened(path)
        kept.append([[of.units(level) for level in range(1, len(of.levels) + 1)] for of in network.tasks])
        assert set(network) == set(session.run.stages[-1].trained)
    assert kept[0] == [[(1,), (1, 2)], [(2,), (1, 2)]]
    assert kept[1] == [
        [(1,), (1, 2), (1, 2, 3)],
        [(2,), (1, 2), (1, 2, 3)],
        [(3,), (2, 3), (1, 2, 3)],
    ]
    expected = whole.network.file_tensors()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in opened(path).file_tensors().items())


def test_more_classes_than_the_backbone_had(tmp_path: Path) -> None:
    """The old networks give what they gave, of units that are what they were."""
    path = first(tmp_path / "first", "assign=importance")
    session = added(tmp_path / "second", path, SEQUENTIAL, task=ALL)
    old, network = opened(path), session.run.network
    assert (old.partition.spec.num_classes, network.partition.spec.num_classes) == (5, 10)
    assert old.partition.rule.assign == "importance"
    kept = ("units", "rule", "axes")
    assert all(getattr(network.partition.metadata(), key) == getattr(old.partition.metadata(), key) for key in kept)
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        for level in (1, 2):
            assert torch.equal(network.eval()(images, 1, level), old(images, 1, level))
            assert network(images, 2, level).shape == (3, 10)
    session.train(small.nothing, small.nothing)
    written = opened(session.files.checkpoint)
    assert [len(task.classes) for task in written.tasks] == [5, 10]
    with torch.no_grad():
        assert torch.equal(written(images, 2, 2), network.eval()(images, 2, 2))


@pytest.mark.parametrize(
    ("words", "order", "levels", "told"),
    [
        ([], (3, 2, 1, 4), (1, 2, 3), "trains unit 3"),
        (["levels=[2, 4]"], (3, 2, 1, 4), (2, 4), "trains unit 3, 4"),
        (["tasks.0.order=[4, 1, 2, 3]"], (4, 1, 2, 3), (1, 2, 3), "trains unit 4"),
        (["orders=shared", "sequential.grow=true"], (1, 2, 3, 4), (1, 2, 3), "trains unit 3"),
        (
            ["tasks.0.order=[2, 1, 3, 4]", "levels=[2]"],
            (2, 1, 3, 4),
            (2,),
            "trains no unit, but what it has of its own",
        ),
    ],
    ids=["its own first", "two of its own", "another order", "a shared order", "no unit"],
)
def test_what_is_shipped_stays_what_it_is(
    tmp_path: Path, words: list[str], order: tuple[int, ...], levels: tuple[int, ...], told: str
) -> None:
    """Files equal byte by byte, though the new task has more classes than the backbone had."""
    path = first(tmp_path / "first", "levels=[1, 2]", units=4)
    notes: list[str] = []
    session = added(tmp_path / "second", path, SEQUENTIAL, *words, task=ALL, note=notes.append)
    session.train(small.nothing, small.nothing)
    before, after = slices(path), slices(session.files.checkpoint)
    assert before.keys() == {(1, 1), (1, 2)}
    assert {network: after[network] for network in before} == before
    assert (session.run.network.tasks[1].order, session.run.network.tasks[1].levels) == (order, levels)
    assert notes == [f"task 'all' {told}; earlier tasks' networks stay what they are"]
    losses = [entry["loss"][1] for entry in session.run.history]
    assert all(loss is not None for of_levels in losses for loss in of_levels)


def test_an_order_that_begins_with_lesser_channels_is_said(tmp_path: Path) -> None:
    """Units are not equally strong where the best channels are in the first one."""
    told: dict[str, list[str]] = {"orders=paper": [], "orders=shared": []}
    for orders, notes in told.items():
        small.session(tmp_path, "assign=sorted", orders, note=notes.append)
    line = "task 'all' begins with unit 2, and unit 1 has the best channels (assign sorted): orders=shared begins with "
    assert told["orders=paper"] == [f"{line}that", *told["orders=shared"]]


def test_no_unit_is_free(tmp_path: Path) -> None:
    """Then the old networks learn by distillation, and that is said; or the new task has no unit of its own."""
    path = first(tmp_path / "first")
    notes: list[str] = []
    session = added(tmp_path / "second", path, SEQUENTIAL, "sequential.replay=9", note=notes.append)
    assert notes == [
        "no unit is free for task 'high' (add_units gives it one): earlier tasks' networks are trained on, held by "
        "distillation",
        "no images of task 'low' are replayed: the recipe has none",
    ]
    assert session.run.stage.distilled == (((1, 1), (1, 1)), ((1, 2), (1, 2)))
    session = added(tmp_path / "third", path, SEQUENTIAL, "sequential.old=frozen")
    session.train(small.nothing, small.nothing)
    before, after = slices(path), slices(session.files.checkpoint)
    assert {network: after[network] for network in before} == before
    assert set(after) == {(1, 1), (1, 2), (2, 1), (2, 2)}


@pytest.mark.parametrize(("assign", "tasks"), [("even", [ALL]), ("importance", [ALL, MIDDLE])])
def test_more_units(tmp_path: Path, assign: str, tasks: list[dict[str, Any]]) -> None:
    """A unit for each task: files of the old networks are equal byte by byte, whatever channels they own."""
    path, before = first(tmp_path / "1", f"assign={assign}"), dict[tuple[int, int], bytes]()
    for number, task in enumerate(tasks, 2):
        before |= slices(path)
        session = added(tmp_path / str(number), path, SEQUENTIAL, "add_units=1", task=task)
        session.train(small.nothing, small.nothing)
        path = session.files.checkpoint
        after = slices(path)
        assert {network: after[network] for network in before} == before
        network = opened(path)
        units, order = number + 1, (number + 1, *range(number, 0, -1))
        assert network.partition.units == units
        assert (network.tasks[-1].order, network.tasks[-1].levels) == (order, tuple(range(1, units + 1)))
        tensors = network.tensors(number, units)
        assert tensors["conv1.weight"].shape[0] == 8 * units
        assert tensors["layer1.0.conv1.weight"].shape == (8 * units, 8 * units, 3, 3)
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        for task_level, content in slices(path).items():
            (tmp_path / "cut.safetensors").write_bytes(content)
            alone = load(tmp_path / "cut.safetensors")
            torch.testing.assert_close(alone(images), network(images, *task_level), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["units=3"], "4/3 of 16 channels are no whole number: units are added where those there are equal"),
        (["round_to=12"], "no units can be added to wrn_10_1 in 2 units: they are not equally wide, or do not divide"),
        (["divide=inner"], "no units can be added to wrn_10_1 in 2 units: they are not equally wide, or do not divide"),
        (["backbone={name: test_vit, in_chans: 1}", "tasks.0.data.size=32"], "test_vit is built at one width alone"),
    ],
)
def test_no_more_units(tmp_path: Path, words: list[str], told: str) -> None:
    path = first(tmp_path / "first", "epochs=1", *words)
    with pytest.raises(InputError, match=told):
        added(tmp_path / "second", path, SEQUENTIAL, "add_units=1", *words[1:])


def test_continued_and_interrupted(tmp_path: Path) -> None:
    path = first(tmp_path / "first", "levels=[1]")
    words = [SEQUENTIAL, GROW]
    whole = added(tmp_path / "whole", path, *words)
    whole.train(small.nothing, small.nothing)
    session = added(tmp_path / "second", path, *words)
    with pytest.raises(small.Stopped):
        session.train(*small.stop_after(2, 1))
    again = prepare(session.recipe, tmp_path / "second", session.files.checkpoint, small.CPU, resume=True)
    assert again.run.epochs_done == 2
    again.train(small.nothing, small.nothing)
    assert small.history(again.run) == small.history(whole.run)
    expected = whole.run.network.file_tensors()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.run.network.file_tensors().items())


def test_setting_of_a_run_that_continues(tmp_path: Path) -> None:
    """What is there has been initialised; the rest of the setting counts."""
    session = added(tmp_path / "second", first(tmp_path / "first"), SEQUENTIAL, "setting=modern")
    assert session.recipe.inplace_distillation
    assert not session.recipe.optimizer.decay_norms


@pytest.mark.parametrize(
    ("words", "task", "told"),
    [
        (["method=lwf"], HIGH, r"dvn.safetensors' was trained with method=dvn: continue with the same"),
        ([SEQUENTIAL], LOW, r"dvn.safetensors' has a task 'low' already: give the new one another name"),
        ([], HIGH, "a checkpoint's tasks are only added to with learning sequential"),
        (["method=baseline", SEQUENTIAL], HIGH, "a checkpoint's tasks are only added to with learning sequential"),
        ([SEQUENTIAL, "units=2"], HIGH, "units is given by the checkpoint"),
        ([SEQUENTIAL, GROW, "tasks.0.order=[2, 1]", "tasks.0.levels=[3]"], HIGH, "the levels of task 'high' are"),
    ],
)
def test_not_added(tmp_path: Path, words: Sequence[str], task: dict[str, Any], told: str) -> None:
    path = first(tmp_path / "first", "epochs=1")
    with pytest.raises(InputError, match=told):
        added(tmp_path / "second", path, *words, task=task)
    assert list((tmp_path / "second").iterdir()) == []


def test_what_nothing_is_added_to(tmp_path: Path) -> None:
    fresh = small.session(tmp_path).run.network
    fresh.save(tmp_path / "fresh.safetensors")
    with pytest.raises(InputError, match=r"fresh.safetensors' has not been trained yet: give it as partition"):
        added(tmp_path / "second", tmp_path / "fresh.safetensors", SEQUENTIAL)
    slice_file(read_checkpoint(tmp_path / "fresh.safetensors"), 1, 1, tmp_path / "slice.safetensors")
    with pytest.raises(InputError, match=r"slice.safetensors' is a slice"):
        added(tmp_path / "second", tmp_path / "slice.safetensors", SEQUENTIAL)
    path = first(tmp_path / "first", "epochs=1")
    with pytest.raises(InputError, match="is what the recipe starts from: give another output with -o"):
        added(tmp_path / "first", path, SEQUENTIAL)


# What the backbone starts from


def test_zero_init_last(tmp_path: Path) -> None:
    """The last norm of every block, in every network, and no other."""
    tensors = small.session(tmp_path, "backbone.zero_init_last=true").run.network.file_tensors()
    weights = {name: tensor for name, tensor in tensors.items() if ".bn" in name and name.endswith(".weight")}
    zero = {name for name, tensor in weights.items() if not tensor.any()}
    assert zero == {name for name in weights if name.endswith(".bn2.weight")}
    assert len(zero) == 4 * 3
    assert all((weights[name] == 1).all() for name in weights.keys() - zero)


def test_a_task_that_is_added_starts_as_the_others_did(tmp_path: Path) -> None:
    path = first(tmp_path / "first", "epochs=1", "levels=[1]", "backbone.zero_init_last=true")
    session = added(tmp_path / "second", path, "learning=sequential")
    tensors = session.run.network.file_tensors()
    new = {n: tensor for n, tensor in tensors.items() if n.startswith("task/2/") and n.endswith(".bn2.weight")}
    assert new
    assert not any(tensor.any() for tensor in new.values())


def test_blocks_that_do_not_know_how(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the blocks of test_convnext have no zero_init_last\(\)"):
        small.session(tmp_path, "backbone={name: test_convnext, in_chans: 1, zero_init_last: true, input_size: 32}")
    save_file(timm.create_model("test_convnext").state_dict(), tmp_path / "weights.safetensors")
    build(resolve("test_convnext"), seed=0, weights=tmp_path / "weights.safetensors", zero_init_last=True)  # replaced


def test_hidden_layers_that_a_partition_lacks(tmp_path: Path) -> None:
    small.session(tmp_path).run.network.save(tmp_path / "p.safetensors")
    words = ["backbone=", "units=", "partition=p.safetensors", "method=da_cnn"]
    with pytest.raises(
        InputError, match=r"method da_cnn has layers that 'p.safetensors' lacks: give backbone and unit"
    ):
        small.session(tmp_path, *words)
