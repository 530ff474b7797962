"""A run from its recipe to its files: the same again, and the same after it was interrupted."""

import contextlib
import errno
import itertools
import json
import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dvn_cli.device import title
from dvn_cli.errors import DvnError, InputError
from dvn_cli.loading import load
from dvn_cli.network import DeepVirtualNetwork, to_data
from dvn_cli.store.file import read_header, write
from dvn_cli.store.slicing import slice_file
from dvn_cli.training import loop, recipes, state
from dvn_cli.training.experiment import prepare
from dvn_cli.training.session import Session, commit, complete_run
from dvn_cli.training.step import Step

STATE = "dvn.state.safetensors"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Session]:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, small.trained(folder)


def interrupted(folder: Path, *overrides: str, epoch: int = 1, step: int = 0) -> None:
    with pytest.raises(small.Stopped):
        small.session(folder, *overrides).train(*small.stop_after(epoch, step))


def test_files(whole: tuple[Path, Session]) -> None:
    folder, session = whole
    assert names(folder) == {"dvn.safetensors", "dvn.run.json"}
    record = json.loads((folder / "dvn.run.json").read_text())
    assert record["recipe"] == session.recipe.model_dump(mode="json")
    assert record["recipe"]["optimizer"]["momentum"] == 0.9, "defaults are spelt out"
    assert record["versions"]["torch"] == version("torch")
    assert record["device"] == title(small.CPU)
    assert record["threads"] == 1
    assert record["commit"] == session.record["commit"] == session.run.network.training_record.commit
    assert [entry["epoch"] for entry in record["epochs"]] == [1, 2]
    for entry in record["epochs"]:
        assert [len(levels) for levels in entry["loss"]] == [2, 2]
        assert all(0 <= value <= 100 for levels in entry["validation"] for value in levels)
        assert entry["seconds"] > 0
    header = read_header(folder / "dvn.safetensors")
    assert header.metadata.training.recipe == record["recipe"]
    assert header.metadata.training.epochs == 2
    loaded = load(folder / "dvn.safetensors")
    assert isinstance(loaded, DeepVirtualNetwork)
    own = session.run.network.file_tensors()
    assert all(torch.equal(tensor, own[name]) for name, tensor in loaded.file_tensors().items())


def test_the_commit_that_it_was_trained_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the working directory; a run has none outside of a checkout, or without git."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() is None
    (tmp_path / "recipe.yaml").write_text("a")
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "a"]):
        subprocess.run(["git", *words], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert commit() == head
    (tmp_path / "recipe.yaml").write_text("b")
    assert commit() == f"{head}-dirty"
    monkeypatch.setenv("PATH", "")
    assert commit() is None


def test_the_same_again(whole: tuple[Path, Session], tmp_path: Path) -> None:
    """To the bit, whatever happened in the process before. The checkpoint names the folder that paths start from."""
    folder, first = whole
    torch.manual_seed(99)
    again = prepare(first.recipe, folder, tmp_path / "dvn.safetensors", small.CPU)
    torch.rand(3)
    again.train(small.nothing, small.nothing)
    assert small.history(again.run) == small.history(first.run)
    assert (tmp_path / "dvn.safetensors").read_bytes() == (folder / "dvn.safetensors").read_bytes()
    other = small.trained(tmp_path, "seed=1")
    assert small.history(other.run) != small.history(first.run)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize(
    "words",
    [
        [],
        ["optimizer.name=adamw", "optimizer.lr=0.01", "select=best", "epochs=3"],
        ["ema=0.9", "units=4", "levels_per_step=sandwich", "unlock=0.5", "select=best", "epochs=3"],
        ["patience=1", "epochs=6", "accumulate=2", "tasks.0.batch_size=8"],
        ["optimizer={name: lamb, lr: 0.01, layer_decay: 0.7, clip_grad: 0.5}"],
    ],
)
def test_resume(tmp_path: Path, words: list[str], step: int) -> None:
    """Between two epochs and within one; the checkpoint to the bit."""
    uninterrupted = small.trained(tmp_path, *words)
    expected = (tmp_path / "dvn.safetensors").read_bytes()
    (tmp_path / "dvn.safetensors").unlink()
    (tmp_path / "dvn.run.json").unlink()
    interrupted(tmp_path, *words, step=step)
    assert names(tmp_path) == {STATE}
    torch.manual_seed(99)
    session = small.session(tmp_path, *words, resume=True)
    assert session.run.epochs_done == 1
    session.train(small.nothing, small.nothing)
    assert small.history(session.run) == small.history(uninterrupted.run)
    assert (tmp_path / "dvn.safetensors").read_bytes() == expected
    assert names(tmp_path) == {"dvn.safetensors", "dvn.run.json"}


@pytest.mark.parametrize(
    ("words", "epoch", "step"),
    [
        ([], 0, 3),
        (["optimizer.name=adamw", "optimizer.lr=0.01", "select=best", "epochs=3"], 1, 5),
        (["learning=sequential", "sequential={grow: true, warmup_epochs: 1}"], 2, 2),
        (["learning=sequential", "sequential={grow: true, warmup_epochs: 1}"], 3, 4),
    ],
)
def test_resume_within_an_epoch(tmp_path: Path, words: list[str], epoch: int, step: int) -> None:
    """From the state after the step before, in any stage, with dropout; a smaller task is in a later pass then."""
    words = [*words, "tasks.*.data.train_images=100", "tasks.0.data.train_images=60", "save_every.steps=1"]
    words.append("backbone.name=small:Dropping")
    uninterrupted = small.trained(tmp_path, *words)
    assert uninterrupted.run.steps == 5
    expected = (tmp_path / "dvn.safetensors").read_bytes()
    (tmp_path / "dvn.safetensors").unlink()
    (tmp_path / "dvn.run.json").unlink()
    interrupted(tmp_path, *words, epoch=epoch, step=step)
    torch.manual_seed(99)
    session = small.session(tmp_path, *words, resume=True)
    assert (session.run.epochs_done, session.run.steps_done) == (epoch, step - 1)
    session.train(small.nothing, small.nothing)
    assert small.history(session.run) == small.history(uninterrupted.run)
    assert (tmp_path / "dvn.safetensors").read_bytes() == expected


def test_resume_before_the_checkpoint_is_written(whole: tuple[Path, Session], tmp_path: Path) -> None:
    """All epochs done, but not the last file."""
    folder, first = whole
    interrupted(tmp_path, epoch=2)
    session = prepare(first.recipe, folder, tmp_path / "dvn.safetensors", small.CPU, resume=True)
    session.train(small.nothing, small.nothing)
    assert (tmp_path / "dvn.safetensors").read_bytes() == (folder / "dvn.safetensors").read_bytes()


SEQUENTIAL = [
    *("learning=sequential", "sequential={old: distilled, grow: true, warmup_epochs: 2}", "select=best"),
    "backbone.name=small:Dropping",
]
"""Stages of two epochs: of the first task, of the second one's new parts, and of all."""


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Session]:
    folder = tmp_path_factory.mktemp("one-by-one")
    return folder, small.trained(folder, *SEQUENTIAL)


@pytest.mark.parametrize(("epoch", "step"), [(1, 1), (2, 0), (3, 0), (3, 1), (4, 0), (5, 1), (6, 0)])
def test_resume_in_any_stage(one_by_one: tuple[Path, Session], tmp_path: Path, epoch: int, step: int) -> None:
    """And between two of them, where the next one's teacher has not been made yet."""
    folder, first = one_by_one
    interrupted(tmp_path, *SEQUENTIAL, epoch=epoch, step=step)
    torch.manual_seed(99)
    session = prepare(first.recipe, folder, tmp_path / "dvn.safetensors", small.CPU, resume=True)
    session.train(small.nothing, small.nothing)
    assert [entry["stage"] for entry in session.run.history] == [1, 1, 2, 2, 3, 3]
    assert small.history(session.run) == small.history(first.run)
    assert (tmp_path / "dvn.safetensors").read_bytes() == (folder / "dvn.safetensors").read_bytes()


@pytest.mark.parametrize(("more", "epoch"), [(["select=best"], 1), (SEQUENTIAL, 5)])
def test_state_goes_round(tmp_path: Path, more: list[str], epoch: int) -> None:
    """Everything in it comes back: generators, the optimizer's averages and what old networks are held by too."""
    words = ["optimizer.name=adamw", *more]
    session = small.session(tmp_path, *words)
    with pytest.raises(small.Stopped):
        session.train(*small.stop_after(epoch))
    tensors = session.run.state()
    parts = {name.split("/")[0] for name in tensors}
    assert parts == {"network", "best", "optimizer", "generator", "random"} | ({"teacher"} if epoch > 1 else set())
    resumed = small.session(tmp_path, *words, resume=True).run
    assert all(getattr(resumed, key) == getattr(session.run, key) for key in ("epochs_done", "history", "best"))
    again = resumed.state()
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == again[name].dtype
        assert torch.equal(tensor, again[name]), name


@pytest.mark.parametrize("what", ["state", "checkpoint", "record", "slice", "foreign", "damaged state"])
def test_what_another_run_has_left_is_not_replaced(whole: tuple[Path, Session], tmp_path: Path, what: str) -> None:
    """Nor is any image read before that is said."""
    if what == "state":
        interrupted(tmp_path)
        told = r"dvn.state.safetensors' is the state of an interrupted run \(tasks: low, all; after epoch 1 of 2, "
    elif what == "checkpoint":
        shutil.copy(whole[0] / "dvn.safetensors", tmp_path)
        told = r"dvn.safetensors' is a trained checkpoint \(tasks: low, all; 2 epochs, written 2"
    elif what == "record":
        shutil.copy(whole[0] / "dvn.run.json", tmp_path)
        told = "dvn.run.json' is the record of a run"
    elif what == "slice":
        slice_file(read_header(whole[0] / "dvn.safetensors"), 1, 1, tmp_path / "dvn.safetensors")
        told = "dvn.safetensors' is a slice"
    elif what == "foreign":
        save_file({"x": torch.zeros(3)}, tmp_path / "dvn.safetensors")
        told = "dvn.safetensors' holds plain weights"
    else:
        (tmp_path / STATE).write_text("hello")
        told = "is not the state of a run that this dvn reads"
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dvn_cli.training.experiment.load_data", lambda *_: pytest.fail("read images"))
        with pytest.raises(InputError, match=f"{told}.*-o writes elsewhere, --force replaces it"):
            small.session(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    small.trained(tmp_path)  # with force
    assert names(tmp_path) == {"dvn.safetensors", "dvn.run.json"}


def test_more_epochs(tmp_path: Path) -> None:
    """With the rates that a run of as many epochs has there, in new batches, repeatably; interrupted or not."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        small.trained(tmp_path / name)
        noted: list[str] = []
        recipe = small.session(tmp_path / name, "epochs=4", resume=True).recipe
        if name == "b":
            with pytest.raises(small.Stopped):
                small.session(tmp_path / name, "epochs=4", resume=True).train(*small.stop_after(3))
            assert names(tmp_path / name) == {"dvn.safetensors", "dvn.run.json", STATE}
        session = prepare(
            recipe, tmp_path / name, tmp_path / name / "dvn.safetensors", small.CPU, resume=True, note=noted.append
        )
        first = session.run.epochs_done
        session.train(small.nothing, small.nothing)
        session.finish([])
        assert first == (2 if name == "a" else 3)
        assert ("going on at its place in the schedule of 4 epochs" in noted[0]) == (name == "a")
    a, b = (tmp_path / name / "dvn.safetensors" for name in ("a", "b"))
    assert a.read_bytes() == b.read_bytes()
    assert read_header(a).metadata.training.restarts == (2,)
    record = json.loads((tmp_path / "a" / "dvn.run.json").read_text())
    assert record["restarts"] == [2]
    assert [entry["epoch"] for entry in record["epochs"]] == [1, 2, 3, 4]
    whole = small.trained(tmp_path, "epochs=4").run.history
    assert [entry["lr"] for entry in record["epochs"][2:]] == [entry["lr"] for entry in whole[2:]]
    assert record["epochs"][2]["loss"] != record["epochs"][0]["loss"]


def test_nothing_is_left_to_do(whole: tuple[Path, Session], tmp_path: Path) -> None:
    folder, first = whole
    output = folder / "dvn.safetensors"
    assert complete_run(first.recipe, output) is None, "it lacks the accuracies on test images"
    before = output.read_bytes()
    session = prepare(first.recipe, folder, output, small.CPU, resume=True)
    session.train(small.nothing, lambda *_: pytest.fail("trained"))
    assert output.read_bytes() == before
    session.finish([])
    done = complete_run(first.recipe, output)
    assert done is not None
    assert (done.epochs, done.results) == (2, [])
    record = json.loads((folder / "dvn.run.json").read_text())
    shutil.copy(output, tmp_path)
    (tmp_path / "dvn.run.json").write_text(json.dumps(record | {"recipe": record["recipe"] | {"epochs": 1}}))
    assert complete_run(first.recipe, tmp_path / "dvn.safetensors") is None, "its record is of another run"
    for words, told in ((["epochs=1"], "has been trained for 2 epochs"), (["seed=1"], "had seed=0, not 1")):
        recipe = recipes.parse(recipes.resolved(small.content(), words, "small.yaml"), "small.yaml")
        with pytest.raises(InputError, match=told):
            complete_run(recipe, output)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_record_that_is_a_pipe_is_not_waited_for(whole: tuple[Path, Session], tmp_path: Path) -> None:
    folder, first = whole
    shutil.copy(folder / "dvn.safetensors", tmp_path)
    os.mkfifo(tmp_path / "dvn.run.json")
    assert complete_run(first.recipe, tmp_path / "dvn.safetensors") is None


def test_stages_get_no_more_epochs(one_by_one: tuple[Path, Session]) -> None:
    words = [*SEQUENTIAL, "epochs=3"]
    with pytest.raises(InputError, match="one after the other get no more epochs afterwards"):
        small.session(one_by_one[0], *words, resume=True)


def test_resume_on_another_machine(tmp_path: Path) -> None:
    """Where images lie and how many threads there are does not count; what the images are does."""
    pictures(tmp_path / "here")
    data = {"source": "folder", "path": "here", "validation": 0}
    tasks = [{"name": "t", "data": data}]
    with pytest.raises(small.Stopped):
        small.session(tmp_path, tasks=tasks).train(*small.stop_after(1))
    (tmp_path / "here").rename(tmp_path / "there")
    moved = [{"name": "t", "data": {**data, "path": str(tmp_path / "there")}}]
    assert small.session(tmp_path, tasks=moved, threads=None, resume=True).run.epochs_done == 1
    with pytest.raises(InputError, match=r"tasks.0.data.validation=0.0, not 0.5"):
        small.session(tmp_path, tasks=[{"name": "t", "data": {**moved[0]["data"], "validation": 0.5}}], resume=True)
    pictures(tmp_path / "others", seed=1)
    moved[0]["data"]["path"] = "others"
    with pytest.raises(InputError, match="the images of task 't' are not those that the run was trained on so far"):
        small.session(tmp_path, tasks=moved, resume=True)


def pictures(folder: Path, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for split, name, number in itertools.product(("train", "test"), ("ant", "bee"), range(8)):
        (folder / split / name).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / split / name / f"{number}.png")


@pytest.mark.parametrize("full", ["dvn.safetensors", "dvn.run.json"])
def test_a_disk_that_is_full_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str) -> None:
    """Loses no epoch: what was trained is written by a resumed run that takes no step."""
    replace = os.replace

    def no_space(source: object, target: Path) -> None:
        if Path(target).name == full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_space)
        told = f"cannot write '.*{full}': No space left on device; '.*{STATE}' has all up to epoch 2: the same command"
        with pytest.raises(DvnError, match=told):
            small.trained(tmp_path)
    assert STATE in names(tmp_path)
    session = small.session(tmp_path, resume=True)
    session.train(small.nothing, lambda *_: pytest.fail("trained again"))
    assert names(tmp_path) == {"dvn.safetensors", "dvn.run.json"}
    assert len(json.loads((tmp_path / "dvn.run.json").read_text())["epochs"]) == 2


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("epochs=3", "the interrupted run had epochs=2, not 3: resume it as it was, or start again with --force"),
        ("optimizer.lr=0.1", "optimizer.lr=0.05, not 0.1"),
        ("tasks.1.data.train_images=50", "tasks.1.data.train_images=40, not 50"),
        ("tasks.0.name=x", 'tasks.0.name="low", not "x"'),
        ("levels=[2]", r"levels=null, not \[2\]"),
    ],
)
def test_resume_of_another_recipe(tmp_path: Path, override: str, told: str) -> None:
    interrupted(tmp_path)
    before = (tmp_path / STATE).read_bytes()
    with pytest.raises(InputError, match=told):
        small.session(tmp_path, override, resume=True)
    assert (tmp_path / STATE).read_bytes() == before


def test_nothing_to_resume(whole: tuple[Path, Session], tmp_path: Path) -> None:
    """Then it starts; a partition is nothing to resume either, and a slice is no run."""
    noted: list[str] = []
    recipe = whole[1].recipe
    session = prepare(recipe, tmp_path, tmp_path / "dvn.safetensors", small.CPU, resume=True, note=noted.append)
    assert session.run.epochs_done == 0
    assert noted == ["there is nothing to resume: the run starts from its beginning"]
    slice_file(read_header(whole[0] / "dvn.safetensors"), 1, 1, tmp_path / "dvn.safetensors")
    with pytest.raises(InputError, match="is a slice, which is no run to resume"):
        small.session(tmp_path, resume=True)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "checkpoint", "foreign", "lacking", "narrower"])
def test_damaged_state(whole: tuple[Path, Session], tmp_path: Path, damage: str) -> None:
    interrupted(tmp_path)
    path = tmp_path / STATE
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("hello")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "checkpoint":
        shutil.copy(whole[0] / "dvn.safetensors", path)
    elif damage == "foreign":
        save_file({"x": torch.zeros(3)}, path)
    else:
        header = state.read(path)
        tensors = state.tensors(header)
        name = "network/shared/layer1.0.conv1.weight"
        if damage == "lacking":
            del tensors[name]
        else:
            tensors[name] = tensors[name][:-1].clone()
        write(path, to_data(tensors), header.metadata)
    told = "does not fit the networks" if damage in ("lacking", "narrower") else "is damaged, or not the state of a run"
    with pytest.raises(InputError, match=f"{STATE}' {told}.*start again with --force"):
        small.session(tmp_path, resume=True)


def test_no_pickle(tmp_path: Path) -> None:
    """The state is what safetensors reads, and nothing else is left there."""
    interrupted(tmp_path)
    assert names(tmp_path) == {STATE}
    assert "random" in load_file(tmp_path / STATE)


def test_failed_run_leaves_the_old_files(whole: tuple[Path, Session], tmp_path: Path) -> None:
    for name in ("dvn.safetensors", "dvn.run.json"):
        shutil.copy(whole[0] / name, tmp_path)
    with pytest.raises(DvnError, match="is not a number"):
        small.trained(tmp_path, "optimizer.lr=1e30")
    for name in names(whole[0]):
        assert (tmp_path / name).read_bytes() == (whole[0] / name).read_bytes()


def test_out_of_memory(tmp_path: Path) -> None:
    session = small.session(tmp_path)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    with pytest.raises(DvnError, match="cpu has too little memory: give a smaller batch_size than 16"):
        session.train(small.nothing, full)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("[enforce fail] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    ],
)
def test_out_of_memory_on_the_cpu(tmp_path: Path, error: Exception) -> None:
    def full(*_: object) -> None:
        raise error

    session = small.session(tmp_path)
    with pytest.raises(DvnError, match="cpu has too little memory: give a smaller batch_size than 16"):
        session.train(small.nothing, full)


def test_another_error_is_not_taken_for_memory(tmp_path: Path) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        small.session(tmp_path).train(small.nothing, broken)


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    """Told before anything runs."""
    with pytest.raises(InputError, match="there is no folder"):
        small.session(tmp_path / "none")
    (tmp_path / STATE).mkdir()
    with pytest.raises(InputError, match=f"cannot write .*{STATE}': it is a folder"):
        small.session(tmp_path)
    assert names(tmp_path) == {STATE}


def test_a_partition_is_not_replaced_by_what_starts_from_it(tmp_path: Path) -> None:
    (tmp_path / "dvn.safetensors").write_bytes(b"a partition")
    with pytest.raises(InputError, match="is what the recipe starts from: give another output with -o"):
        small.session(tmp_path, backbone=None, units=None, partition="dvn.safetensors")
    assert (tmp_path / "dvn.safetensors").read_bytes() == b"a partition"


class BrokenCapture:
    """In place of `torch.cuda.graph`: what runs within fails and leaves another stream, losses and gradients."""

    def __init__(self, step: Step, streams: list[str]) -> None:
        self.step, self.streams = step, streams

    def run(self, *_: Any) -> None:
        self.step.totals += 1000
        for parameter in self.step.parameters:
            parameter.grad = torch.ones_like(parameter)
        raise RuntimeError("operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA")

    def __enter__(self) -> None:
        self.step._run = self.run  # type: ignore[method-assign]
        self.streams.append("the capture's")

    def __exit__(self, *_: Any) -> None:
        del self.step._run


def test_levels_are_launched_before_they_are_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each set of them, where steps draw some."""
    told: list[tuple[str, Any]] = []
    run = Step._run

    class Eager(Step):
        def __init__(self, *words: Any) -> None:
            super().__init__(*words)
            self._eager_left = 1  # as on CUDA

        def _capture(self, given: Any, networks: Any) -> None:
            told.append(("captured", networks))
            run(self, given, networks)

        def _run(self, given: Any, networks: Any) -> None:
            told.append(("launched", networks))
            run(self, given, networks)

    monkeypatch.setattr(loop, "Step", Eager)
    small.trained(tmp_path, "units=4", "levels_per_step=sandwich", "epochs=4")
    sets = {networks for _, networks in told}
    assert len(sets) == 2
    for each in sets:
        of_set = [what for what, networks in told if networks == each]
        assert of_set[0] == "launched"
        assert {*of_set[1:]} == {"captured"}


def test_a_failed_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said once, recorded, and changes nothing: stages included, of which each tries anew."""
    words = ("learning=sequential", "tasks.*.data.augment=none")
    expected = small.history(small.trained(tmp_path, *words).run)
    told: list[str] = []
    session = small.session(tmp_path, *words, force=True, note=told.append)
    streams = ["the first"]

    class Eager(Step):
        def __init__(self, *words: Any) -> None:
            super().__init__(*words)
            self._eager_left = 1  # as on CUDA

    monkeypatch.setattr(loop, "Step", Eager)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda _, **how: BrokenCapture(session.run.step, streams))
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    session.run._begin()
    told.clear()
    session.train(small.nothing, small.nothing)
    assert streams == ["the first", *(["the capture's", "the first"] * 2)]
    assert small.history(session.run) == expected
    assert len(told) == 1
    assert "cannot be captured as a CUDA graph" in told[0]
    assert told[0].endswith("operation not permitted when stream is capturing")
    record = json.loads(session.files.record.read_text())
    assert record["capture_error"] == "operation not permitted when stream is capturing"
