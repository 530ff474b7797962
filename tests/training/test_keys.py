"""`dvn train --keys`: every key of a recipe, as a person looks it up."""

import json
from typing import Any

import pytest
import small
from typer.testing import CliRunner, Result

from dvn_cli import cli
from dvn_cli.errors import InputError
from dvn_cli.training import recipes
from dvn_cli.training.keys import recipe_keys


def run(*words: str, columns: int = 80) -> Result:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(cli.app, ["train", *words])


@pytest.fixture(scope="module")
def keys() -> dict[str, dict[str, Any]]:
    return {entry["key"]: entry for entry in json.loads(run("--keys", "--json").stdout)["keys"]}


@pytest.mark.parametrize(
    ("key", "type_", "required", "default"),
    [
        ("method", "str", False, "dvn"),
        ("seed", "int >= 0, < 4294967296", False, 0),
        ("tasks", "list of keys", True, None),
        ("tasks.*.name", "str", True, None),
        ("tasks.*.order", "list of int > 0", False, None),
        ("tasks.*.data", "keys", True, None),
        ("tasks.*.data.source", "digits | torchvision | folder | hf | webdataset", True, None),
        ("tasks.*.data.classes", "int or str or list of int or str", False, None),
        ("tasks.*.data.size", "int > 0 or [int > 0, int > 0]", False, None),
        ("tasks.*.data.validation", "float >= 0, < 1", False, None),
        ("backbone", "keys", False, None),
        ("backbone.name", "str", True, None),
        ("backbone.in_chans", "1 | 3", False, None),
        ("optimizer", "keys", False, None),
        ("optimizer.lr", "float > 0, <= 1e+30", False, 0.1),
        ("optimizer.nesterov", "bool", False, True),
        ("schedule.milestones", "list of float > 0, < 1", False, [0.3, 0.6, 0.8]),
    ],
)
def test_types_and_defaults(
    keys: dict[str, dict[str, Any]], key: str, type_: str, required: bool, default: Any
) -> None:
    entry = keys[key]
    assert (entry["type"], entry["required"], entry["default"]) == (type_, required, default)


def test_every_meaning_is_a_sentence_or_more() -> None:
    for key in recipe_keys():
        assert key.meaning.endswith("."), key
        assert len(key.meaning.split()) > 2 or key.type == "list of keys", key


def test_every_key_is_one_that_a_recipe_takes(keys: dict[str, dict[str, Any]]) -> None:
    """Overridden as it is printed: it may be refused for its value, and not as unknown."""

    def refusal(key: str) -> str:
        try:
            recipes.parse(recipes.resolved(small.content(), [f"{key}=xyzzy"], "x"), "x")
        except InputError as error:
            return str(error)
        return ""

    assert [key for key in keys if "unknown key" in refusal(key)] == []


@pytest.mark.parametrize("columns", [20, 80, 200])
def test_no_key_is_cut(columns: int, keys: dict[str, dict[str, Any]]) -> None:
    done = run("--keys", columns=columns)
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert {line.split()[0] for line in lines if line[:1].strip()} >= set(keys)
    assert max(map(len, lines)) <= max(columns, 75)


def test_without_a_recipe() -> None:
    refused = run("--keys", "digits").exception
    assert isinstance(refused, InputError)
    assert "leave out the recipe" in str(refused)
