"""Hugging Face data sets: parquet files in a local folder, or on the hub and from then on in its cache."""

import contextlib
import functools
import io
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from dvn_cli.data.decode import Item
from dvn_cli.data.folders import files_below
from dvn_cli.data.listing import (
    SHORT,
    TEST_SPLITS,
    TRAIN_SPLITS,
    Listing,
    Part,
    Request,
    first_present,
    strata_of,
    together,
)
from dvn_cli.errors import DvnError, InputError, did_you_mean
from dvn_cli.files import check_regular

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL.Image import Image

_CONVERTED = "refs/convert/parquet"  # where the hub keeps what it converted to parquet itself


def read(request: Request, part: Part) -> Listing | None:
    """Lists one split: images as stored, classes named as the files' metadata name them.

    Raises:
        InputError: No such folder, data set, split, subset or column, or labels that are not classes.
        DvnError: The hub cannot be reached.
    """
    by_split = _files(request)
    present, has_no = sorted(by_split), f"{request} has no split"
    if part == "validation" and not set(request.splits(part)) & set(present):
        return None
    to_learn = part == "train" or set(TRAIN_SPLITS) & set(present)  # else there are images to test on alone
    train_split = first_present(TRAIN_SPLITS, present, has_no) if to_learn else None
    test_split = first_present(request.splits("test"), present, has_no)
    split = first_present(request.splits(part), present, has_no)
    files = by_split[split]
    columns = _columns(files[0])
    image = _image_column(request, columns)
    splits = [tuple(by_split[name]) for name in dict.fromkeys((train_split, split, test_split)) if name]
    label = _label_column(request, columns, splits)
    values, codes = _encoded(request, tuple(files), label.name)
    class_names = next(filter(None, (_class_names(of_split[0], label.name) for of_split in (files, *splits))), None)
    if class_names is not None:
        classes = [_class_index(value, class_names) for value in values]
    else:
        class_names = _values_as_names(_encoded(request, of_split, label.name)[0] for of_split in splits)
        index = {name: place for place, name in enumerate(class_names)}
        classes = [index[str(value)] for value in values]
    return Listing(
        split,
        torch.from_numpy(np.array(classes, dtype=np.int64)[codes]),
        tuple(class_names),
        torch.from_numpy(_strata(request, tuple(files), columns)),
        key=(image.name, *files),
        items=functools.partial(_items, request, part, tuple(files), image.name),
    )


def _files(request: Request) -> dict[str, list[Path]]:
    """The parquet files of each split, of the subset asked for or of the only one.

    A file's split is the last part of its path that begins with the name of one (data/train-00000-of-00004.parquet,
    plain_text/test/0000.parquet); the parts before that are its subset.
    """
    root = _root(request)
    known = {*TRAIN_SPLITS, *TEST_SPLITS, *request.splits("test")}
    subsets: dict[str, dict[str, list[Path]]] = {}
    for path in parquet_files(root):
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


def parquet_files(root: Path) -> list[Path]:
    """Lists the parquet files below a folder, in order; links are followed, what is hidden is left out."""
    return sorted(map(Path, files_below(root, lambda name: name.endswith(".parquet"), Counter())))


def _root(request: Request) -> Path:
    """The local folder, or the hub's: of the main revision, or of the converted one where that has no parquet files."""
    if request.path is not None:
        if not os.path.isdir(request.path):
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
        if parquet_files(root):
            return root
    if problem is None:
        raise InputError(f"the data set '{name}' on the hub has no parquet files")
    raise DvnError(f"the data set '{name}' cannot be had from the hub: {_first_sentence(problem)}") from problem


def _first_sentence(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator["pq.ParquetFile"]:
    """Opens a file; what fails while it is read is said with its name.

    Raises:
        InputError: It is no regular file, damaged, or has more rows than bytes, as no file of images has.
    """
    import pyarrow.parquet as pq

    check_regular(file)
    try:
        with pq.ParquetFile(file) as opened:
            rows, size = opened.metadata.num_rows, file.stat().st_size
            if rows > size:
                raise InputError(f"{file} cannot be read: it is said to have {rows:,} rows, in {size:,} bytes")
            yield opened
    except (InputError, MemoryError):
        raise
    except Exception as error:  # pyarrow raises nearly anything at damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{file} cannot be read: {reason}") from error


# Columns


class Column(NamedTuple):
    """A column, or a field of a nested one.

    Attributes:
        name: Of a field the names on the way to it, with dots between.
        type: Of its values, pyarrow's.
        feature: The data set's own description of it; empty where the files carry none.
    """

    name: str
    type: "pa.DataType"
    feature: Mapping[str, Any]

    @property
    def kind_of_feature(self) -> str | None:
        """What the data set takes it for, such as Image or ClassLabel."""
        kind = self.feature.get("_type")
        return kind if isinstance(kind, str) else None


def _columns(file: Path) -> list[Column]:
    """The columns of a file, each nested one before its fields."""

    def walk(fields: Iterable["pa.Field"], described: Any, prefix: str) -> Iterator[Column]:
        for field in fields:
            feature = described.get(field.name) if isinstance(described, dict) else None
            column = Column(prefix + field.name, field.type, feature if isinstance(feature, dict) else {})
            yield column
            if _is_nested(column):
                yield from walk(field.type.fields, feature, f"{column.name}.")

    with _opened(file) as opened:
        schema = opened.schema_arrow
        try:
            features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        except (KeyError, RecursionError, TypeError, ValueError):
            features = {}
        return list(walk(schema, features, ""))


def _is_nested(column: Column) -> bool:
    """Whether a column is a struct of others, and not of an image's bytes and path."""
    import pyarrow.types as types

    return types.is_struct(column.type) and column.kind_of_feature != "Image" and not _holds_images(column.type)


def _holds_images(kind: "pa.DataType") -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return types.is_binary(kind) or types.is_large_binary(kind)


def _holds_labels(kind: "pa.DataType") -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_integer(kind) or types.is_boolean(kind) or types.is_string(kind) or types.is_large_string(kind)


def _holds_lists_of_labels(kind: "pa.DataType") -> bool:
    import pyarrow.types as types

    lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return lists and _holds_labels(kind.value_type)


def _image_column(request: Request, columns: Sequence[Column]) -> Column:
    """The column of images: the one asked for, or the only one."""
    if request.image is not None:
        return _asked(request, columns, request.image)
    typed = [column for column in columns if column.kind_of_feature == "Image"]
    return _only(request, columns, "image", typed or [column for column in columns if _holds_images(column.type)])


def _label_column(request: Request, columns: Sequence[Column], splits: Sequence[tuple[Path, ...]]) -> Column:
    """The column of labels: the one asked for, or the only one that may be meant.

    Raises:
        InputError: There is none, several may be meant, or the only one has another value for every image.
    """
    if request.label is not None:
        column = _asked(request, columns, request.label)
        if not _holds_labels(column.type):
            raise InputError(
                f"column '{column.name}' of {request} holds {_python_type(column.type)}, not integers or strings; "
                f"the columns are {_listed(columns)}"
            )
        return column
    typed = [column for column in columns if column.kind_of_feature == "ClassLabel" and _holds_labels(column.type)]
    if len(typed) == 1:
        return typed[0]
    possible = [column for column in columns if _holds_labels(column.type) or _holds_lists_of_labels(column.type)]
    column = _only(request, columns, "label", typed or possible)
    if not _holds_labels(column.type):
        raise InputError(
            f"{request} has no column of labels: '{column.name}' has several for each image; name one with label: "
            f"{_listed(columns)}"
        )
    encoded = [_encoded(request, files, column.name) for files in splits]
    if all(len(values) == len(codes) for values, codes in encoded) and max(len(codes) for _, codes in encoded) > 1:
        raise InputError(
            f"{request} has no column of labels, unless it is '{column.name}', which is another for every image; name "
            f"one with label: {_listed(columns)}"
        )
    return column


def _asked(request: Request, columns: Sequence[Column], name: str) -> Column:
    for column in columns:
        if column.name == name:
            return column
    hint = did_you_mean(name, [column.name for column in columns])
    raise InputError(f"{request} has no column '{name}'{hint}; it has: {_listed(columns)}")


def _only(request: Request, columns: Sequence[Column], what: str, fitting: Sequence[Column]) -> Column:
    if len(fitting) == 1:
        return fitting[0]
    found = "several columns" if fitting else "no column"
    raise InputError(f"{request} has {found} of {what}s: name one with {what}: {_listed(fitting or columns)}")


def _listed(columns: Sequence[Column]) -> str:
    return ", ".join(column.name for column in columns if not _is_nested(column))


def _python_type(kind: "pa.DataType") -> str:
    """What the values of a column are in Python, such as dict."""
    import pyarrow.types as types

    kinds = {
        "dict": types.is_struct,
        "list": types.is_nested,
        "bytes": lambda kind: types.is_binary(kind) or types.is_large_binary(kind),
        "float": types.is_floating,
    }
    return next((name for name, is_one in kinds.items() if is_one(kind)), str(kind))


def _picked(table: "pa.Table | pa.RecordBatch", name: str) -> "pa.Array | pa.ChunkedArray":
    """A column, or a field of a nested one, of what was read with `columns=[name]`."""
    import pyarrow.compute as pc

    for column in table.schema.names:
        if name == column:
            return table.column(column)
    parts = name.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        column = ".".join(parts[:depth])
        if column in table.schema.names:
            return pc.struct_field(table.column(column), parts[depth:])
    raise KeyError(name)


# Labels


@functools.lru_cache(maxsize=4)
def _encoded(
    request: Request, files: tuple[Path, ...], name: str, nulls: bool = False
) -> tuple[list[int | str], np.ndarray]:
    """The different values of a column of labels, and for each row which of them it has; `nulls`: those are one too.

    Raises:
        InputError: A file lacks the column, or a row a label.
    """
    import pyarrow as pa

    place: dict[Any, int] = {}
    codes = []
    for file in files:
        with _opened(file) as opened:
            try:
                column = _picked(opened.read(columns=[name]), name)
            except KeyError:
                raise InputError(f"{file} has no column '{name}', as other files of {request} have") from None
            if column.null_count and not nulls:
                raise InputError(
                    f"column '{name}' of {request} has no label for {column.null_count} of {len(column)} images"
                )
            if pa.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
            if pa.types.is_boolean(column.type):
                column = column.cast(pa.string())  # 'false' and 'true'
            encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
            own = [place.setdefault(value, len(place)) for value in encoded.dictionary.to_pylist()]
            codes.append(np.array(own, dtype=np.int64)[encoded.indices.to_numpy(zero_copy_only=False)])
    return list(place), np.concatenate(codes)


def _strata(request: Request, files: tuple[Path, ...], columns: Sequence[Column]) -> np.ndarray:
    """What choices of images are balanced over, int64 (N,): the same for tasks by any of the columns, so that all of
    them hold out the same images. All columns of named classes count; without such, as many as `strata_of` takes.
    """
    named = [column.name for column in columns if column.kind_of_feature == "ClassLabel"]
    if named:
        return together([_encoded(request, files, name, nulls=True)[1] for name in named])
    encoded = []
    for name in (column.name for column in columns if _holds_labels(column.type)):
        # of texts the first file alone is read
        if all(len(str(value)) <= SHORT for value in _encoded(request, files[:1], name, nulls=True)[0]):
            encoded.append(_encoded(request, files, name, nulls=True)[1])
    return strata_of(encoded, int(_groups(files)[0][-1]))


def _class_names(file: Path, name: str) -> list[str] | None:
    """The names that a data set gives the classes of a column; None where it has none."""
    feature = next((column.feature for column in _columns(file) if column.name == name), {})
    names = feature.get("names")
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _class_index(value: int | str, names: Sequence[str]) -> int:
    """The index of a label's class; an integer is one already."""
    if isinstance(value, int):
        return value if abs(value) < 2**62 else -1
    return names.index(value) if value in names else -1


def _values_as_names(of_splits: Iterable[Sequence[int | str]]) -> list[str]:
    """The classes of a column that nobody has named: its values, integers in ascending order."""
    values = {value for of_split in of_splits for value in of_split}
    integers = [value for value in values if isinstance(value, int)]
    if len(integers) == len(values):
        return [str(value) for value in sorted(integers)]
    return sorted({str(value) for value in values})


# Images


@functools.lru_cache(maxsize=16)
def _groups(files: tuple[Path, ...]) -> tuple[np.ndarray, list[tuple[Path, int, int]]]:
    """The first row of each group of rows, counted through all files, and the end; and of each its file, the number
    within it, and the file's first row."""
    firsts, places = [0], []
    for file in files:
        with _opened(file) as opened:
            first_of_file = firsts[-1]
            for group in range(opened.num_row_groups):
                places.append((file, group, first_of_file))
                firsts.append(firsts[-1] + opened.metadata.row_group(group).num_rows)
    return np.array(firsts), places


def _items(request: Request, part: Part, files: tuple[Path, ...], column: str, indices: np.ndarray) -> Iterator[Item]:
    """The images in some rows, counted through all files; groups of rows that have none of them are not read."""
    import pyarrow as pa

    firsts, places = _groups(files)
    groups = np.unique(np.searchsorted(firsts, indices, side="right") - 1).tolist()
    for file, of_file in itertools.groupby(groups, key=lambda number: places[number][0]):
        with _opened(file) as opened:
            for number in of_file:
                row, (_, group, first_of_file) = int(firsts[number]), places[number]
                for batch in opened.iter_batches(batch_size=256, row_groups=[group], columns=[column]):
                    wanted = indices[np.searchsorted(indices, row) : np.searchsorted(indices, row + len(batch))]
                    values = _picked(batch, column).take(pa.array(wanted - row)).to_pylist()
                    for index, value in zip(wanted, values, strict=True):
                        content = value.get("bytes") if isinstance(value, dict) else value
                        where = f"{part} image in row {index - first_of_file} of {file}"
                        lacking = f"{where}: column '{column}' holds no image there"
                        yield Item(where, functools.partial(_open, content, lacking))
                    row += len(batch)


def _open(content: bytes | None, lacking: str) -> "Image":
    from PIL import Image

    if not isinstance(content, bytes):
        raise InputError(lacking)
    return Image.open(io.BytesIO(content))
