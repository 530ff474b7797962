"""Names to modules: timm's and torchvision's classifiers, the paper's own backbones, and factories of the user's."""

from dvn_cli.backbones.registry import (
    BackboneSpec,
    classifier_tensors,
    default,
    head,
    is_installed,
    preprocessing,
    resolve,
)
from dvn_cli.backbones.weights import load_pretrained, load_weights

__all__ = [
    "BackboneSpec",
    "classifier_tensors",
    "default",
    "head",
    "is_installed",
    "load_pretrained",
    "load_weights",
    "preprocessing",
    "resolve",
]
