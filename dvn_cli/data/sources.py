"""Images from where they lie: one function for each kind of source, all with the same result."""

import functools
import inspect
import os
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dvn_cli.data import decode
from dvn_cli.data.decode import Item
from dvn_cli.data.resize import Resize
from dvn_cli.data.spec import DataSpec, locate
from dvn_cli.errors import DvnError, InputError, did_you_mean, shortened

if TYPE_CHECKING:
    from PIL.Image import Image

Part = Literal["train", "validation", "test"]
Items = Callable[[np.ndarray], Iterator[Item]]

TRAIN_SPLITS = ("train", "trainval")
VALIDATION_SPLITS = ("validation", "valid", "val", "dev")
TEST_SPLITS = ("test", *VALIDATION_SPLITS)
DIGITS_TEST_IMAGES = 500
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


class Request(NamedTuple):
    """What is to be read. Tasks whose requests are equal share one reading."""

    source: str
    name: str | None
    path: Path | None
    image: str | None
    label: str | None
    subset: str | None
    test_split: str | None
    size: tuple[int, int] | None
    channels: int
    resize: Resize = Resize()

    @classmethod
    def of(cls, spec: DataSpec, channels: int, base: Path | None) -> "Request":
        """The request of a task's data, as images of `channels` channels, paths relative to `base`."""
        path = None if spec.path is None else Path(os.path.realpath(locate(spec.path, base)))
        columns = spec.image, spec.label, spec.subset, spec.test_split
        return cls(spec.source, spec.name, path, *columns, spec.height_width, channels, Resize.of(spec))

    def splits(self, part: Part) -> tuple[str, ...]:
        """The names that the split may have, the first found counts; what is tested on is no validation split."""
        if part == "train":
            return TRAIN_SPLITS
        if part == "validation":
            return tuple(name for name in VALIDATION_SPLITS if name != self.test_split)
        return TEST_SPLITS if self.test_split is None else (self.test_split,)

    def __str__(self) -> str:
        return str(self.name or self.path or self.source)


@dataclass(frozen=True, eq=False)
class Listing:
    """One part of a data set, its images not decoded yet.

    Attributes:
        split: What the source calls it.
        labels: int64 (N,), the index of each image's class.
        class_names: Of all classes.
        strata: int64 (N,), what random choices of images are balanced over. The same whichever column is the label,
            so that tasks of one data set choose the same images.
        key: Equal for listings of the same images.
        items: Given indices of images in rising order, those images.
        empty: Classes that ought to have images and have none, by their index, and what is there instead.
        left_out: How many files, by kind, lie there and are not read.
    """

    split: str
    labels: Tensor
    class_names: tuple[str, ...]
    strata: Tensor
    key: Hashable
    items: Items
    empty: Mapping[int, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)


def read(request: Request, part: Part) -> Listing | None:
    """Lists the images of one part; None where the source has no validation split beside the one to test on.

    Raises:
        InputError: What the request asks for is not there.
        DvnError: It cannot be downloaded.
    """
    listing = SOURCES[request.source](request, part)
    if listing is None:
        return None
    if len(listing.labels) == 0:
        beside = f": {in_words(listing.left_out)} left out" if listing.left_out else ""
        raise InputError(f"{request} has no {part} images{beside}")
    bad = (listing.labels < 0) | (listing.labels >= len(listing.class_names))
    if bad.any():
        raise InputError(
            f"{int(bad.sum())} {part} images of {request} have no class (label "
            f"{int(listing.labels[bad][0])}); another split may have them, see test_split"
        )
    return listing


def in_words(left_out: Mapping[str, int]) -> str:
    """Counts of files by kind: 3 .txt, 1 hidden."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))


def stratified_order(strata: np.ndarray, seed: int) -> np.ndarray:
    """Returns a random order of the images in which every prefix has the strata in their proportions, nearly.

    The n images of a stratum are shuffled and spread evenly: the i-th stands at (i + 1/2) / n of the way. Drawn with
    numpy's legacy generator, whose stream numpy keeps for ever, so that a choice of images outlives all versions.

    Args:
        strata: Integers (N,).
        seed: Of the shuffle.
    """
    shuffled = np.random.RandomState(seed).permutation(len(strata))
    of_shuffled = strata[shuffled]
    place = np.empty(len(strata))
    for stratum in np.unique(strata):
        members = np.flatnonzero(of_shuffled == stratum)
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return shuffled[np.argsort(place, kind="stable")]


def stack(items: Callable[[], Iterable[Item]], count: int, request: Request) -> Tensor:
    """Decodes images into one tensor, uint8 (N, C, H, W), with the channels and of the size requested.

    Args:
        items: Begins to go through the images; more than once where their range of values must be known first.
        count: Of the images, N.
        request: Has the channels, 1 or 3, and the size.

    Raises:
        InputError: They are of different sizes and none is requested, or one cannot be read.
        MemoryError: There is too little memory.
    """
    mode = {1: "L", 3: "RGB"}[request.channels]
    white = functools.cache(lambda of_mode: decode.white_of(items(), of_mode))
    out = np.empty((0, request.channels, 1, 1), dtype=np.uint8)
    for number, item in enumerate(items()):
        stored = decode.upright(item)
        with decode.named(item):
            image = decode.eight_bit(stored, mode, white)
        if request.size is not None:
            image = request.resize(image, request.size)
        if number == 0:
            out = np.empty((count, request.channels, image.height, image.width), dtype=np.uint8)
        elif out.shape[2:] != (image.height, image.width):
            sizes = f"{out.shape[2]}x{out.shape[3]} and {image.height}x{image.width}"
            raise InputError(f"images of {request} have different sizes ({sizes}): set size")
        out[number] = np.asarray(image).reshape(*out.shape[2:], request.channels).transpose(2, 0, 1)
    return torch.from_numpy(out)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def digits(request: Request, part: Part) -> Listing | None:
    """The UCI handwritten digits, 8x8 (see digits.LICENSE.txt): 500 test images, 1,297 to train.

    The test images are the first 500 of `stratified_order(labels, seed=0)`, whatever a task's seed is.
    """
    from PIL import Image

    if part == "validation":
        return None
    with np.load(Path(__file__).parent / "digits.npz", allow_pickle=False) as file:
        images, labels = file["images"], file["labels"].astype(np.int64)
    order = stratified_order(labels, seed=0)
    chosen = np.sort(order[DIGITS_TEST_IMAGES:] if part == "train" else order[:DIGITS_TEST_IMAGES])
    pixels = np.rint(images[chosen] * (255 / 16)).astype(np.uint8)

    def items(indices: np.ndarray) -> Iterator[Item]:
        for index in indices:
            yield Item(f"{part} image {index} of the digits", functools.partial(Image.fromarray, pixels[index]))

    return _labelled(part, labels[chosen], tuple(map(str, range(10))), key=part, items=items)


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
    if part != "validation" and request.test_split is None and _is_flat(root, folders):
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


def _is_flat(root: Path, folders: Sequence[str]) -> bool:
    """Whether folders are classes; not where some, or what is in them, are called as splits are."""
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
    classes = _class_folders(root)
    whole = _files_by_class(root, ".", classes, "train")
    order = stratified_order(whole.labels.numpy(), seed=0)
    count = round(FLAT_TEST_SHARE * len(order))
    chosen = np.sort(order[:count] if part == "test" else order[count:])
    labels = whole.labels.numpy()[chosen]
    few = set(range(len(classes))) - set(labels.tolist()) - set(whole.empty)
    return replace(
        whole,
        split=f"{100 * (FLAT_TEST_SHARE if part == 'test' else 1 - FLAT_TEST_SHARE):g} % of its images",
        labels=torch.from_numpy(labels),
        strata=torch.from_numpy(labels),
        key=(root, part),
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

    return _labelled(split, labels, tuple(classes), key=(root, split), items=items, empty=empty, left_out=left_out)


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


def first_present(names: Sequence[str], present: Sequence[str], has_no: str) -> str:
    """The first of the names that is present."""
    for name in names:
        if name in present:
            return name
    raise InputError(f"{has_no} {' or '.join(names)}; there is: {', '.join(present) or 'nothing'}")


def torchvision_data(request: Request, part: Part) -> Listing | None:
    """A data set of torchvision.datasets that has a train and a test part, downloaded if it can be and is not there."""
    from torchvision import datasets

    name = str(request.name)
    usable = {item: parameters for item in datasets.__all__ if {"train", "split"} & (parameters := _parameters(item))}
    if name not in usable:
        raise InputError(f"torchvision has no data set '{name}' of images by class{did_you_mean(name, usable)}")
    parameters = usable[name]
    if part == "validation" and "train" in parameters:
        return None
    for option, taken in (("subset", {"train", "split"} <= parameters), ("test_split", "train" not in parameters)):
        if getattr(request, option) is not None and not taken:
            raise InputError(f"torchvision's {name} takes no {option}")
    options: dict[str, Any] = {"root": str(request.path or Path(torch.hub.get_dir()).parent / "datasets")}
    if "download" in parameters:
        options["download"] = True
    if "train" not in parameters:
        choices: list[dict[str, Any]] = [{"split": split} for split in request.splits(part)]
    elif "split" not in parameters:
        choices = [{"train": part == "train"}]
    elif request.subset is not None:
        choices = [{"train": part == "train", "split": request.subset}]
    else:
        raise InputError(f"torchvision's {name} comes in several: name one with subset")
    try:
        data, choice = _construct(name, options, choices)
    except InputError:
        if part == "validation":
            return None
        raise
    labels: Sequence[int] | np.ndarray = _labels(name, data)
    names = getattr(data, "classes", None)
    if not names:  # its labels are all that there is to call the classes by
        names, labels = np.unique(labels, return_inverse=True)

    def items(indices: np.ndarray) -> Iterator[Item]:
        for index in indices:
            yield Item(f"{part} image {index} of torchvision's {name}", functools.partial(_image, data, int(index)))

    split = part if "train" in choice else choice["split"]
    key = (name, options["root"], *choice.values())
    return _labelled(split, labels, tuple(map(str, names)), key=key, items=items)


def _image(data: Any, index: int) -> "Image":
    return data[index][0]


def _labels(name: str, data: Any) -> list[int]:
    """The class of each image of a torchvision data set, without decoding all of them where it keeps a list.

    The list goes by several names, and is believed if a few of the images have the labels that it says.
    """

    def label(index: int) -> int:
        try:
            return int(data[index][1])
        except (TypeError, ValueError) as error:
            raise InputError(f"torchvision's {name} does not label each image with one class") from error

    some = np.linspace(0, len(data) - 1, min(len(data), 10)).astype(int).tolist()
    for attribute in ("targets", "labels", "_labels"):
        kept = getattr(data, attribute, None)
        if kept is None or len(kept) != len(data):
            continue
        values = np.asarray(kept)
        if values.dtype.kind in "iu" and values.ndim == 1 and all(values[index] == label(index) for index in some):
            return values.tolist()
    return [label(index) for index in range(len(data))]


def _parameters(name: str) -> set[str]:
    """The arguments of a torchvision data set, those that it hands on to its base included."""
    from torchvision import datasets

    parameters: set[str] = set()
    for cls in inspect.getmro(getattr(datasets, name)) if inspect.isclass(getattr(datasets, name)) else ():
        if "__init__" in vars(cls):
            own = inspect.signature(vars(cls)["__init__"]).parameters
            parameters |= set(own)
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()):
                break
    return parameters


def _construct(name: str, options: dict[str, Any], choices: list[dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """Builds a torchvision data set with the first choice of arguments that it accepts, and says which that is."""
    from torchvision import datasets

    problem: Exception | None = None
    for choice in choices:
        try:
            return getattr(datasets, name)(**options, **choice), choice
        except (TypeError, ValueError) as error:  # it has no such split, or wants more than images by class need
            problem = problem or error
        except Exception as error:  # no connection, or whatever its reader raises at damaged files
            raise DvnError(f"torchvision's {name} cannot be had: {_line(error)}") from error
    raise InputError(f"torchvision's {name} cannot be used: {_line(problem or ValueError())}") from problem


def hugging_face(request: Request, part: Part) -> Listing | None:
    """Parquet files in a local folder or on the hub."""
    from dvn_cli.data import parquet

    return parquet.read(request, part)


def _labelled(
    split: str, labels: Sequence[int] | np.ndarray, names: tuple[str, ...], *, key: Hashable, items: Items, **more: Any
) -> Listing:
    """A listing of images that have one label each, which random choices are balanced over."""
    of_image = torch.as_tensor(np.asarray(labels, dtype=np.int64))
    return Listing(split, of_image, names, strata=of_image, key=key, items=items, **more)


SOURCES: dict[str, Callable[[Request, Part], Listing | None]] = {
    "digits": digits,
    "torchvision": torchvision_data,
    "folder": folder,
    "hf": hugging_face,
}
