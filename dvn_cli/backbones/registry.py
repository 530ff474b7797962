"""What a backbone's name means, and the module that it means. torch, timm and torchvision are imported when needed."""

import contextlib
import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_type_hints

from dvn_cli.backbones import factory
from dvn_cli.errors import InputError, did_you_mean
from dvn_cli.store.metadata import Backbone, Preprocessing

if TYPE_CHECKING:
    import torch
    from torch import nn

MOST_CLASSES, MOST_CHANNELS, MOST_PIXELS = 1 << 20, 1 << 10, 1 << 13
"""Of a classifier, of images, and of their sides."""

FAMILIES = {
    "convnext": "convnext_tiny",
    "deit": "deit_small_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_tiny": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "efficientnet": "efficientnet_b0",
    "efficientnetv2": "efficientnetv2_rw_s",
    "inception": "inception_v3",
    "mixer": "mixer_b16_224",
    "mnasnet": "mnasnet_100",
    "mobilenet": "mobilenetv3_large_100",
    "mobilenetv2": "mobilenetv2_100",
    "mobilenetv3": "mobilenetv3_large_100",
    "mobilenetv3_large": "mobilenetv3_large_100",
    "mobilenetv3_small": "mobilenetv3_small_100",
    "regnet": "regnety_008",
    "regnetx": "regnetx_008",
    "regnety": "regnety_008",
    "resnet": "resnet50",
    "resnext": "resnext50_32x4d",
    "resnext50": "resnext50_32x4d",
    "shufflenet": "shufflenet_v2_x1_0",
    "squeezenet": "squeezenet1_1",
    "swin": "swin_tiny_patch4_window7_224",
    "vgg": "vgg16_bn",
    "vit": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_tiny": "vit_tiny_patch16_224",
    "wide_resnet": "wide_resnet50_2",
    "wrn": "wrn_32_4",
}
"""The usual member of each family whose bare name people type."""


class BackboneSpec(Backbone):
    """All that it takes to build a backbone, as a checkpoint records it, and the way to build it."""

    def build(self, device: "str | torch.device | None" = None) -> "nn.Module":
        """Builds the module, randomly initialised and in eval mode; on the device `meta` it holds no data.

        Raises:
            InputError: The installed timm or torchvision has no such model, or cannot build it for these images.
        """
        import torch

        from dvn_cli.backbones import paper
        from dvn_cli.graph.empty_init import empty_init

        if device is not None and torch.device(device).type == "meta":
            return empty_init(self.build, "meta")  # few models can be built there: some read tensors that they make
        library = LIBRARIES[self.source]
        if not library.has(self.name):
            raise InputError(f"the installed {self.source} has no model '{self.name}'")
        if self.width != (1, 1) and (self.source != "timm" or paper.shape_of(self.name) is None):
            wider = "wrn_N_S, resnet_N and cifar_resnet_N"
            raise InputError(f"{self.name} is built at one width alone: only {wider} take more units")
        with torch.device(device) if device is not None else contextlib.nullcontext():
            try:
                module = library.build(self)
            except (AssertionError, ValueError) as error:  # how both libraries refuse a size
                raise InputError(f"{self.name} cannot be built for {_images(self)}: {first_line(error)}") from error
            if self.hidden_layers:
                _deepen(module, self)
        return module.eval()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def resolve(
    name: str,
    num_classes: int | None = None,
    in_chans: int | None = None,
    input_size: tuple[int, int] | None = None,
) -> BackboneSpec:
    """Returns what a name means: timm's name, the paper's (`wrn_32_4`), torchvision's, or a family's usual member.

    `timm/NAME` and `torchvision/NAME` force one of the two; `package.module:factory` is a factory of one's own, for
    which the number of classes and the size of images have to be given. The name of the result differs from the one
    asked where that was a family's or had a prefix.

    Args:
        name: The name.
        num_classes: Outputs of the classifier; the model's own by default.
        in_chans: Channels of the images; the model's own by default.
        input_size: Height and width in pixels; the model's own by default.

    Raises:
        InputError: No such model, or it takes no such images or number of classes.
    """
    spec = default(name)
    if spec.input_size < (1, 1) and (num_classes is None or input_size is None):
        missing = [word for word, given in (("--num-classes", num_classes), ("--input-size", input_size)) if not given]
        raise InputError(f"a factory does not say what {spec.name} is for: give {' and '.join(missing)}")
    if num_classes is None and spec.num_classes < 1:
        raise InputError(f"{spec.name} comes without a classifier: give the number of classes")
    if num_classes is not None and not 2 <= num_classes <= MOST_CLASSES:
        raise InputError(f"a classifier has 2 to {MOST_CLASSES:,} classes, not {num_classes}")
    if in_chans is not None and not 1 <= in_chans <= MOST_CHANNELS:
        raise InputError(f"images have 1 to {MOST_CHANNELS:,} channels, not {in_chans}")
    if input_size is not None and not 1 <= min(input_size) <= max(input_size) <= MOST_PIXELS:
        raise InputError(f"images have 1 to {MOST_PIXELS:,} pixels a side, not {input_size[0]}x{input_size[1]}")
    asked = replace(
        spec,
        num_classes=num_classes or spec.num_classes,
        in_chans=in_chans or spec.in_chans,
        input_size=input_size or spec.input_size,
    )
    if asked != spec:
        _check_memory(asked)
    if (asked.in_chans, asked.input_size) != (spec.in_chans, spec.input_size):
        _try_images(asked)
    return asked


def default(name: str) -> BackboneSpec:
    """Returns what a name means, with the model's own classes, channels and size of images (0 where it has none).

    Raises:
        InputError: No such model.
    """
    prefix, slash, bare = name.partition("/")
    libraries = {prefix: LIBRARIES[prefix]} if slash and prefix in LIBRARIES else LIBRARIES
    wanted = bare if libraries is not LIBRARIES else name
    member = FAMILIES.get(wanted, wanted)
    found = (
        library.default(model) for model in (wanted, member) for library in libraries.values() if library.has(model)
    )
    spec = next(found, None)
    if spec is None:
        known = [*FAMILIES, *(model for library in libraries.values() for model in library.names())]
        raise InputError(f"unknown backbone '{name}'{did_you_mean(wanted, known)}")
    return spec


def _images(spec: BackboneSpec) -> str:
    return f"images of {spec.in_chans}x{spec.input_size[0]}x{spec.input_size[1]}"


def _check_memory(spec: BackboneSpec) -> None:
    """Raises InputError where the weights do not fit the memory that is free, found out on the meta device."""
    import torch

    from dvn_cli.data import memory

    try:
        with torch.device("meta"):
            state = LIBRARIES[spec.source].build(spec).state_dict().values()
    except Exception:  # few models cannot be built there: some read tensors that they make
        return
    size, free = sum(tensor.nbytes for tensor in state), memory.available()
    if free is not None and size > free:
        raise InputError(
            f"{spec.name} for {_images(spec)} and {spec.num_classes:,} classes takes {memory.in_words(size)}, and "
            f"{memory.in_words(free)} of memory are free"
        )


def _try_images(spec: BackboneSpec) -> None:
    """Raises InputError where the backbone cannot take images of the spec's size, found out on the meta device."""
    import torch

    module = spec.build("meta")
    try:
        with torch.no_grad():
            module(torch.empty(2, spec.in_chans, *spec.input_size, device="meta"))
    except NotImplementedError:  # an operator that does not run on the meta device says nothing about the size
        return
    except (AssertionError, RuntimeError, ValueError) as error:
        raise InputError(f"{spec.name} cannot take {_images(spec)}: {first_line(error)}") from error


def classifier_tensors(spec: BackboneSpec) -> dict[str, int]:
    """Returns every tensor of a backbone that grows with the number of classes, and its dimension of classes.

    Found by building the backbone for two numbers of classes, without data.
    """
    shapes = {name: tensor.shape for name, tensor in spec.build("meta").state_dict().items()}
    wider = replace(spec, num_classes=spec.num_classes + 1).build("meta").state_dict()
    return {
        name: next(dim for dim, size in enumerate(shape) if size != wider[name].shape[dim])
        for name, shape in shapes.items()
        if shape != wider[name].shape
    }


def is_installed(spec: BackboneSpec) -> bool:
    """Tells whether a library that was installed builds a backbone, not code that may change while a process lives.

    Such as a notebook's, where one's own module is edited and loaded again.
    """
    library = LIBRARIES[spec.source]
    if not library.has(spec.name):  # the paper's are registered when they are first asked for
        return False
    return str(library.builder(spec.name).__module__).partition(".")[0] in ("dvn_cli", "timm", "torchvision")


def head(spec: BackboneSpec) -> tuple[str, ...]:
    """Returns the paths of the modules that map features to classes, hidden layers included: `("fc",)`."""
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in classifier_tensors(replace(spec, hidden_layers=0))))


def _deepen(module: "nn.Module", spec: BackboneSpec) -> None:
    """Puts the spec's hidden layers, each followed by ReLU, before the classifier.

    Raises:
        InputError: The classifier is not one fully connected layer.
    """
    from torch import nn

    for path in head(spec):
        classifier = module.get_submodule(path)
        if not isinstance(classifier, nn.Linear):
            raise InputError(f"{spec.name} takes no hidden layers: its classifier '{path}' is no fully connected layer")
        width = classifier.in_features
        layers = [layer for _ in range(spec.hidden_layers) for layer in (nn.Linear(width, width), nn.ReLU())]
        module.set_submodule(path, nn.Sequential(*layers, classifier))


def preprocessing(spec: BackboneSpec) -> Preprocessing | None:
    """Returns how images were prepared for a backbone's published weights, by its library's configuration.

    None where it has no such weights (the paper's backbones). Mean and standard deviation are left out for other
    channels than those of the weights: then the data's count.
    """
    found = LIBRARIES[spec.source].preprocessing(spec.name)
    if found is not None and found.mean is not None and len(found.mean) != spec.in_chans:
        return replace(found, mean=None, std=None)
    return found


def timm_cfg(name: str) -> Any:
    """What timm notes about a model and its weights (`timm.models.PretrainedCfg`)."""
    from timm.models import get_pretrained_cfg

    return get_pretrained_cfg(name, allow_unregistered=False)


def timm_options(spec: BackboneSpec) -> dict[str, Any]:
    """The arguments that make `timm.create_model` build what a spec describes."""
    options: dict[str, Any] = {"num_classes": spec.num_classes, "in_chans": spec.in_chans}
    if spec.width != (1, 1):
        options["width"] = spec.width
    if timm_cfg(spec.name).fixed_input_size:  # a model built for one size
        options["img_size"] = spec.input_size
    return options


class Timm:
    """timm's models, and the paper's, which are registered there."""

    def names(self) -> list[str]:
        import timm

        return timm.list_models()

    def has(self, name: str) -> bool:
        """Raises InputError for a model that timm has with a pretrained tag that it has not."""
        from timm import models

        from dvn_cli.backbones import paper

        if paper.register(name):
            return True
        if not models.is_model(name):
            return False
        try:  # a deprecated alias has no configuration
            return models.get_pretrained_cfg(name) is not None
        except RuntimeError as error:  # its way to say that the tag is unknown
            tags = models.list_pretrained(f"{models.get_arch_name(name)}.*")
            raise InputError(f"timm has no weights '{name}'{did_you_mean(name, tags)}") from error

    def builder(self, name: str) -> Any:
        from timm.models import get_arch_name, model_entrypoint

        return model_entrypoint(get_arch_name(name))

    def default(self, name: str) -> BackboneSpec:
        cfg = timm_cfg(name)
        channels, height, width = cfg.input_size
        return BackboneSpec("timm", name, cfg.num_classes, channels, (height, width))

    def build(self, spec: BackboneSpec) -> "nn.Module":
        import timm

        return timm.create_model(spec.name, **timm_options(spec))

    def preprocessing(self, name: str) -> Preprocessing | None:
        from timm.data import resolve_data_config

        cfg = timm_cfg(name)
        if not (cfg.mean and cfg.std):
            return None
        found = resolve_data_config(pretrained_cfg=cfg.to_dict())
        keys = ("interpolation", "crop_pct", "crop_mode")
        full = ".".join(filter(None, (cfg.architecture or name, cfg.tag)))
        return Preprocessing(f"timm's configuration of {full}", cfg.mean, cfg.std, *(found[key] for key in keys))


class Torchvision:
    """torchvision's classifiers."""

    def names(self) -> list[str]:
        from torchvision import models

        return models.list_models(module=models)

    def has(self, name: str) -> bool:
        return name in self.names()

    def builder(self, name: str) -> Any:
        from torchvision import models

        return models.get_model_builder(name)

    def default(self, name: str) -> BackboneSpec:
        from torchvision import models

        weights = models.get_model_weights(name).DEFAULT
        crop = weights.transforms().crop_size
        return BackboneSpec("torchvision", name, len(weights.meta["categories"]), 3, (crop[0], crop[-1]))

    def parameters(self, name: str) -> set[str]:
        """The arguments that the model's class takes; its builder hands on all but a few."""
        from torchvision import models

        return set(inspect.signature(get_type_hints(models.get_model_builder(name))["return"]).parameters)

    def build(self, spec: BackboneSpec) -> "nn.Module":
        from torchvision import models

        if spec.in_chans != 3:
            raise InputError(f"torchvision's {spec.name} takes 3 channels, not {spec.in_chans}; timm's models take any")
        height, width = spec.input_size
        parameters = self.parameters(spec.name)
        if "image_size" in parameters and height != width:
            raise InputError(f"torchvision's {spec.name} takes square images, not {height}x{width}")
        options = {"aux_logits": False, "init_weights": True, "image_size": height, "input_size": (height, width)}
        taken = {key: value for key, value in options.items() if key in parameters}
        return models.get_model_builder(spec.name)(weights=None, num_classes=spec.num_classes, **taken)

    def preprocessing(self, name: str) -> Preprocessing:
        from torchvision import models

        weights = models.get_model_weights(name).DEFAULT
        transforms = weights.transforms()
        mean, std = tuple(transforms.mean), tuple(transforms.std)
        if "transform_input" in self.parameters(name):
            # Its weights want pixels in -1..1, to which torchvision converts ImageNet's inside the model, if so built.
            mean = std = (0.5, 0.5, 0.5)
        share = transforms.crop_size[0] / transforms.resize_size[0]  # to the pixel: floor(crop / share) is resize
        origin = f"torchvision's configuration of {weights}"
        return Preprocessing(origin, mean, std, transforms.interpolation.value, share, "center")


class Python:
    """Factories of the user's own."""

    def names(self) -> list[str]:
        return []

    def has(self, name: str) -> bool:
        return factory.is_factory(name)

    def builder(self, name: str) -> Any:
        return factory.find(name)

    def default(self, name: str) -> BackboneSpec:
        factory.find(name)
        return BackboneSpec("python", name, 0, 3, (0, 0))

    def build(self, spec: BackboneSpec) -> "nn.Module":
        return factory.build(spec.name, spec.num_classes, spec.in_chans)

    def preprocessing(self, name: str) -> None:
        return None


LIBRARIES: dict[str, Timm | Torchvision | Python] = {
    "python": Python(),
    "timm": Timm(),
    "torchvision": Torchvision(),
}
