"""What users build on: flags, JSON keys, exit codes and public names are those of `surface.yaml`.

A change here is a change for users: edit that file deliberately, and say so in the changelog.
"""

import functools
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pinned
import pytest
import typer.main
import yaml
from safetensors import safe_open
from typer.testing import CliRunner

import dvn_cli
from dvn_cli import cli
from dvn_cli.training.recipe import Recipe

SURFACE = yaml.safe_load((pinned.HERE / "surface.yaml").read_text())
GROUP = typer.main.get_command(cli.app)
RECIPE = {
    "scenario": "s1",
    "backbone": {"name": "wrn_10_1", "in_chans": 1},
    "units": 2,
    "tasks": [
        {"name": "first", "data": {"source": "digits", "classes": "0-4", "train_images": 20, "test_images": 10}},
        {"name": "last", "data": {"source": "digits", "classes": "5-9", "train_images": 20, "test_images": 10}},
    ],
    "epochs": 1,
    "threads": 1,
}


def usage(command: Any) -> list[str]:
    """Each parameter's names, whether it takes a value, and its default."""
    lines = []
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            lines.append(f"{parameter.name}{'' if parameter.required else ' (optional)'}")
        else:
            default = "" if parameter.is_flag or parameter.default is None else f" = {parameter.default}"
            lines.append(", ".join(parameter.opts) + ("" if parameter.is_flag else " VALUE") + default)
    return lines


def test_commands() -> None:
    assert list(GROUP.commands) == list(SURFACE["commands"])  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", SURFACE["commands"])
def test_flags(name: str) -> None:
    assert usage(GROUP.commands[name]) == SURFACE["commands"][name]  # type: ignore[attr-defined]


def test_public_names() -> None:
    assert sorted(dvn_cli.__all__) == SURFACE["public names"]
    assert all(hasattr(dvn_cli, name) for name in SURFACE["public names"])


def test_recipe_keys() -> None:
    assert keys(Recipe.model_json_schema()) == SURFACE["recipe keys"]


def keys(schema: dict[str, Any]) -> dict[str, str]:
    """The names of all keys of a recipe, by the part that they are in."""
    parts = {"Recipe": schema, **schema["$defs"]}
    return {name: " ".join(part["properties"]) for name, part in parts.items() if "properties" in part}


def shape(value: Any) -> Any:
    """The keys of a JSON document, nested; of a list those of its first item, and so of what is keyed by tensors."""
    if isinstance(value, dict) and any("." in key for key in value):
        return {"*": shape(value[min(value)])}
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in sorted(value.items())}
    return [shape(value[0])] if isinstance(value, list) and value and isinstance(value[0], dict | list) else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("surface")
    for path in (pinned.FILES / "0.1.0").glob("*.gz"):
        (made / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    (made / "small.yaml").write_text(yaml.safe_dump(RECIPE))
    return made


@pytest.fixture(scope="module")
def documents(folder: Path) -> Callable[[str], Any]:
    """Returns what a command prints as JSON, or what a file that it leaves says."""

    @functools.cache
    def document(name: str) -> Any:
        if name in ("record", "checkpoint", "bench --scenario"):
            document("train")
        if name == "slice file":
            document("slice")
        if name == "record":
            return json.loads((folder / "run.run.json").read_text())
        if name in ("checkpoint", "slice file"):
            path = folder / ("run.safetensors" if name == "checkpoint" else "slices/trained-task1-level1.safetensors")
            with safe_open(path, "np") as file:
                return json.loads(file.metadata()["dvn"])
        done = CliRunner().invoke(cli.app, [*words[name], "--json"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    cut, run = str(folder / "slice.safetensors"), str(folder / "run.safetensors")
    digits = ["wrn_10_1", "--units", "2", "--in-chans", "1", "--input-size", "8"]
    words = {
        "partition": ["partition", *digits, "-o", str(folder / "new.safetensors")],
        "train": ["train", str(folder / "small.yaml"), "-o", run],
        "train --keys": ["train", "--keys"],
        "train --list": ["train", "--list"],
        "train --dry-run": ["train", str(folder / "small.yaml"), "--dry-run"],
        "slice": ["slice", str(folder / "trained.safetensors"), "--all", "-o", str(folder / "slices")],
        "eval": ["eval", cut, "--data", "source=digits"],
        "bench": ["bench", cut, "--num-bench-iter", "1", "--num-warm-iter", "0"],
        "bench --training": ["bench", "--training", str(folder / "small.yaml"), "--num-warm-iter", "0"],
        "bench --scenario": ["bench", "--scenario", "s1", str(folder / "run.run.json")],
    }
    return document


SLOW = {"bench": pytest.mark.slow}  # it starts a process of its own


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in SURFACE["json"]])
def test_json_keys(name: str, documents: Callable[[str], Any]) -> None:
    assert shape(documents(name)) == SURFACE["json"][name]


@pytest.mark.parametrize(("words", "code"), SURFACE["exit codes"].items())
def test_exit_codes(words: str, code: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", words.split())
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code or 0) == code
