"""WebDataset's tar files, read at any place: the headers of a tar say where each of its files lies.

A sample is what one tar has under one name up to the first dot of its last part: `0001/7.jpg` and `0001/7.cls`
(https://github.com/webdataset/webdataset). Order, resuming and sharing out are thus those of every other source.
"""

import functools
import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from dvn_cli.data import decode
from dvn_cli.data.decode import Item
from dvn_cli.data.folders import a_fifth, files_below
from dvn_cli.data.listing import SHORT, TEST_SPLITS, TRAIN_SPLITS, Listing, Part, Request, first_present, strata_of
from dvn_cli.data.spec import braces
from dvn_cli.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST_LABEL = 1024
"""Bytes of a file that names a class."""


class Member(NamedTuple):
    """A file within a tar: where its bytes lie."""

    tar: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def read(request: Request, part: Part) -> Listing | None:
    """Lists one split of a folder of tars, of some, or of one.

    A tar's split is the first word of its path below the folder that names one (`imagenet-train-0001.tar`,
    `train/0001.tar`); without such words, a fifth is to test on, balanced over all that may be labels.

    Raises:
        InputError: No such folder, tar or split, a tar that is compressed or damaged, or a sample without a label.
    """
    root = request.path
    assert root is not None
    found = tar_files(root)
    if not found:
        raise InputError(f"{root} is no folder of tar files, and no tar file")
    known = {*TRAIN_SPLITS, *TEST_SPLITS, *request.splits("test")}
    by_split: dict[str, list[Path]] = {}
    folder = root if root.is_dir() else os.path.dirname(str(root).partition("{")[0])
    for path in found:
        words = re.split(r"\W|_", str(path.relative_to(folder)))
        by_split.setdefault(next((word for word in words if word in known), ""), []).append(path)
    if part == "validation" and not set(request.splits(part)) & set(by_split):
        return None
    if set(by_split) == {""}:
        whole = _listing(request, "", by_split[""], by_split[""], "train")
        return a_fifth(whole, part, key=(root, part))
    to_learn = part == "train" or set(TRAIN_SPLITS) & set(by_split)
    split = first_present(request.splits(part), sorted(by_split), f"{request} has no tar files of")
    train = first_present(TRAIN_SPLITS, sorted(by_split), f"{request} has no tar files of") if to_learn else split
    return _listing(request, split, by_split[split], by_split[train], part)


def tar_files(root: Path) -> list[Path]:
    """Lists the tar files below a folder, in order, or those of a pattern (`spec.braces`), as of the path of one.

    Raises:
        InputError: One of a pattern is not there.
    """
    if root.is_dir():
        return sorted(map(Path, files_below(root, lambda name: name.endswith(".tar"), Counter())))
    found = dict[Path, None]()
    for path in map(Path, braces(str(root))):
        if path.suffix != ".tar" or not path.is_file():
            if path == root:
                return []
            raise InputError(f"there is no tar file {path}, of {root.name}")
        found[path] = None
    return list(found)


def _listing(request: Request, split: str, tars: list[Path], train: list[Path], part: Part) -> Listing:
    """The samples of a split, whose classes are those of train too: integers in ascending order, or names."""
    images, values, labels_of, left_out = _samples(request, tuple(tars))
    known = {*values, *(values if train == tars else _samples(request, tuple(train))[1])}
    names = sorted(known, key=lambda name: (0, int(name), "") if name.isdecimal() else (1, 0, name))
    place = {name: label for label, name in enumerate(names)}

    def items(indices: np.ndarray) -> Iterator[Item]:
        for index in indices:
            member = images[index]
            yield Item(f"{part} image {member.name} of {member.tar}", functools.partial(_open, member))

    labels = torch.tensor([place[value] for value in values], dtype=torch.int64)
    strata = torch.from_numpy(strata_of(labels_of, len(labels)))
    return Listing(
        split, labels, tuple(names), strata=strata, key=(request.image, *tars), items=items, left_out=left_out
    )


@functools.lru_cache(maxsize=4)
def _samples(
    request: Request, tars: tuple[Path, ...]
) -> tuple[list[Member], list[str], list[np.ndarray], Counter[str]]:
    """Of each sample the image and the text of its label; of all that may be labels which value each sample has, int64
    (N,), the same for tasks of other labels; and what lies in the tars and is not read.
    """
    images, values, left_out = list[Member](), list[str](), Counter[str]()
    known: dict[str, tuple[dict[str, int], list[int]]] = {}
    suffix = f".{request.label or 'cls'}".lower()  # as names in the tars are compared
    wanted = decode.suffixes() if request.image is None else {f".{request.image}".lower()}
    for tar in tars:
        samples: dict[str, dict[str, Member]] = {}
        for member in _members(tar):
            folder, _, name = member.name.rpartition("/")
            key, dot, rest = name.partition(".")
            samples.setdefault(f"{folder}/{key}", {})[(dot + rest).lower()] = member
        if not images:
            with_image = [members for members in samples.values() if not wanted.isdisjoint(members)]
            known = {end: ({}, []) for end in _may_be_labels(with_image)}
        for members in samples.values():
            of_image = [end for end in members if end in wanted]
            left_out.update(end or "without suffix" for end in members if end not in (suffix, *of_image))
            if not of_image:
                continue
            image = members[of_image[0]]
            if len(of_image) > 1:
                raise InputError(
                    f"{tar} has {image.name} and {members[of_image[1]].name}: name one's suffix with image"
                )
            if suffix not in members:
                raise InputError(f"{tar} has {image.name}, and no {suffix} file that names its class: see label")
            images.append(image)
            values.append(_label(members[suffix]))
            for end, (place, codes) in known.items():
                text = values[-1] if end == suffix else _text(members.get(end))
                codes.append(place.setdefault(text, len(place)))
    return images, values, [np.array(codes, dtype=np.int64) for _, codes in known.values()], left_out


def _may_be_labels(samples: Sequence[Mapping[str, Member]]) -> list[str]:
    """Suffixes of short files that all of some samples have."""
    images = decode.suffixes()
    of_each = [{end for end, of in each.items() if of.size <= SHORT and end not in images} for each in samples]
    return sorted(set.intersection(*of_each)) if of_each else []


def _members(tar: Path) -> list[Member]:
    """The regular files of a tar, in its order."""
    try:
        with tarfile.open(tar, "r:") as opened:
            return [Member(tar, found.name, found.offset_data, found.size) for found in opened if found.isreg()]
    except (tarfile.TarError, OSError, ValueError) as error:
        raise InputError(f"{tar} cannot be read: {error or type(error).__name__} (an uncompressed tar?)") from error


def _label(member: Member) -> str:
    value = _text(member)
    if not value:
        raise InputError(f"{member.name} of {member.tar} names no class: it is empty or has over {LONGEST_LABEL} bytes")
    return value


def _text(member: Member | None) -> str:
    """What a file says that names a class; nothing where there is none, or a longer one."""
    value = "" if member is None or member.size > LONGEST_LABEL else member.read().decode(errors="replace").strip()
    return str(int(value)) if value.isdecimal() else value


def _open(member: Member) -> "Image":
    from PIL import Image

    return Image.open(io.BytesIO(member.read()))
