"""A recipe from the command line to the files that it leaves: checkpoint, record, and meanwhile the state to resume."""

import contextlib
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dvn_cli import checkpoint
from dvn_cli.data.spec import locate
from dvn_cli.device import title
from dvn_cli.errors import DvnError, InputError
from dvn_cli.training import setup, state
from dvn_cli.training.loop import Run
from dvn_cli.training.recipe import Recipe

LIBRARIES = ("dvn", "torch", "timm", "torchvision", "safetensors")


@dataclass(frozen=True)
class Files:
    """What a run writes.

    Attributes:
        checkpoint: the trained networks, when it is done.
        record: JSON: the resolved recipe, versions, and loss and accuracy of every epoch.
        state: what `--resume` goes on from; gone when it is done.
    """

    checkpoint: Path
    record: Path
    state: Path

    @classmethod
    def of(cls, output: Path) -> "Files":
        stem = output.name.removesuffix(".safetensors")
        return cls(output, output.with_name(f"{stem}.run.json"), output.with_name(f"{stem}.state.safetensors"))


class Session:
    """One `dvn train`: reads the data, trains, and keeps the files.

    Raises:
        InputError: data, backbone or output are not as the recipe says, or there is no such run to resume.
    """

    def __init__(
        self,
        recipe: Recipe,
        base: Path,
        output: Path,
        device: torch.device,
        resume: bool = False,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`base`: the folder of the recipe, which its relative paths start from; `note`: told, in lines, of choices."""
        self.recipe, self.files = recipe, Files.of(output)
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        self.record: dict[str, Any] = {
            "recipe": recipe.model_dump(mode="json"),
            "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
            "device": title(device),
            "threads": torch.get_num_threads(),
        }
        start = recipe.partition or recipe.continues
        if start is not None and _same_file(locate(start, base), output):
            raise InputError(f"'{output}' is what the recipe starts from: give another output with -o")
        for file in vars(self.files).values():
            _check_writable(file)  # now, not after the last epoch
        saved = state.load(self.files.state) if resume else None
        if saved is not None:
            _same_recipe(saved[1]["recipe"], self.record["recipe"])
        data = setup.load_data(recipe, base, note)
        network, before = setup.build(recipe, data, base, note)
        known = len(network.tasks) - len(data)
        with self._enough_memory(device):
            self.run = Run(recipe, network, dict(enumerate(data, known + 1)), device, before)
        if saved is not None:
            try:
                self.run.restore(*saved)
            except (KeyError, RuntimeError, TypeError, ValueError):
                raise InputError(
                    f"'{self.files.state}' does not fit the networks that the recipe gives now: start again without "
                    "--resume"
                ) from None

    @contextlib.contextmanager
    def _enough_memory(self, device: torch.device) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise DvnError(
                f"{device} has too little memory: give a smaller batch_size than {self.recipe.batch_size}, or see what "
                "else runs there"
            ) from error

    @property
    def left_over(self) -> bool:
        """Whether an interrupted run of this output lies there, and this one is not its continuation."""
        return self.run.epochs_done == 0 and self.files.state.exists()

    def train(self, after_epoch: Callable[[Run], None], after_step: Callable[[Run, int], None]) -> None:
        """Trains to the end and writes the checkpoint.

        Raises:
            DvnError: a loss is not a number, the device's memory is too small, or a file cannot be written; an older
                checkpoint stays what it was, and so does its record.
        """

        def keep(run: Run) -> None:
            tensors, metadata = run.state()
            state.save(self.files.state, tensors, {**metadata, "recipe": self.record["recipe"]})
            after_epoch(run)

        with self._enough_memory(self.run.device):
            self.run.run(keep, after_step)
        self.run.network.training_record = {**self.record, "epochs": self.run.epochs_done}
        self.record["stored"] = sum(p.numel() for p in self.run.network.parameters())
        self.run.network.save(self.files.checkpoint)
        self._write_record()
        self.files.state.unlink(missing_ok=True)

    def finish(self, results: list[dict[str, Any]]) -> None:
        """Adds the accuracies on the test images to the record."""
        self.record["test"] = results
        self._write_record()

    def _write_record(self) -> None:
        tasks = [
            {"name": self.run.network.tasks[number - 1].name, "classes": data.classes, "images": data.counts}
            | ({} if data.spec.groups is None else {"groups": data.spec.groups})
            for number, data in self.run.data.items()
        ]
        text = json.dumps({**self.record, "tasks": tasks, "epochs": self.run.history}, indent=1, allow_nan=False)
        with checkpoint.atomic(self.files.record) as file:
            file.write(text.encode() + b"\n")


def _same_file(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.samefile(b)


class _Writable(Exception):
    """Leaves `checkpoint.atomic` before it replaces anything."""


def _check_writable(path: Path) -> None:
    with contextlib.suppress(_Writable), checkpoint.atomic(path):
        raise _Writable


def _same_recipe(before: Any, now: Any, path: str = "") -> None:
    """Raises InputError at the first key that differs."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            _same_recipe(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
    elif before != now:
        old, new = (json.dumps(value) for value in (before, now))
        raise InputError(f"the interrupted run had {path}={old}, not {new}: resume it as it was, or start again")
