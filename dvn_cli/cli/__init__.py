"""The command line: one file per subcommand, which parses, calls and renders. Heavy imports wait for their command."""

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import version
from types import FrameType
from typing import Annotated, Any

import typer

from dvn_cli.cli.bench import bench_command
from dvn_cli.cli.eval import eval_command
from dvn_cli.cli.partition import partition_command
from dvn_cli.cli.slice import slice_command
from dvn_cli.cli.train import train_command
from dvn_cli.errors import DvnError, InputError, enough_memory

app = typer.Typer(no_args_is_help=True, add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
app.command("partition")(partition_command)
app.command("train")(train_command)
app.command("slice")(slice_command)
app.command("eval")(eval_command)
app.command("bench")(bench_command)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"dvn {version('dvn')}")
        raise typer.Exit


@app.callback()
def dvn(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Several vision tasks and several memory budgets in one set of weights: Deep Virtual Networks (CVPR 2019)."""
    if context.invoked_subcommand in ("partition", "slice") and _are_several():
        raise InputError(f"dvn {context.invoked_subcommand} runs in one process: leave out torchrun")


def _are_several() -> bool:
    """Whether torchrun, or whoever sets its variables, has started this process as one of several."""
    started = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    return started and os.environ["WORLD_SIZE"] != "1"


class _Output(io.FileIO):
    """A standard stream whose reader may have had enough, such as `head`: the work goes on, and writes its files."""

    has_reader = True

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            self.has_reader = False
            self.silence()
            return memoryview(data).nbytes

    def silence(self) -> None:
        """Lets what is written from here on go nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


class _Stdout(_Output):
    """File descriptor 1, of which it is said once, and as any other failure, that it cannot be written."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.silence()
            raise DvnError(f"cannot write to stdout: {error.strerror}") from None


def main() -> None:
    """Runs `dvn`: whatever goes wrong is one line on stderr and the exit code that says whose fault it was."""
    stdout = _prepare_streams()
    try:
        memory = enough_memory("this machine", "see what else runs on it, or set smaller images, batches or a backbone")
        with _stopped_by_signals(), _one_of_several(), memory:
            _check_working_directory()
            code = app(standalone_mode=False)
    except DvnError as error:
        code = _fail(str(error), error.exit_code)
    except Exception as error:
        if not hasattr(error, "format_message"):  # wrong usage, as Typer's or click's own exceptions tell it
            raise
        code = _fail(error.format_message(), 2)
    if stdout is not None and not stdout.has_reader:
        code = code or 1  # the work is done, and not all of what it came to was read
    sys.exit(code)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Has SIGTERM, and a terminal that is closed, end the command as Ctrl-C does, so that nothing temporary stays.

    A second one ends it at once. What stands for a signal is the exit code, 128 and its number.
    """
    caught: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():  # no other one may
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows lacks the second
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # under nohup it is ignored
                signal.signal(number, stop)
                caught.append(number)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def _one_of_several() -> Iterator[None]:
    """Joins the other processes where there are any; the first alone says how it goes."""
    if not _are_several():
        yield
        return
    from dvn_cli import processes

    with processes.joined(), contextlib.ExitStack() as silence:
        if processes.rank():
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(contextlib.redirect_stdout(nowhere))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def _check_working_directory() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise InputError(f"the working directory is gone ({error.strerror}): change to another one") from None


def _prepare_streams() -> _Stdout | None:
    """Lets no result be lost to a character that the terminal lacks, a reader who has gone or, unsaid, a full disk.

    Returns:
        What stdout is written through; None where it is closed, or not the process's own.
    """
    stdout = None
    for name, kind in (("stdout", _Stdout), ("stderr", _Output)):
        stream = getattr(sys, name)
        if stream is not None and stream is getattr(sys, f"__{name}__"):
            raw = kind(stream.fileno(), "wb", closefd=False)
            stdout = raw if isinstance(raw, _Stdout) else stdout
            wrapped = io.TextIOWrapper(
                io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=stream.line_buffering
            )
            setattr(sys, name, wrapped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")
    return stdout


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # nobody reads stderr: the exit code says it all the same
        typer.echo(f"dvn: {' '.join(message.split())}", err=True)
    return code
