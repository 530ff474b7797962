"""The entry of the command line: help without torch, and one line for what is wrong."""

import importlib.metadata
import importlib.resources
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import dvn_cli
from dvn_cli import cli

COMMANDS = ["partition", "train", "slice", "eval", "bench"]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dvn", *words])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code or 0  # type: ignore[return-value]


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from dvn_cli import cli; sys.argv = ['dvn', *sys.argv[1:]]\n"
        "try: cli.main()\n"
        "finally: print(sorted({'torch', 'timm', 'pyarrow'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"
    assert done.stdout


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"dvn {dvn_cli.__version__}\n"
    assert dvn_cli.__version__ == importlib.metadata.version("dvn")
    assert (importlib.resources.files(dvn_cli) / "py.typed").is_file(), "type checkers would not look into it"


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["slcie"], "No such command 'slcie'"),
        (["slice", "--tsak", "1"], "No such option: --tsak"),
        (["slice", "--level", "one"], "Invalid value for '--level'"),
        (["partition"], "Missing argument"),
        (["train"], "Missing argument"),
        (["eval", "nothing.safetensors"], "there is no checkpoint 'nothing.safetensors'"),
    ],
)
def test_wrong_usage_is_one_line_and_2(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("dvn: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_working_directory_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run(monkeypatch, "slice", "--all") == 2
    assert capsys.readouterr().err.startswith("dvn: the working directory is gone (")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("words", [["--version"], ["slice", "--help"]])
def test_a_stdout_that_is_full_or_closed(words: list[str]) -> None:
    """One line and 1 where it is full; where nobody wants to hear of it, none."""
    code = "import sys; from dvn_cli import cli; sys.argv = ['dvn', *sys.argv[1:]]; cli.main()"
    command = [sys.executable, "-c", code, *words]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "dvn: cannot write to stdout: No space left on device\n")
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_who_has_had_enough_does_not_stop_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unread: Callable[[], None]
) -> None:
    """`| head` gets its lines, and all files are written; that not everything was read is the exit code."""
    monkeypatch.chdir(tmp_path)
    bench = ["bench", "--num-warm-iter", "0", "--num-bench-iter", "1", "--results-file", "bench.json"]
    for words, files in (
        (["partition", "wrn_10_1", "--units", "2", "--input-size", "8", "-o", "dvn.safetensors"], ["dvn.safetensors"]),
        (["slice", "--task", "1", "--max-params", "1G"], ["dvn-task1-level2.safetensors"]),
        (["slice", "--all"], [f"dvn-slices/dvn-task1-level{level}.safetensors" for level in (1, 2)]),
        (["slice", "--all", "-o", "more"], ["more/manifest.json"]),
        ([*bench, "dvn-task1-level2.safetensors"], ["bench.json"]),
    ):
        unread()
        assert run(monkeypatch, *words) == 1
        assert [name for name in files if not (tmp_path / name).exists()] == []


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: ...")])
def test_too_little_memory_anywhere(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", full)
    assert run(monkeypatch, "partition") == 1
    err = capsys.readouterr().err
    assert err.startswith("dvn: this machine has too little memory: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("bug", [RuntimeError("shapes do not fit"), OSError(5, "Input/output error", "a file")])
def test_nothing_else_is_taken_for_it(bug: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise bug

    monkeypatch.setattr(cli, "app", broken)
    monkeypatch.setattr(sys, "argv", ["dvn"])
    with pytest.raises(type(bug)):
        cli.main()


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGHUP])
def test_what_ends_a_command_leaves_nothing_temporary(
    sign: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a job's time is over, or a terminal is closed."""

    def ended() -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path):
            os.kill(os.getpid(), sign)
            time.sleep(10)
        raise AssertionError("it goes on")

    monkeypatch.setattr(cli, "_check_working_directory", ended)
    before = signal.signal(sign, signal.SIG_DFL)  # whoever runs the tests may have it ignored
    try:
        assert run(monkeypatch, "--version") == 128 + sign
        assert signal.getsignal(sign) is signal.SIG_DFL
    finally:
        signal.signal(sign, before)
    assert not list(tmp_path.iterdir())
