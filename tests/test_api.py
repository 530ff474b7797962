"""dvn from Python: what README shows runs, and the functions do all that the commands do."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training import small

import dvn_cli
from dvn_cli import cli

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For which modes (train or not) a backbone is traced."""
    modes: list[bool] = []

    def trace(module: Any, shape: Any, train: bool) -> Any:
        modes.append(train)
        return real(module, shape, train)

    real = dvn_cli.partition.trace
    monkeypatch.setattr("dvn_cli.partition.trace", trace)
    dvn_cli.partition._restored.cache_clear()
    dvn_cli.partition._ALIVE.clear()
    return modes


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run from Python, of a recipe that is a mapping."""
    folder = tmp_path_factory.mktemp("trained")
    dvn_cli.train(small.content(), folder / "dvn.safetensors", overrides=["epochs=1"], device="cpu")
    return folder


def test_readme(tmp_path: Path) -> None:
    """Its example runs as it stands there, as a script without a guard of its main module."""
    section = README.read_text(encoding="utf-8").partition("### From Python\n")[2].partition("\n### ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert all(
        f"dvn_cli.{name}(" in example for name in ("divide", "train", "slice", "evaluate", "bench", "load", "Runtime")
    )
    (tmp_path / "example.py").write_text(example, encoding="utf-8")
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {
        "example.py", "fresh.safetensors", "trained.safetensors", "trained.run.json", "trained-task2-level1.safetensors"
    }  # fmt: skip
    assert len(done.stdout.splitlines()) == 9


def test_importing_takes_no_torch() -> None:
    code = "import dvn_cli, sys; dvn_cli.slice; dvn_cli.InputError; print('torch' in sys.modules, *dir(dvn_cli))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, *names = done.stdout.split()
    assert loaded == "False"
    assert set(dvn_cli.__all__) - {"__version__"} <= set(names)


def test_dividing_is_what_the_command_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte, random weights included; and no network is left that cannot be made."""
    monkeypatch.chdir(tmp_path)
    network = dvn_cli.divide("wrn_10_1", 2, num_classes=4, in_chans=1, input_size=(8, 8), round_to=8, seed=3)
    network.save("api.safetensors")
    words = ["--units", "2", "--num-classes", "4", "--in-chans", "1", "--input-size", "8", "--round-to", "8"]
    cli.app(["partition", "wrn_10_1", *words, "--seed", "3"], standalone_mode=False)
    assert Path("api.safetensors").read_bytes() == Path("dvn.safetensors").read_bytes()
    with pytest.raises(dvn_cli.InputError, match="pretrained or weights, not both"):
        dvn_cli.divide("wrn_10_1", 2, pretrained=True, weights="x.pth")


def test_a_run_is_finished(trained: Path) -> None:
    """Checkpoint and record are there, the record with the results, and no state is left."""
    assert {path.name for path in trained.iterdir()} == {"dvn.safetensors", "dvn.run.json"}
    record = json.loads((trained / "dvn.run.json").read_text())
    assert [(row["task"], row["level"]) for row in record["test"]] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    again = dvn_cli.train(small.content(epochs=1), trained / "dvn.safetensors", resume=True)
    assert [result.to_dict() for result in again.results] == record["test"], "nothing was left to do"
    assert again.history == record["epochs"]
    with pytest.raises(dvn_cli.InputError, match="is a trained checkpoint"):
        dvn_cli.train(small.content(epochs=1), trained / "dvn.safetensors")


def test_networks_in_memory_are_evaluated_as_their_files(trained: Path) -> None:
    path = trained / "dvn.safetensors"
    of_file = dvn_cli.evaluate(path, task="all", level=2)
    in_memory = dvn_cli.evaluate(dvn_cli.load(path), task="all", level=2, device="cpu")
    record = json.loads((trained / "dvn.run.json").read_text())["test"]
    assert [result.to_dict() for result in in_memory] == record[-1:]
    assert [{**result.to_dict(), "file": None} for result in of_file] == record[-1:]
    cut = dvn_cli.load(path).virtual_network("all", 2)
    assert [result.to_dict() for result in dvn_cli.evaluate(cut.train(), device="cpu")] == record[-1:]
    assert cut.training
    done = []
    given = dvn_cli.evaluate(
        path, data=[{"source": "digits"}, "test_images=30"], task=2, progress=lambda *now: done.append(now)
    )
    assert [result.images for result in given] == [30, 30]
    assert done[-1] == (60, 60)


def test_only_training_traces_the_backbone(trained: Path, tmp_path: Path, traced: list[bool]) -> None:
    cut = dvn_cli.slice(trained / "dvn.safetensors", "all", 1, tmp_path)
    assert cut.file == tmp_path / "dvn-task2-level1.safetensors"
    network, images = dvn_cli.load(cut.file), torch.randn(2, 1, 8, 8)
    network(images)
    dvn_cli.evaluate([cut.file, cut.file], data={"source": "digits", "test_images": 5})
    dvn_cli.evaluate(trained / "dvn.safetensors")
    assert traced == [], "files keep the graph that they need"
    network.train()(images).sum().backward()
    assert traced == [False, True], "in eval mode, to compare it with the one that the file keeps"
    assert all(parameter.grad is not None for parameter in network.parameters())
    network.half().eval().train()
    assert traced == [False, True]
