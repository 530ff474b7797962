"""Images from where they lie: one function for each kind of source, all with the same result."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dvn_cli import processes
from dvn_cli.data import tars
from dvn_cli.data.decode import Item
from dvn_cli.data.folders import folder
from dvn_cli.data.listing import Listing, Part, Request, in_words, labelled, stratified_order
from dvn_cli.errors import DvnError, InputError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image

DIGITS_TEST_IMAGES = 500


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

    return labelled(part, labels[chosen], tuple(map(str, range(10))), key=part, items=items)


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
        with processes.first_alone():
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
    return labelled(split, labels, tuple(map(str, names)), key=key, items=items)


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


SOURCES: dict[str, Callable[[Request, Part], Listing | None]] = {
    "digits": digits,
    "torchvision": torchvision_data,
    "folder": folder,
    "hf": hugging_face,
    "webdataset": tars.read,
}
