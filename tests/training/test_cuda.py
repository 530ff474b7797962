"""On a GPU: a step that is replayed is the step that is launched."""

from pathlib import Path

import pytest
import small
import torch

from dvn_cli.training import step
from dvn_cli.training.experiment import prepare
from dvn_cli.training.loop import Run, numbers
from dvn_cli.training.recipes import parse, resolved
from dvn_cli.training.session import Session

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

SEQUENTIAL = (
    "learning=sequential",
    "sequential={old: distilled, grow: true, warmup_epochs: 1}",
    "inplace_distillation=true",
)


def session(folder: Path, *overrides: str) -> Session:
    folder.mkdir(exist_ok=True)
    recipe = parse(resolved(small.content(), ("epochs=4", *overrides), "small.yaml"), "small.yaml")
    return prepare(recipe, folder, folder / "dvn.safetensors", torch.device("cuda"))


def trained(folder: Path, *overrides: str) -> Run:
    made = session(folder, *overrides)
    made.train(small.nothing, small.nothing)
    return made.run


SANDWICH = ("units=4", "levels_per_step=sandwich", "unlock=0.5")


@pytest.mark.parametrize("overrides", [(), SEQUENTIAL, SANDWICH], ids=["joint", "sequential", "sandwich"])
def test_replayed_is_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]) -> None:
    replayed = trained(tmp_path / "replayed", *overrides)
    assert replayed.step._captured
    monkeypatch.setattr(step, "WARM", 10**6)
    launched = trained(tmp_path / "launched", *overrides)
    assert not launched.step._captured
    for ours, theirs in zip(replayed.history, launched.history, strict=True):
        assert numbers(ours["loss"]) == pytest.approx(numbers(theirs["loss"]), rel=1e-2)


@pytest.mark.parametrize("overrides", [(), SEQUENTIAL], ids=["joint", "sequential"])
def test_gradients_of_a_replayed_step(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """One step on the same weights and images, launched and replayed: rounding alone may differ."""
    run = session(tmp_path, *overrides).run
    run.epochs_done = run.total_epochs - run.stage.epochs  # the last stage, in which old tasks are distilled
    run._begin()
    run.network.train()
    with torch.no_grad():
        for parameter in run.step.parameters:  # otherwise old tasks' networks are what they are distilled from
            parameter.mul_(1.05)
    batches = {task: next(run.endless(task, split)) for task, split in run._splits().items()}
    gradients: list[dict[str, torch.Tensor]] = []
    for _ in range(step.WARM + 2):  # launched WARM times, then captured and replayed, then replayed
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            run.step(batches)
        gradients.append({n: t.grad.clone() for n, t in run.network.file_tensors().items() if t.grad is not None})
        run.step.clear()
    assert run.step._captured
    for replayed in gradients[step.WARM :]:
        assert set(replayed) == set(gradients[0])
        for name, gradient in replayed.items():
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(gradient, gradients[0][name], rtol=1e-4, atol=1e-5, msg=name)
