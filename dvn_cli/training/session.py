"""The files that a run keeps: checkpoint, record, and meanwhile the state that it is resumed from."""

import contextlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from dvn_cli import processes
from dvn_cli.data import DataSpec
from dvn_cli.data.pool import left_out
from dvn_cli.data.spec import MAY_DIFFER
from dvn_cli.device import title
from dvn_cli.errors import DvnError, InputError, enough_memory
from dvn_cli.evaluation.measure import Evaluation
from dvn_cli.files import atomic, run_record, stem
from dvn_cli.loading import read_tensors
from dvn_cli.network import to_data
from dvn_cli.store.file import Header, is_trained, lost_with, read_checkpoint, read_run, write
from dvn_cli.store.metadata import CheckpointMetadata, StateMetadata, Task, TrainingRecord
from dvn_cli.training import state
from dvn_cli.training.loop import Run, json_number
from dvn_cli.training.recipe import Keys, Recipe

_MAY_GROW = {"epochs", "patience"}
"""Keys of a recipe with other values of which a finished run is trained on."""

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
        return cls(output, run_record(output), output.with_name(f"{stem(output)}.state.safetensors"))


@dataclass
class Session:
    """A run and the files that it keeps.

    Attributes:
        run: what is trained.
        files: what it writes.
        note: is told, in a line each, what the record says that the recipe does not.
        restarts: after which numbers of epochs the run was trained on from its finished networks alone.
        left_out: what is said of images that cannot be read; None where there are none.
        record: what the record says before anything is trained.
    """

    run: Run
    files: Files
    note: Callable[[str], None]
    restarts: list[int] = field(default_factory=list)
    left_out: str | None = field(default=None, init=False)
    record: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.record = {
            "recipe": self.recipe.model_dump(mode="json"),
            "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
            "device": title(self.run.device),
            "threads": torch.get_num_threads(),
            "commit": commit(),
        }

    @property
    def recipe(self) -> Recipe:
        """What is trained."""
        return self.run.recipe

    @property
    def images(self) -> tuple[tuple[int, int], ...]:
        """How many images of train and validation each task has that is learnt."""
        return tuple((len(data.train), len(data.validation or ())) for data in self.run.data.values())

    def restore(self, interrupted: Header[StateMetadata]) -> None:
        """Goes back to where a run was interrupted.

        Raises:
            InputError: its images or networks were others.
        """
        metadata = interrupted.metadata
        if metadata.tasks is not None:
            _check_data(metadata.tasks, self.run.network.tasks)
            learnt = self.run.network.tasks[-len(self.images) :]
            for task, before, now in zip(learnt, metadata.images, self.images, strict=False):
                if before != now:
                    raise _other_data(task)
        self.restarts = list(metadata.restarts)
        tensors = state.tensors(interrupted)
        with self._fitting(self.files.state, "start again with --force"):
            self.run.restore(tensors, metadata)
        self.note(f"going on after {metadata.place}")

    def extend(self, finished: "Finished") -> None:
        """Goes on from a finished run's networks, or only measures them.

        Raises:
            InputError: its images or networks were others.
        """
        _check_data(finished.header.metadata.tasks, self.run.network.tasks)
        tensors = read_tensors(finished.header)
        with self._fitting(self.files.checkpoint, "give another output with -o"):
            self.run.extend(tensors, finished.history, finished.epochs, finished.keeps_best)
        self.restarts = list(finished.training.restarts)
        what = "measuring it"
        if finished.epochs < self.run.total_epochs:
            self.restarts.append(finished.epochs)
            what = f"going on at its place in the schedule of {self.run.total_epochs} epochs, with a new optimizer"
        self.note(f"'{self.files.checkpoint}' has {self.run.epochs_done} epochs: {what}")

    @staticmethod
    @contextlib.contextmanager
    def _fitting(path: Path, remedy: str) -> Iterator[None]:
        """Says of a file whose tensors are not those of the networks what to do."""
        try:
            yield
        except (KeyError, RuntimeError, TypeError, ValueError):
            raise InputError(f"'{path}' does not fit the networks that the recipe gives now: {remedy}") from None

    def train(self, after_epoch: Callable[[Run], None], after_step: Callable[[Run, int], None]) -> None:
        """Trains to the end and writes the checkpoint.

        The state is written after every epoch, at the intervals of the recipe, and when SIGINT or SIGTERM asks for an
        end.

        Raises:
            KeyboardInterrupt, SystemExit: a signal asked for an end.
            DvnError: a loss is not a number, the device's memory is too small, or a file cannot be written; an older
                checkpoint stays what it was, and so does its record.
        """
        processes.check_alike((self.run.epochs_done, self.run.steps_done, self.images))
        partition = self.run.network.partition
        tasks = tuple(replace(task, data=None) for task in self.run.network.tasks)
        saved = time.monotonic()

        def save(run: Run) -> None:
            nonlocal saved
            saved = time.monotonic()
            if processes.rank():
                return
            metadata = StateMetadata(
                recipe=self.record["recipe"],
                epochs_done=run.epochs_done,
                history=tuple(run.history),
                best=json_number(run.best),
                total_epochs=run.total_epochs,
                restarts=tuple(self.restarts),
                tasks=tasks,
                images=self.images,
                division=replace(partition.metadata(), graph=partition.graph_text),
                steps_done=run.steps_done,
            )
            with self._resumable():
                write(self.files.state, to_data(run.state()), metadata)

        def epoch_ended(run: Run) -> None:
            self._note_capture()
            self._note_left_out()
            save(run)
            after_epoch(run)
            stop.check()

        def step_ended(run: Run, step: int) -> None:
            after_step(run, step)
            if step == run.steps:  # the epoch ends, whose state is written
                return
            every = self.recipe.save_every
            is_due = every.steps is not None and step % every.steps == 0
            is_due = is_due or (every.minutes is not None and time.monotonic() - saved >= 60 * every.minutes)
            if is_due or stop.is_due:
                run.check_losses(step)
                save(run)
            stop.check()

        with enough_memory_for(self.recipe, self.run.device), self.run.stop as stop:
            self.run.run(epoch_ended, step_ended)
        if self.run.patience_is_over:
            self.note(f"stopped after epoch {self.run.epochs_done}: none of the last {self.recipe.patience} was better")
        epochs, restarts = self.run.epochs_done, tuple(self.restarts)
        self.run.network.training_record = TrainingRecord(**self.record, epochs=epochs, restarts=restarts)
        self.record["stored"] = sum(p.numel() for p in self.run.network.parameters())
        if processes.rank():
            return
        with self._resumable():
            self.run.network.save(self.files.checkpoint)
            self._write_record()
        self.files.state.unlink(missing_ok=True)

    def _note_capture(self) -> None:
        """Says and records, once, that the steps are not replayed as a CUDA graph, and why."""
        error = self.run.step.capture_error
        if error is not None and "capture_error" not in self.record:
            self.record["capture_error"] = error
            self.note(f"warning: a step cannot be captured as a CUDA graph; steps are launched one by one: {error}")

    def _note_left_out(self) -> None:
        """Says and records which images cannot be read, where others than before are found."""
        line = left_out(problem for data in self.run.data.values() for problem in data.bad)
        if line is not None and line != self.left_out:
            self.left_out = line
            self.note(f"warning: {line}")

    @contextlib.contextmanager
    def _resumable(self) -> Iterator[None]:
        """Says of a file that cannot be written what is not lost."""
        try:
            yield
        except DvnError as error:
            if not self.files.state.exists():
                raise
            kept = f"'{self.files.state}' has all up to {state.read(self.files.state).metadata.place}"
            raise type(error)(f"{error}; {kept}: the same command with --resume goes on from there") from error

    def finish(self, results: Sequence[Evaluation]) -> None:
        """Adds the accuracies on the test images to the record."""
        self._note_left_out()
        self.record["test"] = [result.to_dict() for result in results]
        if not processes.rank():
            self._write_record()

    def _write_record(self) -> None:
        tasks = [
            {"name": task.name, "classes": data.classes, "images": data.counts}
            | ({} if data.spec.groups is None else {"groups": data.spec.groups})
            | ({"order": task.order, "affinity": task.affinity} if task.affinity else {})
            for task, data in ((self.run.network.tasks[number - 1], data) for number, data in self.run.data.items())
        ]
        more = {key: value for key in ("restarts", "left_out") if (value := getattr(self, key))}
        if processes.count() > 1:
            more["processes"] = processes.count()
        record = {**self.record, **more, "tasks": tasks, "epochs": self.run.history}
        text = json.dumps(record, indent=1, allow_nan=False)
        with atomic(self.files.record) as file:
            file.write(text.encode() + b"\n")


def commit() -> str | None:
    """Returns the commit of the working directory, with `-dirty` where files were changed since; None without one.

    Recipes are recorded whole; it tells of what is beside them, such as a backbone of one's own.
    """
    quiet = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false"]  # writes nothing, runs nothing of the checkout
    words = [*quiet, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # there is no git, no checkout, or no commit in it
        return None


def enough_memory_for(recipe: Recipe, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Says of a device whose memory is too small for a run what to do."""
    return enough_memory(device, f"give a smaller batch_size than {recipe.batch_size}, or see what else runs there")


def interrupted_run(recipe: Recipe, files: Files) -> Header[StateMetadata] | None:
    """Returns the state of a recipe's interrupted run that has these files; None where none was interrupted.

    Raises:
        InputError: what was interrupted is of another recipe.
    """
    if not files.state.exists():
        return None
    interrupted = state.read(files.state)
    _check_recipe(interrupted.metadata.recipe, recipe, "the interrupted run")
    return interrupted


@dataclass(frozen=True)
class Finished:
    """A finished run, as its files tell of it.

    Attributes:
        header: of its checkpoint.
        record: what is beside it; empty where that is lost, or of another run.
    """

    header: Header[CheckpointMetadata]
    record: dict[str, Any]

    @classmethod
    def read(cls, files: Files) -> "Finished | None":
        """Reads the run that has these files; None where there are none, or a fresh partition.

        Raises:
            InputError: there is something else.
        """
        if not is_trained(files.checkpoint):
            if lost := lost_with(files.checkpoint):
                raise InputError(f"{lost}, which is no run to resume: --force replaces it, -o writes elsewhere")
            return None
        header, record = read_checkpoint(files.checkpoint), dict[str, Any]()
        with contextlib.suppress(InputError):
            record = read_run(header)
        return cls(header, record)

    @property
    def training(self) -> TrainingRecord:
        assert self.header.metadata.training is not None
        return self.header.metadata.training

    @property
    def epochs(self) -> int:
        """Of all stages."""
        assert self.training.epochs is not None
        return self.training.epochs

    @property
    def keeps_best(self) -> bool:
        """Whether the checkpoint is that of its best epoch."""
        return Recipe.model_validate(self.training.recipe).keeps_best

    @property
    def history(self) -> list[dict[str, Any]]:
        """What each epoch gave; empty where the record is lost."""
        history = self.record.get("epochs", [])
        return history if len(history) == self.epochs else []

    @property
    def results(self) -> list[Evaluation] | None:
        """On the test images; None where the run was interrupted before it had them, or they cannot be read."""
        try:
            return [Evaluation.from_dict(entry) for entry in self.record["test"]]
        except (KeyError, TypeError, AttributeError):
            return None

    def check(self, recipe: Recipe) -> None:
        """Raises InputError unless it is of the recipe, but for fewer epochs and other patience."""
        path = self.header.path
        if self.training.epochs is None:
            raise InputError(f"'{path}' does not say how many epochs it was trained for: start again with --force")
        before = _check_recipe(self.training.recipe, recipe, f"'{path}'", _MAY_GROW).epochs
        if before > recipe.epochs:
            raise InputError(f"'{path}' has been trained for {before} epochs: with --resume give as many or more")

    def is_complete(self, recipe: Recipe) -> bool:
        """Whether nothing is left to do for a recipe, which it is of (see `check`)."""
        before = self.training.recipe
        return self.results is not None and all(before.get(key) == getattr(recipe, key) for key in _MAY_GROW)


def complete_run(recipe: Recipe, output: Path) -> Finished | None:
    """Returns the finished run of a recipe whose files are there, or None where anything is left to do.

    Raises:
        InputError: what is there is of another recipe.
    """
    files = Files.of(output)
    finished = None if os.path.exists(files.state) else Finished.read(files)
    if finished is None:
        return None
    finished.check(recipe)
    return finished if finished.is_complete(recipe) else None


def refuse_to_lose(files: Files) -> None:
    """Raises InputError where another run's work would be lost: a state, a trained checkpoint, or its record."""
    elsewhere = "-o writes elsewhere, --force replaces it"
    if lost := state.lost_with(files.state):
        raise InputError(f"{lost}: --resume goes on with it, {elsewhere}")
    if lost := lost_with(files.checkpoint):
        more = ", --resume trains it on to more epochs" if is_trained(files.checkpoint) else ""
        raise InputError(f"{lost}: {elsewhere}{more}")
    if os.path.exists(files.record):
        raise InputError(f"'{files.record}' is the record of a run: {elsewhere}")


def _check_recipe(before: Any, now: Recipe, whose: str, apart: Collection[str] = ()) -> Recipe:
    """Returns a run's recipe; InputError at the first key in which it differs from that of now, and that counts.

    Args:
        before: the recipe, as JSON.
        now: the other one.
        whose: the first one is, for the message.
        apart: keys at the top that may differ as well.
    """
    try:
        known = Recipe.model_validate(before)
    except ValidationError:
        raise InputError(f"{whose} is of a recipe that this dvn does not know: start again with --force") from None
    found = _difference(known, now, apart)
    if found is not None:
        path, old, new = found
        old, new = (json.dumps(value, default=lambda keys: keys.model_dump(mode="json")) for value in (old, new))
        raise InputError(f"{whose} had {path}={old}, not {new}: resume it as it was, or start again with --force")
    return known


def _difference(before: Any, now: Any, apart: Collection[str] = (), path: str = "") -> tuple[str, Any, Any] | None:
    """The first key in which two recipes differ, and its values; those apart that may differ."""
    pairs: Iterable[tuple[str, Any, Any]]
    if isinstance(now, Keys | DataSpec) and type(before) is type(now):
        fields = type(now).model_fields
        names = [name for name in fields if MAY_DIFFER not in fields[name].metadata and name not in apart]
        pairs = ((name, getattr(before, name), getattr(now, name)) for name in names)
    elif isinstance(now, list) and isinstance(before, list) and len(before) == len(now):
        pairs = ((str(place), *both) for place, both in enumerate(zip(before, now, strict=True)))
    else:
        return None if before == now else (path, before, now)
    inner = (_difference(old, new, path=f"{path}.{name}" if path else name) for name, old, new in pairs)
    return next(filter(None, inner), None)


def _check_data(before: Sequence[Task], now: Sequence[Task]) -> None:
    """Raises InputError where tasks are not told apart, or their images not prepared, as they were."""
    for old, task in zip(before, now, strict=False):
        if any(getattr(old, key) != getattr(task, key) for key in ("classes", "input_size", "mean", "std")):
            raise _other_data(task)


def _other_data(task: Task) -> InputError:
    return InputError(
        f"the images of task '{task.name}' are not those that the run was trained on so far: put them back, or start "
        "again with --force"
    )
