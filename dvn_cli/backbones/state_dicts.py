"""State dicts as people have them: read without running anything that a file holds, found in what lies around them."""

import argparse
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvn_cli.errors import InputError, shortened
from dvn_cli.files import check_regular

SAVE = "save the weights alone, with torch.save(model.state_dict(), FILE) or as safetensors"

CUT = "it is damaged or cut short"

COUNTERS = {"total_ops", "total_params", "n_averaged"}
"""What profilers (thop) and averaging (`torch.optim.swa_utils`) leave among a module's buffers."""

_ARCHIVE = b"PK\x03\x04"

_DEPTH = 100
"""Of the dicts in a file that are looked at."""

BEGINNINGS = {
    rb"version https://git-lfs": "it is a pointer of Git LFS to the file: `git lfs pull` fetches the file itself",
    rb"\s*<": "it is a web page, such as a server sends in place of a file: download it again",
    rb"\s*[\[{]\s*[\"\]}]": "it is JSON: give the .safetensors or .pth file that lies beside it",
    rb"PK\x03\x04.{26}[^/]*\.npy": "it is a NumPy archive: convert it to safetensors",
    rb"\x89HDF": "it is an HDF5 file: convert it to safetensors",
    rb"$": "it is empty",
}
"""How files begin that are often taken for weights, and what they are."""


@dataclass(frozen=True)
class Found:
    """A state dict that was found in a file.

    Attributes:
        state: The values by their names, which are the backbone's where they fit it; not all need be tensors.
        done: What was done to get there, in words.
    """

    state: dict[str, Any]
    done: list[str]


class _Foreign:
    """Stands in for an object that was pickled beside tensors: its own class is not imported, its state is dropped."""

    def __new__(cls, *_: Any, **__: Any) -> "_Foreign":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def read(path: Path) -> Any:
    """Reads what a file of weights holds: safetensors, or torch's format in any of its versions, seen from the content.

    Raises:
        InputError: No such file, or not one of weights; the message says what it is where that can be seen.
    """
    import torch
    from safetensors.torch import load_file

    check_regular(path)
    not_weights = f"{path} is not a file of weights"
    try:
        with open(path, "rb") as file:
            beginning = file.read(256)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    for pattern, what in BEGINNINGS.items():
        if re.match(pattern, beginning, re.DOTALL):
            raise InputError(f"{not_weights}: {what}")
    packed: list[str] = []
    try:
        if beginning[8:9] == b"{":
            return load_file(path)
        if beginning.startswith(_ARCHIVE):
            with zipfile.ZipFile(path) as archive:
                packed = archive.namelist()
                size = sum(entry.file_size for entry in archive.infolist())
            if is_unpacked(size, path.stat().st_size):
                raise InputError(f"{not_weights}: it would unpack to {size / 2**30:,.1f} GiB")
        stands_in = [(type(name, (_Foreign,), {}), name) for name in _foreign_names(path)]
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals([argparse.Namespace, *stands_in]),
            open(path, "rb") as file,
        ):
            warnings.simplefilter("ignore")  # of formats that it reads all the same
            return torch.load(file, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # each reader fails in its own ways at a file that is not its own
        raise InputError(f"{not_weights}: {_why(beginning, packed, error)}") from error


def is_unpacked(size: int, stored: int) -> bool:
    """Tells whether values are so many more bytes than what is stored of them that nobody has saved them so."""
    return size > 4 * stored + (64 << 20)


def _why(beginning: bytes, packed: Sequence[str], error: Exception) -> str:
    """Why a file cannot be read, in words; `packed` are the names in an archive."""
    if beginning[8:9] == b"{":
        return f"its safetensors header or data are damaged ({next(iter(str(error).splitlines()), '')})"
    if any(name.endswith("/constants.pkl") for name in packed):
        return f"it is a TorchScript module: {SAVE}"
    if not beginning.startswith((_ARCHIVE, b"\x80")):  # torch's archives, and its pickles before 1.6
        return "it is of no known kind"
    # What torch says advises to read the file unsafely.
    return f"what it pickles cannot be read safely: {SAVE}" if isinstance(error, pickle.UnpicklingError) else CUT


def _foreign_names(path: Path) -> Sequence[str]:
    """The classes and functions that a pickle names and that torch does not take for safe."""
    import torch

    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # a damaged file, or the format before torch 1.6, of which it cannot tell
        return []


def find(content: Any, own: Mapping[str, Any], origin: str) -> Found:
    """Finds in what a file holds the state dict that has most of a backbone's names, under whatever prefix.

    Of several that have as many, the averaged one (`ema` in the key that it lies under) counts, else the first.

    Args:
        content: As `read` gives it.
        own: By name, what the backbone has.
        origin: What to call the file in errors.

    Raises:
        InputError: It holds no tensors by name.
    """
    dicts = list(_dicts(content))
    if not dicts:
        raise InputError(f"{origin} is not a file of weights: {_what(content)}")
    ranked = []
    for where, state in dicts:
        prefix, fitting = _prefix(state, own)
        ranked.append((fitting, any("ema" in part for part in where), len(state) if not fitting else 0, prefix))
    best = max(range(len(dicts)), key=lambda place: ranked[place][:3])
    (where, state), (fitting, *_, prefix) = dicts[best], ranked[best]
    done = []
    if where:
        others = [".".join(path) for i, (path, _) in enumerate(dicts) if i != best and ranked[i][0] == fitting and path]
        beside = f", not from {' or '.join(map(repr, others))}" if others and fitting else ""
        done.append(f"taken from '{'.'.join(where)}'{beside}")
    if prefix:
        done.append(f"'{prefix}' removed from the names")
    counters = [name for name in state if name.rpartition(".")[2] in COUNTERS and name not in own]
    outside = [name for name in state if not name.startswith(prefix) and name not in counters]
    if counters:
        done.append(f"counters left out ({few(counters)})")
    if outside:
        done.append(f"left out what is not under '{prefix}' ({few(outside)})")
    left_out = {*counters, *outside}
    return Found({name[len(prefix) :]: value for name, value in state.items() if name not in left_out}, done)


def few(names: Sequence[str], shown: int = 1) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(map(shortened, names[:shown])) + more


def _dicts(content: Any) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every dict with tensors by name in what a file holds, and the keys that lead to it."""
    import torch

    for where, mapping in _mappings(content):
        by_name = {key: value for key, value in mapping.items() if isinstance(key, str)}
        if any(isinstance(value, torch.Tensor) for value in by_name.values()):
            yield where, {key: value for key, value in by_name.items() if not isinstance(value, Mapping)}


def _mappings(content: Any) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Every mapping in what a file holds, once however often it is there, and the keys that lead to it."""
    seen = set()
    pending: list[tuple[tuple[str, ...], Any]] = [((), content)]
    while pending:
        where, value = pending.pop()
        if isinstance(value, Mapping) and id(value) not in seen and len(where) <= _DEPTH:
            seen.add(id(value))
            yield where, value
            inner = [((*where, key), below) for key, below in value.items() if isinstance(key, str)]
            pending += reversed(inner)


def _prefix(names: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[str, int]:
    """The prefix without which most names are a backbone's, and how many; of several the shortest."""
    longest = max(map(len, own), default=0)
    found = Counter(
        name[:start]
        for name in names
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", name)))
        if len(name) - start <= longest and name[start:] in own
    )
    prefix, fitting = max(found.items(), key=lambda item: (item[1], -len(item[0])), default=("", 0))
    return prefix, fitting


def _what(content: Any) -> str:
    """What a file holds that has no tensors by name."""
    if foreign := _foreign(content):
        return f"it is a whole pickled module ({foreign}), which would run its code to be opened: {SAVE}"
    if isinstance(content, Mapping):
        keys = [key if isinstance(key, str) else type(key).__name__ for key in content]
        return f"it has no tensors by name, but {few(keys, 3)}" if keys else "it holds nothing"
    return f"it holds a {type(content).__name__}, not tensors by name"


def _foreign(content: Any) -> str | None:
    """The class of the first pickled object in what a file holds."""
    values = (content, *(value for _, mapping in _mappings(content) for value in mapping.values()))
    return next((type(value).__name__ for value in values if isinstance(value, _Foreign)), None)
