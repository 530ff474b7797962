"""Several processes that train together: the run of one, whoever is stopped or fails."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import together
import torch
import yaml
from safetensors.torch import load_file

from dvn_cli import processes
from dvn_cli.data import Split, batches
from dvn_cli.data.augment import Mixing
from dvn_cli.errors import InputError
from dvn_cli.evaluation.measure import evaluate
from dvn_cli.training.loop import Run
from dvn_cli.training.sharing import check_batches


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the processes of `together.py` say, by what they did, and the folder of their files."""
    folder = tmp_path_factory.mktemp("together")
    subprocess.run([sys.executable, together.__file__, str(folder)], check=True, timeout=500)
    said = {
        what.name: [json.loads((what / f"{number}.json").read_text()) for number in range(together.COUNT)]
        for what in folder.iterdir()
    }
    return {**said, "folder": folder}


def test_one_process_goes_on_where_two_were_stopped(told: dict[str, Any], tmp_path: Path) -> None:
    """With the losses of one that nothing stopped."""
    first, second = told["interrupted"]
    assert first == second
    assert [first[key] for key in ("code", "epochs", "steps")] == [128 + signal.SIGTERM, 1, 2]
    whole = small.trained(tmp_path, **together.RECIPE).run
    shutil.copy(told["folder"] / "interrupted" / "dvn.state.safetensors", tmp_path)
    resumed = small.trained(tmp_path, resume=True, **together.RECIPE).run
    for ours, theirs in zip(small.history(whole), small.history(resumed), strict=True):
        for key, value in ours.items():
            torch.testing.assert_close(torch.tensor(theirs[key]), torch.tensor(value), rtol=1e-4, atol=0, msg=key)
    assert first["history"] == small.history(resumed)[:1]


def test_an_evaluation_is_shared_out(told: dict[str, Any]) -> None:
    """Each image is counted once, and the first process alone writes: what one process makes of all images."""
    folder = told["folder"] / "interrupted"
    rows = list(csv.DictReader((folder / "0.csv").open()))
    assert [int(row["images"]) for row in rows] == [20, 20, 21, 21]
    for row, result in zip(rows, evaluate(folder / "0.safetensors"), strict=True):
        assert float(row["top1"]) == result.top1
        assert float(row["loss"]) == pytest.approx(result.loss, rel=1e-5)
    assert not (folder / "1.csv").exists()


def test_a_process_that_fails_ends_all(told: dict[str, Any]) -> None:
    assert told["failed"] == [["SystemExit", "1"], ["InputError", "no such image"]]


def test_batch_norms_of_all_processes_are_one(told: dict[str, Any]) -> None:
    assert np.array(told["norms"]).shape == (together.COUNT, 6)
    assert np.max(told["norms"]) < 1e-5


def test_a_run_with_synchronised_norms_is_another_way_to_the_same(tmp_path: Path) -> None:
    runs = [small.trained(tmp_path, f"sync_bn={each}").run for each in ("true", "false")]
    (ours, theirs) = (run.network.file_tensors() for run in runs)
    assert any(not torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("mixing", [None, Mixing(0.5, 0, 0, 50), Mixing(0.5, 1.0, 1.0, 50)])
def test_parts_of_batches_are_those_of_the_whole(mixing: Mixing | None) -> None:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (50, 3, 6, 6), generator=draw, dtype=torch.uint8)
    split = Split(images, torch.arange(50))

    def passed(part: tuple[int, int] = (0, 1)) -> list[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(1)
        keys: dict[str, Any] = {"generator": generator, "augment": "crop-flip", "pad": 2, "mixing": mixing}
        made = [
            batch
            for _ in range(2)
            for batch in batches(split, 12, mean=[0.5] * 3, std=[0.5] * 3, skip=1, part=part, **keys)
        ]
        assert len(made) == 6
        return made

    parts = [passed((place, 4)) for place in range(4)]
    for number, (whole, labels) in enumerate(passed()):
        assert torch.equal(labels, torch.cat([part[number][1] for part in parts]))
        assert torch.equal(whole, torch.cat([part[number][0] for part in parts]))


def test_a_batch_that_cannot_be_shared_evenly_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = small.session(tmp_path)
    monkeypatch.setattr(processes, "count", lambda: 3)
    with pytest.raises(InputError, match=r"^3 processes cannot share the 16 images .* multiple of 3$"):
        check_batches(session.run)


@pytest.mark.parametrize("replay", [1, 15])
def test_replayed_images_that_cannot_be_shared_evenly_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replay: int
) -> None:
    """Before anything is trained, and only where they are replayed."""

    def run(old: str, count: int) -> Run:
        words = (f"sequential.old={old}", f"sequential.replay={count}")
        return small.session(tmp_path, "learning=sequential", *words).run

    refused, taken = run("distilled", replay), [run("frozen", replay), run("distilled", 2), run("distilled", 17)]
    monkeypatch.setattr(processes, "count", lambda: 2)
    for each in taken:  # a batch has 16 of the 17
        check_batches(each)
    told = rf"^2 processes cannot share the {replay} images evenly that task 'low' .*replay to a multiple of 2$"
    with pytest.raises(InputError, match=told):
        check_batches(refused)


def torchrun(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "--", "dvn_cli", *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, **pipes)


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    """A run that a signal stops and that one process ends, running statistics and all; the same images in order."""
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small.content(epochs=60)))
    run = torchrun(tmp_path, "train", "small.yaml", "--log", "log.jsonl")
    log = tmp_path / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        time.sleep(0.2)
        assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=120)[1]
    assert said.count("2 processes, each on cpu") == 1
    assert len(re.findall("stopped after .*: the same command with --resume goes on", said)) == 1
    done = len(log.read_text().splitlines())
    assert 3 <= done < 60
    with pytest.raises(InputError, match="epochs"):
        small.session(tmp_path, f"epochs={done + 1}", resume=True)
    small.trained(tmp_path, "epochs=60", resume=True)
    assert load_file(tmp_path / "dvn.safetensors")


@pytest.mark.slow
def test_torchrun_says_what_is_wrong_once(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small.content(batch_size=15)))
    said = torchrun(tmp_path, "train", "small.yaml").communicate(timeout=120)[1]
    assert said.count("dvn: ") == 1
    assert "dvn: 2 processes cannot share the 15 images evenly that task 'low' has in a batch" in said
