"""The networks of a recipe: what it starts from, divided, and given what tasks and levels have of their own."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvn_cli import compensation
from dvn_cli.backbones import BackboneSpec, default, preprocessing, resolve
from dvn_cli.data import TaskData, drawn
from dvn_cli.data.resize import Resize
from dvn_cli.data.sample import IMAGES
from dvn_cli.data.spec import locate
from dvn_cli.dividing import Note, partition_backbone, silent
from dvn_cli.dividing import build as build_backbone
from dvn_cli.errors import InputError
from dvn_cli.loading import load
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.partition import Partition
from dvn_cli.store.file import read_checkpoint
from dvn_cli.store.metadata import (
    CheckpointMetadata,
    DataSource,
    DividedBackbone,
    Owner,
    Preprocessing,
    Rule,
    StateMetadata,
    Task,
    TaskLevel,
    task_levels,
)
from dvn_cli.training import classifiers
from dvn_cli.training.affinity import affinity
from dvn_cli.training.loop import Run
from dvn_cli.training.methods import METHODS, Method, levels_of, no_level, old_networks, together, used_units
from dvn_cli.training.recipe import Recipe
from dvn_cli.units.order import learned_orders, order_beside, paper_order
from dvn_cli.widening import add_units


def build(
    recipe: Recipe,
    data: Sequence[TaskData],
    base: Path,
    device: torch.device,
    note: Note = silent,
    earlier: StateMetadata | CheckpointMetadata | None = None,
) -> tuple[DeepVirtualNetwork, list[TaskLevel]]:
    """Partitions the recipe's backbone, or opens its partition or checkpoint, and gives everyone what is their own.

    Args:
        device: to compute on where orders are learned and classifiers fitted.
        earlier: what the run that goes on has left, where one does; the networks are then not made ready to start.

    Returns:
        all networks, and which of them were trained in an earlier run.
    """
    if recipe.continues is not None:
        return _continued(recipe, data, base, note)
    method = METHODS[recipe.method]
    division = earlier.division if isinstance(earlier, StateMetadata) else earlier
    if recipe.partition is not None:
        partition, tensors, random = _opened(recipe, data, base)
        is_loaded, load = not random, None
    else:
        partition, tensors, random = _divided(recipe, data, base, note, division)
        is_loaded, load = not random, functools.partial(_backbone, recipe, base=base)
    weights = prepared_for(recipe, base, partition.spec.in_chans)
    tasks = _tasks(recipe, data, partition, base, note)
    has_weights = weights is not None or random is not None
    compensates = recipe.compensate and has_weights and method.levels != "top"
    if compensates:
        partition = compensation.with_private_biases(partition)

    def networks(tasks: Sequence[Task], tensors: Mapping[str, Tensor], note: Note) -> DeepVirtualNetwork:
        made = DeepVirtualNetwork(partition, tasks, tensors, preprocessing=weights)
        made.make_private(owners(method, partition))
        made.check()
        if has_weights and division is None:
            classifiers.start(made, tensors, load, is_loaded, functools.partial(fitted, made), note)
        return made

    def fitted(made: DeepVirtualNetwork, number: int) -> Mapping[str, Tensor]:
        return classifiers.fit(made, number, data[number - 1], recipe.seed, device) if recipe.fit_classifiers else {}

    if recipe.orders == "learned" and earlier is None:
        note("comparing tasks by their gradients, in a few steps of networks of all units")
        whole = [replace(task, levels=(partition.units,)) for task in tasks]
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        found = affinity(Run(recipe, networks(whole, copies, silent), dict(enumerate(data, 1)), device))
        orders = learned_orders(found, partition.units)
        tasks = [
            replace(task, order=task.order if keys.order else tuple(order), affinity=tuple(row))
            for task, keys, order, row in zip(tasks, recipe.tasks, orders, found, strict=True)
        ]
    elif recipe.orders == "learned" and earlier is not None and earlier.tasks is not None:
        pairs = zip(tasks, earlier.tasks, strict=True)
        tasks = [replace(task, order=before.order, affinity=before.affinity) for task, before in pairs]
    network = networks(tasks, tensors, note)
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


def channels(recipe: Recipe, base: Path) -> int:
    """Channels of the images, before any is read."""
    start = recipe.partition or recipe.continues
    if start is not None:
        return read_checkpoint(locate(start, base)).metadata.backbone.in_chans
    assert recipe.backbone is not None
    return recipe.backbone.in_chans or default(recipe.backbone.name).in_chans


def input_size(recipe: Recipe, base: Path) -> tuple[int, int] | None:
    """Height and width of the images that the backbone is made for, None where it takes any."""
    start = recipe.partition or recipe.continues
    if start is not None:
        return read_checkpoint(locate(start, base)).metadata.backbone.input_size
    assert recipe.backbone is not None
    asked = recipe.backbone.input_size or default(recipe.backbone.name).input_size
    size = (asked, asked) if isinstance(asked, int) else asked
    return size if all(size) else None


def prepared_for(recipe: Recipe, base: Path, in_chans: int) -> Preprocessing | None:
    """How images were prepared for the weights that a recipe starts from; None where those are random."""
    start = recipe.partition or recipe.continues
    if start is not None:
        return read_checkpoint(locate(start, base)).metadata.preprocessing
    assert recipe.backbone is not None
    if not recipe.backbone.has_weights:
        return None
    return preprocessing(replace(default(recipe.backbone.name), in_chans=in_chans))


def _divided(
    recipe: Recipe, data: Sequence[TaskData], base: Path, note: Note, division: DividedBackbone | None
) -> tuple[Partition, dict[str, Tensor], Sequence[str] | None]:
    """The divided backbone, its tensors by their names in the file, and which its weights lack, where it has any."""
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
    rule = Rule(recipe.assign, recipe.round_to, recipe.divide, recipe.widths)
    if not rule.scores_channels:
        partition = partition_backbone(spec, recipe.units, rule)
        partition.check_backbone(None if division is None else division.graph)
    elif division is not None:
        partition = Partition.restore(division)
    else:
        images = _scoring(data, spec, recipe.seed) if recipe.backbone.has_weights else []
        partition = partition_backbone(spec, recipe.units, rule, module, images)
    return partition, _templates(partition, module), lacking if recipe.backbone.has_weights else None


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


def _opened(
    recipe: Recipe, data: Sequence[TaskData], base: Path
) -> tuple[Partition, dict[str, Tensor], Sequence[str] | None]:
    """As `_divided`, of a partition."""
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
    shared = {name: tensor for name, tensor in opened.file_tensors().items() if name.startswith("shared/")}
    return opened.partition, shared, opened.random


def _continued(
    recipe: Recipe, data: Sequence[TaskData], base: Path, note: Note
) -> tuple[DeepVirtualNetwork, list[TaskLevel]]:
    """A trained checkpoint with new tasks, and with the new levels of old tasks that are to be distilled into."""
    assert recipe.continues is not None
    opened, method = _open(recipe.continues, base), METHODS[recipe.method]
    if opened.training_record is None:
        raise InputError(f"'{recipe.continues}' has not been trained yet: give it as partition")
    started = opened.training_record.recipe
    trained = started.get("method", "dvn")
    if trained != recipe.method:
        raise InputError(f"'{recipe.continues}' was trained with method={trained}: continue with the same")
    if recipe.add_units:
        opened = add_units(opened, recipe.add_units, recipe.seed)
    known, units = opened.tasks, opened.partition.units
    twice = {task.name for task in known} & {task.name for task in recipe.tasks}
    if twice:
        raise InputError(f"'{recipe.continues}' has a task '{min(twice)}' already: give the new one another name")
    before = list(opened)
    tasks = _tasks(recipe, data, opened.partition, base, note, known)
    if method.levels == "all" and recipe.sequential.old == "distilled":
        used = max(used_units(known, before))
        there = min(used + len(data), units) if recipe.sequential.grow else units
        wanted = recipe.levels or range(1, units + 1)
        for place, task in enumerate(tasks):
            more = [n for n in wanted if n > task.levels[-1]] if place < len(known) else []
            levels = tuple(n for n in (*task.levels, *more) if max(task.order[:n]) <= there)
            tasks[place] = replace(task, levels=levels)
    partition = opened.partition
    most = max(len(task.classes) for task in tasks)
    if most > partition.spec.num_classes:
        partition.check_backbone(partition.kept)
        partition = partition.rebuilt(replace(partition.spec, num_classes=most))
    backbone = started.get("backbone") or {}
    zeroed = bool(backbone.get("zero_init_last")) and not backbone.get("pretrained") and not backbone.get("weights")
    module, _ = build_backbone(partition.spec, seed=recipe.seed, zero_init_last=zeroed)
    tensors = {**_templates(partition, module), **opened.file_tensors()}
    network = DeepVirtualNetwork(partition, tasks, tensors, preprocessing=opened.preprocessing, earlier=opened.earlier)
    network.make_private(owners(method, partition))
    network.check()
    return network, before


def _tasks(
    recipe: Recipe, data: Sequence[TaskData], partition: Partition, base: Path, note: Note, known: Sequence[Task] = ()
) -> list[Task]:
    """The tasks that are known already, and then the recipe's."""
    method, tasks = METHODS[recipe.method], list(known)
    for place, (keys, images) in enumerate(zip(recipe.tasks, data, strict=True)):
        number, count = len(tasks) + 1, len(known) + len(data)
        order, levels = _order_and_levels(recipe, place, tasks, partition, note)
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


def _order_and_levels(
    recipe: Recipe, place: int, earlier: Sequence[Task], partition: Partition, note: Note
) -> tuple[list[int], list[int]]:
    """The order of units of one of the recipe's tasks, and its levels, of which the method may take some."""
    method, keys, used = METHODS[recipe.method], recipe.tasks[place], used_units(earlier, task_levels(earlier))
    units = partition.units
    is_open = method.old == "any" and not together(method, recipe.learning == "sequential")
    freezes = is_open and old_networks(method, recipe.sequential.old, used, units) == "frozen"
    order = list(range(1, units + 1))
    if keys.order is not None:
        if method.order == "same":
            raise InputError(f"tasks.{place}.order: with method={recipe.method} all tasks have the same order")
        order = keys.order
    elif method.order == recipe.orders == "paper":
        beside = freezes and len(used) < units
        order = order_beside(used, units) if beside else paper_order(len(earlier) + 1, units)
        if order[0] > 1 and partition.rule.assign == "sorted" and not beside:
            note(
                f"task '{keys.name}' begins with unit {order[0]}, and unit 1 has the best channels (assign sorted): "
                "orders=shared begins with that"
            )
    if sorted(order) != list(range(1, units + 1)):
        raise InputError(f"tasks.{place}.order: name each of the units 1 to {units} once, not {order}")
    room = units  # units that are there when the task comes: with frozen ones those, and one of its own
    if freezes and (earlier or recipe.sequential.grow):
        room = min(len(used) + 1 if earlier else units + 1 - len(recipe.tasks), units)
    given = (levels for levels in (keys.levels, recipe.levels) if levels is not None)
    levels = next(given, list(range(1, max(room, 1) + 1)))
    if not levels or levels != sorted(set(levels)) or levels[-1] > units:
        raise InputError(
            f"the levels of task '{keys.name}' are cumulative numbers of units, ascending, up to {units}, not {levels}"
        )
    if recipe.sequential.grow and not (levels := [level for level in levels if level <= room]):
        raise no_level(keys.name, room, units)
    if is_open and earlier:
        new = sorted(set(order[: levels[-1]]) - used)
        if not freezes and recipe.sequential.old is None:
            note(
                f"no unit is free for task '{keys.name}' (add_units gives it one): earlier tasks' networks are trained "
                "on, held by distillation"
            )
        elif freezes:
            trains = f"trains unit {', '.join(map(str, new))}" if new else "trains no unit, but what it has of its own"
            note(f"task '{keys.name}' {trains}; earlier tasks' networks stay what they are")
    return order, levels
