"""A run from its recipe to its files: the same again, and the same after it was interrupted."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import small
import torch
from safetensors.torch import load_file, save_file

from dvn_cli.checkpoint import read_header
from dvn_cli.device import title
from dvn_cli.errors import DvnError, InputError
from dvn_cli.network import DeepVirtualNetwork, load
from dvn_cli.training import state
from dvn_cli.training.session import Session

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
    assert [entry["epoch"] for entry in record["epochs"]] == [1, 2]
    for entry in record["epochs"]:
        assert [len(levels) for levels in entry["loss"]] == [2, 2]
        assert all(0 <= value <= 100 for levels in entry["validation"] for value in levels)
        assert entry["seconds"] > 0
    header = read_header(folder / "dvn.safetensors")
    assert header.metadata["training"]["recipe"] == record["recipe"]
    assert header.metadata["training"]["epochs"] == 2
    loaded = load(folder / "dvn.safetensors")
    assert isinstance(loaded, DeepVirtualNetwork)
    own = session.run.network.file_tensors()
    assert all(torch.equal(tensor, own[name]) for name, tensor in loaded.file_tensors().items())


def test_the_same_again(whole: tuple[Path, Session], tmp_path: Path) -> None:
    """To the bit, whatever happened in the process before. The checkpoint names the folder that paths start from."""
    folder, first = whole
    torch.manual_seed(99)
    again = Session(first.recipe, folder, tmp_path / "dvn.safetensors", small.CPU)
    torch.rand(3)
    again.train(small.nothing, small.nothing)
    assert small.history(again.run) == small.history(first.run)
    assert (tmp_path / "dvn.safetensors").read_bytes() == (folder / "dvn.safetensors").read_bytes()
    other = small.trained(tmp_path, "seed=1")
    assert small.history(other.run) != small.history(first.run)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("words", [[], ["optimizer.name=adamw", "optimizer.lr=0.01", "select=best", "epochs=3"]])
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
    assert not session.left_over
    session.train(small.nothing, small.nothing)
    assert small.history(session.run) == small.history(uninterrupted.run)
    assert (tmp_path / "dvn.safetensors").read_bytes() == expected
    assert names(tmp_path) == {"dvn.safetensors", "dvn.run.json"}


def test_resume_before_the_checkpoint_is_written(whole: tuple[Path, Session], tmp_path: Path) -> None:
    """All epochs done, but not the last file."""
    folder, first = whole
    interrupted(tmp_path, epoch=2)
    session = Session(first.recipe, folder, tmp_path / "dvn.safetensors", small.CPU, resume=True)
    session.train(small.nothing, small.nothing)
    assert (tmp_path / "dvn.safetensors").read_bytes() == (folder / "dvn.safetensors").read_bytes()


SEQUENTIAL = ["learning=sequential", "sequential={grow: true, warmup_epochs: 2}", "select=best"]
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
    session = Session(first.recipe, folder, tmp_path / "dvn.safetensors", small.CPU, resume=True)
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
    tensors, metadata = session.run.state()
    parts = {name.split("/")[0] for name in tensors}
    assert parts == {"network", "best", "optimizer", "generator", "random"} | ({"teacher"} if epoch > 1 else set())
    again, metadata_again = small.session(tmp_path, *words, resume=True).run.state()
    assert metadata_again == metadata
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == again[name].dtype
        assert torch.equal(tensor, again[name]), name


def test_an_interrupted_run_is_noticed(tmp_path: Path) -> None:
    interrupted(tmp_path)
    assert small.session(tmp_path).left_over
    assert names(tmp_path) == {STATE}


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("epochs=3", "the interrupted run had epochs=2, not 3: resume it as it was, or start again"),
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
    with pytest.raises(InputError, match=r"there is nothing to resume: no file '.*dvn.state.safetensors'"):
        small.session(tmp_path, resume=True)
    with pytest.raises(InputError, match="there is nothing to resume"):
        small.session(whole[0], resume=True)


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
        tensors, metadata = state.load(path)
        name = "network/shared/layer1.0.conv1.weight"
        if damage == "lacking":
            del tensors[name]
        else:
            tensors[name] = tensors[name][:-1].clone()
        state.save(path, tensors, metadata)
    told = "does not fit the networks" if damage in ("lacking", "narrower") else "is damaged, or not the state of a run"
    with pytest.raises(InputError, match=f"{STATE}' {told}.*start again without --resume"):
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
