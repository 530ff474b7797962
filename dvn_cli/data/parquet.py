"""Hugging Face data sets: parquet files in a local folder, or on the hub and from then on in its cache."""

import functools
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dvn_cli.data.sources import TEST_SPLITS, TRAIN_SPLITS, Images, Request, first_present, stack
from dvn_cli.errors import DvnError, InputError, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL.Image import Image

_CONVERTED = "refs/convert/parquet"  # where the hub keeps what it converted to parquet itself


def read(request: Request, train: bool) -> Images:
    """Reads one split: images as stored, classes named as the files' metadata name them.

    Raises:
        InputError: No such folder, data set, split, subset or column, or labels that are not classes.
        DvnError: The hub cannot be reached.
    """
    import pyarrow.parquet as pq

    by_split = _files(request)
    present, has_no = sorted(by_split), f"{request} has no split"
    to_learn = train or set(TRAIN_SPLITS) & set(present)  # else there are images to test on alone
    train_split = first_present(TRAIN_SPLITS, present, has_no) if to_learn else None
    test_split = first_present(request.splits(train=False), present, has_no)
    files = by_split[train_split if train and train_split else test_split]
    schema = pq.read_schema(files[0])
    features = _features(schema)
    image = _column(request, schema, features, "image", request.image)
    label = _column(request, schema, features, "label", request.label)
    class_names = (features.get(label) or {}).get("names")
    if class_names is None:
        both = {split: by_split[split] for split in (train_split, test_split) if split}
        class_names = _names(_values(request, [file for files in both.values() for file in files], label))
    labels = _indices(_values(request, files, label), class_names)
    # Every column of classes counts, so that a task by one of them holds out the same images as a task by another.
    columns = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"] or [label]
    codes = [np.unique(np.asarray(_values(request, files, column)), return_inverse=True)[1] for column in columns]
    strata = np.unique(np.stack(codes), axis=1, return_inverse=True)[1].reshape(-1)
    images = _decoded(request._replace(label=None), tuple(files), image)
    return Images(images, torch.from_numpy(labels), tuple(map(str, class_names)), torch.from_numpy(strata))


def _files(request: Request) -> dict[str, list[Path]]:
    """The parquet files of each split, of the subset asked for or of the only one.

    A file's split is the last part of its path that begins with the name of one (data/train-00000-of-00004.parquet,
    plain_text/test/0000.parquet); the parts before that are its subset.
    """
    root = _root(request)
    known = {*TRAIN_SPLITS, *TEST_SPLITS, *request.splits(train=False)}
    subsets: dict[str, dict[str, list[Path]]] = {}
    for path in sorted(root.rglob("*.parquet")):
        parts = path.relative_to(root).parts
        for depth in range(len(parts) - 1, -1, -1):
            split = re.split(r"[-.]", parts[depth])[0]
            if split in known:
                subset = "/".join(part for part in parts[:depth] if part != "data")
                subsets.setdefault(subset, {}).setdefault(split, []).append(path)
                break
    if not subsets:
        raise InputError(f"{request} has no parquet files of a split {' or '.join(sorted(known))}")
    if request.subset is None:
        if len(subsets) > 1:
            raise InputError(f"{request} has several subsets: name one with subset: {', '.join(sorted(subsets))}")
        return next(iter(subsets.values()))
    if request.subset not in subsets:
        there = f"; there is: {', '.join(sorted(filter(None, subsets)))}" if any(subsets) else "; it has only one"
        raise InputError(f"{request} has no subset '{request.subset}'{there}")
    return subsets[request.subset]


def _root(request: Request) -> Path:
    """The local folder, or the hub's: of the main revision, or of the converted one where that has no parquet files."""
    if request.path is not None:
        if not request.path.is_dir():
            raise InputError(f"no folder {request.path}")
        return request.path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    name = str(request.name)
    patterns = (
        ["*.parquet"] if request.subset is None else [f"{request.subset}/*.parquet", f"*/{request.subset}/*.parquet"]
    )
    problem: Exception | None = None
    for revision in ("main", _CONVERTED):
        try:
            root = Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns))
        except (HFValidationError, GatedRepoError, RepositoryNotFoundError) as error:
            raise InputError(f"the hub gives no data set '{name}': {_first_sentence(error)}") from error
        except Exception as error:  # offline, a failed download, no such revision: the hub's client raises many kinds
            problem = error
            continue
        if next(root.rglob("*.parquet"), None) is not None:
            return root
    if problem is None:
        raise InputError(f"the data set '{name}' on the hub has no parquet files")
    raise DvnError(f"the data set '{name}' cannot be had from the hub: {_first_sentence(problem)}") from problem


def _first_sentence(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _features(schema: "pa.Schema") -> dict[str, dict[str, Any]]:
    """The data set's own types of its columns, empty where the files carry none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def _column(
    request: Request, schema: "pa.Schema", features: dict[str, dict[str, Any]], what: str, asked: str | None
) -> str:
    """The column of images or of labels: the one asked for, or the only one of its type."""
    if asked is not None:
        if asked not in schema.names:
            there = ", ".join(schema.names)
            raise InputError(f"{request} has no column '{asked}'{did_you_mean(asked, schema.names)}; it has: {there}")
        return asked
    wanted = {"image": "Image", "label": "ClassLabel"}[what]
    fitting = [name for name, feature in features.items() if feature.get("_type") == wanted and name in schema.names]
    fitting = fitting or [name for name in schema.names if _fits(schema.field(name).type, what)]
    if len(fitting) != 1:
        found = "several columns" if fitting else "no column"
        raise InputError(
            f"{request} has {found} of {what}s: name one with {what}: {', '.join(fitting or schema.names)}"
        )
    return fitting[0]


def _fits(kind: "pa.DataType", what: str) -> bool:
    import pyarrow.types as types

    if what == "label":
        return types.is_integer(kind) or types.is_string(kind) or types.is_boolean(kind)
    return types.is_binary(kind) or (types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def _values(request: Request, files: list[Path], column: str) -> list[int] | list[str]:
    """A column of labels, whole."""
    import pyarrow.parquet as pq

    values = [value for file in files for value in pq.read_table(file, columns=[column])[column].to_pylist()]
    if not all(isinstance(value, int | str) for value in values):
        odd = next(value for value in values if not isinstance(value, int | str))
        raise InputError(f"column '{column}' of {request} has {odd!r}: labels are integers or strings")
    return values


def _names(values: list[int] | list[str]) -> list[Any]:
    """The classes of a column without names for them: its strings in order, or as many as its integers count."""
    strings = {value for value in values if isinstance(value, str)}
    integers = [value for value in values if isinstance(value, int)]
    return sorted(strings) if strings else list(range(max(integers, default=-1) + 1))


def _indices(values: list[int] | list[str], class_names: list[Any]) -> np.ndarray:
    """The index of each label's class; integers are indices already."""
    of_name = {name: index for index, name in enumerate(class_names)}
    return np.asarray([int(v) if isinstance(v, int) else of_name.get(v, -1) for v in values], dtype=np.int64)


@functools.lru_cache(maxsize=16)
def _decoded(request: Request, files: tuple[Path, ...], column: str) -> Tensor:
    """The images of some files; tasks by different labels share them."""
    import pyarrow.parquet as pq

    count = sum(pq.read_metadata(file).num_rows for file in files)
    return stack(_opened(request, files, column), count, request)


def _opened(request: Request, files: tuple[Path, ...], column: str) -> Iterator["Image"]:
    import pyarrow.parquet as pq
    from PIL import Image

    for file in files:
        with pq.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(0).to_pylist():
                    content = value.get("bytes") if isinstance(value, dict) else value
                    if not isinstance(content, bytes):
                        raise InputError(f"column '{column}' of {request} does not hold images")
                    yield Image.open(io.BytesIO(content))
