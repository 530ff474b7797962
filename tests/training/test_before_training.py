"""`dvn train --list`, `--show` and `--dry-run`: what there is to know before anything is trained."""

import json
from pathlib import Path

import pytest
import small
import yaml
from typer.testing import CliRunner

from dvn_cli import cli
from dvn_cli.training import recipes
from dvn_cli.training.experiment import dry_run
from dvn_cli.training.step import Step


def dvn(*words: str) -> str:
    done = CliRunner().invoke(cli.app, ["train", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_list() -> None:
    """Every recipe by its name, with its scales and what it is."""
    found = json.loads(dvn("--list", "--json"))["recipes"]
    assert {recipe["name"]: recipe["scales"] for recipe in found}.items() >= {
        "digits": ["full"],
        "j1": ["full", "small"],
    }.items()
    assert {recipe["name"] for recipe in found} == set(recipes.shipped())
    for recipe in found:
        assert recipe["meaning"][0].isupper()
        assert "#" not in recipe["meaning"]
    assert "Four tasks on the handwritten digits" in dvn("--list")


@pytest.mark.parametrize("words", [[], ["scale=small", "setting=modern", "inplace_distillation=false", "seed=3"]])
def test_show_is_a_recipe(tmp_path: Path, words: list[str]) -> None:
    """Which trains the same, with nothing to be overridden by a scale or setting; all defaults are spelt out."""
    text = dvn("--show", "j1", *words)
    assert text.splitlines()[0] == " ".join(["# dvn train j1", *words])
    (tmp_path / "shown.yaml").write_text(text)
    whole = recipes.read(recipes.find("j1"), words)
    assert recipes.read(tmp_path / "shown.yaml") == whole.model_copy(update={"scale": "full", "setting": "paper"})
    assert yaml.safe_load(text)["optimizer"]["momentum"] == 0.9
    assert json.loads(dvn("--show", "j1", *words, "--json")) == yaml.safe_load(text)


def test_a_dry_run_takes_steps_of_all_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the lower ones come later; of a task that has fewer images than a batch it counts these."""
    monkeypatch.chdir(tmp_path)
    steps: list[int] = []
    run = Step._run
    monkeypatch.setattr(Step, "_run", lambda self, given, these: (steps.append(len(these)), run(self, given, these))[1])
    told = dry_run(small.content(), overrides=["unlock=0.99", "batch_size=128"])
    assert steps == [4, 4]
    assert told.images_per_s * told.seconds_per_step == pytest.approx(32 + 32)


def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, of which the second says how long all stages take; no file is left or touched."""
    monkeypatch.chdir(tmp_path)
    small.trained(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    told = dry_run(small.content(), overrides=["learning=sequential", "epochs=3", "batch_size=8"])
    assert told.steps == 3 * 4 + 3 * 4
    assert told.images_per_s * told.seconds_per_step == pytest.approx(8)
    assert told.seconds == pytest.approx(24 * told.seconds_per_step)
    assert told.peak_memory_bytes is None or told.peak_memory_bytes > 10**7
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
