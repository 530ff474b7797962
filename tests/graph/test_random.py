"""Random small networks: what is narrowed is what is masked, whatever operators come together."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dvn_cli.check import Comparison, networks

CHANNELS = (4, 6, 8, 9, 12, 16, 24)


class Attention(nn.Module):
    def __init__(self, channels: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).reshape(b, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, h * w, c)).transpose(1, 2).reshape(b, c, h, w)


class Gate(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, 6, 1), nn.Conv2d(6, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class ChannelsLast(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Step(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.forward = function  # type: ignore[method-assign]


def shuffled(groups: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.reshape(x.shape[0], groups, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)


def to_space(x: Tensor) -> Tensor:
    """Channels to positions, pooled back."""
    return F.avg_pool2d(F.pixel_shuffle(x, 2), 2)


class Net(nn.Module):
    """Steps one after the other; each reads the latest value, and one from before where it takes two."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList([nn.Conv2d(3, channels, 3, padding=1)])
        self.inputs: list[tuple[int, ...]] = [(-1,)]
        self.widths = [channels]

    def add(self, step: nn.Module, width: int, *others: int) -> None:
        self.steps.append(step)
        self.inputs.append((len(self.widths) - 1, *others))
        self.widths.append(width)

    def finish(self) -> "Net":
        self.head = nn.Linear(self.widths[-1], 5)
        return self

    def forward(self, x: Tensor) -> Tensor:
        values: list[Tensor] = []
        for step, inputs in zip(self.steps, self.inputs, strict=True):
            values.append(step(*(x if i < 0 else values[i] for i in inputs)))
        return self.head(values[-1].mean((2, 3)))


def divisors(n: int) -> list[int]:
    return [d for d in range(2, n + 1) if n % d == 0]


@st.composite
def nets(draw: st.DrawFn) -> Net:
    net = Net(draw(st.sampled_from(CHANNELS)))
    for _ in range(draw(st.integers(1, 6))):
        c = net.widths[-1]
        kinds = ["conv", "linear", "depthwise", "batch", "layer", "gelu", "add", "cat", "gate", "attention"]
        kinds += ["grouped", "group", "shuffle", "split"] if divisors(c) else []
        kinds += ["halves", "part"] if c % 2 == 0 else []
        kinds += ["space"] if c % 4 == 0 and c > 4 else []
        kind = draw(st.sampled_from(kinds))
        to = draw(st.sampled_from(CHANNELS))
        some = draw(st.sampled_from(divisors(c) or [1]))
        if kind == "conv":
            net.add(nn.Conv2d(c, to, 3, padding=1, bias=draw(st.booleans())), to)
        elif kind == "linear":
            net.add(ChannelsLast(nn.Linear(c, to)), to)
        elif kind == "depthwise":
            net.add(nn.Conv2d(c, c, 3, padding=1, groups=c), c)
        elif kind == "grouped":
            net.add(nn.Conv2d(c, 2 * c, 1, groups=some), 2 * c)
        elif kind == "batch":
            net.add(nn.BatchNorm2d(c), c)
        elif kind == "group":
            net.add(nn.GroupNorm(some, c), c)
        elif kind == "layer":
            net.add(ChannelsLast(nn.LayerNorm(c)), c)
        elif kind == "gelu":
            net.add(nn.GELU(), c)
        elif kind == "add":
            same = [i for i, width in enumerate(net.widths[:-1]) if width == c]
            if same:
                net.add(Step(lambda x, y: x + y), c, draw(st.sampled_from(same)))
        elif kind == "cat":
            other = draw(st.integers(0, len(net.widths) - 1))
            net.add(Step(lambda x, y: torch.cat([x, y], 1)), c + net.widths[other], other)
        elif kind == "gate":
            net.add(Gate(c), c)
        elif kind == "attention":
            net.add(Attention(c, some, draw(st.booleans())), c)
        elif kind == "shuffle":
            net.add(Step(shuffled(some)), c)
        elif kind == "split":
            net.add(Step(lambda x, n=c // some: torch.cat(x.split(n, 1)[::-1], 1)), c)
        elif kind == "halves":
            net.add(Step(lambda x: (lambda a, b: a * b.sigmoid())(*x.chunk(2, 1))), c // 2)
        elif kind == "part":
            net.add(Step(lambda x: torch.cat([x[:, 1::2].tanh(), x[:, ::2]], 1)), c)
        elif kind == "space":
            net.add(Step(to_space), c // 4)
    return net.finish()


def check(net: Net, units: int, number: int, train: bool) -> None:
    note(f"{net.steps} {net.inputs}")
    torch.manual_seed(0)
    comparison = Comparison(net, (3, 4, 4), modes=(train,))
    comparison.divide(units)
    sets = networks(units)
    assert comparison.error(sets[number % len(sets)], train) < 1e-8


arguments = (nets(), st.integers(2, 4), st.integers(0, 9), st.booleans())
unhurried = {"deadline": None, "suppress_health_check": list(HealthCheck), "phases": (Phase.explicit, Phase.generate)}


@settings(max_examples=25, derandomize=True, **unhurried)
@given(*arguments)
def test_narrowed_is_masked(net, units, number, train):
    check(net, units, number, train)


@pytest.mark.slow
@settings(max_examples=300, **unhurried)
@given(*arguments)
def test_narrowed_is_masked_often(net, units, number, train):
    check(net, units, number, train)
