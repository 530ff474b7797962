"""What all tests have in common."""

from collections.abc import Iterator

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
