"""Runs that start from weights: which channels a level gets, and what makes up for those that it lacks."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from safetensors.torch import load_file, save_file

from dvn_cli.backbones import resolve
from dvn_cli.cli import main
from dvn_cli.data import batches
from dvn_cli.dividing import divide
from dvn_cli.evaluation.measure import evaluate_all
from dvn_cli.loading import load
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.training import building
from dvn_cli.training.classifiers import PENALTY
from dvn_cli.training.outlook import outlook

KEYS: dict[str, Any] = {"divide": "inner", "assign": "sorted", "widths": "macs", "orders": "shared"}


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


def classifier(network: DeepVirtualNetwork, task: int, level: int) -> tuple[torch.Tensor, torch.Tensor]:
    own = network.file_tensors()
    return own[f"task/{task}/level/{level}/fc.weight"], own[f"task/{task}/level/{level}/fc.bias"]


def test_a_classifier_of_other_classes_starts_at_zero(weights: Path, tmp_path: Path) -> None:
    """Where it is not to be fitted."""
    notes: list[str] = []
    keys = {"backbone": backbone(weights), "compensate": False, "fit_classifiers": False}
    network = small.session(tmp_path, note=notes.append, **keys).run.network
    published = load_file(weights)
    for level in (1, 2):
        assert not any(tensor.any() for tensor in classifier(network, 1, level))  # of five classes, nobody knows which
        weight, bias = classifier(network, 2, level)  # of as many as the weights have
        assert torch.equal(bias, published["fc.bias"])
        assert {*map(tuple, weight.T.tolist())} <= {*map(tuple, published["fc.weight"].T.tolist())}
    assert [note for note in notes if "classifier" in note] == ["task 'low': its classifier starts at zero"]
    random = small.session(tmp_path).run.network
    assert all(classifier(random, task, 1)[0].any() for task in (1, 2))


def test_a_classifier_of_other_classes_is_fitted(weights: Path, tmp_path: Path) -> None:
    """To the top level's features of training images, which it tells then; a lower level has as much of it."""
    notes: list[str] = []
    session = small.session(tmp_path, note=notes.append, backbone=backbone(weights), compensate=False)
    network, data = session.run.network, session.run.data[1]
    assert "task 'low': its classifier starts fitted to features of its training images" in notes
    top = network.virtual_network(1, 2).eval()
    with torch.no_grad():
        [(images, labels)] = batches(data.train, len(data.train), mean=data.mean, std=data.std)
        features, given = top.features(images), top(images)
    assert (given.argmax(1) == labels).float().mean() > 0.9
    loss = torch.nn.functional.cross_entropy
    (weight, bias), (narrow, same) = classifier(network, 1, 2), classifier(network, 1, 1)
    columns = small.indices(network, "fc.weight", 1, 1)[1]
    assert torch.equal(narrow, weight[:, columns])
    assert torch.equal(bias, same)

    def objective(weight: torch.Tensor) -> torch.Tensor:
        penalty = (weight * features.std(0, correction=0)).square().sum()
        return loss(features @ weight.T + bias, labels) + PENALTY * penalty

    worse = (objective(weight * factor) for factor in (0.98, 1.02))
    assert all(objective(weight) < value for value in worse)
    again = small.session(tmp_path, backbone=backbone(weights), compensate=False).run.network
    assert all(map(torch.equal, classifier(again, 1, 2), (weight, bias)))


def test_a_classifier_starts_from_the_weights_of_its_classes(tmp_path: Path) -> None:
    """Found by name among a thousand, in whatever order, whole and as a level has them."""
    torch.manual_seed(0)
    spec = resolve("timm/test_vit", 1000, 1, (160, 160))
    save_file(spec.build().state_dict(), tmp_path / "weights.safetensors")
    data = small.data(size=160, groups={"English_springer": 0, "n01440764": [1, 2]})
    others = small.data(size=160, classes="3-7")
    tasks = [{"name": "known", "data": data}, {"name": "others", "data": others}]
    keys = {"name": "timm/test_vit", "in_chans": 1, "weights": "weights.safetensors"}
    notes: list[str] = []
    session = small.session(tmp_path, note=notes.append, tasks=tasks, backbone=keys, compensate=False)
    published, network = load_file(tmp_path / "weights.safetensors"), session.run.network
    own = network.file_tensors()
    for level in (1, 2):
        columns = small.indices(network, "head.weight", 1, level)[1]
        wanted = published["head.weight"][[217, 0]][:, columns]
        assert torch.equal(own[f"task/1/level/{level}/head.weight"], wanted)
        assert torch.equal(own[f"task/1/level/{level}/head.bias"], published["head.bias"][[217, 0]])
        assert own[f"task/2/level/{level}/head.weight"].any()
    assert [note for note in notes if "classifier" in note] == [
        "task 'known': its classifier starts from the weights of its classes",
        "task 'others': its classifier starts fitted to features of its training images",
    ]


def test_what_each_level_will_have(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = small.session(tmp_path, backbone=backbone(weights), **KEYS)
    rows = outlook(session.run)
    assert [(row.task, row.level, row.units) for row in rows] == [(1, 1, 1), (1, 2, 2), (2, 1, 1), (2, 2, 2)]
    for row in rows:
        network = session.run.network.virtual_network(row.task, row.level)
        assert row.params == sum(p.numel() for p in network.parameters())
        assert (row.density == 1) == (row.level == 2)
        assert 0 < row.common < 0.2
        assert row.top1 is not None
    assert rows[0].macs < rows[1].macs
    assert [row.top1 for row in rows] == [row.top1 for row in evaluate_all(session.run.network, session.run.validation)]
    assert all(row.top1 is None for row in outlook(small.session(tmp_path).run))
    (tmp_path / "small.yaml").write_text(json.dumps(small.content(epochs=1, backbone=backbone(weights))))
    monkeypatch.setattr(
        "sys.argv", ["dvn", "train", str(tmp_path / "small.yaml"), "-o", str(tmp_path / "a.safetensors")]
    )
    with pytest.raises(SystemExit):
        main()
    err = " ".join(capsys.readouterr().err.split())
    assert "parameters density" in err
    assert "before training" in err
    monkeypatch.setattr("sys.argv", [*sys.argv, "epochs=2", "--resume"])
    with pytest.raises(SystemExit):
        main()
    err = " ".join(capsys.readouterr().err.split())
    assert "parameters density" in err
    assert "before training" not in err  # it is trained by now


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
    monkeypatch.setattr(building, "drawn", lambda *_, **__: [torch.rand(8, 1, 8, 8)])
    resumed = small.trained(tmp_path, resume=True, **keys)
    for name, tensor in resumed.run.network.file_tensors().items():
        assert torch.equal(tensor, whole.run.network.file_tensors()[name]), name
    assert small.history(resumed.run) == small.history(whole.run)
    longer = small.session(tmp_path, "epochs=3", resume=True, **keys)
    assert longer.run.network.partition.assignment == whole.run.network.partition.assignment


def test_a_partition_says_what_its_weights_lack(weights: Path, tmp_path: Path) -> None:
    """Without a word on how images are prepared, too: its classifier of other classes is fitted, not kept."""
    made: dict[str, Any] = {"in_chans": 1, "input_size": 8, "weights": weights}
    divide("wrn_10_1", 2, num_classes=7, **made).save(tmp_path / "other.safetensors")
    divide("wrn_10_1", 2, num_classes=10, **made).save(tmp_path / "same.safetensors")
    for file, fits in (("other", "all"), ("same", "low")):
        keys: dict[str, Any] = {"backbone": None, "units": None, "partition": f"{file}.safetensors"}
        if file == "other":
            keys["tasks"] = [{"name": "all", "data": small.data(classes="0-6")}]
        notes: list[str] = []
        network = small.session(tmp_path, note=notes.append, **keys).run.network
        fitted = [note for note in notes if "fitted to features of its training images" in note]
        assert fitted == [f"task '{fits}': its classifier starts fitted to features of its training images"]
        assert "making up for what levels lack: running statistics and biases, on training images" in notes
        assert network.random is None
    recorded = [load(tmp_path / f"{file}.safetensors").random for file in ("other", "same")]
    assert recorded == [("fc.weight", "fc.bias"), ()]


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
