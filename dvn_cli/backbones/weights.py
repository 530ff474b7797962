"""Published weights into a backbone: from a file, or as timm and torchvision download them."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

from dvn_cli.backbones import state_dicts
from dvn_cli.backbones.registry import BackboneSpec, classifier_tensors, first_line, head, timm_cfg, timm_options
from dvn_cli.backbones.state_dicts import few, is_unpacked
from dvn_cli.errors import DvnError, InputError, shortened

if TYPE_CHECKING:
    from torch import Tensor, nn

Note = Callable[[str], None]
"""Told, in a line each, of what was done to make something fit."""


def load_weights(module: "nn.Module", spec: BackboneSpec, path: Path, note: Note | None = None) -> list[str]:
    """Loads a state dict, as people have them, into a backbone built from `spec`.

    The file is safetensors or torch's (read without executing anything in it). The state dict may lie under a key, and
    its names may have a prefix. An input layer for other channels, and tables that follow the size of the images, are
    adapted as timm does for the weights that it publishes.

    Returns:
        The names of the classifier's tensors, left as they were, where the file has none for these classes.

    Raises:
        InputError: No such file, not a file of weights, or not the weights of this backbone.
    """
    found = state_dicts.find(state_dicts.read(path), module.state_dict(), str(path))
    return _fill(module, spec, found.state, str(path), note, found.done)


def load_pretrained(module: "nn.Module", spec: BackboneSpec, note: Note | None = None) -> list[str]:
    """Loads the weights that timm or torchvision publishes for a backbone, downloaded once, into one built from `spec`.

    Returns:
        The names of the classifier's tensors, left as they were, where `spec` has another number of classes.

    Raises:
        InputError: There are none, or not for these images.
        DvnError: They cannot be downloaded.
    """
    if spec.source not in _PRETRAINED:
        raise InputError(f"nobody publishes weights of {spec.name}: give a file of them, or load them in the factory")
    return _fill(module, spec, _PRETRAINED[spec.source](spec), f"the pretrained {spec.name}", note)


def _timm_pretrained(spec: BackboneSpec) -> dict[str, Any]:
    import timm

    cfg = timm_cfg(spec.name)
    if not cfg.has_weights:
        raise InputError(f"there are no pretrained weights of {spec.name}")
    try:  # timm fits the input layer and the position table to the spec's images
        state = timm.create_model(spec.name, pretrained=True, **timm_options(spec)).state_dict()
    except Exception as error:
        raise _unavailable(spec, error) from error
    if cfg.num_classes == spec.num_classes:
        return state
    inside = _head(spec)
    return {name: value for name, value in state.items() if not name.startswith(inside)}


def _torchvision_pretrained(spec: BackboneSpec) -> dict[str, Any]:
    from torchvision import models

    try:
        return models.get_model(spec.name, weights="DEFAULT").state_dict()
    except Exception as error:
        raise _unavailable(spec, error) from error


def _unavailable(spec: BackboneSpec, error: Exception) -> DvnError:
    return DvnError(f"the pretrained weights of {spec.name} cannot be had: {first_line(error)}")


_PRETRAINED = {"timm": _timm_pretrained, "torchvision": _torchvision_pretrained}


def _head(spec: BackboneSpec) -> tuple[str, ...]:
    return tuple(f"{path}." for path in head(spec))


def _fill(
    module: "nn.Module",
    spec: BackboneSpec,
    state: Mapping[str, Any],
    origin: str,
    note: Note | None,
    done: Sequence[str] = (),
) -> list[str]:
    """Loads a state dict except for a classifier of other classes, whose names it returns.

    Args:
        done: What has been done to the state dict already, in words, to be noted with what is done here.

    Raises:
        InputError: Names are missing, unknown, or of another shape, or values are none that a network computes with.
    """
    own = module.state_dict()
    state = {name: value for name, value in state.items() if not _is_off(module, name)}
    for name, value in state.items():
        if (name in own or _is_tensor(value)) and (why := _odd(value, own.get(name))):
            raise InputError(f"{origin} cannot be loaded: {shortened(name)} {why}")
    fitted = _Fitted(spec, own, {name: value for name, value in state.items() if _is_tensor(value)}, list(done))
    if fitted.problems():
        fitted.adapt_input(module)
        fitted.leave_out_classifier()
    if fitted.problems() and spec.source in _CONVERT:
        converted = fitted.converted(_CONVERT[spec.source](module, spec, fitted.tensors))
        if len(converted.problems()) < len(fitted.problems()):
            fitted = converted
    if problems := fitted.problems():
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        unknown = [name for name in fitted.tensors if name not in own]
        has = f"; it has {few(unknown, 3)}" if unknown and fitted.missing() else ""
        raise InputError(f"{origin} does not fit {spec.name}: {', '.join(problems[:3])}{more}{has}")
    for name, tensor in fitted.tensors.items():
        if not _is_finite(tensor) and _is_finite(own[name]):  # a mask of the backbone's own may hold infinities
            raise InputError(f"{origin} cannot be used: {name} has values that are not finite (NaN or infinite)")
    own.update(fitted.tensors)
    module.load_state_dict(own)  # and not the tensors alone: some modules look for the version that lies beside them
    if note is not None:
        if fitted.done:
            note(f"{origin}: {'; '.join(fitted.done)}.")
        if fitted.left_out:
            which = "no classifier" if fitted.headless else "other classes"
            note(f"The weights have {which}: {', '.join(fitted.left_out)} are not loaded.")
    return fitted.left_out


@dataclass
class _Fitted:
    """Tensors on their way into a backbone.

    Attributes:
        own: What the backbone has, by name.
        tensors: What there is to load; changed by what is done.
        done: That, in words.
        left_out: The names of the classifier's tensors, where they are not to be loaded.
        headless: Whether there are none to load.
    """

    spec: BackboneSpec
    own: "Mapping[str, Tensor]"
    tensors: "dict[str, Tensor]"
    done: list[str]
    left_out: list[str] = field(default_factory=list)
    headless: bool = False

    def missing(self) -> list[str]:
        """The names that are not there; the counters of batch norms, which its first versions had not, are no loss."""
        absent = [name for name in self.own if name not in self.tensors and name not in self.left_out]
        return [name for name in absent if not name.endswith("num_batches_tracked")]

    def mismatched(self) -> list[str]:
        return [n for n, own in self.own.items() if n in self.tensors and self.tensors[n].shape != own.shape]

    def problems(self) -> list[str]:
        """What keeps the tensors from being loaded, in words."""
        shapes = [(n, list(self.tensors[n].shape), list(self.own[n].shape)) for n in self.mismatched()]
        return [
            *(f"{name} has shape {there}, not {here}" for name, there, here in shapes),
            *(f"{name} is missing" for name in self.missing()),
            *(f"{shortened(name)} is unknown" for name in self.tensors if name not in self.own),
        ]

    def leave_out_classifier(self) -> None:
        """Leaves the classifier out where the tensors have one of other classes, or none, or one of another form."""
        class_dim = classifier_tensors(self.spec)

        def other_classes(name: str) -> bool:
            dim = class_dim.get(name)
            there, here = tuple(self.tensors[name].shape), tuple(self.own[name].shape)
            return dim is not None and _without(there, dim) == _without(here, dim)

        self.headless = not any(name in self.tensors for name in class_dim)
        if self.headless:
            inside = _head(self.spec)
            self.left_out = [name for name in self.own if name.startswith(inside)]
            foreign = [name for name in self.tensors if name.startswith(inside)]
            if foreign:
                self.done.append(f"left out a classifier of another form ({few(foreign)})")
            drop = set(foreign)
        else:
            self.left_out = [name for name in self.mismatched() if other_classes(name)]
            drop = set(self.left_out)
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if name not in drop}

    def adapt_input(self, module: "nn.Module") -> None:
        """Adapts convolutions of the image to its channels, as timm does."""
        from timm.models import adapt_input_conv

        channels = self.spec.in_chans
        for name in self.mismatched():
            there, here = self.tensors[name].shape, self.own[name].shape
            layer = module.get_submodule(name.rpartition(".")[0])
            only_channels = len(there) == len(here) == 4 and _without(tuple(there), 1) == _without(tuple(here), 1)
            if not only_channels or here[1] % channels or getattr(layer, "groups", 1) > 1:
                continue
            if here[1] != channels and name.rpartition(".")[0] not in _first_convs(self.spec):
                continue
            base = there[1] * channels // here[1]
            try:
                adapted = adapt_input_conv(channels, self.tensors[name], base_chans=base)
            except (AssertionError, NotImplementedError, TypeError, ValueError):  # TypeError: an older timm
                continue
            if adapted.shape == here:
                self.tensors[name] = adapted
                self.done.append(f"{name} adapted from {base} to {channels} channels")

    def converted(self, tensors: "dict[str, Tensor]") -> "_Fitted":
        """The same with what the library makes of the tensors."""
        resized = [
            f"{name} resized from {list(self.tensors[name].shape)} to {list(tensor.shape)}"
            for name, tensor in tensors.items()
            if name in self.tensors and self.tensors[name].shape != tensor.shape
        ]
        renamed = [name for name in tensors if name not in self.tensors]
        done = [*self.done, *([few(resized)] if resized else [])]
        if renamed:
            done.append(f"names made those of {self.spec.source} ({few(renamed)})")
        fitted = _Fitted(self.spec, self.own, {n: t for n, t in tensors.items() if n not in self.left_out}, done)
        fitted.leave_out_classifier()
        return fitted


def _convert_for_timm(module: "nn.Module", spec: BackboneSpec, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """What timm would load if it had published the tensors: names as they are now, tables in the images' size."""
    import timm

    loaded: dict[str, Tensor] = {}

    def keep(_: Any, state: "Mapping[str, Tensor]", *__: Any, **___: Any) -> Any:
        loaded.update(state)
        return SimpleNamespace(missing_keys=[], unexpected_keys=[])

    published = {
        "state_dict": tensors,
        "num_classes": spec.num_classes,
        "label_offset": 0,
        "input_size": (spec.in_chans, *spec.input_size),
    }
    try:
        with mock.patch.object(type(module), "load_state_dict", keep), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how the tables are resized
            timm.create_model(spec.name, pretrained=True, pretrained_cfg_overlay=published, **timm_options(spec))
    except Exception:  # what a model makes of tensors that are not its own can fail in any way
        return tensors
    return loaded


def _convert_for_torchvision(
    module: "nn.Module", spec: BackboneSpec, tensors: "dict[str, Tensor]"
) -> "dict[str, Tensor]":
    """The tensors with the position table, where there is one, in the images' size."""
    from torchvision.models.vision_transformer import interpolate_embeddings

    try:
        return dict(interpolate_embeddings(spec.input_size[0], module.patch_size, OrderedDict(tensors)))  # type: ignore
    except (AttributeError, KeyError, ValueError):  # no such table, or none of square images
        return tensors


_CONVERT = {"timm": _convert_for_timm, "torchvision": _convert_for_torchvision}


def _first_convs(spec: BackboneSpec) -> tuple[str, ...]:
    """The convolutions of the image, as timm notes them."""
    names = timm_cfg(spec.name).first_conv if spec.source == "timm" else None
    return (names,) if isinstance(names, str) else tuple(names or ())


def _odd(value: Any, own: "Tensor | None") -> str | None:
    """Why a value is none to load in place of the backbone's own, in words; None where it is one."""
    import torch

    if not _is_tensor(value):
        return f"is no tensor but a {type(value).__name__}"
    if value.is_meta:
        return "has a shape but no values (it is on the meta device)"
    integer = own is not None and own.is_floating_point() and not value.is_floating_point()
    if value.is_quantized or integer:
        return f"is quantised ({value.dtype}): give the weights before that"
    if value.is_nested or value.layout is not torch.strided:
        return f"is sparse or nested ({value.layout}): save it with .to_dense()"
    if is_unpacked(value.nbytes, value.untyped_storage().nbytes()):
        return f"repeats the values that are stored to {value.nbytes / 2**30:,.1f} GiB (it is expanded)"
    return None


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _is_finite(tensor: "Tensor") -> bool:
    return bool((tensor if tensor.itemsize > 1 else tensor.float()).isfinite().all())  # of 8 bits it is not implemented


def _without(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return shape[:dim] + shape[dim + 1 :]


def _is_off(module: "nn.Module", name: str) -> bool:
    """Whether a name belongs to a part that the module was built without, such as an auxiliary head for training."""
    return getattr(module, name.partition(".")[0], module) is None
