"""The reference itself: what it says of networks small enough to do by hand."""

import torch
import torch.nn.functional as F
from torch import nn

from dvn_cli.check import Comparison, networks
from dvn_cli.reference import KeptStatistics


def test_networks_of_four_units_are_those_of_the_paper():
    assert networks(4) == [
        *((1,), (2,), (3,), (4,), (1, 2), (2, 3), (3, 4), (1, 2, 3), (2, 3, 4), (1, 2, 3, 4)),
    ]


def test_statistics_are_taken_over_what_is_kept():
    x = torch.randn(2, 6, 5, dtype=torch.double) + 3
    part = x.clone()
    part[:, 2:4] = 0
    kept = [0, 1, 4, 5]
    weight = torch.rand(5, dtype=torch.double) + 1
    cases = [
        (lambda t: t.mean(1), lambda t: t.mean(1)),
        (lambda t: t.var(1, keepdim=True), lambda t: t.var(1, keepdim=True)),
        (lambda t: t.std(dim=1, unbiased=False), lambda t: t.std(dim=1, unbiased=False)),
        (lambda t: t.softmax(1)[:, kept], lambda t: t.softmax(1)),
        (lambda t: (-t).amax(1), lambda t: (-t).amax(1)),
        (lambda t: F.group_norm(t, 1)[:, kept], lambda t: F.group_norm(t, 1)),
        (lambda t: F.group_norm(t, 3)[:, kept], lambda t: F.group_norm(t, 2)),
        (lambda t: F.layer_norm(t.mT, (6,)).mT[:, kept], lambda t: F.layer_norm(t.mT, (4,)).mT),
        (lambda t: F.rms_norm(t.mT, (6,)).mT[:, kept], lambda t: F.rms_norm(t.mT, (4,)).mT),
        (lambda t: F.batch_norm(t.mT, None, None, weight, None, True).mT[:, kept],
         lambda t: F.batch_norm(t.mT, None, None, weight, None, True).mT),
    ]  # fmt: skip
    for masked, narrow in cases:
        with KeptStatistics() as whole:
            masked(x)
        with KeptStatistics(whole):
            found = masked(part)
        torch.testing.assert_close(found, narrow(x[:, kept]))


def test_a_wrong_network_is_told():
    comparison = Comparison(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), (3, 8, 8))
    comparison.divide(2)
    assert comparison.error((1,), False) < 1e-12
    narrowed = comparison.narrowed
    comparison.narrowed = lambda kept, train: narrowed((2,), train)  # type: ignore[method-assign]
    assert comparison.error((1,), False) > 1e-3


class Pooled(nn.Module):
    """One channel for each of eight units, which is zero at some positions of all images, and its mean over them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))


def test_what_happens_to_be_zero_is_kept() -> None:
    comparison = Comparison(Pooled(), (3, 16, 1))
    comparison.divide(8)
    values = comparison.module.conv(comparison.x).relu()
    assert (values[:, [0, 4]] == 0).all(0).any(1).all()  # of either channel, at some position
    for units in ((1,), (5,), (1, 2, 3)):
        for train in (False, True):
            assert comparison.error(units, train) < 1e-12, (units, train)
