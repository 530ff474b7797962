"""YAML in which the names of classes stay as they are written."""

import copy
import re
from typing import Any

import yaml

from dvn_cli.errors import InputError

_OF_CLASSES = {"classes", "groups"}
_CORE = "tag:yaml.org,2002:"
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
        yaml.YAMLError: It is not YAML.
        ValueError: A value is none of its kind, such as a date that there is not.
        InputError: One of `groups` is given twice.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        parts = key.split(".")
        if _OF_CLASSES & set(parts):
            node = _names(node, loader, parts[-1] in _OF_CLASSES)
        else:
            _keep_names(node, loader, set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


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
        keys = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                key.tag = _CORE + "str" if key.tag in _WORDS else key.tag
                if key.value in keys:
                    raise InputError(f"groups has '{key.value}' twice")
                keys.add(key.value)
            _mark(value, loader, seen)
    else:
        for value in node.value:
            _mark(value, loader, seen)
