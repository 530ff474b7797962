"""Keys and values as a user writes them: YAML files, `key=value`, and what is wrong with a key or value."""

import copy
import math
import re
from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from dvn_cli.errors import InputError, did_you_mean, shortened

_OF_CLASSES = {"classes", "groups"}
_CORE = "tag:yaml.org,2002:"
LARGEST = 1 << 20
"""Bytes of a file of YAML, and of the values that it stands for once every alias is what it is an alias of."""

_DIGITS = 1000  # of an integer; Python prints no number of more than 4,300
_WORDS = {_CORE + kind for kind in ("bool", "float", "int", "null", "timestamp", "value")}


def read_yaml(text: str, key: str = "") -> Any:
    """Reads YAML as `yaml.safe_load` does, but for what stands below `classes` and `groups`, whose scalars are names.

    There `00009`, `yes`, `1e3`, `2024-01-01` and `null` are those strings, keys included. A whole number as it is
    usually written, without quotes, is an int, which may be a name or an index; in quotes it is a string, a name.
    `classes:` and `groups:` with nothing or null after them are None, as any key.

    Args:
        text: One document.
        key: The dotted key whose value the text is; of a whole file none.

    Raises:
        yaml.YAMLError: It is not YAML, or a value is none of its kind, such as a date that there is not.
        InputError: It is too deep or too large, has a key twice, or a number that is too long.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, "", {})
        parts = key.split(".")
        if _OF_CLASSES & set(parts):
            node = _names(node, loader, parts[-1] in _OF_CLASSES)
        else:
            _keep_names(node, loader, set())
        return loader.construct_document(node)
    except RecursionError:
        raise InputError("it is nested too deeply") from None
    except (ArithmeticError, AttributeError, LookupError, ValueError) as error:  # what a scalar's reader raises
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def _check(node: yaml.Node, path: str, sizes: dict[int, float]) -> float:
    """Returns how many bytes of values a node stands for, with aliases as often as they are used.

    Args:
        node: The node.
        path: The keys that lead to it, each with a dot after it.
        sizes: Those of the nodes that are known, by `id`.

    Raises:
        InputError: It is too large, or has a key twice, of which YAML silently takes the last, or too long a number.
    """
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = math.inf  # where it is met in itself
    inner: list[tuple[str, yaml.Node]] = []
    if isinstance(node, yaml.SequenceNode):
        inner = [(str(index), value) for index, value in enumerate(node.value)]
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and name in lines:
                raise InputError(f"key '{path}{name}' is there twice, in lines {lines[name]} and {line}: leave one out")
            lines[name] = line
            inner += [(name, key), (name, value)]
    sizes[id(node)] = max(1, len(node.value)) + sum(_check(value, f"{path}{name}.", sizes) for name, value in inner)
    if sizes[id(node)] > LARGEST:
        raise InputError(f"with its aliases it is larger than {LARGEST >> 20} MiB")
    if node.tag == _CORE + "int" and len(node.value) > _DIGITS:
        raise InputError(f"{path.rstrip('.') or 'it'} is a number of {len(node.value):,} digits")
    return sizes[id(node)]


def _keep_names(node: yaml.Node, loader: yaml.SafeLoader, seen: set[int]) -> None:
    """Marks what stands below `classes` and `groups` anywhere in a document."""
    if id(node) in seen or isinstance(node, yaml.ScalarNode):
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for place, (key, value) in enumerate(node.value):
            if isinstance(key, yaml.ScalarNode) and _OF_CLASSES & set(key.value.split(".")):
                own = key.value.rpartition(".")[2] in _OF_CLASSES
                node.value[place] = (key, _names(value, loader, own))
            else:
                _keep_names(value, loader, seen)
    else:
        for value in node.value:
            _keep_names(value, loader, seen)


def _names(node: yaml.Node, loader: yaml.SafeLoader, whole: bool) -> yaml.Node:
    """A copy of a node in which scalars are names; `whole`: it is all that `classes` or `groups` has."""
    if whole and isinstance(node, yaml.ScalarNode) and node.tag == _CORE + "null":
        return node
    node = copy.deepcopy(node)  # an alias of it may stand for other things elsewhere
    _mark(node, loader, set())
    return node


def _mark(node: yaml.Node, loader: yaml.SafeLoader, seen: set[int]) -> None:
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        index = node.tag == _CORE + "int" and re.fullmatch(r"0|[1-9][0-9]{0,17}", node.value)
        if node.tag in _WORDS and not index:
            node.tag = _CORE + "str"
    elif isinstance(node, yaml.MappingNode):
        loader.flatten_mapping(node)  # `<<`, whose keys are keys of this mapping
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag in _WORDS:
                key.tag = _CORE + "str"
            _mark(value, loader, seen)
    else:
        for value in node.value:
            _mark(value, loader, seen)


def parse_override(override: str) -> tuple[str, Any]:
    """The key and the value, in YAML, of `key=value`."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"'{shortened(override)}' is no override: give key=value, such as optimizer.lr=0.05")
    try:
        return key, read_yaml(text, key)
    except yaml.YAMLError:
        raise InputError(f"the value of {key} is not YAML: {shortened(text)}") from None
    except InputError as error:
        raise InputError(f"{key}: {error}") from None


def override_key(content: dict[str, Any], key: str, value: Any) -> None:
    """Sets what a dotted key names; `*` in it is every one of a list."""
    if "[" in key or "]" in key:
        dotted = re.sub(r"\[([^\[\].]*)\]", r".\1", key)
        hint = "" if "[" in dotted or "]" in dotted else f"; did you mean '{dotted}'?"
        raise InputError(f"unknown key '{key}': parts of a key are separated by dots alone{hint}")
    *parents, last = key.split(".")
    places: list[tuple[str, Any]] = [("", content)]
    for part in parents:
        inside = []
        for path, place in places:
            if isinstance(place, dict) and place.get(part) is None:
                place[part] = {}
            inside += [(f"{path}.{name}" if path else name, place[at]) for name, at in _places(place, part, path)]
        places = inside
    for path, place in places:
        for _, at in [("", last)] if isinstance(place, dict) else _places(place, last, path):
            place[at] = copy.deepcopy(value)


def _places(place: Any, part: str, path: str) -> list[tuple[str, Any]]:
    """The names and keys that a part of a dotted key stands for, in the dict or list that is at a path."""
    if isinstance(place, dict):
        return [(part, part)]
    if not isinstance(place, list):
        raise InputError(f"{path} has no keys: there is no {path}.{part}")
    if part == "*":
        return [(str(index), index) for index in range(len(place))]
    if not re.fullmatch("[0-9]{1,9}", part) or int(part) >= len(place):
        allowed = f"give a number from 0 to {len(place) - 1}, or *" if place else "the list is empty"
        raise InputError(f"{path}.{part}: {allowed}")
    return [(part, int(part))]


def first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """The first of pydantic's errors in one line, with the nearest key where one is unknown."""
    problem = error.errors(include_url=False)[0]
    path, known = _keys_along(model, problem["loc"])
    where = ".".join(path)
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{where}'{did_you_mean(path[-1], known) or '; known here: ' + ', '.join(known)}"
    if problem["type"] == "missing":
        return f"'{where}' is missing"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    given = problem["input"]
    shown = f", not {shortened(repr(given))}" if isinstance(given, str | int | float | bool) or given is None else ""
    return f"{where}: {message}{shown}" if where else message


def _keys_along(annotation: Any, location: Sequence[int | str]) -> tuple[list[str], list[str]]:
    """The keys of an error's place, without what pydantic names there that is none: which of several types did not fit.

    Args:
        annotation: the type of what the place starts from.
        location: the place.

    Returns:
        the keys, and those that are known where the last one is.
    """
    path: list[str] = []
    known: list[str] = []
    for part in location:
        while get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        choices = [choice for choice in get_args(annotation) if choice is not type(None)]
        if get_origin(annotation) in (Union, UnionType):
            annotation = next((choice for choice in choices if _has_parts(choice)), choices[0])
            if len(choices) > 1:
                continue  # the part names one of them
            choices = list(get_args(annotation))
        path.append(str(part))
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            known = list(annotation.model_fields)
            annotation = annotation.model_fields[str(part)].annotation if part in known else None
        else:  # the items of a list, or the values of a mapping
            annotation = choices[-1] if choices else None
    return path, known


def _has_parts(annotation: Any) -> bool:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return get_origin(annotation) is not None or (isinstance(annotation, type) and issubclass(annotation, BaseModel))
