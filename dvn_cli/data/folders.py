"""Folders of images by class, and what lies in folders."""

import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dvn_cli.data import decode
from dvn_cli.data.decode import Item
from dvn_cli.data.listing import (
    TEST_SPLITS,
    TRAIN_SPLITS,
    VALIDATION_SPLITS,
    Listing,
    Part,
    Request,
    first_present,
    in_words,
    labelled,
    stratified_order,
)
from dvn_cli.errors import InputError, did_you_mean, shortened

FLAT_TEST_SHARE = 0.2
"""Of a folder of classes without splits."""

SYSTEM_FOLDERS = {
    "__macosx",
    "__pycache__",
    "@eadir",
    "#recycle",
    "$recycle.bin",
    "lost+found",
    "system volume information",
}
"""Folders that systems and programs leave beside a user's, in small letters, as are those that begin with a dot."""


def folder(request: Request, part: Part) -> Listing | None:
    """PATH/train/CLASS/* and PATH/test/CLASS/*, classes in the order of their names; `val` and its like do for test.

    To test on, PATH/test/CLASS/* alone is enough, and with the test split `.` PATH/CLASS/*. A folder that has classes
    and no splits, PATH/CLASS/*, is split: a fifth of each class is to test on, the same whatever a task's seed is.
    """
    root = request.path
    assert root is not None
    if not os.path.isdir(root):
        raise InputError(f"no folder {root}")
    folders = subfolders(root)
    if request.test_split == ".":
        if part == "train":
            raise InputError("the test split `.` is to evaluate on: leave test_split out to train")
        return _files_by_class(root, ".", _class_folders(root), part)
    if part == "validation" and not set(request.splits(part)) & set(folders):
        return None
    if part != "validation" and request.test_split is None and is_flat(root):
        return _flat_folder(root, part)
    train_split = next((name for name in TRAIN_SPLITS if name in folders), None)  # else there are test images alone
    try:
        split = first_present(request.splits(part), folders, f"{root} has no")
    except InputError as error:
        raise InputError(f"{error}{_advice(root, folders, train_split)}") from None
    classes = _class_folders(root / (train_split or split))
    unknown = [name for name in _class_folders(root / split) if name not in classes]
    if unknown:
        raise InputError(
            f"{root / split} has a class '{unknown[0]}' that {train_split} has not{did_you_mean(unknown[0], classes)}"
        )
    return _files_by_class(root / split, split, classes, part)


def unsplit(request: Request) -> Listing:
    """All images of a folder of classes, or of images alone.

    Raises:
        InputError: there are none.
    """
    root = request.path
    assert root is not None
    listing = _files_by_class(root, ".", tuple(subfolders(root)) or (".",), "test")
    if len(listing.labels) == 0:
        raise InputError(f"{root} has no images")
    return listing


def is_flat(root: Path) -> bool:
    """Whether a folder's folders are classes; not where some, or what is in them, are called as splits are."""
    folders = subfolders(root)
    first_words = {re.split(r"[^a-z]", name.casefold())[0] for name in folders}
    in_them = (below for name in folders for below in subfolders(root / name))
    return (
        bool(folders)
        and not any(map(_like_a_split, folders))
        and not (first_words & {"train", "training"} and first_words & {"test", "testing", *VALIDATION_SPLITS})
        and not any(map(_like_a_split, in_them))
    )


def _like_a_split(name: str) -> bool:
    return name.casefold() in {*TRAIN_SPLITS, *TEST_SPLITS, "training", "testing"}


def _advice(root: Path, folders: Sequence[str], train_split: str | None) -> str:
    """What someone may do whose splits are not found."""
    if train_split is not None:
        return f"; with {root / train_split} for path, a fifth of its images is to test on"
    inside = next((name for name in folders if any(map(_like_a_split, subfolders(root / name)))), None)
    if inside is not None and not any(map(_like_a_split, folders)):
        return f"; there are splits in '{inside}': is {root / inside} the path?"
    return ""


def _flat_folder(root: Path, part: Part) -> Listing:
    """A folder of classes without splits, and which of its images are to train and to test on."""
    return a_fifth(_files_by_class(root, ".", _class_folders(root), "train"), part, key=(root, part))


def a_fifth(whole: Listing, part: Part, key: Hashable) -> Listing:
    """Returns a fifth of images without splits, balanced over their strata, to test on, or the rest, to train on."""
    order = stratified_order(whole.strata.numpy(), seed=0)
    count = round(FLAT_TEST_SHARE * len(order))
    chosen = np.sort(order[:count] if part == "test" else order[count:])
    labels = whole.labels.numpy()[chosen]
    few = set(range(len(whole.class_names))) - set(labels.tolist()) - set(whole.empty)
    return replace(
        whole,
        split=f"{100 * (FLAT_TEST_SHARE if part == 'test' else 1 - FLAT_TEST_SHARE):g} % of its images",
        labels=torch.from_numpy(labels),
        strata=whole.strata[torch.from_numpy(chosen)],
        key=key,
        items=lambda indices: whole.items(chosen[indices]),
        left_out=Counter() if part == "test" else whole.left_out,
        empty={} if part == "test" else {**whole.empty, **dict.fromkeys(few, "it has too few to test on some")},
    )


def _files_by_class(root: Path, split: str, classes: Sequence[str], part: Part) -> Listing:
    """The images in ROOT/CLASS, at any depth."""
    left_out: Counter[str] = Counter()
    paths: list[str] = []
    labels: list[int] = []
    empty = {}
    for entry in _entries(root):
        if not os.path.isdir(entry.path):
            left_out[f"{_kind(entry.name)} beside the classes"] += 1
        elif _hidden(entry.name):
            left_out[f"{entry.name}/"] += 1
    for label, name in enumerate(classes):
        others: Counter[str] = Counter()
        own = files_below(root / name, _is_image, others) if os.path.isdir(root / name) else []
        paths += own
        labels += [label] * len(own)
        left_out += others
        if not own and part == "train":
            empty[label] = f"there is nothing but {in_words(others)}" if others else "it is empty"
            empty[label] = f"in {root / name}, {empty[label]}"

    def items(indices: np.ndarray) -> Iterator[Item]:
        from PIL import Image

        for index in indices:
            yield Item(f"{part} image {paths[index]}", functools.partial(Image.open, paths[index]))

    return labelled(split, labels, tuple(classes), key=(root, split), items=items, empty=empty, left_out=left_out)


def _is_image(name: str) -> bool:
    return _kind(name) in decode.suffixes()


def files_below(top: Path, wanted: Callable[[str], bool], left_out: Counter[str]) -> list[str]:
    """Lists files below a folder, in the order of their folders' names and then of their own.

    Links to folders are followed, but no folder is read twice, so that links in a circle come to an end.

    Args:
        top: The folder.
        wanted: Says by its name whether a file is one to list.
        left_out: Counts the others by kind; hidden ones and what is no regular file are never listed.
    """
    found: list[tuple[str, str]] = []
    seen = set()
    pending = [str(top)]
    while pending:
        path = pending.pop()
        entries = sorted(_entries(path), key=lambda entry: entry.name, reverse=True)
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
            left_out["link to a folder that is read already"] += 1
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            below = os.path.isdir(entry.path)
            if _hidden(entry.name):
                left_out[f"{entry.name}/" if below else "hidden"] += 1
            elif below:
                pending.append(entry.path)
            elif wanted(entry.name) and _is_file(entry):
                found.append((path, entry.name))
            else:
                left_out[_kind(entry.name)] += 1
    return [os.path.join(*pair) for pair in sorted(found)]


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a regular file, or a link to one or to nothing, which is named when it is read."""
    return entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path) or not os.path.exists(entry.path)


def _entries(path: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError as error:
        raise InputError(f"folder {shortened(str(path))} cannot be read: {error.strerror}") from None


def subfolders(root: Path) -> list[str]:
    """Names of the folders in a folder, but for hidden ones, in order."""
    return sorted(entry.name for entry in _entries(root) if os.path.isdir(entry.path) and not _hidden(entry.name))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.casefold() in SYSTEM_FOLDERS


def _kind(name: str) -> str:
    """The suffix of a file, by which it is counted."""
    return os.path.splitext(name)[1].lower() or ("hidden" if name.startswith(".") else "without suffix")


def _class_folders(root: Path) -> tuple[str, ...]:
    names = tuple(subfolders(root))
    if not names:
        raise InputError(f"{root} has no folders of classes")
    return names
