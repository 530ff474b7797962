"""Where the figures of every epoch go: files that people plot from, TensorBoard, and loggers of one's own."""

import csv
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small

import dvn_cli
from dvn_cli.errors import DvnError, InputError
from dvn_cli.training.logs import log
from dvn_cli.training.loop import Run

WORDS = ["epochs=3", "unlock=0.99", "tasks.0.data.validation=0"]  # with epochs and networks that lack some figures


class Kill(dvn_cli.Observer):
    def epoch(self, run: Run) -> None:
        if run.epochs_done == 2:
            raise small.Stopped


def train(folder: Path, *observers: dvn_cli.Observer, **keys: Any) -> None:
    dvn_cli.train(
        small.content(), folder / "dvn.safetensors", overrides=WORDS, observer=observers, device="cpu", **keys
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("name", ["log.csv", "log.jsonl"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("dvn_cli.training.logs.check_writable", lambda path: None)
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(DvnError, match=r"cannot write '.*': No space left on device"):
        train(tmp_path, log(tmp_path / name, force=True))


def test_files(tmp_path: Path) -> None:
    """A line an epoch, with the figures of the record; complete, too, of a run that was interrupted."""
    files = [tmp_path / "log.csv", tmp_path / "log.jsonl"]
    with pytest.raises(small.Stopped):
        train(tmp_path, *map(log, files), Kill())
    assert [len(file.read_text().splitlines()) for file in files] == [3, 2], "written as the epochs end"
    with pytest.raises(InputError, match=r"'.*log.csv' exists: give another --log, or --force to replace it"):
        train(tmp_path, *map(log, files), force=True)
    for file in files:
        own = file.read_bytes()
        file.write_bytes(own[:-9] + b"7" + own[-8:])  # another run's
        with pytest.raises(InputError, match=r"exists: give another --log"):
            train(tmp_path, log(file), resume=True)
        file.write_bytes(own[:-9])  # cut off by a crash
    train(tmp_path, *map(log, files), resume=True)
    history = json.loads((tmp_path / "dvn.run.json").read_text())["epochs"]
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    with open(files[0], newline="") as file:
        table = list(csv.DictReader(file))
    assert len(history) == len(rows) == len(table) == 3
    for entry, row, cells in zip(history, rows, table, strict=True):
        assert {key: row[key] for key in ("epoch", "stage", "lr", "seconds")}.items() <= entry.items()
        for number, name in enumerate(("low", "all")):
            for level in range(2):
                for what, values in (("loss", entry["loss"]), ("validation", entry["validation"])):
                    assert row.get(f"{what}/{name}/{level + 1}") == values[number][level]
        assert {key: float(value) for key, value in cells.items() if value} == row
    assert "validation/low/1" in table[0], "a column for each network"
    assert rows[0].get("loss/all/1") is None


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []
    writer = SimpleNamespace(
        add_scalar=lambda *words: written.append(words), flush=lambda: None, close=lambda: written.append("closed")
    )
    module = SimpleNamespace(SummaryWriter=lambda folder, purge_step: written.append((folder, purge_step)) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    scalars: list[Any] = []

    class Mine(dvn_cli.Observer):
        def epoch(self, run: Run) -> None:
            scalars.extend((name, value, run.epochs_done) for name, value in run.scalars().items())

    train(tmp_path, Mine(), log(tmp_path / "runs"))
    assert written == [(str(tmp_path / "runs"), 1), *scalars, "closed"]


def test_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"ends with .csv or .jsonl, or is a folder for TensorBoard, not 'log.txt'"):
        log(Path("log.txt"))
    with pytest.raises(InputError, match="there is no folder"):
        log(tmp_path / "none" / "log.csv")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"pip install 'dvn\[tensorboard\]'"):
        log(tmp_path)
