"""How sure accuracies from images are: 95 % intervals of an accuracy, and of a change on the same images."""

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np

_Z = NormalDist().inv_cdf(0.975)

_GAMMA = 0.0025
"""Of the 5 % that an interval of a change may miss, what the limit of the share of flips takes."""


def wilson(right: int, images: int) -> tuple[float, float]:
    """Returns the interval of Wilson (1927) of an accuracy, in per cent, from how many images were told right."""
    share, weight = right / images, _Z**2 / images
    middle = share + weight / 2
    half = _Z * math.sqrt(share * (1 - share) / images + weight / (4 * images))
    low, high = ((middle + sign * half) / (1 + weight) for sign in (-1, 1))
    return 100 * max(low, 0.0), 100 * min(high, 1.0)


def top1_interval(top1: float, images: int) -> tuple[float, float]:
    """Returns Wilson's interval of an accuracy in per cent, as it was found on so many images."""
    return wilson(round(top1 * images / 100), images)


def change_interval(gained: int, lost: int, images: int) -> tuple[float, float]:
    """Returns the exact interval of the change in accuracy, in points, between two networks on the same images.

    A test is inverted: outside are the changes with which as many net gains as were seen, or more (on the other side:
    or fewer), are improbable. What the test would have to know besides, the share of images that flip at all, is taken
    at an upper confidence limit, whose own error is part of the 5 % (Berger and Boos, "P Values Maximized Over a
    Confidence Set for the Nuisance Parameter", JASA 1994). Up to a share of 2/3 the distribution of net gains is
    unimodal, and its tails are the heavier the more images flip, so that the limit is the worst case, and the interval
    covers the true change at least 95 times in 100.

    Args:
        gained: images that were told wrong before, and right now.
        lost: images that were told right before, and wrong now.
        images: all of them.
    """
    # By Clopper and Pearson (1934).
    flipping = _bisect(lambda share: _tail(gained + lost + 1, share, 0.0, images) < 1 - _GAMMA, 0.0, 1.0)

    def lower(net: int) -> float:
        level = (0.05 - _GAMMA) / 2

        def improbable(change: float) -> bool:
            return _tail(net, (flipping + change) / 2, (flipping - change) / 2, images) < level

        return 100 * _bisect(improbable, -flipping, net / images)

    return lower(gained - lost), -lower(lost - gained)


def images_needed(change: float, interval: tuple[float, float], bound: float, images: int) -> int | None:
    """Returns how many images would tell on which side of a bound a change is, if they flip as those of its interval.

    All are in points. None where the change is the bound, which no number of images tells from it.
    """
    near = interval[0] if change > bound else interval[1]
    return None if change == bound else math.ceil(images * ((change - near) / (change - bound)) ** 2)


def _tail(net: int, gain: float, loss: float, images: int) -> float:
    """The probability of as many net gains or more, where each image is a gain or a loss with these probabilities.

    The distribution is the inverse transform of a power of the characteristic function of one image.
    """
    flips = (gain + loss) * images
    reach = min(images, math.ceil(flips + 9 * math.sqrt(flips) + 40))  # more than ever flip, but once in 1e20 times
    size = 1 << (2 * max(reach, abs(net))).bit_length()
    turn = np.exp(-2j * np.pi / size * np.arange(size // 2 + 1))
    one = 1 - gain - loss + gain * turn + loss * turn.conj()
    power = np.abs(one) ** images * np.exp(1j * images * np.angle(one))  # faster than `one**images`
    probabilities = np.fft.irfft(power, size)
    return float(probabilities[np.arange(net, max(reach, net) + 1) % size].sum())


def _bisect(below: Callable[[float], bool], low: float, high: float) -> float:
    """Where a condition that holds at `low` ends to hold, from below."""
    for _ in range(28):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return low
