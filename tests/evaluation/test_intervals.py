"""Whether intervals cover as often as they say: counted over every outcome, not drawn."""

import math

import numpy as np
import pytest

from dvn_cli.evaluation.intervals import change_interval, images_needed, wilson


def probabilities(gain: np.ndarray, loss: np.ndarray, images: int) -> np.ndarray:
    """Of every outcome, (gained, lost) images, for each pair of the probabilities of a gain and of a loss."""
    outcomes = [(g, lost) for g in range(images + 1) for lost in range(images + 1 - g)]
    found = []
    for gained, lost in outcomes:
        rest = images - gained - lost
        ways = math.comb(images, gained) * math.comb(images - gained, lost)
        found.append(ways * gain**gained * loss**lost * np.maximum(1 - gain - loss, 0) ** rest)
    return np.array(found)


@pytest.mark.parametrize("images", [1, 4, 12])
def test_the_interval_of_a_change_covers_at_least_95_in_100(images: int) -> None:
    """Of all shares of gains and losses, in steps of a fortieth; what is above the promise is not thrown away."""
    outcomes = [(g, lost) for g in range(images + 1) for lost in range(images + 1 - g)]
    intervals = np.array([change_interval(*outcome, images) for outcome in outcomes])
    steps = np.linspace(0, 1, 41)
    pairs = np.array([(gain, loss) for gain in steps for loss in steps if gain + loss < 1 + 1e-9])
    change = 100 * (pairs[:, 0] - pairs[:, 1])
    covers = (intervals[:, :1] <= change + 1e-6) & (change - 1e-6 <= intervals[:, 1:])
    coverage = (probabilities(*pairs.T, images) * covers).sum(0)
    assert 0.95 <= coverage.min() < 0.98


@pytest.mark.parametrize(("gained", "lost", "images"), [(50, 50, 10_000), (100, 160, 10_000), (700, 300, 20_000)])
def test_the_interval_is_hardly_wider_than_the_normal_one_that_promises_nothing(
    gained: int, lost: int, images: int
) -> None:
    change = gained - lost
    half = 100 * 1.96 * math.sqrt(gained + lost - change**2 / images) / images
    low, high = change_interval(gained, lost, images)
    assert low < 100 * change / images - half < 100 * change / images + half < high
    assert high - low < 2.4 * half


def test_gains_and_losses_are_alike() -> None:
    low, high = change_interval(9, 4, 300)
    assert change_interval(4, 9, 300) == pytest.approx((-high, -low))
    assert change_interval(5, 0, 5)[1] == pytest.approx(100)
    low, high = change_interval(0, 0, 1000)
    assert low == -high < -0.37  # none of 1,000 flips: up to 3.7 in 1,000 may, at 2.5 %


def test_so_many_images_tell() -> None:
    images = 2000
    before = change_interval(10, 14, images)
    needed = images_needed(-0.2, before, -0.6, images)
    assert before[0] < -0.6
    assert needed is not None
    more = needed / images
    assert change_interval(round(10 * more), round(14 * more), needed)[0] >= -0.6
    assert change_interval(round(5 * more), round(7 * more), needed // 2)[0] < -0.6
    assert images_needed(-0.6, (-1, 0), -0.6, images) is None


@pytest.mark.parametrize(("right", "images", "interval"), [
    (0, 10, (0, 27.753)), (10, 10, (72.247, 100)), (81, 263, (25.529, 36.621)), (498, 500, (98.552, 99.890)),
])  # fmt: skip
def test_wilson(right: int, images: int, interval: tuple[float, float]) -> None:
    """81 of 263 is the example of Newcombe (1998), who has 25.5 to 36.6 %."""
    assert wilson(right, images) == pytest.approx(interval, abs=0.002)
