"""Whatever the bytes of a file, it is read or refused in a line: no traceback, no hang, no memory without end."""

import functools
import signal
from collections.abc import Callable
from pathlib import Path

import hostile
import pytest

from dvn_cli.errors import DvnError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @functools.cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        hostile.KINDS[name].make(folder)
        return folder

    return make


class Late(BaseException):
    """It takes longer than it may."""


def late(*_: object) -> None:
    raise Late


@pytest.mark.filterwarnings("ignore")  # of what torch says of the kinds of tensors
@pytest.mark.parametrize("name", hostile.KINDS)
def test_a_damaged_file_is_read_or_refused(
    name: str, whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(signal.SIGALRM, late)
    kind = hostile.KINDS[name]
    for number in range(34):
        folder = tmp_path / str(number)
        hostile.damage(kind, whole(name), folder, f"{name} {number}")
        monkeypatch.chdir(folder)
        signal.alarm(hostile.SECONDS)
        try:
            kind.read(folder)
        except DvnError:
            pass
        except BaseException as error:
            pytest.fail(f"{name} {number}: {error!r}")
        finally:
            signal.alarm(0)


@pytest.mark.slow
@pytest.mark.parametrize("name", hostile.KINDS)
def test_in_processes_with_limits(name: str, tmp_path: Path) -> None:
    """Some 3,000 files, every tenth with the whole command."""
    assert hostile.faults(name, 334, tmp_path) == []
