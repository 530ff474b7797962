"""Published weights into a backbone: from a file, or as timm and torchvision download them."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvn_cli.backbones.registry import BackboneSpec, classifier_tensors, first_line, timm_cfg, timm_options
from dvn_cli.errors import DvnError, InputError

if TYPE_CHECKING:
    from torch import nn


def load_weights(module: "nn.Module", spec: BackboneSpec, path: Path) -> list[str]:
    """Loads a state dict, as published, into a backbone built from `spec`.

    The file is safetensors (by its suffix) or torch's (read without executing anything in it); the state dict may lie
    under `state_dict` or `model`, and its names may have the prefix that data parallelism or compilation leaves.

    Returns:
        The names of the classifier's tensors, left as they were, where the file's have another number of classes.

    Raises:
        InputError: No such file, not a file of weights, or not the weights of this backbone.
    """
    from timm.models import load_state_dict

    if not path.is_file():
        raise InputError(f"no file {path}")
    try:
        state = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # each reader fails in its own ways at a file that is not its own
        raise InputError(f"{path} is not a file of weights: {first_line(error)}") from error
    return _fill(module, spec, state, str(path))


def load_pretrained(module: "nn.Module", spec: BackboneSpec) -> list[str]:
    """Loads the weights that timm or torchvision publishes for a backbone, downloaded once, into one built from `spec`.

    Returns:
        The names of the classifier's tensors, left as they were, where `spec` has another number of classes.

    Raises:
        InputError: There are none, or not for these images.
        DvnError: They cannot be downloaded.
    """
    if spec.source not in _PRETRAINED:
        raise InputError(f"nobody publishes weights of {spec.name}: give a file of them, or load them in the factory")
    return _PRETRAINED[spec.source](module, spec)


def _timm_pretrained(module: "nn.Module", spec: BackboneSpec) -> list[str]:
    import timm

    cfg = timm_cfg(spec.name)
    if not cfg.has_weights:
        raise InputError(f"there are no pretrained weights of {spec.name}")
    try:  # timm fits the input layer and the position table to the spec's images
        state = timm.create_model(spec.name, pretrained=True, **timm_options(spec)).state_dict()
    except Exception as error:
        raise _unavailable(spec, error) from error
    own = module.state_dict()
    left_out = list(classifier_tensors(spec)) if cfg.num_classes != spec.num_classes else []
    module.load_state_dict(state | {name: own[name] for name in left_out})
    return left_out


def _torchvision_pretrained(module: "nn.Module", spec: BackboneSpec) -> list[str]:
    from torchvision import models

    try:
        state = models.get_model(spec.name, weights="DEFAULT").state_dict()
    except Exception as error:
        raise _unavailable(spec, error) from error
    return _fill(module, spec, state, f"the pretrained {spec.name}")


def _unavailable(spec: BackboneSpec, error: Exception) -> DvnError:
    return DvnError(f"the pretrained weights of {spec.name} cannot be had: {first_line(error)}")


_PRETRAINED = {"timm": _timm_pretrained, "torchvision": _torchvision_pretrained}


def _fill(module: "nn.Module", spec: BackboneSpec, state: Mapping[str, Any], origin: str) -> list[str]:
    """Loads a state dict except for a classifier of another number of classes, whose names it returns.

    Raises:
        InputError: Names are missing, unknown, or of another shape.
    """
    own = module.state_dict()
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
    mismatched = [name for name in state if name in own and shapes[name] != own[name].shape]
    class_dim = classifier_tensors(spec) if mismatched else {}

    def other_classes(name: str) -> bool:
        dim = class_dim.get(name)
        return dim is not None and _without(shapes[name], dim) == _without(tuple(own[name].shape), dim)

    left_out = [name for name in mismatched if other_classes(name)]
    problems = [
        f"{name} has shape {list(shapes[name])}, not {list(own[name].shape)}"
        for name in mismatched
        if name not in left_out
    ]
    fitting = {name: value for name, value in state.items() if name not in mismatched and not _is_off(module, name)}
    result = module.load_state_dict(fitting, strict=False)
    problems += [f"{name} is missing" for name in result.missing_keys if name not in mismatched]
    problems += [f"{name} is unknown" for name in result.unexpected_keys]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(f"{origin} does not fit {spec.name}: {', '.join(problems[:3])}{more}")
    return left_out


def _without(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return shape[:dim] + shape[dim + 1 :]


def _is_off(module: "nn.Module", name: str) -> bool:
    """Whether a name belongs to a part that the module was built without, such as an auxiliary head for training."""
    return getattr(module, name.partition(".")[0], module) is None
