"""Runs that start from weights: which channels a level gets, and what makes up for those that it lacks."""

import json
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from safetensors.torch import save_file

from dvn_cli.backbones import resolve
from dvn_cli.dividing import divide
from dvn_cli.training import experiment

KEYS: dict[str, Any] = {"divide": "inner", "assign": "sorted", "orders": "shared"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a network for ten classes, with running statistics that are not those of any images."""
    torch.manual_seed(3)
    file = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file(resolve("wrn_10_1", 10, 1).build().state_dict(), file)
    return file


def backbone(weights: Path) -> dict[str, Any]:
    return {"name": "wrn_10_1", "in_chans": 1, "weights": str(weights)}


def test_levels_are_compensated_before_training(weights: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    network = small.session(tmp_path, note=notes.append, backbone=backbone(weights), **KEYS).run.network
    assert [task.order for task in network.tasks] == [(1, 2), (1, 2)]
    assert network.partition.rule.divide == "inner"
    assert "making up for what levels lack: running statistics and biases, on training images" in notes
    own = network.file_tensors()
    means = [own[f"task/{task}/level/1/bn1.running_mean"] for task in (1, 2)]
    assert all(mean.any() for mean in means)  # of its own images, each
    assert not torch.equal(*means)
    assert not own["task/1/level/2/bn1.running_mean"].any()  # which lacks nothing
    assert not torch.equal(own["task/2/level/1/fc.bias"], own["task/2/level/2/fc.bias"])

    plain = small.session(tmp_path, backbone=backbone(weights), compensate=False, **KEYS).run.network
    assert not plain.file_tensors()["task/1/level/1/bn1.running_mean"].any()
    assert plain.partition.assignment == network.partition.assignment
    assert plain.partition.assignment != small.session(tmp_path).run.network.partition.assignment


def test_the_papers_orders_unless_a_recipe_wants_one_for_all(tmp_path: Path) -> None:
    assert [task.order for task in small.session(tmp_path).run.network.tasks] == [(1, 2), (2, 1)]
    keys = small.content(orders="shared")["tasks"]
    keys[1]["order"] = [2, 1]
    network = small.session(tmp_path, tasks=keys, orders="shared").run.network
    assert [task.order for task in network.tasks] == [(1, 2), (2, 1)]


def test_random_weights_are_not_compensated(tmp_path: Path) -> None:
    notes: list[str] = []
    network = small.session(tmp_path, note=notes.append).run.network
    assert not network.file_tensors()["task/1/level/1/bn1.running_mean"].any()
    assert not any("making up" in note for note in notes)


def test_a_run_goes_on_with_the_channels_that_it_had(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although images would now tell otherwise, as they may with other threads; so does a finished one."""
    keys = {"backbone": backbone(weights), **KEYS}
    (tmp_path / "whole").mkdir()
    whole = small.trained(tmp_path / "whole", **keys)
    run = small.session(tmp_path, force=True, **keys)
    with pytest.raises(small.Stopped):
        run.train(*small.stop_after(1))
    monkeypatch.setattr(experiment, "drawn", lambda *_, **__: [torch.rand(8, 1, 8, 8)])
    resumed = small.trained(tmp_path, resume=True, **keys)
    for name, tensor in resumed.run.network.file_tensors().items():
        assert torch.equal(tensor, whole.run.network.file_tensors()[name]), name
    assert small.history(resumed.run) == small.history(whole.run)
    longer = small.session(tmp_path, "epochs=3", resume=True, **keys)
    assert longer.run.network.partition.assignment == whole.run.network.partition.assignment


def test_a_compensated_partition_to_start_from(weights: Path, tmp_path: Path) -> None:
    divided = divide(
        "wrn_10_1", 2, divide="inner", assign="sorted", data="source=digits", num_classes=10, input_size=8, in_chans=1,
        weights=weights, mean=[0.5], std=[0.5],
    )  # fmt: skip
    divided.save(tmp_path / "fresh.safetensors")
    keys = {"backbone": None, "units": None, "partition": "fresh.safetensors"}
    session = small.trained(tmp_path, **keys)
    network = session.run.network
    assert network.partition.rule.assign == "sorted"
    assert {name.split("/")[0] for name in network.file_tensors()} == {"shared", "task"}
    assert not any(name in network.file_tensors() for name in ("shared/bn1.running_mean", "shared/fc.bias"))
    record = json.loads((tmp_path / "dvn.run.json").read_text())
    assert record["recipe"]["compensate"] is True
