"""What all tests have in common."""

import os
import sys
from collections.abc import Callable, Iterator

import pytest
import synthetic
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exact", action="store_true", help="want stored losses and logits bit by bit (tests/pins)")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """The networks of the tests are small, and on a shared machine a second thread waits more than it works.

    The same goes for the commands that tests start.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory: pytest.TempPathFactory) -> synthetic.DataSets:
    """What stands for the data sets of the recipes that come with dvn."""
    return synthetic.data_sets(tmp_path_factory.mktemp("data_sets"))


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Makes stdout and stderr pipes whose reader has gone, as in `2>&1 | head`, until the test ends."""
    opened = []

    def break_pipes() -> None:
        for name in ("stdout", "stderr"):
            reading, writing = os.pipe()
            os.close(reading)
            opened.append(writing)
            stream = os.fdopen(writing, "w", closefd=False)
            monkeypatch.setattr(sys, name, stream)
            monkeypatch.setattr(sys, f"__{name}__", stream)

    yield break_pipes
    for descriptor in opened:
        os.close(descriptor)
