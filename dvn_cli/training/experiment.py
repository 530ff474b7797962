"""A recipe, trained: from its data and backbone to the networks and their accuracies."""

import contextlib
import copy
import functools
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dvn_cli import processes
from dvn_cli.data import DataSpec, Reader, TaskData
from dvn_cli.data.classes import few
from dvn_cli.data.spec import locate
from dvn_cli.device import check_compiler, choose
from dvn_cli.dividing import Note, silent
from dvn_cli.errors import InputError
from dvn_cli.evaluation import measure
from dvn_cli.evaluation.measure import Evaluation
from dvn_cli.files import check_writable
from dvn_cli.store.metadata import Preprocessing
from dvn_cli.training import recipes
from dvn_cli.training.building import build, channels, input_size, prepared_for
from dvn_cli.training.loop import Run
from dvn_cli.training.recipe import Recipe
from dvn_cli.training.rehearsal import Rehearsal, rehearse
from dvn_cli.training.session import (
    Files,
    Finished,
    Session,
    complete_run,
    enough_memory_for,
    interrupted_run,
    refuse_to_lose,
)
from dvn_cli.training.sharing import check_batches
from dvn_cli.training.speed import Speed, speed
from dvn_cli.training.teachers import file_teachers


@dataclass(frozen=True)
class Trained:
    """What a run leaves.

    Attributes:
        checkpoint: the file of the trained networks.
        record: the JSON file that says how they were trained.
        results: of every network on the test images, by task and level.
        history: for each epoch its learning rate, losses and validation accuracies; see `Run`.
    """

    checkpoint: Path
    record: Path
    results: list[Evaluation]
    history: list[dict[str, Any]]


class Observer:
    """Is told how a run goes, and keeps it to itself. A subclass shows it, or hands it on to a logger."""

    def note(self, line: str) -> None:
        """What is used for what, and where an interrupted run goes on."""

    def begins(self, session: Session) -> None:
        """All is read and divided; the first step comes next."""

    def step(self, run: Run, step: int) -> None:
        """A step has been taken, by number from 1 in its epoch."""

    def epoch(self, run: Run) -> None:
        """An epoch has ended, and can be resumed after."""

    def measures(self) -> None:
        """The networks are written; their accuracies on the test images come next."""

    def ends(self, trained: Trained) -> None:
        """The results are there, and about to be filed."""


def train(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    output: str | os.PathLike[str] = "dvn.safetensors",
    *,
    overrides: Sequence[str] = (),
    device: str | torch.device = "auto",
    resume: bool = False,
    force: bool = False,
    observer: Observer | Sequence[Observer] = (),
) -> Trained:
    """Trains the networks of all tasks and levels as a recipe says, and measures them on the test images.

    Args:
        recipe: its file, the name of one that comes with dvn, a mapping of keys, or a `Recipe`. Relative paths in it
            start from its file's folder, else from the working directory.
        output: the checkpoint to write; its record lies beside it, and so does what `resume` goes on from.
        overrides: `key=value` with dotted keys and values in YAML, as on the command line: `optimizer.lr=0.05`.
        device: `auto`, or by torch's name.
        resume: go on with the run whose files are there: interrupted, or finished with fewer epochs. Where there is
            none, start; where nothing is left to do, return what it left.
        force: replace what another run has left there.
        observer: is told how it goes; several are told one after the other.

    Raises:
        InputError: recipe, data, backbone or output cannot be used so, or there is another run's work where this one
            would write.
        DvnError: a loss is not a number, memory is too small, or a file cannot be written.

    Example:
        >>> trained = dvn_cli.train("digits", overrides=["epochs=5"])  # doctest: +SKIP
        >>> [round(result.top1) for result in trained.results]  # doctest: +SKIP
    """
    observers, output = [observer] if isinstance(observer, Observer) else list(observer), Path(output)
    if processes.rank():
        observers = []

    def tell(what: str, *words: Any) -> None:
        for each in observers:
            getattr(each, what)(*words)

    note = functools.partial(tell, "note")
    recipe, base = _read(recipe, overrides)
    if resume and (finished := complete_run(recipe, output)) is not None:
        note(f"{output} has all of its {finished.epochs} epochs: there is nothing left to do")
        return Trained(output, Files.of(output).record, finished.results or [], finished.history)
    where = device if isinstance(device, torch.device) else choose(device)
    session = prepare(recipe, base, output, where, resume, force=force, note=note)
    tell("begins", session)
    session.train(functools.partial(tell, "epoch"), functools.partial(tell, "step"))
    tell("measures")
    splits = {number: data.test for number, data in session.run.data.items()}
    results = measure.evaluate_all(session.run.network, splits, device=where, shared=True)
    trained = Trained(output, session.files.record, results, session.run.history)
    try:
        tell("ends", trained)
    finally:  # whichever of the two fails, the other one has the results
        session.finish(results)
    return trained


def dry_run(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    *,
    overrides: Sequence[str] = (),
    device: str | torch.device = "auto",
    observer: Observer | None = None,
) -> Rehearsal:
    """Reads and divides all that a run needs, takes two steps, and returns what the run will take; writes nothing.

    Arguments and errors are those of `train`.
    """
    observer = observer or Observer()
    session = _unwritten(recipe, overrides, device, observer.note)
    observer.begins(session)
    with enough_memory_for(session.recipe, session.run.device):
        return rehearse(session.run)


def measure_speed(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    *,
    overrides: Sequence[str] = (),
    device: str | torch.device = "auto",
    num_warm_iter: int = 10,
    num_bench_iter: int = 40,
    note: Note = silent,
) -> tuple[Speed, Run]:
    """Reads and divides all that a run needs, and returns how fast it trains, and the run; writes nothing.

    Args:
        recipe, overrides, device: as of `train`, and so are errors.
        num_warm_iter: steps before those that are timed.
        num_bench_iter: steps that are; fewer where the run has no more.
        note: is told, in a line each, what is used for what.
    """
    session = _unwritten(recipe, overrides, device, note)
    with enough_memory_for(session.recipe, session.run.device):
        return speed(session.run, num_warm_iter, num_bench_iter), session.run


def _unwritten(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    overrides: Sequence[str],
    device: str | torch.device,
    note: Note,
) -> Session:
    """A run that is ready to start, and leaves no file."""
    recipe, base = _read(recipe, overrides)
    where = device if isinstance(device, torch.device) else choose(device)
    with tempfile.TemporaryDirectory() as folder:
        return prepare(recipe, base, Path(folder) / "dvn.safetensors", where, note=note)


def _read(recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe, overrides: Sequence[str]) -> tuple[Recipe, Path]:
    """The recipe, however it is given, and the folder that its relative paths start from."""
    if isinstance(recipe, Recipe):
        if overrides:
            raise InputError("a Recipe is complete: give its keys as a mapping to override some of them")
        return recipe, Path()
    if isinstance(recipe, Mapping):
        content = recipes.resolved(copy.deepcopy(dict(recipe)), overrides, "the recipe")
        return recipes.parse(content, "the recipe"), Path()
    file = recipes.find(os.fspath(recipe))
    return recipes.read(file, overrides), recipes.folder(file)


def prepare(
    recipe: Recipe,
    base: Path,
    output: Path,
    device: torch.device,
    resume: bool = False,
    *,
    force: bool = False,
    note: Note = silent,
) -> Session:
    """Reads and divides all that a run needs, up to its first step or the one that an earlier run would take next.

    Args:
        recipe: what is trained.
        base: the folder of the recipe, which its relative paths start from.
        output: the checkpoint; its other files lie beside it.
        device: to compute on.
        resume: go on with the run whose files are there, interrupted, or finished with fewer epochs.
        force: replace what another run has left there.
        note: is told, in a line each, what is used for what and where the run goes on.

    Raises:
        InputError: data, backbone or output are not as the recipe says, there is another run's work where this one
            would write, or what is there is of another recipe.
        DvnError: the device's memory is too small.
    """
    files = Files.of(output)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    start = recipe.partition or recipe.continues
    if start is not None and _same_file(locate(start, base), output):
        raise InputError(f"'{output}' is what the recipe starts from: give another output with -o")
    if recipe.compile:
        check_compiler(device)
    for file in vars(files).values():
        check_writable(file)  # now, not after the last epoch
    if not resume and not force:
        refuse_to_lose(files)
    interrupted = interrupted_run(recipe, files) if resume else None
    finished = Finished.read(files) if resume and interrupted is None else None
    if finished is not None:
        finished.check(recipe)
    data = load_data(recipe, base, note)
    earlier = interrupted or (None if finished is None else finished.header)
    with enough_memory_for(recipe, device):
        network, before = build(recipe, data, base, device, note, None if earlier is None else earlier.metadata)
        learnt = dict(enumerate(data, len(network.tasks) - len(data) + 1))
        teachers = {}
        if recipe.taught_by not in (None, "top", "next"):
            teachers = file_teachers(recipe.taught_by, base, network, list(learnt), device)
        run = Run(recipe, network, learnt, device, before, teachers)
    check_batches(run)
    if frozen := sorted(network.partition.frozen):
        note(f"not trained, since the backbone's code has requires_grad=False on them: {few(frozen)}")
    held = {student.task for stage in run.stages for student, _ in stage.distilled}
    for number in sorted(held - run.data.keys()) if recipe.sequential.replay else ():
        note(f"no images of task '{run.network.tasks[number - 1].name}' are replayed: the recipe has none")
    session = Session(run, files, note)
    if interrupted is not None:
        session.restore(interrupted)
    elif finished is not None:
        session.extend(finished)
    elif resume:
        note("there is nothing to resume: the run starts from its beginning")
    return session


def _same_file(a: Path, b: Path) -> bool:
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)


def load_data(recipe: Recipe, base: Path, note: Note = silent) -> list[TaskData]:
    """Reads the images of all tasks; paths are relative to `base`, else to the working directory.

    What a task does not say of how its images are prepared is as for the weights that the recipe starts from. Images of
    different sizes are brought to the backbone's where it does not say to which.

    Raises:
        InputError: see `data.Reader`; the message begins with the task's name.
    """
    in_chans, reader = channels(recipe, base), Reader()
    weights = prepared_for(recipe, base, in_chans)
    specs, plans, loaded = [], [], []
    for task in recipe.tasks:
        with _named(task.name):
            spec = task.data
            size = input_size(recipe, base) if reader.needs_size(spec, channels=in_chans, base=base) else None
            if size is not None:
                height_width = f"{size[0]}x{size[1]}"
                note(f"task '{task.name}': images are brought to the backbone's {height_width}; size sets another one")
                spec = spec.model_copy(update={"size": size})
            specs.append(spec)
    resized = any(spec.size is not None for spec in specs)
    if weights is not None and (resized or weights.mean is not None):
        how = weights.describe(resized)
        note(f"images are prepared as for the weights where the recipe does not say otherwise: {how}")
    for task, spec in zip(recipe.tasks, specs, strict=True):
        with _named(task.name):
            plans.append(reader.task(_prepared(spec, weights), channels=in_chans, base=base))
    reader.settle()
    for task, plan in zip(recipe.tasks, plans, strict=True):
        with _named(task.name):
            loaded.append(plan.load())
    for line in reader.notes:
        note(line)
    return loaded


@contextlib.contextmanager
def _named(task: str) -> Iterator[None]:
    """What cannot be done for a task is said with its name."""
    try:
        yield
    except InputError as error:
        raise InputError(f"task '{task}': {error}") from None


def _prepared(spec: DataSpec, weights: Preprocessing | None) -> DataSpec:
    """A task's data, prepared as for the weights in what it does not say; without a size, images stay as they are."""
    if weights is None:
        return spec
    keys = {"mean": weights.mean, "std": weights.std, **(weights.resize if spec.size is not None else {})}
    unsaid = {key: value for key, value in keys.items() if getattr(spec, key) is None and value is not None}
    return DataSpec.model_validate(spec.model_dump() | unsaid)
