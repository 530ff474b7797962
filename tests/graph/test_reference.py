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
