"""Images from where they lie: one function for each kind of source, all with the same result."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dvn_cli.data.resize import Resize
from dvn_cli.data.spec import DataSpec, locate
from dvn_cli.errors import DvnError, InputError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image

TRAIN_SPLITS = ("train", "trainval")
TEST_SPLITS = ("test", "validation", "valid", "val")
DIGITS_TEST_IMAGES = 500


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
        path = None if spec.path is None else locate(spec.path, base).resolve()
        columns = spec.image, spec.label, spec.subset, spec.test_split
        return cls(spec.source, spec.name, path, *columns, spec.height_width, channels, Resize.of(spec))

    def splits(self, train: bool) -> tuple[str, ...]:
        """The names that the split may have, the first found counts."""
        if train:
            return TRAIN_SPLITS
        return TEST_SPLITS if self.test_split is None else (self.test_split,)

    def __str__(self) -> str:
        return str(self.name or self.path or self.source)


@dataclass(frozen=True, eq=False)
class Images:
    """One split of a data set, decoded.

    Attributes:
        images: uint8 (N, C, H, W).
        labels: int64 (N,), the index of each image's class.
        class_names: Of all classes.
        strata: int64 (N,), what random choices of images are balanced over. The same whichever column is the label,
            so that tasks of one data set choose the same images.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    strata: Tensor


@functools.lru_cache(maxsize=16)
def read(request: Request, train: bool) -> Images:
    """Reads the train or the test split; a second reading of the same costs nothing.

    Raises:
        InputError: What the request asks for is not there.
        DvnError: It cannot be downloaded.
    """
    images = SOURCES[request.source](request, train)
    if len(images.labels) == 0:
        raise InputError(f"{request} has no {'train' if train else 'test'} images")
    bad = (images.labels < 0) | (images.labels >= len(images.class_names))
    if bad.any():
        raise InputError(
            f"{int(bad.sum())} {'train' if train else 'test'} images of {request} have no class (label "
            f"{int(images.labels[bad][0])}); another split may have them, see test_split"
        )
    return images


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


def stack(decoded: Iterable["Image"], count: int, request: Request) -> Tensor:
    """Decodes PIL images into one tensor, uint8 (N, C, H, W), with the channels and of the size requested.

    Raises:
        InputError: They are of different sizes and none is requested, or of more than 8 bits a channel.
    """
    modes = {1: "L", 3: "RGB"}
    if request.channels not in modes:
        raise InputError(f"images have 1 or 3 channels, not {request.channels}")
    out = np.empty((0, request.channels, 1, 1), dtype=np.uint8)
    number = -1
    try:
        for number, image in enumerate(decoded):
            if image.mode.startswith(("I", "F")):
                raise InputError(f"image {number} of {request} has more than 8 bits a channel ({image.mode})")
            image = image.convert(modes[request.channels])
            if request.size is not None:
                image = request.resize(image, request.size)
            if number == 0:
                out = np.empty((count, request.channels, image.height, image.width), dtype=np.uint8)
            elif out.shape[2:] != (image.height, image.width):
                sizes = f"{out.shape[2]}x{out.shape[3]} and {image.height}x{image.width}"
                raise InputError(f"images of {request} have different sizes ({sizes}): set size")
            out[number] = np.asarray(image).reshape(*out.shape[2:], request.channels).transpose(2, 0, 1)
    except OSError as error:
        raise InputError(
            f"an image of {request}, after {number + 1} good ones, cannot be read: {_line(error)}"
        ) from error
    return torch.from_numpy(out)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def digits(request: Request, train: bool) -> Images:
    """The UCI handwritten digits, 8x8 (see digits.LICENSE.txt): 500 test images, 1,297 to train.

    The test images are the first 500 of `stratified_order(labels, seed=0)`, whatever a task's seed is.
    """
    from PIL import Image

    with np.load(Path(__file__).parent / "digits.npz", allow_pickle=False) as file:
        images, labels = file["images"], file["labels"].astype(np.int64)
    order = stratified_order(labels, seed=0)
    chosen = np.sort(order[DIGITS_TEST_IMAGES:] if train else order[:DIGITS_TEST_IMAGES])
    pixels = np.rint(images[chosen] * (255 / 16)).astype(np.uint8)
    tensor = stack(map(Image.fromarray, pixels), len(chosen), request)
    return _labelled(tensor, labels[chosen], tuple(map(str, range(10))))


def folder(request: Request, train: bool) -> Images:
    """PATH/train/CLASS/* and PATH/test/CLASS/*, classes in the order of their names; `val` and its like do for test.

    To test on, PATH/test/CLASS/* alone is enough, and with the test split `.` PATH/CLASS/*.
    """
    from PIL import Image
    from torchvision.datasets import ImageFolder

    root = request.path
    assert root is not None
    if not root.is_dir():
        raise InputError(f"no folder {root}")
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    itself = request.test_split == "."
    if train or (not itself and set(TRAIN_SPLITS) & set(folders)):
        train_root = first_present(TRAIN_SPLITS, folders, f"{root} has no")
    else:
        train_root = None  # images to test on alone: their classes are those there are
    test_root = "." if itself else first_present(request.splits(train=False), folders, f"{root} has no")
    classes = _class_folders(root / (train_root or test_root))
    chosen = root / (train_root if train and train_root else test_root)
    unknown = [name for name in _class_folders(chosen) if name not in classes]
    if unknown:
        raise InputError(
            f"{chosen} has a class '{unknown[0]}' that {train_root} has not{did_you_mean(unknown[0], classes)}"
        )
    files = ImageFolder(chosen, allow_empty=True)
    labels = [classes.index(files.classes[label]) for label in files.targets]
    return _labelled(stack((Image.open(path) for path, _ in files.samples), len(labels), request), labels, classes)


def _class_folders(root: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir()))
    if not names:
        raise InputError(f"{root} has no folders of classes")
    return names


def first_present(names: Sequence[str], present: Sequence[str], has_no: str) -> str:
    """The first of the names that is present."""
    for name in names:
        if name in present:
            return name
    raise InputError(f"{has_no} {' or '.join(names)}; there is: {', '.join(present) or 'nothing'}")


def torchvision_data(request: Request, train: bool) -> Images:
    """A data set of torchvision.datasets that has a train and a test part, downloaded if it can be and is not there."""
    from torchvision import datasets

    name = str(request.name)
    usable = {item: parameters for item in datasets.__all__ if {"train", "split"} & (parameters := _parameters(item))}
    if name not in usable:
        raise InputError(f"torchvision has no data set '{name}' of images by class{did_you_mean(name, usable)}")
    parameters = usable[name]
    for field, taken in (("subset", {"train", "split"} <= parameters), ("test_split", "train" not in parameters)):
        if getattr(request, field) is not None and not taken:
            raise InputError(f"torchvision's {name} takes no {field}")
    options: dict[str, Any] = {"root": str(request.path or Path(torch.hub.get_dir()).parent / "datasets")}
    if "download" in parameters:
        options["download"] = True
    if "train" not in parameters:
        choices: list[dict[str, Any]] = [{"split": split} for split in request.splits(train)]
    elif "split" not in parameters:
        choices = [{"train": train}]
    elif request.subset is not None:
        choices = [{"train": train, "split": request.subset}]
    else:
        raise InputError(f"torchvision's {name} comes in several: name one with subset")
    data = _construct(name, options, choices)
    labels: list[int] = []

    def images() -> Iterator["Image"]:
        for index in range(len(data)):
            image, label = data[index]
            try:
                labels.append(int(label))
            except (TypeError, ValueError) as error:
                raise InputError(f"torchvision's {name} does not label each image with one class") from error
            yield image

    tensor = stack(images(), len(data), request)
    names = getattr(data, "classes", None)
    if not names:  # its labels are all that there is to call the classes by
        names, places = np.unique(labels, return_inverse=True)
        return _labelled(tensor, places, tuple(map(str, names)))
    return _labelled(tensor, labels, tuple(map(str, names)))


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


def _construct(name: str, options: dict[str, Any], choices: list[dict[str, Any]]) -> Any:
    """Builds a torchvision data set with the first choice of arguments that it accepts."""
    from torchvision import datasets

    problem: Exception | None = None
    for choice in choices:
        try:
            return getattr(datasets, name)(**options, **choice)
        except (TypeError, ValueError) as error:  # it has no such split, or wants more than images by class need
            problem = problem or error
        except (OSError, RuntimeError) as error:
            raise DvnError(f"torchvision's {name} cannot be had: {_line(error)}") from error
    raise InputError(f"torchvision's {name} cannot be used: {_line(problem or ValueError())}") from problem


def hugging_face(request: Request, train: bool) -> Images:
    """Parquet files in a local folder or on the hub."""
    from dvn_cli.data import parquet

    return parquet.read(request, train)


def _labelled(images: Tensor, labels: Sequence[int] | np.ndarray, names: tuple[str, ...]) -> Images:
    of_image = torch.as_tensor(np.asarray(labels, dtype=np.int64))
    return Images(images, of_image, names, strata=of_image)


SOURCES: dict[str, Callable[[Request, bool], Images]] = {
    "digits": digits,
    "torchvision": torchvision_data,
    "folder": folder,
    "hf": hugging_face,
}
