"""How much counts what in a step: batches, tasks, classes; and how long a run goes on."""

from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dvn_cli.errors import InputError
from dvn_cli.training.loop import Run, numbers
from dvn_cli.training.losses import balancing

PLAIN = ("tasks.0.data.augment=none",)


def first_gradients(run: Run, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """The gradients of the first step, and task, level and images of every network in its turn."""
    gradients, batches = {}, []

    def instead_of_a_step() -> None:
        gradients.update({n: t.grad.clone() for n, t in run.network.file_tensors().items() if t.grad is not None})
        raise small.Stopped

    run.network.register_forward_pre_hook(lambda _, given: batches.append((given[1], given[2], given[0])))
    monkeypatch.setattr(run.optimizer, "step", instead_of_a_step)
    with pytest.raises(small.Stopped):
        run.run(small.nothing, small.nothing)
    return gradients, batches


def test_gradients_are_accumulated_and_weighted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over batches, each task's of its own size, times the task's weight; classes by how rare they are."""
    words = ("accumulate=2", "tasks.1.weight=3", "tasks.1.batch_size=6", "tasks.1.class_weights=balanced")
    run = small.session(tmp_path, *PLAIN, *words).run
    assert run.steps == -(-max(-(-32 // 6), 32 // 16) // 2)
    students = {network: run.network.virtual_network(*network).train() for network in run.network}
    gradients, batches = first_gradients(run, monkeypatch)
    assert [(task, level, len(images)) for task, level, images in batches] == [
        (1, 1, 16),
        (1, 2, 16),
        (2, 1, 6),
        (2, 2, 6),
    ] * 2
    labels = run.data[2].train.labels
    rare = torch.tensor([len(labels) / 10 / max(1, int((labels == label).sum())) for label in range(10)])
    for task, level, images in batches:
        loss = F.cross_entropy(
            students[task, level](images), small.labels_of(images, run.data[task]), rare if task == 2 else None
        )
        ((3 if task == 2 else 1) * loss / 2).backward()
    expected = small.gathered(run.network, students)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_what_is_frozen_is_not_clipped_with(tmp_path: Path) -> None:
    """A step of SGD at a rate of 1, clipped, moves what it trains by the largest norm of gradients, all together."""
    words = ("optimizer={lr: 1, momentum: 0, weight_decay: 0, clip_grad: 0.01}", "schedule.name=constant")
    run = small.session(tmp_path, "learning=sequential", "sequential.grow=true", "epochs=1", *words).run
    seen: list[dict[str, torch.Tensor]] = []
    run.run(small.nothing, lambda run, _: seen.append(small.copied(run.network)) if run.stage.before else None)
    first, second = seen[:2]
    parameters = [name for name in first if name.rpartition("/")[2] in run.network.partition.parameters]
    moved = torch.stack([(second[name] - first[name]).norm() for name in parameters]).norm()
    assert float(moved) == pytest.approx(0.01, rel=1e-3)


def test_what_the_backbones_code_freezes_is_not_trained(tmp_path: Path) -> None:
    told: list[str] = []
    session = small.session(tmp_path, "backbone.name=small:Frozen", note=told.append)
    before = small.copied(session.run.network)
    session.train(small.nothing, small.nothing)
    parameters = session.run.network.partition.parameters
    moved = {
        name.rpartition("/")[2]
        for name, tensor in session.run.network.file_tensors().items()
        if not torch.equal(tensor, before[name])
    }
    assert parameters - moved == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert (
        "not trained, since the backbone's code has requires_grad=False on them: '0.bias', '0.weight', '1.bias' and 1 "
        "more"
    ) in told
    with pytest.raises(InputError, match=r"small:all_frozen has requires_grad=False on all that is to be trained"):
        small.session(tmp_path, "backbone.name=small:all_frozen", force=True)


def test_balancing() -> None:
    torch.testing.assert_close(balancing(torch.tensor([0, 0, 0, 1]), 3), torch.tensor([4 / 9, 4 / 3, 4 / 3]))


def test_the_recorded_rate_is_the_recipes(tmp_path: Path) -> None:
    """Whatever factors on it norms and layers have."""
    plain, scaled = (
        small.trained(tmp_path, *words).run
        for words in ((), ("optimizer.norm_lr_factor=10", "optimizer.layer_decay=0.5"))
    )
    assert scaled.optimizer.param_groups[0]["lr"] != plain.optimizer.param_groups[0]["lr"]
    rates = [entry["lr"] for entry in scaled.history]
    assert rates == [entry["lr"] for entry in plain.history] == pytest.approx([0.05, 0.01])


def test_patience(tmp_path: Path) -> None:
    """It stops where validation has not been better for so long, keeps the best, and has nothing left to do."""
    told: list[str] = []
    session = small.session(tmp_path, "patience=2", "epochs=30", "optimizer.lr=0.000001", note=told.append)
    kept: list[dict[str, torch.Tensor]] = []
    session.train(lambda run: kept.append(small.copied(run.network)), small.nothing)
    run = session.run
    scores = [sum(numbers(entry["validation"])) for entry in run.history]
    best = scores.index(max(scores))
    assert run.epochs_done == len(scores) == best + 3 < 30
    assert told[-1] == f"stopped after epoch {best + 3}: none of the last 2 was better"
    for name, tensor in run.network.file_tensors().items():
        assert torch.equal(tensor, kept[best][name]), name
    more = small.trained(tmp_path, "patience=4", "epochs=30", "optimizer.lr=0.000001", resume=True).run
    assert run.epochs_done < more.epochs_done <= 30, "more patience trains it on"


@pytest.mark.parametrize("key", ["patience=1", "select=best"])
def test_epochs_before_all_levels_are_trained_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """They neither use up patience nor are kept as the best."""
    validation = iter((5.0, 4.0, 3.0, 2.0, 1.0, 1.0))
    monkeypatch.setattr(Run, "_validate", lambda run: run._by_level(dict.fromkeys(run.stage.learn, next(validation))))
    session = small.session(tmp_path, key, "unlock=0.5", "epochs=6")
    kept: list[dict[str, torch.Tensor]] = []
    session.train(lambda run: kept.append(small.copied(run.network)), small.nothing)
    run = session.run
    assert [None in [*entry["loss"][0], *entry["loss"][1]] for entry in run.history[:4]] == [True, True, True, False]
    assert run.epochs_done == (5 if key == "patience=1" else 6)
    for name, tensor in run.network.file_tensors().items():
        assert torch.equal(tensor, kept[3][name]), name


def test_patience_for_a_run_that_kept_its_last_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best epoch of before is gone: what is better than the last one is kept, interrupted or trained on again."""
    accuracies = [9.0, 3.0, 4.0, 6.0, 5.0, 7.0, 2.0]

    def validate(run: Run) -> list[list[float | None]]:
        return run._by_level(dict.fromkeys(run.stage.learn, accuracies[run.epochs_done - 1]))

    monkeypatch.setattr(Run, "_validate", validate)
    kept: dict[int, dict[str, torch.Tensor]] = {}

    def keep(run: Run) -> None:
        kept[run.epochs_done] = small.copied(run.network)

    def has_kept(epoch: int) -> bool:
        tensors = load_file(tmp_path / "dvn.safetensors")
        return all(torch.equal(tensor, tensors[name]) for name, tensor in kept[epoch].items())

    small.trained(tmp_path)
    with pytest.raises(small.Stopped):
        small.session(tmp_path, "patience=1", "epochs=5", resume=True).train(*small.stop_after(2, 1))
    resumed = small.session(tmp_path, "patience=1", "epochs=5", resume=True)
    resumed.train(keep, small.nothing)
    resumed.finish([])
    assert sorted(kept) == [3, 4, 5]
    assert has_kept(4)
    more = small.session(tmp_path, "patience=2", "epochs=7", resume=True)
    more.train(keep, small.nothing)
    assert sorted(kept) == [3, 4, 5, 6, 7]
    assert has_kept(6)
