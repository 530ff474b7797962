"""One small module for every operator or pattern that wants care, and what is refused."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvn_cli.backbones import BackboneSpec
from dvn_cli.check import Comparison
from dvn_cli.dividing import partition_backbone
from dvn_cli.errors import InputError
from dvn_cli.graph.dtype import recast
from dvn_cli.graph.labels import Labeller
from dvn_cli.graph.narrow import Narrower, on_device
from dvn_cli.graph.trace import trace


class Between(nn.Module):
    """A function of 8 channels (N, 8, 6, 6), with modules of its own, between two convolutions and a classifier."""

    def __init__(self, function: Callable[..., Tensor], out: int = 8, **modules: nn.Module) -> None:
        super().__init__()
        self.stem, self.after, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(out, 8, 3), nn.Linear(8, 4)
        self.function = function
        self.inner = nn.ModuleDict(modules)

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(self.stem(x), **self.inner)
        return self.head(self.after(x).mean((2, 3)))


def through_lstm(x: Tensor, lstm: nn.Module) -> Tensor:
    return lstm(x[:, :, ::2, ::2].flatten(2).mT)[0].mT.unflatten(2, (3, 3))  # every step costs time to trace


def folded(x: Tensor) -> Tensor:
    return F.fold(F.unfold(x, 3, padding=1) * 2, (6, 6), 3, padding=1)


def attention_of_windows(x: Tensor) -> Tensor:
    """As in VOLO: a window's values are weighted before they are folded back."""
    values = F.unfold(x, 3, padding=1).reshape(x.shape[0], 2, 4, 9, 36).permute(0, 1, 4, 3, 2)
    values = values.softmax(-2) * values
    return F.fold(values.permute(0, 1, 4, 3, 2).reshape(x.shape[0], 72, 36), (6, 6), 3, padding=1)


def written_into(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, :, 1:] = x[:, :, 1:] * 2
    y[:, 1:7].add_(x[:, 1:7])
    return y


def without_autocast(x: Tensor, conv: nn.Module) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return conv(x) @ x.mT


def without_gradient(x: Tensor, conv: nn.Module) -> Tensor:
    with torch.no_grad():
        gate = conv(x).sigmoid()
    return x * gate


def own_kernel(x: Tensor) -> Tensor:
    return F.conv2d(x, torch.full((8, 1, 3, 3), 0.1, dtype=x.dtype), padding=1, groups=8)


def own_matrix(x: Tensor) -> Tensor:
    return F.linear(x, torch.arange(36.0, dtype=x.dtype).reshape(6, 6) / 9)


def sampled(x: Tensor) -> Tensor:
    grid = F.affine_grid(torch.eye(2, 3, dtype=x.dtype).expand(x.shape[0], 2, 3) * 0.7, [x.shape[0], 8, 6, 6])
    return F.grid_sample(x, grid, align_corners=False)


def changed_index(x: Tensor) -> Tensor:
    index = torch.arange(8)
    first = x[:, index]
    index[1:] -= 1
    second = x[:, index + 0]
    index.mul_(0)
    return first + second


def softmax_over_channels(x: Tensor) -> Tensor:
    return x.softmax(1) * 3 + x


def channel_attention(x: Tensor) -> Tensor:
    y = F.normalize(x.flatten(2), dim=-1)
    return ((y @ y.mT).softmax(-1) @ y).unflatten(2, (6, 6))


def selective(x: Tensor, a: nn.Module, b: nn.Module, gate: nn.Module) -> Tensor:
    branches = torch.stack([a(x), b(x)], 1)
    weights = gate(branches.sum(1).mean((2, 3), keepdim=True)).reshape(-1, 2, 8, 1, 1)
    return (branches * weights.softmax(1)).sum(1)


def mixture(x: Tensor, route: nn.Module, experts: nn.Module) -> Tensor:
    """As in CondConv: a kernel for every image, whose groups are as many as its experts say."""
    groups = 64 * 9 // experts.weight.shape[0]
    kernel = (route(x.mean((2, 3))).sigmoid() @ experts.weight.T).reshape(-1, 8 // groups, 3, 3)
    images = x.reshape(1, -1, 6, 6)
    return F.conv2d(images, kernel, padding=1, groups=groups * x.shape[0]).reshape(-1, 8, 6, 6)


def grouped_queries(x: Tensor, q: nn.Module, kv: nn.Module) -> Tensor:
    queries = q(x).flatten(2).unflatten(1, (4, 2)).mT
    keys, values = kv(x).flatten(2).unflatten(1, (2, 2, 2)).unbind(1)
    attended = F.scaled_dot_product_attention(queries, keys.mT, values.mT, enable_gqa=True)
    return attended.mT.flatten(1, 2).unflatten(2, (6, 6))


def heads_along_the_batch(x: Tensor) -> Tensor:
    """As in BoTNet's relative positions: sizes and slices of a dimension that grows with the batch."""
    heads = x.reshape(-1, 2, 6, 6)[:, :, :5]
    return heads[:, :, None].expand(x.shape[0] * 4, -1, 3, -1, -1).mean(2).reshape(-1, 8, 5, 6)


def one_head(x: Tensor) -> Tensor:
    tokens = x.flatten(2).mT[:, None] * 3
    return F.scaled_dot_product_attention(tokens, tokens, tokens)[:, 0].mT.unflatten(2, (6, 6))


def twice(x: Tensor, conv: nn.Module, again: nn.Module) -> Tensor:
    return again(conv(x).relu())


def tokens_as_channels(x: Tensor, mix: nn.Module) -> Tensor:
    """As in CoaT: a convolution whose positions are the channels of what went before."""
    tokens = x.flatten(2).mT[:, :3]
    return x * mix(tokens).mT[..., None]


def channels_as_positions(x: Tensor, conv: nn.Module) -> Tensor:
    """As in ECA: what is dropped of the channels are zeros between those that are kept."""
    return x * conv(x.mean((2, 3))[:, None])[:, 0, :, None, None].sigmoid()


def standardised(x: Tensor, conv: nn.Module) -> Tensor:
    """As in NFNets: the weights of each output channel are normalised, over those of its inputs that are kept."""
    weight = F.batch_norm(conv.weight.reshape(1, 8, -1), None, None, training=True)
    return F.conv2d(x, weight.reshape_as(conv.weight), padding=1)


TABLE = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
SHARED_CONV = nn.Conv2d(8, 8, 3, padding=1)
CASES = {
    "lstm": Between(through_lstm, 16, lstm=nn.LSTM(8, 8, 2, batch_first=True, bidirectional=True)),
    "gru": Between(through_lstm, lstm=nn.GRU(8, 8, batch_first=True, bias=False)),
    "fold": Between(folded),
    "windows": Between(attention_of_windows),
    "copy into slices": Between(written_into),
    "no autocast": Between(without_autocast, conv=nn.Conv2d(8, 8, 1)),
    "no gradient": Between(without_gradient, conv=nn.Conv2d(8, 8, 1)),
    "constant kernel": Between(own_kernel),
    "constant matrix": Between(own_matrix),
    "grid_sample": Between(sampled),
    "index changed in place": Between(changed_index),
    "interpolate": Between(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    "interpolate 1d": Between(lambda x: F.interpolate(x.flatten(2), 49, mode="linear").unflatten(2, (7, 7))),
    "softmax": Between(softmax_over_channels),
    "channel attention": Between(channel_attention),
    "selective kernel": Between(selective, a=nn.Conv2d(8, 8, 1), b=nn.Conv2d(8, 8, 1), gate=nn.Conv2d(8, 16, 1)),
    "generated kernel": Between(mixture, route=nn.Linear(8, 3), experts=nn.Linear(3, 8 * 8 * 9)),
    "generated kernel of two groups": Between(mixture, route=nn.Linear(8, 3), experts=nn.Linear(3, 8 * 4 * 9)),
    "generated depthwise kernel": Between(mixture, route=nn.Linear(8, 3), experts=nn.Linear(3, 8 * 9)),
    "grouped queries": Between(grouped_queries, q=nn.Conv2d(8, 8, 1), kv=nn.Conv2d(8, 8, 1)),
    "heads along the batch": Between(heads_along_the_batch),
    "one head": Between(one_head),
    "shared module": Between(twice, conv=SHARED_CONV, again=SHARED_CONV),
    "transposed": Between(lambda x, up: up(x), 6, up=nn.ConvTranspose2d(8, 6, 2, 2, groups=2)),
    "instance norm": Between(lambda x, norm: norm(x), norm=nn.InstanceNorm2d(8, affine=True)),
    "group norm without scale": Between(lambda x, norm: norm(x) + x, norm=nn.GroupNorm(2, 8, affine=False)),
    "padded channels": Between(lambda x: F.pad(x, (0, 0, 0, 0, 2, 2)), 12),
    "prelu": Between(lambda x, act: act(x), act=nn.PReLU(8)),
    "glu": Between(lambda x: F.glu(x, 1), 4),
    "cumulative": Between(lambda x: x.cumsum(1)),
    "place of the largest": Between(lambda x: x * x.argmax(1, keepdim=True)),
    "place of the smallest": Between(lambda x: x * x.min(1, keepdim=True)[1]),
    "maximum": Between(lambda x: x.max(1, keepdim=True)[0] - x),
    "roll": Between(lambda x: x.roll((1, 2), (1, 2))),
    "floor division": Between(lambda x: torch.where((x // 2).gt(0).all((2, 3), keepdim=True), x, -x)),
    "tokens as channels": Between(tokens_as_channels, mix=nn.Conv1d(3, 1, 1)),
    "channels as positions": Between(channels_as_positions, conv=nn.Conv1d(1, 1, 3, padding=1)),
    "interleaved channels as positions": Between(
        lambda x, conv: channels_as_positions(x + x.roll(4, 1), conv), conv=nn.Conv1d(1, 1, 5, padding=2)
    ),
    "standardised weights": Between(standardised, conv=nn.Conv2d(8, 8, 3)),
    "sum of groups": Between(  # as in ResNeSt: whole groups are one class here, every group alike is eight
        lambda x, conv: conv(x).unflatten(1, (2, 8)).sum(1), conv=nn.Conv2d(8, 16, 3, padding=1, groups=2)
    ),
    "channels by a table": Between(lambda x: x[:, TABLE] + x.index_select(1, TABLE.flip(0))),
    "some channels by a table": Between(lambda x: x[:, TABLE[:6]], 6),
    "einsum": Between(lambda x: torch.einsum("bchw,bcij->bchi", x, x) / 9),
}

UNEVEN = "generated kernel", "generated depthwise kernel", "grouped queries", "heads along the batch"  # in 3 units too
PLACES = {"place of the largest", "place of the smallest"}
WHOLE = {"cumulative", "generated kernel", "index changed in place"} | PLACES  # every channel goes with every other


@pytest.mark.parametrize(("name", "units"), [*((name, 2) for name in CASES), *((name, 3) for name in UNEVEN)])
def test_narrowed_is_masked(name, units):
    torch.manual_seed(0)
    comparison = Comparison(CASES[name], (3, 6, 6))
    comparison.divide(units)
    assert comparison.assignment.tensors["after.weight"][0] is not None
    assert (comparison.assignment.tensors["stem.weight"][0] is None) == (name in WHOLE)
    for kept in [(1,), (2,), (1, 2)]:
        for train in (False, True):
            assert comparison.error(kept, train) < 1e-8


def with_positions(x: Tensor) -> Tensor:
    positions = torch.arange(6, device=x.device, dtype=x.dtype) // 2
    return x * positions + x.new_ones(8, 1, 1)


def test_a_network_makes_its_tensors_where_it_is():
    comparison = Comparison(Between(with_positions), (3, 6, 6), modes=(False,))
    comparison.divide(2)
    net = comparison.network((1,), False)
    tensors = [tensor.to("meta") for tensor in comparison.tensors(net.names, (1,))]
    x = comparison.x.to("meta")
    assert on_device(net.module, "meta")(x, *tensors).device.type == "meta"
    with pytest.raises(RuntimeError, match="device"):
        net.module(x, *tensors)


class Started(nn.Module):
    """An LSTM that starts from states of its own, one for every image, as in Sequencer."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        images = x.shape[0]
        state = torch.zeros(1, images, 8, dtype=x.dtype)
        scale = torch.full((images, 1, 1), 2.0, dtype=x.dtype) + torch.arange(images)[:, None, None]  # of int64
        y, _ = self.lstm(x[:, :, ::2, ::2].flatten(2).mT * scale, (state, state))
        return y.mT.unflatten(2, (3, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_that_makes_tensors_for_every_image_can_be_pickled(dtype):
    """They are made of the weights' type and for as many images as before, also after a second journey."""
    comparison = Comparison(Between(lambda x, inner: inner(x), inner=Started()), (3, 6, 6), modes=(False,))
    comparison.divide(2)
    assert comparison.error((1,), False) < 1e-8
    net = comparison.network((1,), False)
    tensors = [tensor.to(dtype) for tensor in comparison.tensors(net.names, (1,))]
    module = copy.deepcopy(net.module)
    recast(module, torch.float64, dtype)
    for images in (comparison.x.to(dtype), comparison.x[:1].to(dtype)):
        expected, again = module(images, *tensors), module
        assert expected.dtype is dtype
        for _ in range(2):
            again = pickle.loads(pickle.dumps(again))
            assert torch.equal(again(images, *tensors), expected)


def test_no_gradient_where_the_module_has_none():
    comparison = Comparison(CASES["no gradient"], (3, 6, 6))
    comparison.divide(2)
    net = comparison.network((1,), True)
    tensors = {name: t.requires_grad_() for name, t in zip(net.names, comparison.tensors(net.names, (1,)), strict=True)}
    net.module(comparison.x, *tensors.values()).sum().backward()
    assert tensors["inner.conv.weight"].grad is None
    assert tensors["stem.weight"].grad is not None


# What is refused


@torch.library.custom_op("dvn_test::twist", mutates_args=())
def twist(x: Tensor) -> Tensor:
    return x.flip(1)


@twist.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Twist(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return twist(x)


def refusal(module: nn.Module) -> str:
    with pytest.raises(InputError) as caught:
        Labeller(2).run(trace(module, (3, 6, 6), False))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_fits_the_traced_batch_alone_is_refused(monkeypatch):
    """A model with kernels for every image, whose groups are here as many as at the size that it was traced with."""
    monkeypatch.setattr(Narrower, "scaled", lambda self, number, now: now)
    spec = BackboneSpec("timm", "small", 4, 3, (6, 6))
    partition = partition_backbone(spec, 2, module=CASES["generated kernel of two groups"])
    with pytest.raises(InputError, match=r"operator aten.conv2d.default \(Between\) cannot be narrowed so"):
        partition.network((1,), 4)


def test_an_unknown_operator_is_refused_by_name():
    message = refusal(Between(lambda x, odd: odd(x), odd=Twist()))
    assert message == "operator dvn_test.twist.default in inner.odd (Twist) is not supported"


class Picked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, x.sum((0, 2, 3)).argsort()]


class Looked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, x.sum((0, 2, 3)).gt(0).long()]


def test_an_index_that_depends_on_the_input_is_refused():
    message = refusal(Between(lambda x, odd: odd(x), odd=Looked()))
    assert message.endswith("in inner.odd (Looked) is not supported as an index: it depends on the input")
    message = refusal(Between(lambda x, odd: odd(x), odd=Picked()))
    assert message.startswith("operator aten.argsort.default in inner.odd (Picked)")


def test_a_write_that_would_be_lost_is_refused():
    """Every other channel is written to: where what is kept of them is no view, the write would miss the tensor."""

    def odd_ones(x: Tensor) -> Tensor:
        y = x + x.roll(4, 1)  # channels i and i + 4 belong together
        y[:, ::2].mul_(2)
        return y

    comparison = Comparison(Between(odd_ones), (3, 6, 6))
    comparison.divide(2)
    with pytest.raises(InputError, match=r"aten\.mul_\.Tensor .* where only a part of it is kept"):
        comparison.error((1,), False)
