"""The paper's own backbones, WRN-n-s and ResNet-n, registered with timm.

Post-activation basic blocks, batch norm after every convolution and shortcuts without parameters: K. He, X. Zhang,
S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2, option A; the widths of WRN-n-s:
S. Zagoruyko, N. Komodakis, "Wide Residual Networks", BMVC 2016. The common ones are registered when this module is
imported, every other by `register`.
"""

import re
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, register_model
from torch import Tensor, nn

from dvn_cli.errors import InputError, shortened

COMMON = (
    *("wrn_16_4", "wrn_28_2", "wrn_28_4", "wrn_28_10", "wrn_32_2", "wrn_32_4", "wrn_32_8", "wrn_40_2", "wrn_40_4"),
    *("resnet_18", "resnet_34", "resnet_42", "resnet_50", "resnet_20", "resnet_32", "resnet_44", "resnet_56"),
    *("resnet_110", "cifar_resnet_20", "cifar_resnet_32", "cifar_resnet_44", "cifar_resnet_56", "cifar_resnet_110"),
)

MOST_LAYERS, MOST_PARAMETERS = 2000, 10**10
"""Of a network that a name asks for: more is a slip, and would take hours to find out."""

default_cfgs: dict[str, Any] = {}  # timm's registry looks for this name in the module of an entry point


class BasicBlock(nn.Module):
    """conv 3x3, norm, ReLU, conv 3x3, norm; plus the input, subsampled and with zero channels appended; ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.added = channels - in_channels
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def zero_init_last(self) -> None:
        """Makes the block pass its input on; the name is timm's."""
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.stride > 1:
            shortcut = shortcut[:, :, :: self.stride, :: self.stride]
        if self.added:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.added))
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class Shape(NamedTuple):
    """What sets one of these networks apart from another."""

    stem: int  # channels of the first convolution
    widths: tuple[int, ...]  # channels of each stage
    blocks: int  # basic blocks in each stage

    def check(self, name: str) -> "Shape":
        """Returns the same; InputError where nobody means a network of that size, called by `name`."""
        layers = 2 + 2 * self.blocks * len(self.widths)
        before = (self.stem, *self.widths)
        parameters = sum(9 * (a * b + (2 * self.blocks - 1) * b * b) for a, b in zip(before, self.widths, strict=False))
        if layers > MOST_LAYERS or parameters > MOST_PARAMETERS:
            most = f"{MOST_LAYERS:,} layers and {MOST_PARAMETERS:,} parameters"
            raise InputError(f"{shortened(name)} has {layers:,} layers and {parameters:,} parameters, more than {most}")
        return self

    def times(self, numerator: int, denominator: int) -> "Shape":
        """Returns the same with other numbers of channels; InputError where they are no whole numbers."""
        widths = [width * numerator for width in (self.stem, *self.widths)]
        if any(width % denominator for width in widths):
            share = f"{numerator}/{denominator} of {self.stem} channels"
            raise InputError(f"{share} are no whole number: units are added where those there are equally wide")
        stem, *widths = (width // denominator for width in widths)
        return Shape(stem, tuple(widths), self.blocks)


class PaperResNet(nn.Module):
    """Stem at full resolution, stages of basic blocks of which all but the first halve it, pooling, linear classifier.

    Args:
        shape: Channels and depth.
        num_classes: Outputs of the classifier; 0 for none.
        in_chans: Channels of the images.
        global_pool: `avg`, or empty for none.
        width: What numbers of channels are multiplied by: numerator and denominator.
    """

    def __init__(
        self,
        shape: Shape,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        width: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__()
        shape = shape.times(*width).check("a network of that width")
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = shape.widths[-1]
        self.conv1 = nn.Conv2d(in_chans, shape.stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(shape.stem)
        self.stages = [f"layer{number}" for number in range(1, len(shape.widths) + 1)]
        before = shape.stem
        for name, channels in zip(self.stages, shape.widths, strict=True):
            stride = 1 if name == self.stages[0] else 2
            first = BasicBlock(before, channels, stride)
            self.add_module(
                name, nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(1, shape.blocks)))
            )
            before = channels
        self.reset_classifier(num_classes, global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if isinstance(self.fc, nn.Linear):
            nn.init.xavier_uniform_(self.fc.weight)
            nn.init.zeros_(self.fc.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature maps (N, C, h, w) of images (N, in_chans, H, W)."""
        x = F.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (N, num_classes) of feature maps (N, C, h, w); the pooled features (N, C) with `pre_logits`."""
        if self.global_pool:
            x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def shape_of(name: str) -> Shape | None:
    """Returns the shape that a name asks for, or None where it is not a name of this module's pattern.

    `wrn_N_S`: three stages of width 16 S, 32 S, 64 S; N = 6 m + 2, or 6 m + 4 where the convolutions in the shortcuts
    are counted too, as Zagoruyko and Komodakis do, for m blocks a stage. `resnet_N`: four stages of width 64 to 512
    where N = 8 m + 2 (ImageNet style), else as `cifar_resnet_N`: three stages of width 16, 32, 64 with N = 6 m + 2.

    Raises:
        InputError: The pattern is right, but no network has that depth or width, or it is too large.
    """
    match = re.fullmatch(r"(?:(wrn)_(\d{1,9})_(\d{1,9})|(cifar_)?resnet_(\d{1,9}))", name)
    if match is None:
        return None
    if match[1]:
        depth, widening = int(match[2]), int(match[3])
        if depth < 8 or depth % 6 not in (2, 4) or widening < 1:
            raise InputError(f"{name}: wrn_N_S wants N = 6m + 2 or 6m + 4 (8, 10, ..., 28, 32, 40) and S from 1")
        return Shape(16, (16 * widening, 32 * widening, 64 * widening), (depth - 2) // 6).check(name)
    depth = int(match[5])
    if not match[4] and depth >= 10 and depth % 8 == 2:
        return Shape(64, (64, 128, 256, 512), (depth - 2) // 8).check(name)
    if depth < 8 or depth % 6 != 2:
        four = "" if match[4] else "N = 8m + 2 (10, 18, 26, 34, 42, 50) or "
        raise InputError(f"{name}: {match[4] or ''}resnet_N wants {four}N = 6m + 2 (8, 14, 20, 32, 44, 56, 110)")
    return Shape(16, (16, 32, 64), (depth - 2) // 6).check(name)


def register(name: str) -> bool:
    """Makes `timm.create_model(name)` work where the name fits the pattern of `shape_of`, and says whether it does.

    Raises:
        InputError: As `shape_of`.
    """
    shape = shape_of(name)
    if shape is None:
        return False
    if is_model(name):
        return True

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(PaperResNet, name, pretrained, shape=shape, **kwargs)

    entrypoint.__name__ = name
    entrypoint.__doc__ = f"{name}: {len(shape.widths)} stages of {shape.blocks} blocks, widths {shape.widths}."
    globals()[name] = entrypoint  # register_model adds the name to __all__
    # The paper normalises with the statistics of each data set, so the network has no mean and std of its own.
    cfg = {"input_size": (3, 32, 32), "num_classes": 100, "mean": None, "std": None, "pool_size": None}
    default_cfgs.update(generate_default_cfgs({name: cfg | {"first_conv": "conv1", "classifier": "fc"}}))
    register_model(entrypoint)
    return True


for _name in COMMON:
    register(_name)
