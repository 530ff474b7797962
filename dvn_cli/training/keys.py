"""The keys of a recipe as a person looks them up: name, type, default and meaning, from the definition itself."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dvn_cli.training.recipe import Recipe

TYPES = {"integer": "int", "number": "float", "string": "str", "boolean": "bool", "null": "null", "object": "mapping"}
"""What Python calls the types of a JSON schema."""

BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


@dataclass(frozen=True)
class Key:
    """A key of a recipe.

    Attributes:
        key: dotted, as it is overridden on the command line; `*` stands for each item of a list.
        type: what it takes; `keys` if it has keys of its own, which are listed after it.
        required: whether a recipe must have it, or the part that it is in.
        default: its value where a recipe does not have it, as JSON has it.
        meaning: what it is for.
    """

    key: str
    type: str
    required: bool
    default: Any
    meaning: str


def recipe_keys() -> list[Key]:
    """Returns every key of a recipe, in the order of the definition."""
    schema = Recipe.model_json_schema()
    return list(_keys(schema, schema["$defs"], ""))


def _keys(schema: Mapping[str, Any], parts: Mapping[str, Any], prefix: str) -> Iterator[Key]:
    required = schema.get("required", ())
    for name, entry in schema["properties"].items():
        inner, path = _part(entry), f"{prefix}{name}"
        default = None if inner else entry.get("default")
        yield Key(path, _type(entry), name in required, default, entry["description"])
        if inner is not None:
            part, is_list = inner
            yield from _keys(parts[part], parts, f"{path}.*." if is_list else f"{path}.")


def _part(entry: Mapping[str, Any]) -> tuple[str, bool] | None:
    """The definition that holds an entry's own keys, if it has any, and whether the entry is a list of such."""
    for choice in entry.get("anyOf", [entry]):
        items = choice.get("items", {})
        reference = choice.get("$ref") or items.get("$ref")
        if reference is not None:
            return reference.rpartition("/")[2], "$ref" in items
    return None


def _type(entry: Mapping[str, Any]) -> str:
    """What an entry of a JSON schema takes, in Python's words; null is left out, which stands for an absent key."""
    if "anyOf" in entry:
        return " or ".join(text for text in map(_type, entry["anyOf"]) if text != "null")
    if "enum" in entry:
        return " | ".join(map(str, entry["enum"]))
    if "$ref" in entry:
        return "keys"
    if "prefixItems" in entry:
        return f"[{', '.join(map(_type, entry['prefixItems']))}]"
    if entry["type"] == "array":
        return f"list of {_type(entry['items'])}"
    if isinstance(entry.get("additionalProperties"), dict):
        return f"mapping of str to {_type(entry['additionalProperties'])}"
    bounds = ", ".join(f"{sign} {entry[bound]:.16g}" for bound, sign in BOUNDS.items() if bound in entry)
    return f"{TYPES[entry['type']]} {bounds}".rstrip()
