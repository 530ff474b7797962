"""On a GPU: a step that is replayed is the step that is launched."""

from pathlib import Path

import pytest
import small
import torch

from dvn_cli.training import step
from dvn_cli.training.loop import Run, numbers
from dvn_cli.training.recipe import parse, resolved
from dvn_cli.training.session import Session

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

SEQUENTIAL = ("learning=sequential", "sequential.grow=true", "sequential.warmup_epochs=1", "inplace_distillation=true")


def trained(folder: Path, *overrides: str) -> Run:
    recipe = parse(resolved(small.content(), ("epochs=4", *overrides), "small.yaml"), "small.yaml")
    session = Session(recipe, folder, folder / "dvn.safetensors", torch.device("cuda"))
    session.train(small.nothing, small.nothing)
    return session.run


@pytest.mark.parametrize("overrides", [(), SEQUENTIAL], ids=["joint", "sequential"])
def test_replayed_is_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]) -> None:
    replayed = trained(tmp_path, *overrides)
    assert replayed.step._graph is not None
    monkeypatch.setattr(step, "WARM", 10**6)
    launched = trained(tmp_path, *overrides)
    assert launched.step._graph is None
    for ours, theirs in zip(replayed.history, launched.history, strict=True):
        assert numbers(ours["loss"]) == pytest.approx(numbers(theirs["loss"]), rel=1e-2)
    for name, tensor in replayed.network.file_tensors().items():
        torch.testing.assert_close(tensor, launched.network.file_tensors()[name], rtol=0.05, atol=0.05, msg=name)
