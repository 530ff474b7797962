"""Backbones of one's own: a callable, named `package.module:factory`, that builds the module."""

import contextlib
import importlib
import inspect
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvn_cli.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

FORM = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
"""Of a name. Nothing else in a file's metadata is ever imported or called."""

log = logging.getLogger("dvn_cli")


def is_factory(name: str) -> bool:
    """Tells whether a backbone's name is that of a factory: `package.module:factory`."""
    return ":" in name


def find(name: str) -> Callable[..., Any]:
    """Imports a factory; modules of the working directory are found first, as with `python -m`.

    Raises:
        InputError: It cannot be imported, or takes no number of classes.
    """
    if not FORM.fullmatch(name):
        raise InputError(f"a backbone of one's own is named package.module:factory, not '{name}'")
    path, _, attribute = name.partition(":")
    if path not in sys.modules:
        log.info("importing %s, which builds the backbone", path)
    with _working_directory():
        try:
            found: Any = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{path}.".startswith(f"{error.name}."):
                raise InputError(f"'{name}' cannot be imported: {path} needs a module '{error.name}'") from error
            raise InputError(
                f"'{name}' cannot be imported: there is no module '{error.name}', neither installed nor in {Path.cwd()}"
            ) from error
        except Exception as error:  # whatever a module of the user's raises
            raise InputError(f"'{name}' cannot be imported: {_told(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = did_you_mean(part, (other for other in vars(found) if not other.startswith("_")))
            raise InputError(f"'{name}' cannot be imported: {path} has no '{attribute}'{near}")
        found = getattr(found, part)
    if not callable(found) or "num_classes" not in _parameters(found):
        raise InputError(f"'{name}' is no factory: dvn calls it with num_classes=..., which it does not take")
    return found


def _parameters(factory: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(factory).parameters)
    except (TypeError, ValueError):  # a builtin
        return set()


def _told(error: Exception) -> str:
    """An error of the user's code, in a line."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first} ({Path(last.filename).name}, line {last.lineno})"


@contextlib.contextmanager
def _working_directory() -> Iterator[None]:
    """Puts the working directory before all else that is searched, and afterwards behind it."""
    folder, before = os.getcwd(), list(sys.path)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path[:] = before if {"", folder} & set(before) else [*before, folder]


def build(name: str, num_classes: int, in_chans: int) -> "nn.Module":
    """Calls a factory, as `factory(num_classes=..., in_chans=...)`, the second where it takes it.

    Raises:
        InputError: It cannot be imported, it raises, or it returns no `nn.Module`.
    """
    from torch import nn

    factory, asked = find(name), {"num_classes": num_classes}
    if "in_chans" in _parameters(factory):
        asked["in_chans"] = in_chans
    with _working_directory():
        try:
            module = factory(**asked)
        except Exception as error:  # whatever a factory of the user's raises
            call = ", ".join(f"{key}={value}" for key, value in asked.items())
            raise InputError(f"{name}({call}) failed with {_told(error)}") from error
    if not isinstance(module, nn.Module):
        raise InputError(f"{name} returned a {type(module).__name__}, not a torch.nn.Module")
    return module
