"""Who teaches, and which levels a step trains."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch.nn.functional as F

import dvn_cli
from dvn_cli.errors import InputError
from dvn_cli.export import Form
from dvn_cli.store.metadata import TaskLevel
from dvn_cli.training.levels import networks_of_step
from dvn_cli.training.losses import as_seen_by, distillation


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained checkpoint, and level 1 of its task that has all digits."""
    folder = tmp_path_factory.mktemp("taught")
    small.trained(folder, "seed=3", "epochs=1", "tasks.0.data.size=16")
    (folder / "dvn.safetensors").rename(folder / "both.safetensors")
    dvn_cli.slice(folder / "both.safetensors", task="all", level=1, output=folder / "all.safetensors")
    return folder


@pytest.mark.parametrize(("file", "of_low"), [("both.safetensors", (1, 2)), ("all.safetensors", (2, 1))])
def test_a_network_of_a_file_teaches(
    taught: Path, monkeypatch: pytest.MonkeyPatch, file: str, of_low: tuple[int, int]
) -> None:
    """All levels: the largest network that has the task's classes, on images as that wants them."""
    run = small.session(taught, f"teacher={file}", force=True).run
    images: dict[Any, torch.Tensor] = {}
    totals: list[float] = []
    students = {network: run.network.virtual_network(*network).train() for network in run.network}
    run.network.register_forward_pre_hook(lambda _, given: images.update({given[1:3]: given[0]}))
    monkeypatch.setattr(run.optimizer, "step", lambda: totals.extend(run.step.totals.tolist()))
    with pytest.raises(small.Stopped):
        run.run(*small.stop_after(0, 1))
    both = dvn_cli.load(taught / "both.safetensors")
    assert isinstance(both, dvn_cli.DeepVirtualNetwork)
    for total, (network, student) in zip(totals, students.items(), strict=True):
        own, place = run.network.tasks[network.task - 1], of_low if network.task == 1 else (2, 2)
        place = (2, 1) if file == "all.safetensors" else place
        theirs, given = both.tasks[place[0] - 1], images[network]
        pixels = given * torch.tensor(own.std).view(-1, 1, 1) + torch.tensor(own.mean).view(-1, 1, 1)
        if theirs.input_size != own.input_size:
            pixels = F.interpolate(pixels, theirs.input_size, mode="bilinear", antialias=True)
        pixels = (pixels - torch.tensor(theirs.mean).view(-1, 1, 1)) / torch.tensor(theirs.std).view(-1, 1, 1)
        with torch.no_grad():
            soft = both(pixels, *place)[:, : len(own.classes)]  # 0 to 4 are the first of all
            assert total == pytest.approx(distillation(student(given), soft, 1.0).item(), rel=1e-3, abs=1e-5)
    run.run(small.nothing, small.nothing)
    for name, tensor in both.file_tensors().items():
        assert torch.equal(tensor, dvn_cli.load(taught / "both.safetensors").file_tensors()[name])


def test_a_slice_in_half_precision_teaches(taught: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.safetensors"
    dvn_cli.slice(taught / "both.safetensors", task="all", level=2, output=half, form=Form(dtype="bf16"))
    session = small.trained(tmp_path, f"teacher={half}", "epochs=1")
    assert all(math.isfinite(loss) for losses in session.run.history[0]["loss"] for loss in losses)


def test_classes_are_found_by_their_names(taught: Path) -> None:
    run = small.session(taught, "teacher=all.safetensors", "tasks.0.data.classes=5-9", force=True).run
    teacher, images = run.teachers[1], torch.rand(2, 1, 8, 8)
    assert run.network.tasks[0].classes == teacher.network.task.classes[5:]
    seen = as_seen_by(images, run.network.tasks[0], teacher.network.task)
    assert torch.equal(teacher(images), teacher.network(seen)[:, 5:])


def test_the_largest_network_teaches(tmp_path: Path) -> None:
    small.trained(tmp_path, "epochs=1", "tasks.0.levels=[1]")
    (tmp_path / "dvn.safetensors").rename(tmp_path / "uneven.safetensors")
    run = small.session(tmp_path, "teacher=uneven.safetensors", force=True).run
    assert [run.teachers[number].network.task.name for number in (1, 2)] == ["all", "all"]


def test_no_teacher(taught: Path) -> None:
    groups = "tasks.1.data.groups={a: [1], b: [2]}"
    with pytest.raises(InputError, match=r"teacher 'all.safetensors' has no task with the classes of 'new'"):
        small.session(taught, "teacher=all.safetensors", "tasks.1.name=new", groups, force=True)
    with pytest.raises(InputError, match=r"no checkpoint 'topp'"):
        small.session(taught, "teacher=topp", force=True)


def test_another_teacher_is_told_from_the_one_before(taught: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher.safetensors"

    def put(level: int) -> None:
        teacher.unlink(missing_ok=True)
        dvn_cli.slice(taught / "both.safetensors", task="all", level=level, output=teacher)

    put(2)
    with pytest.raises(small.Stopped):
        small.session(tmp_path, f"teacher={teacher}").train(*small.stop_after(1))
    put(1)
    with pytest.raises(InputError, match=r"'.*teacher.safetensors' is not the teacher that the run had so far"):
        small.session(tmp_path, f"teacher={teacher}", resume=True)
    put(2)
    assert small.session(tmp_path, f"teacher={teacher}", resume=True).run.epochs_done == 1


def drawn(folder: Path, *words: str, units: int = 4, steps: int = 400) -> list[tuple[TaskLevel, ...]]:
    run = small.session(folder, *words, f"units={units}", "tasks.1.levels=[1, 2]", force=True).run
    return [networks_of_step(run.stage, run.recipe, step / steps, step) for step in range(steps)]


def test_a_sandwich(tmp_path: Path) -> None:
    """Top, lowest and one between, each as often; a task of two levels has both; the seed says which."""
    found = drawn(tmp_path, "levels_per_step=sandwich")
    counts = Counter(found)
    assert set(counts) == {tuple(TaskLevel(*at) for at in ((1, 1), (1, m), (1, 4), (2, 1), (2, 2))) for m in (2, 3)}
    assert min(counts.values()) > 150
    assert found == drawn(tmp_path, "levels_per_step=sandwich")
    assert found != drawn(tmp_path, "levels_per_step=sandwich", "seed=1")


def test_levels_are_unlocked_from_the_top(tmp_path: Path) -> None:
    found = drawn(tmp_path, "unlock=0.6", steps=10)
    of_first = [sorted(network.level for network in networks if network.task == 1) for networks in found]
    assert of_first == [[4]] * 2 + [[3, 4]] * 2 + [[2, 3, 4]] * 2 + [[1, 2, 3, 4]] * 4
    of_second = [sorted(network.level for network in networks if network.task == 2) for networks in found]
    assert of_second == [[2]] * 6 + [[1, 2]] * 4


def test_what_is_not_trained_stays(tmp_path: Path) -> None:
    """Levels that are not unlocked have no loss, and what is their own is what it was."""
    run = small.session(tmp_path, "unlock=0.99", "epochs=1", "units=2").run
    before = small.copied(run.network)
    run.run(small.nothing, small.nothing)
    assert [[loss is None for loss in losses] for losses in run.history[0]["loss"]] == [[True, False]] * 2
    after = run.network.file_tensors()
    assert {name for name in after if "/level/1/" in name and not torch.equal(before[name], after[name])} == set()


def test_the_average(tmp_path: Path) -> None:
    """Of all tensors but counters, by the formula; it is what is validated and kept."""
    session = small.session(tmp_path, "ema=0.6", "schedule.name=constant")
    average = small.copied(session.run.network)
    steps = iter(range(100))

    def follow(run: Any, _: int) -> None:
        decay = min(0.6, 1 - (1 + next(steps)) ** (-2 / 3))
        for name, tensor in run.network.file_tensors().items():
            average[name] = (
                average[name] * decay + tensor.detach() * (1 - decay) if tensor.is_floating_point() else tensor
            )

    session.train(small.nothing, follow)
    kept = dvn_cli.load(tmp_path / "dvn.safetensors").file_tensors()
    for name, tensor in kept.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, average[name], rtol=1e-4, atol=1e-6)
