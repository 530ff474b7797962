"""Images of other sizes: what a stem may skip, and what a network that was made for one size does with another."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from training import small

from dvn_cli.backbones import BackboneSpec
from dvn_cli.dividing import partition_backbone
from dvn_cli.errors import InputError
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.partition import Partition
from dvn_cli.tasks import default_tasks

OWN = 16
SPEC = BackboneSpec("timm", "small", 4, 3, (OWN, OWN))


def stem(kernel: int, stride: int, padding: int, before: int) -> Partition:
    """A backbone of 16 pixels whose first layer is a convolution, with a constant padding before it."""
    layers = [nn.ZeroPad2d((0, before, 0, before)), nn.Conv2d(3, 4, kernel, stride, padding), nn.AdaptiveAvgPool2d(1)]
    return partition_backbone(SPEC, 2, module=nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 4)))


def seen(partition: Partition, size: int) -> float:
    """The share of an image's pixels that have an influence on the logits."""
    network = partition.network((1, 2), 4, (size, size))
    image = torch.zeros(1, 3, size, size, requires_grad=True)
    tensors = [torch.ones(partition.shapes[name]) for name in network.names]
    network.module(image, *tensors).sum().backward()
    assert image.grad is not None
    return image.grad[0, 0].ne(0).float().mean().item()


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2), st.integers(0, 1), st.sampled_from((8, 24, 32, 48)))
def test_a_size_is_taken_where_its_pixels_are_seen(kernel, stride, padding, before, size):
    partition = stem(kernel, stride, padding, before)
    try:
        partition.check_images((size, size))
    except InputError as error:
        words = str(error)
        if "would see" in words:
            # a border that no stride reaches is none of its business
            assert seen(partition, size) < 0.95
            assert seen(partition, size) == pytest.approx(int(words.split("would see ")[1].split()[0]) / 100, abs=0.17)
        else:
            assert "cannot meet" in words
            assert ("constant of its graph" in words) == bool(before)
        advised = words.split("`size` in the task's data to ")[1].split(", or make")[0]
        for better in advised.replace(" or ", ", ").split(", "):
            partition.check_images((int(better), int(better)))
    else:
        assert seen(partition, size) > 0.75 or stride > kernel


def test_a_task_whose_pixels_would_be_skipped_is_refused_by_its_name(tmp_path):
    with pytest.raises(InputError) as caught:
        small.session(tmp_path, "tasks.1.data.size=32")
    for part in ("task 'all': wrn_10_1 would see 56 %", "images of 32x32", "stride of 4x4", "`size`", "8, 16 or 24"):
        assert part in str(caught.value)


def test_weights_that_are_computed_are_said_to_be_the_reason():
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True))

    partition = partition_backbone(SPEC, 2, module=Net(Standardised))
    with pytest.raises(InputError, match=r"^small takes images of 16x16 only, .* computed: set .* to 16$"):
        partition.check_images((32, 32))


class Padded(nn.Conv2d):
    """Pads as much as an image's size asks for, as networks that come from TensorFlow do."""

    def forward(self, x: Tensor) -> Tensor:
        more = [max((-(-n // 2) - 1) * 2 + 3 - n, 0) for n in (x.shape[3], x.shape[2])]
        return super().forward(nn.functional.pad(x, (0, more[0], 0, more[1])))


class Net(nn.Module):
    def __init__(self, first: type[nn.Conv2d]) -> None:
        super().__init__()
        self.stem, self.norm = first(3, 8, 3, 2), nn.BatchNorm2d(8)
        self.mix, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.norm(self.stem(x)).relu()).mean((2, 3)))


@pytest.fixture(params=[nn.Conv2d, Padded])
def pair(request, monkeypatch):
    """A backbone and its networks."""
    torch.manual_seed(0)
    module = Net(request.param).eval()
    monkeypatch.setattr(BackboneSpec, "build", lambda self: copy.deepcopy(module))
    partition = partition_backbone(replace(SPEC, name=request.param.__name__), 2, module=module)
    tasks = default_tasks(2, 4, SPEC.input_size, (0.5,) * 3, (0.25,) * 3)
    return module, DeepVirtualNetwork.from_backbone(partition, module, tasks).eval()


def images(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_another_size_gives_what_the_backbone_gives_or_is_refused(pair):
    module, networks = pair
    padded, alone = isinstance(module.stem, Padded), networks.virtual_network(1, 2)
    for height, width in ((16, 16), (17, 17), (16, 24), (15, 16), (32, 32)):
        x, right = images(height, width), not padded or (height % 2, width % 2) == (0, 0)
        refusing = () if right else (alone.features,)
        for run in (alone, lambda x: networks(x, 1, 2), lambda x: networks(x, 2, 1), *refusing):
            if right:
                with torch.no_grad():
                    logits = run(x)
                assert run not in (alone,) or torch.equal(logits, module(x))
            else:
                with pytest.raises(
                    InputError, match=f"made for images of 16x16, .* not right for those of {height}x{width}"
                ):
                    run(x)


def test_a_network_that_has_met_another_size_is_copied_pickled_compiled_and_exported(pair):
    module, networks = pair
    network, x = networks.virtual_network(1, 2), images(32, 32)
    expected = module(x)
    with torch.inference_mode():
        torch.testing.assert_close(network(x), expected)
    torch.testing.assert_close(copy.deepcopy(network)(x), expected)
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    torch.testing.assert_close(torch.compile(torch.load(file, weights_only=False), backend="eager")(x), expected)
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    for size in (16, 32):
        program = torch.export.export(network, (images(size, size),), dynamic_shapes=dynamic)
        torch.testing.assert_close(program.module()(images(size, size)[:1]), module(images(size, size)[:1]))


def test_an_export_at_a_size_of_which_nothing_is_known_is_refused(pair):
    _, networks = pair
    with pytest.raises(InputError, match="call it once with 48x48"):
        torch.export.export(networks.virtual_network(1, 1), (images(48, 48),))
