"""What the classes of published weights are called."""

import re

from dvn_cli.backbones.registry import BackboneSpec, default

IMAGENET = 1000
"""Classes of the classifiers that timm and torchvision publish, in the order of ILSVRC 2012."""


def class_numbers(spec: BackboneSpec) -> dict[str, int]:
    """Returns the numbers of the classes that a backbone's published weights tell apart, by every name of theirs.

    Names are those of WordNet, such as `n01440764`, and what they stand for, such as `tench`; see `folded`. A name that
    two classes have stands for neither. There are none where it is not known which classes these are.
    """
    if spec.source not in ("timm", "torchvision") or default(f"{spec.source}/{spec.name}").num_classes != IMAGENET:
        return {}
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    numbers: dict[str, set[int]] = {}
    for number in range(IMAGENET):
        description = info.index_to_description(number)
        for name in (info.index_to_label_name(number), description, *description.split(",")):
            numbers.setdefault(folded(name), set()).add(number)
    return {name: min(those) for name, those in numbers.items() if len(those) == 1}


def folded(name: str) -> str:
    """Returns a name in small letters, its words with one space between: `English_springer` is `english springer`."""
    return " ".join(re.split(r"[\W_]+", name.casefold().strip()))
