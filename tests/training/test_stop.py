"""Signals to a run: the first asks it to stop after the step, a second one ends it as if nobody listened."""

import signal
from collections.abc import Iterator

import pytest

from dvn_cli.training.stop import Stop


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Whoever runs the tests in the background may have SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("sign", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_the_first_one_is_noted(sign: signal.Signals, raised: type[BaseException]) -> None:
    with Stop() as stop:
        stop.check()
        signal.raise_signal(sign)
        with pytest.raises(raised):
            stop.check()


def test_a_second_one_does_what_it_did_before() -> None:
    with Stop():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_one_that_is_ignored_stays_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signal is None
