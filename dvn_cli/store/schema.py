"""JSON as dataclasses: the annotations of their fields say what is accepted, and a wrong value is named by its key."""

import functools
import itertools
import json
import math
import os
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dvn_cli.errors import InputError

T = TypeVar("T")

MOST_NESTED = 100
"""How deep a value is nested at most of which nothing is known."""


class _WrongError(InputError):
    """A value that is not as its annotation says, and the keys that lead to it, the innermost first."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.keys: list[object] = []


def _within(key: object, error: InputError) -> _WrongError:
    wrong = error if isinstance(error, _WrongError) else _WrongError(f"is not usable: {error}")
    wrong.keys.append(key)
    return wrong


def omitted(default: Any) -> Any:
    """Declares a field that is left out of the JSON where it has its default."""
    return field(default=default, metadata={"omitted": True})


def loads(text: str | bytes) -> Any:
    """Parses JSON.

    Raises:
        ValueError: it is no JSON (nor is NaN), nested too deeply, or an object has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_float=_number, parse_constant=_number)
    except ValueError as error:
        raise ValueError(f"it is no JSON: {error}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check_version(path: str | os.PathLike[str], content: Any, newest: int, key: str = "schema_version") -> None:
    """Raises InputError where what was parsed of a file says that it is of a newer version than this dvn reads.

    What says none is of before there were any.
    """
    version = content.get(key) if isinstance(content, dict) else None
    if isinstance(version, int) and version > newest:
        raise InputError(f"'{path}' has {key} {version!r:.40}, this dvn reads up to {newest}: update dvn")


def checked(value: Any) -> dict[str, Any]:
    """Returns a dataclass as parsed JSON, from which `parse` makes it again.

    Raises:
        InputError: `parse` would refuse it.
        ValueError: as `dumps`.
    """
    content = loads(dumps(value))
    parse(type(value), content)
    return content


def _number(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text:.20} is no number")
    return float(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def dumps(value: Any) -> str:
    """Returns the compact JSON of dataclasses, mappings and sequences, with sorted keys.

    Raises:
        ValueError: there is something that JSON does not have, such as NaN, or it is nested too deeply.
    """
    try:
        return json.dumps(value, default=_fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _fields(value: Any) -> dict[str, Any]:
    if not is_dataclass(value):
        raise TypeError(f"{type(value).__name__} is no JSON")
    pairs = ((each, getattr(value, each.name)) for each in fields(value))
    return {each.name: own for each, own in pairs if not (each.metadata.get("omitted") and own == each.default)}


def parse(kind: type[T], value: Any) -> T:
    """Returns parsed JSON as an instance of a dataclass; keys that it has no field for are passed over.

    Understood are int, float, str, bool, Literal, tuples, mappings with string keys, None beside one of these,
    dataclasses, Any, and `Annotated[int, range(...)]`. What depends on several fields a `__post_init__` checks, by
    raising InputError.

    Raises:
        InputError: a value is missing or is not what its annotation says; the message begins with its key.
    """
    try:
        return _reader(kind)(value)  # type: ignore[arg-type]
    except _WrongError as wrong:
        key = ".".join(map(str, reversed(wrong.keys)))
        raise InputError(f"{key!r:.200} {wrong}" if key else f"it {wrong}") from None


@functools.cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """Returns the function that checks and converts a value of an annotated type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return _any
    if is_dataclass(kind):
        return _dataclass(kind)
    if origin is Annotated:
        return _checked(_reader(arguments[0]), arguments[1], f"{arguments[1][0]:,} to {arguments[1][-1]:,}")
    if origin is Literal:
        return _checked(_reader(str), arguments, " or ".join(map(repr, arguments)))
    if origin in (Union, types.UnionType):
        (inner,) = (_reader(argument) for argument in arguments if argument is not type(None))
        return lambda value: None if value is None else inner(value)
    if origin is tuple:
        return _tuple(arguments)
    if origin is not None and issubclass(origin, Mapping):
        return _mapping(_reader(arguments[1]))
    return _plain(kind)


def _wrong(value: Any, expected: str) -> _WrongError:
    shown = "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else f"{value!r:.40}"
    return _WrongError(f"is {shown}, not {expected}")


def _any(value: Any, depth: int = 0) -> Any:
    if depth > MOST_NESTED:
        raise _WrongError(f"is nested more than {MOST_NESTED} deep")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _any(inner, depth + 1)
    return value


def _plain(kind: type) -> Callable[[Any], Any]:
    expected = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}[kind]
    accepted = (int, float) if kind is float else (kind,)

    def read(value: Any) -> Any:
        if type(value) not in accepted or (kind is float and not -1e300 < value < 1e300):
            raise _wrong(value, expected)
        return value

    return read


def _checked(inner: Callable[[Any], Any], allowed: Any, expected: str) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if inner(value) not in allowed:
            raise _wrong(value, expected)
        return value

    return read


def _tuple(arguments: tuple[Any, ...]) -> Callable[[Any], tuple[Any, ...]]:
    many = arguments[-1] is ...
    inner = itertools.repeat(_reader(arguments[0])) if many else [_reader(argument) for argument in arguments]

    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or not (many or len(value) == len(arguments)):
            raise _wrong(value, "a list" if many else f"a list of {len(arguments)}")
        items: list[Any] = []
        try:
            for item, reader in zip(value, inner, strict=False):
                items.append(reader(item))
        except InputError as error:
            raise _within(len(items), error) from None
        return tuple(items)

    return read


def _mapping(inner: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    def read(value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            raise _wrong(value, "an object")
        items, key = {}, ""
        try:
            for key, item in value.items():
                items[key] = inner(item)
        except InputError as error:
            raise _within(key, error) from None
        return items

    return read


def _dataclass(kind: Any) -> Callable[[Any], Any]:
    hints = get_type_hints(kind, include_extras=True)
    readers = {each.name: _reader(hints[each.name]) for each in fields(kind)}
    required = [e.name for e in fields(kind) if e.default is MISSING and e.default_factory is MISSING]

    def read(value: Any) -> Any:
        if type(value) is not dict:
            raise _wrong(value, "an object")
        for name in required:
            if name not in value:
                raise _within(name, _WrongError("is missing"))
        items, name = {}, ""
        try:
            for name, reader in readers.items():
                if name in value:
                    items[name] = reader(value[name])
        except InputError as error:
            raise _within(name, error) from None
        return kind(**items)

    return read
