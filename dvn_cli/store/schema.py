"""JSON as dataclasses: the annotations of their fields say what is accepted, and a wrong value is named by its key."""

import functools
import itertools
import json
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dvn_cli.errors import InputError

T = TypeVar("T")


class _WrongError(Exception):
    """A value that is not as its annotation says, and the keys that lead to it, the innermost first."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.keys: list[object] = []

    def within(self, key: object) -> "_WrongError":
        self.keys.append(key)
        return self


def omitted(default: Any) -> Any:
    """Declares a field that is left out of the JSON where it has its default."""
    return field(default=default, metadata={"omitted": True})


def loads(text: str | bytes) -> Any:
    """Parses JSON.

    Raises:
        ValueError: it is no JSON, nested too deeply, or an object has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def dumps(value: Any) -> str:
    """Returns the compact JSON of dataclasses, mappings and sequences, with sorted keys.

    Raises:
        ValueError: there is something that JSON does not have, such as NaN.
    """
    return json.dumps(value, default=_fields, sort_keys=True, separators=(",", ":"), allow_nan=False)


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
        raise InputError(f"{key!r:.200} {wrong}" if key else str(wrong)) from None


@functools.cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """Returns the function that checks and converts a value of an annotated type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda value: value
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
        except _WrongError as wrong:
            raise wrong.within(len(items)) from None
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
        except _WrongError as wrong:
            raise wrong.within(key) from None
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
                raise _WrongError("is missing").within(name)
        items, name = {}, ""
        try:
            for name, reader in readers.items():
                if name in value:
                    items[name] = reader(value[name])
        except _WrongError as wrong:
            raise wrong.within(name) from None
        try:
            return kind(**items)
        except InputError as error:
            raise _WrongError(f"is not usable: {error}") from None

    return read
