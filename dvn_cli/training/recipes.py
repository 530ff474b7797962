"""Where recipes are, and how one is read: from its file, with the overrides of its scale, its setting and its user."""

import codecs
import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dvn_cli.errors import InputError, did_you_mean, shortened
from dvn_cli.files import check_length, read_bytes
from dvn_cli.overrides import LARGEST, first_problem, override_key, parse_override, read_yaml
from dvn_cli.training.recipe import Recipe

FOLDERS = (Path(__file__).parents[1] / "recipes", Path(__file__).parents[2] / "recipes")
"""Where the recipes that come with dvn are: in an installed package, or in a checkout."""

STDIN = Path("-")
"""In place of a recipe's file."""

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "paper": {},
    "modern": {
        "inplace_distillation": True,  # Yu & Huang, "Universally slimmable networks", ICCV 2019
        "optimizer.decay_norms": False,  # He et al., "Bag of tricks", CVPR 2019; so too the next two
        "backbone.zero_init_last": True,
        "schedule.name": "cosine",
    },
}
"""What each setting overrides in a recipe's file, whatever its method."""


def shipped() -> dict[str, Path]:
    """The recipes that come with dvn, by name."""
    return {path.stem: path for folder in FOLDERS for path in sorted(folder.glob("*.yaml"))}


@dataclass(frozen=True)
class Shipped:
    """A recipe that comes with dvn.

    Attributes:
        name: of it.
        scales: sets of overrides that it has, by their names.
        meaning: what it trains.
    """

    name: str
    scales: list[str]
    meaning: str


def described() -> list[Shipped]:
    """Returns the recipes that come with dvn, as their files describe themselves."""
    found = []
    for name, path in shipped().items():
        text = path.read_text(encoding="utf-8")
        comment = "".join(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines(keepends=True)))
        meaning = comment.partition("#\n")[2].replace("# ", "").replace("\n", " ").strip()
        found.append(Shipped(name, ["full", *(read_yaml(text).get("scales") or {})], meaning))
    return found


def folder(file: Path) -> Path:
    """The folder that a recipe's relative paths start from: that of its file, of a pipe the working directory."""
    return file.parent if os.path.isfile(file) else Path()


def find(recipe: str) -> Path:
    """The file of a recipe, given by path or by the name of one that comes with dvn; `-` is stdin."""
    path = Path(recipe)
    if path == STDIN or (os.path.exists(path) and not os.path.isdir(path)):
        return path
    known = shipped()
    if recipe in known:
        return known[recipe]
    hint = did_you_mean(recipe, known) or f": give a file, or the name of one that comes with dvn, {', '.join(known)}"
    raise InputError(f"there is no recipe '{recipe}'{hint}")


def read(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: the YAML file.
        overrides: `key=value` with dotted keys, `optimizer.lr=0.05`, `tasks.0.data.train_images=100`; values in YAML.

    Raises:
        InputError: not YAML, an unknown key, a value of the wrong type or out of range: the first of them.
    """
    name = "stdin" if path == STDIN else f"'{path}'"
    if path == STDIN:
        raw = check_length(sys.stdin.buffer.read(LARGEST + 1), LARGEST, name)
    else:
        raw = read_bytes(path, LARGEST)
    try:
        content = read_yaml(_decoded(raw))
    except (UnicodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read the recipe {name}: {error}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"'{path}' is no recipe: a recipe is a mapping of keys")
    return parse(resolved(content, overrides, str(path)), str(path))


def _decoded(raw: bytes) -> str:
    """The text of a file: UTF-16 where its byte order mark says so, else UTF-8, with a mark or without."""
    utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return raw.decode("utf-16" if utf16 else "utf-8-sig")


def resolved(content: dict[str, Any], overrides: Sequence[str], origin: str) -> dict[str, Any]:
    """What a file has, with the overrides of its scale, then those of its setting, then those that are given.

    Raises:
        InputError: there is no such scale or setting, or nothing to override.
    """
    given = [parse_override(override) for override in overrides]
    scales = content.pop("scales", None) or {}
    if not isinstance(scales, dict) or not all(isinstance(changes, dict) for changes in scales.values()):
        raise InputError(f"{origin}: scales is a mapping of names to the keys that each overrides")
    for label, default, known in (("scale", "full", {"full": {}, **scales}), ("setting", "paper", SETTINGS)):
        name = dict(given).get(label, content.get(label, default))
        if not isinstance(name, str) or name not in known:
            raise InputError(f"{origin}: {label} is one of {', '.join(map(str, known))}, not '{shortened(str(name))}'")
        for key, value in known[name].items():
            if label == "setting" and key.startswith("backbone.") and content.get("backbone") is None:
                continue  # the partition or checkpoint that the recipe starts from has one
            override_key(content, str(key), value)
    for key, value in given:
        override_key(content, key, value)
    return content


def parse(content: Mapping[str, Any], origin: str) -> Recipe:
    """Checks a recipe that has been read already; `origin` names it in errors."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{origin}: {first_problem(error, Recipe)}") from None
