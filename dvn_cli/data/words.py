"""What `--data` says: a folder, a YAML file, or keys and values."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dvn_cli.data.folders import is_flat, subfolders
from dvn_cli.data.listing import TEST_SPLITS
from dvn_cli.data.parquet import parquet_files
from dvn_cli.data.spec import DataSpec
from dvn_cli.data.tars import tar_files
from dvn_cli.errors import InputError
from dvn_cli.files import read_bytes
from dvn_cli.overrides import LARGEST, first_problem, override_key, parse_override, read_yaml
from dvn_cli.store.metadata import Task

Data = str | os.PathLike[str] | Mapping[str, Any]
"""Images: a folder, a YAML file with the keys of a recipe's `data`, a mapping of them, or `key=value` of one."""


def prepared(task: Task) -> dict[str, Any]:
    """How a task's images are prepared, as the keys of a `DataSpec`."""
    keys: dict[str, Any] = {"size": task.input_size}
    keys |= {key: getattr(task, key) for key in ("interpolation", "crop_pct", "crop_mode")}
    return keys | ({"mean": list(task.mean)} if task.crop_mode == "border" else {})


_NOT_EVALUATED = (
    "train_images",
    "validation",
    "augment",
    "pad",
    "scale",
    "ratio",
    "hflip",
    "color_jitter",
    "aa",
    "reprob",
    "mixup",
    "cutmix",
    "mean",
    "std",
    "interpolation",
    "crop_pct",
    "crop_mode",
)


def parse_data(
    data: Data | Sequence[Data],
    note: Callable[[str], None] | None = None,
    flat: bool = False,
) -> tuple[DataSpec, Path | None]:
    """Reads what `--data` says: a folder, whose kind is seen from what is in it, or a YAML file of a `DataSpec`; and
    `KEY=VALUE` of a `DataSpec`, which go before. Returns it, and the folder that relative paths start from.

    Args:
        note: is told, in a line, of what kind a folder is.
        flat: whether a folder may hold images alone, and of one of classes without splits a fifth is kept to test on,
            as in training; otherwise all of it is to test on.

    Raises:
        InputError: no such folder or file, nothing known in it, or an unknown key or value.
    """
    content: dict[str, Any] = {}
    base = None
    for each in [data] if isinstance(data, str | os.PathLike | Mapping) else data:
        if isinstance(each, Mapping):
            content |= each
            continue
        word = os.fspath(each)
        path, key = Path(os.path.expanduser(word)), word.partition("=")[0]
        if os.path.isdir(path):  # which is false, unlike pathlib's, of what is too long for a path: long KEY=VALUE
            content |= _folder(path, flat)
            if note is not None:
                what = {"hf": "parquet files", "webdataset": "tar files"}
                note(f"images: the {what.get(content['source'], 'images by class')} in '{path}'")
        elif os.path.isfile(path) and path.suffix in (".yaml", ".yml"):
            base = path.parent
            content |= _yaml(path)
        elif "=" not in word:
            raise InputError(f"--data {word}: there is no such folder; give a folder, a YAML file or KEY=VALUE")
        elif key in _NOT_EVALUATED:
            raise InputError(f"--data {word}: '{key}' is for training; images are prepared as the task's were")
        else:
            override_key(content, *parse_override(word))
    try:
        return DataSpec.model_validate(content), base
    except ValidationError as error:
        raise InputError(f"--data: {first_problem(error, DataSpec)}") from None


def _folder(path: Path, flat: bool) -> dict[str, Any]:
    if parquet_files(path):
        return {"source": "hf", "path": str(path)}
    if tar_files(path):
        return {"source": "webdataset", "path": str(path)}
    folders = set(subfolders(path))
    if not folders and not flat:
        raise InputError(f"--data {path}: there are neither parquet files in it nor folders of classes")
    has_test = folders & set(TEST_SPLITS) or (flat and is_flat(path))
    return {"source": "folder", "path": str(path)} | ({} if has_test else {"test_split": "."})


def _yaml(path: Path) -> dict[str, Any]:
    raw = read_bytes(path, LARGEST)
    try:
        content = read_yaml(raw.decode())
    except (InputError, UnicodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read '{path}': {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"'{path}' describes no images: give a mapping of keys, such as source and path")
    return content
