"""Where the figures of every epoch can go besides the record: CSV, JSON lines, TensorBoard."""

import contextlib
import csv
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from dvn_cli.errors import DvnError, InputError
from dvn_cli.files import check_writable, reason
from dvn_cli.training.experiment import Observer, Trained
from dvn_cli.training.loop import Run
from dvn_cli.training.session import Session


def log(path: Path, force: bool = False) -> Observer:
    """Returns what keeps the figures of every epoch of a run, see `Run.scalars`.

    Args:
        path: a file that ends with .csv or .jsonl, with a line an epoch; or a folder, for TensorBoard.
        force: replace a file that is there. Without it, a run that goes on adds to its own.

    Raises:
        InputError: it is neither, cannot be written, or TensorBoard is not installed.
    """
    if path.suffix in (".csv", ".jsonl") and not path.is_dir():
        check_writable(path)
        return FileLog(path, force)
    if path.suffix and not path.is_dir():
        raise InputError(f"--log ends with .csv or .jsonl, or is a folder for TensorBoard, not '{path}'")
    return TensorBoard(path)


class FileLog(Observer):
    """Writes a line for each epoch: CSV, a column for each figure, or JSON, whichever the file's name ends with."""

    def __init__(self, path: Path, force: bool) -> None:
        self.path, self.force = path, force

    def begins(self, session: Session) -> None:
        run = session.run
        networks = [f"{run.network.tasks[task - 1].name}/{level}" for task, level in run.network]
        columns = [f"{what}/{network}" for what in ("loss", "validation") for network in networks]
        self.columns = ["epoch", "stage", "lr", "seconds", *columns]
        so_far = "".join(self._line(run.scalars(entry)) for entry in run.history)
        if self.path.suffix == ".csv":
            so_far = self._line(dict(zip(self.columns, self.columns, strict=True))) + so_far
        if os.path.exists(self.path) and not self.force:
            with open(self.path, encoding="utf-8", errors="replace", newline="") as there:
                if not so_far.startswith(there.read(len(so_far) + 1)):
                    raise InputError(f"'{self.path}' exists: give another --log, or --force to replace it")
        with self._writing():
            file: TextIO = open(self.path, "w", encoding="utf-8", newline="", buffering=1)  # noqa: SIM115
            self.file = file
            file.write(so_far)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Says what the system says, such as that the disk is full."""
        try:
            yield
        except OSError as error:
            raise DvnError(f"cannot write '{self.path}': {reason(error)}") from error

    def _line(self, scalars: Mapping[str, Any]) -> str:
        if self.path.suffix != ".csv":
            return json.dumps(scalars) + "\n"
        line = io.StringIO()
        csv.DictWriter(line, self.columns).writerow(scalars)
        return line.getvalue()

    def epoch(self, run: Run) -> None:
        with self._writing():
            self.file.write(self._line(run.scalars()))

    def ends(self, trained: Trained) -> None:
        self.file.close()


class TensorBoard(Observer):
    """Writes the figures of every epoch as TensorBoard reads them."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError(f"--log {folder} is for TensorBoard: pip install 'dvn[tensorboard]'") from None
        self.folder, self.writer_of = folder, SummaryWriter

    def begins(self, session: Session) -> None:
        self.writer: Any = self.writer_of(str(self.folder), purge_step=session.run.epochs_done + 1)

    def epoch(self, run: Run) -> None:
        for name, value in run.scalars().items():
            self.writer.add_scalar(name, value, run.epochs_done)
        self.writer.flush()

    def ends(self, trained: Trained) -> None:
        self.writer.close()
