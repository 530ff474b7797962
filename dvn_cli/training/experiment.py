"""A recipe, trained: from its data and backbone to the networks and their accuracies."""

import contextlib
import copy
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvn_cli import compensation
from dvn_cli.backbones import BackboneSpec, default, preprocessing, resolve
from dvn_cli.data import DataSpec, Reader, TaskData, drawn
from dvn_cli.data.resize import Resize
from dvn_cli.data.sample import IMAGES
from dvn_cli.data.spec import locate
from dvn_cli.device import choose
from dvn_cli.dividing import Note, partition_backbone, silent
from dvn_cli.dividing import build as build_backbone
from dvn_cli.errors import InputError
from dvn_cli.evaluation import measure
from dvn_cli.evaluation.measure import Evaluation
from dvn_cli.files import check_writable
from dvn_cli.loading import load
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.partition import Partition
from dvn_cli.store.file import read_checkpoint
from dvn_cli.store.metadata import DataSource, DividedBackbone, Owner, Preprocessing, Rule, Task, TaskLevel
from dvn_cli.training import classifiers, recipes
from dvn_cli.training.loop import Run
from dvn_cli.training.methods import METHODS, Method, levels_of
from dvn_cli.training.recipe import Recipe
from dvn_cli.training.session import (
    Files,
    Finished,
    Session,
    complete_run,
    enough_memory_for,
    interrupted_run,
    refuse_to_lose,
)
from dvn_cli.units.order import paper_order


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
    """Is told how a run goes, and keeps it to itself. A subclass shows it."""

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
    observer: Observer | None = None,
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
        observer: is told how it goes.

    Raises:
        InputError: recipe, data, backbone or output cannot be used so, or there is another run's work where this one
            would write.
        DvnError: a loss is not a number, memory is too small, or a file cannot be written.

    Example:
        >>> trained = dvn_cli.train("digits", overrides=["epochs=5"])  # doctest: +SKIP
        >>> [round(result.top1) for result in trained.results]  # doctest: +SKIP
    """
    observer, output, base = observer or Observer(), Path(output), Path()
    if isinstance(recipe, Recipe):
        if overrides:
            raise InputError("a Recipe is complete: give its keys as a mapping to override some of them")
    elif isinstance(recipe, Mapping):
        recipe = recipes.parse(recipes.resolved(copy.deepcopy(dict(recipe)), overrides, "the recipe"), "the recipe")
    else:
        file = recipes.find(os.fspath(recipe))
        recipe, base = recipes.read(file, overrides), recipes.folder(file)
    if resume and (finished := complete_run(recipe, output)) is not None:
        observer.note(f"{output} has all of its {finished.epochs} epochs: there is nothing left to do")
        return Trained(output, Files.of(output).record, finished.results or [], finished.history)
    where = device if isinstance(device, torch.device) else choose(device)
    session = prepare(recipe, base, output, where, resume, force=force, note=observer.note)
    observer.begins(session)
    session.train(observer.epoch, observer.step)
    observer.measures()
    splits = {number: data.test for number, data in session.run.data.items()}
    results = measure.evaluate_all(session.run.network, splits, device=where)
    trained = Trained(output, session.files.record, results, session.run.history)
    try:
        observer.ends(trained)
    finally:  # whichever of the two fails, the other one has the results
        session.finish(results)
    return trained


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
    for file in vars(files).values():
        check_writable(file)  # now, not after the last epoch
    if not resume and not force:
        refuse_to_lose(files)
    interrupted = interrupted_run(recipe, files) if resume else None
    finished = Finished.read(files) if resume and interrupted is None else None
    if finished is not None:
        finished.check(recipe)
    data = load_data(recipe, base, note)
    division = interrupted.metadata.division if interrupted is not None else None
    network, before = build(recipe, data, base, note, division if finished is None else finished.header.metadata)
    with enough_memory_for(recipe, device):
        run = Run(recipe, network, dict(enumerate(data, len(network.tasks) - len(data) + 1)), device, before)
    run.check_batches()
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

    What a task does not say of how its images are prepared is as for the weights that the recipe starts from.

    Raises:
        InputError: see `data.Reader`; the message begins with the task's name.
    """
    channels, reader = _channels(recipe, base), Reader()
    weights = _preprocessing(recipe, base, channels)
    resized = any(task.data.size is not None for task in recipe.tasks)
    if weights is not None and (resized or weights.mean is not None):
        how = weights.describe(resized)
        note(f"images are prepared as for the weights where the recipe does not say otherwise: {how}")
    plans, loaded = [], []
    for task in recipe.tasks:
        with _named(task.name):
            plans.append(reader.task(_prepared(task.data, weights), channels=channels, base=base))
    reader.check_memory()
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


def _preprocessing(recipe: Recipe, base: Path, channels: int) -> Preprocessing | None:
    """How images were prepared for the weights that a recipe starts from; None where those are random."""
    start = recipe.partition or recipe.continues
    if start is not None:
        return read_checkpoint(locate(start, base)).metadata.preprocessing
    assert recipe.backbone is not None
    if not recipe.backbone.has_weights:
        return None
    return preprocessing(replace(default(recipe.backbone.name), in_chans=channels))


def _prepared(spec: DataSpec, weights: Preprocessing | None) -> DataSpec:
    """A task's data, prepared as for the weights in what it does not say; without a size, images stay as they are."""
    if weights is None:
        return spec
    keys = {"mean": weights.mean, "std": weights.std, **(weights.resize if spec.size is not None else {})}
    unsaid = {key: value for key, value in keys.items() if getattr(spec, key) is None and value is not None}
    return DataSpec.model_validate(spec.model_dump() | unsaid)


def build(
    recipe: Recipe,
    data: Sequence[TaskData],
    base: Path,
    note: Note = silent,
    division: DividedBackbone | None = None,
) -> tuple[DeepVirtualNetwork, list[TaskLevel]]:
    """Partitions the recipe's backbone, or opens its partition or checkpoint, and gives everyone what is their own.

    Args:
        division: that of the run that goes on, where one does; the networks are then not made ready to start.

    Returns:
        all networks, and which of them were trained in an earlier run.
    """
    if recipe.continues is not None:
        return _continued(recipe, data, base)
    method = METHODS[recipe.method]
    if recipe.partition is not None:
        partition, tensors = _opened(recipe, data, base)
        is_loaded, load = True, None
    else:
        partition, tensors, is_loaded = _divided(recipe, data, base, note, division)
        load = functools.partial(_backbone, recipe, base=base)
    weights = _preprocessing(recipe, base, partition.spec.in_chans)
    tasks = _tasks(recipe, data, partition, base)
    has_weights = weights is not None or (recipe.backbone is not None and recipe.backbone.has_weights)
    compensates = recipe.compensate and has_weights and method.levels != "top"
    if compensates:
        partition = compensation.with_private_biases(partition)
    network = DeepVirtualNetwork(partition, tasks, tensors, preprocessing=weights)
    network.make_private(owners(method, partition))
    network.check()
    if has_weights and division is None:
        classifiers.start(network, tensors, load, is_loaded, note)
    if compensates and division is None:
        note("making up for what levels lack: running statistics and biases, on training images")
        images = {number: drawn(d.train, d.mean, d.std, seed=recipe.seed) for number, d in enumerate(data, 1)}
        compensation.compensate(network, images)
    return network, []


def owners(method: Method, partition: Partition) -> Mapping[str, Owner]:
    """Who has a tensor of its own, of each."""
    if method.private == "norms":
        return partition.owners
    names = partition.shapes if method.private == "all" else partition.head
    return dict.fromkeys(names, "network")


def _channels(recipe: Recipe, base: Path) -> int:
    """Channels of the images, before any is read."""
    start = recipe.partition or recipe.continues
    if start is not None:
        return read_checkpoint(locate(start, base)).metadata.backbone.in_chans
    assert recipe.backbone is not None
    return recipe.backbone.in_chans or default(recipe.backbone.name).in_chans


def _divided(
    recipe: Recipe, data: Sequence[TaskData], base: Path, note: Note, division: DividedBackbone | None
) -> tuple[Partition, dict[str, Tensor], bool]:
    """The divided backbone, its tensors by their names in the file, and whether it has its weights' classifier."""
    assert recipe.backbone is not None
    assert recipe.units is not None
    smallest = min((d.input_size for d in data), key=lambda size: size[0] * size[1])
    asked = recipe.backbone.input_size
    spec = resolve(
        recipe.backbone.name,
        num_classes=max(len(d.classes) for d in data),
        in_chans=recipe.backbone.in_chans,
        input_size=(asked, asked) if isinstance(asked, int) else asked or smallest,
    )
    spec = replace(spec, hidden_layers=METHODS[recipe.method].hidden)
    module, lacking = _backbone(recipe, spec, base, note)
    rule = Rule(recipe.assign, recipe.round_to, recipe.divide)
    if rule.assign == "even":
        partition = partition_backbone(spec, recipe.units, rule)
    elif division is not None:
        partition = Partition.restore(division)
    else:
        images = _scoring(data, spec, recipe.seed) if recipe.backbone.has_weights else []
        partition = partition_backbone(spec, recipe.units, rule, module, images)
    return partition, _templates(partition, module), not lacking


def _backbone(recipe: Recipe, spec: BackboneSpec, base: Path, note: Note = silent) -> tuple[nn.Module, list[str]]:
    """Builds the recipe's backbone; see `dividing.build`."""
    assert recipe.backbone is not None
    given = recipe.backbone.weights
    return build_backbone(
        spec,
        seed=recipe.seed,
        weights=None if given is None else locate(given, base),
        pretrained=recipe.backbone.pretrained,
        zero_init_last=recipe.backbone.zero_init_last,
        note=note,
    )


def _scoring(data: Sequence[TaskData], spec: BackboneSpec, seed: int) -> list[Tensor]:
    """Batches of training images, as many of each task, to score channels by."""
    count = -(-IMAGES // len(data))
    batches = (drawn(of_task.train, of_task.mean, of_task.std, seed=seed, count=count) for of_task in data)
    return [F.interpolate(batch, spec.input_size, mode="bilinear") for of_task in batches for batch in of_task]


def _templates(partition: Partition, module: nn.Module) -> dict[str, Tensor]:
    """The backbone's tensors by their names in the file."""
    state = module.state_dict()
    return {f"shared/{name}": state[name].detach().clone() for name in partition.shapes}


def _open(file: str, base: Path) -> DeepVirtualNetwork:
    opened = load(locate(file, base))
    if not isinstance(opened, DeepVirtualNetwork):
        raise InputError(f"'{file}' is a slice: give a checkpoint")
    return opened


def _opened(recipe: Recipe, data: Sequence[TaskData], base: Path) -> tuple[Partition, dict[str, Tensor]]:
    assert recipe.partition is not None
    if METHODS[recipe.method].hidden:
        raise InputError(f"method {recipe.method} has layers that '{recipe.partition}' lacks: give backbone and units")
    opened = _open(recipe.partition, base)
    if opened.training_record is not None:
        raise InputError(f"'{recipe.partition}' has been trained already: `continues` adds tasks to it")
    most = opened.partition.spec.num_classes
    for task, images in zip(recipe.tasks, data, strict=True):
        if len(images.classes) > most:
            raise InputError(
                f"task '{task.name}' has {len(images.classes)} classes, the partition's classifier {most}: "
                f"partition with --num-classes {max(len(d.classes) for d in data)}"
            )
    return opened.partition, {n: t for n, t in opened.file_tensors().items() if n.startswith("shared/")}


def _continued(recipe: Recipe, data: Sequence[TaskData], base: Path) -> tuple[DeepVirtualNetwork, list[TaskLevel]]:
    """A trained checkpoint, with new tasks and, where a new unit makes them possible, new levels of the old tasks."""
    assert recipe.continues is not None
    opened, method = _open(recipe.continues, base), METHODS[recipe.method]
    if opened.training_record is None:
        raise InputError(f"'{recipe.continues}' has not been trained yet: give it as partition")
    trained = opened.training_record.recipe.get("method", "dvn")
    if trained != recipe.method:
        raise InputError(f"'{recipe.continues}' was trained with method={trained}: continue with the same")
    known, units = opened.tasks, opened.partition.units
    twice = {task.name for task in known} & {task.name for task in recipe.tasks}
    if twice:
        raise InputError(f"'{recipe.continues}' has a task '{min(twice)}' already: give the new one another name")
    before = list(opened)
    tasks = [*known, *_tasks(recipe, data, opened.partition, base, len(known))]
    if method.levels == "all":
        used = max(unit for task, level in before for unit in known[task - 1].units(level))
        there = min(used + len(data), units) if recipe.sequential.grow else units
        wanted = recipe.levels or range(1, units + 1)
        for place, task in enumerate(tasks):
            more = [n for n in wanted if n > task.levels[-1]] if place < len(known) else []
            levels = tuple(n for n in (*task.levels, *more) if max(task.order[:n]) <= there)
            tasks[place] = replace(task, levels=levels)
    partition = opened.partition
    most = max(len(task.classes) for task in tasks)
    if most > partition.spec.num_classes:
        partition = partition.rebuilt(replace(partition.spec, num_classes=most))
    torch.manual_seed(recipe.seed)
    tensors = {**_templates(partition, partition.spec.build()), **opened.file_tensors()}
    network = DeepVirtualNetwork(partition, tasks, tensors, preprocessing=opened.preprocessing)
    network.make_private(owners(method, partition))
    network.check()
    return network, before


def _tasks(recipe: Recipe, data: Sequence[TaskData], partition: Partition, base: Path, known: int = 0) -> list[Task]:
    """The recipe's tasks, where so many are known already."""
    method, count, units = METHODS[recipe.method], known + len(data), partition.units
    tasks = []
    for place, (keys, images) in enumerate(zip(recipe.tasks, data, strict=True)):
        number = known + place + 1
        if method.order == "same" and keys.order is not None:
            raise InputError(f"tasks.{place}.order: with method={recipe.method} all tasks have the same order")
        order = paper_order(number, units) if method.order == recipe.orders == "paper" else list(range(1, units + 1))
        if keys.order is not None:
            order = keys.order
        if sorted(order) != list(range(1, units + 1)):
            raise InputError(f"tasks.{place}.order: name each of the units 1 to {units} once, not {order}")
        given = (levels for levels in (keys.levels, recipe.levels) if levels is not None)
        levels = next(given, list(range(1, units + 1)))
        if not levels or levels != sorted(set(levels)) or levels[-1] > units:
            raise InputError(
                f"the levels of task '{keys.name}' are cumulative numbers of units, ascending, up to {units}, not "
                f"{levels}"
            )
        try:
            partition.check_images(images.input_size)
        except InputError as error:
            raise InputError(f"task '{keys.name}': {error}") from None
        resize = Resize.of(images.spec)
        tasks.append(
            Task(
                keys.name,
                tuple(images.classes),
                images.input_size,
                tuple(images.mean),
                tuple(images.std),
                tuple(order),
                levels_of(method, number, count, levels, keys.name),
                DataSource(
                    images.spec.model_dump(mode="json"),
                    str(base.resolve()) if images.spec.has_relative_path else None,
                ),
                resize.interpolation,
                resize.crop_pct,
                resize.crop_mode,
            )
        )
    return tasks
