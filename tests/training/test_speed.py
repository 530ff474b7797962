"""`dvn bench --training`: what a training step costs, and what that is compared with."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schema
import small
import yaml
from typer.testing import CliRunner

from dvn_cli import cli
from dvn_cli.data import TaskData
from dvn_cli.training.experiment import measure_speed
from dvn_cli.training.step import Step


def test_waiting_and_operations_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With images that come late; two passes a step, more steps than an epoch has, and nothing left behind."""
    monkeypatch.chdir(tmp_path)
    train_batches = TaskData.train_batches

    def late(*given: Any) -> Iterator[Any]:
        for batch in train_batches(*given):
            time.sleep(0.05)
            yield batch

    monkeypatch.setattr(TaskData, "train_batches", late)
    keys = ["accumulate=2", "batch_size=4", "epochs=2"]
    speed, run = measure_speed(small.content(), overrides=keys, num_warm_iter=2, num_bench_iter=100)
    assert speed.steps == 2 * 4 - 2
    assert speed.wait >= 2 * 2 * 0.05
    assert speed.step > speed.wait
    assert speed.images_per_s * speed.step == pytest.approx(2 * 2 * 4)
    assert speed.flops == 2 * 4 * 6 * sum(run.network.macs(*network) for network in run.network)
    assert speed.apart is not None
    assert 0.2 < speed.joint / speed.apart < 5
    assert 0 < speed.share < 1
    assert list(tmp_path.iterdir()) == []


def test_networks_that_are_held_take_the_images_of_the_new_task(tmp_path: Path) -> None:
    """Those of a checkpoint that a recipe continues."""
    small.trained(tmp_path, "epochs=1")
    keys = {
        "continues": str(tmp_path / "dvn.safetensors"),
        "learning": "sequential",
        "sequential": {"old": "distilled"},
    }
    recipe = {key: value for key, value in small.content(**keys).items() if key not in ("backbone", "units")}
    recipe["tasks"] = [{"name": "new", "data": small.data(classes="5-9"), "batch_size": 64}]  # more than there are
    speed, run = measure_speed(recipe, num_warm_iter=1, num_bench_iter=1)
    assert speed.flops == 32 * 6 * sum(run.network.macs(*network) for network in run.network)


def test_levels_that_are_drawn_are_those_that_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of each task in a step, the middle one another from step to step."""
    taken: list[tuple[Any, ...]] = []
    call = Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda self, given, these: (taken.append(these), call(self, given, these))[1])
    keys = ["units=4", "levels_per_step=sandwich", "epochs=4"]
    speed, run = measure_speed(small.content(), overrides=keys, num_warm_iter=2, num_bench_iter=6)
    assert speed.networks == 6
    timed, rest = taken[2:8], taken[8:]
    assert len({*timed}) == 2
    assert speed.flops == round(sum(16 * 6 * run.network.macs(*each) for these in timed for each in these) / 6)
    assert {*rest} == {timed[-1]}


def test_command(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small.content()))
    words = ["bench", "--training", str(tmp_path / "small.yaml"), "levels=[2]", "--num-warm-iter", "1"]
    shown = CliRunner().invoke(
        cli.app, [*words, "--num-bench-iter", "1", "--results-file", str(tmp_path / "speed.json")]
    )
    assert shown.exit_code == 0, shown.output
    assert "2 networks, fp32" in shown.stdout
    assert "networks apart" in shown.stdout
    document = json.loads((tmp_path / "speed.json").read_text())
    assert document["steps"] == 1
    schema.validator("bench").validate(document)
