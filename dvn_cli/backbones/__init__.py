"""Names to modules: timm's and torchvision's classifiers, and the paper's own backbones."""

from dvn_cli.backbones.registry import (
    BackboneSpec,
    Preprocessing,
    classifier_tensors,
    head,
    preprocessing,
    resolve,
)
from dvn_cli.backbones.weights import load_pretrained, load_weights

__all__ = [
    "BackboneSpec",
    "Preprocessing",
    "classifier_tensors",
    "head",
    "load_pretrained",
    "load_weights",
    "preprocessing",
    "resolve",
]
