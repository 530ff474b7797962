"""From a recipe to what the loop needs: the tasks' images and the untrained networks."""

from collections.abc import Sequence
from pathlib import Path

import torch

from dvn_cli import checkpoint
from dvn_cli.backbones import BackboneSpec, load_pretrained, load_weights, resolve
from dvn_cli.data import TaskData, load_task
from dvn_cli.data.spec import locate
from dvn_cli.errors import InputError
from dvn_cli.network import DeepVirtualNetwork, load
from dvn_cli.partition import Partition
from dvn_cli.tasks import Task
from dvn_cli.training.recipe import Recipe
from dvn_cli.units.order import paper_order


def load_data(recipe: Recipe, base: Path) -> list[TaskData]:
    """Reads the images of all tasks; paths are relative to `base`, else to the working directory.

    Raises:
        InputError: see `data.load_task`; the message begins with the task's name.
    """
    channels = _channels(recipe, base)
    loaded = []
    for task in recipe.tasks:
        try:
            loaded.append(load_task(task.data, channels=channels, base=base))
        except InputError as error:
            raise InputError(f"task '{task.name}': {error}") from None
    return loaded


def build(recipe: Recipe, data: Sequence[TaskData], base: Path) -> DeepVirtualNetwork:
    """Partitions the recipe's backbone, or opens its partition, and gives every task and network its private part."""
    if recipe.partition is not None:
        return _from_partition(recipe, data, base)
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
    torch.manual_seed(recipe.seed)
    module = spec.build()
    if recipe.backbone.weights is not None:
        load_weights(module, spec, locate(recipe.backbone.weights, base))
    elif recipe.backbone.pretrained:
        load_pretrained(module, spec)
    tasks = _tasks(recipe, data, recipe.units, base)
    network = DeepVirtualNetwork.from_backbone(Partition.create(spec, recipe.units, module), module, tasks)
    network.make_private()
    return network


def _channels(recipe: Recipe, base: Path) -> int:
    """Channels of the images, before any is read."""
    if recipe.partition is not None:
        header = checkpoint.read_checkpoint(locate(recipe.partition, base))
        return BackboneSpec.from_dict(header.metadata["backbone"]).in_chans
    assert recipe.backbone is not None
    return recipe.backbone.in_chans or resolve(recipe.backbone.name, num_classes=2).in_chans


def _from_partition(recipe: Recipe, data: Sequence[TaskData], base: Path) -> DeepVirtualNetwork:
    assert recipe.partition is not None
    opened = load(locate(recipe.partition, base))
    if not isinstance(opened, DeepVirtualNetwork):
        raise InputError(f"'{recipe.partition}' is a slice: give a partition")
    if opened.training_record is not None:
        raise InputError(f"'{recipe.partition}' has been trained already: give a partition")
    tasks = _tasks(recipe, data, opened.partition.units, base)
    most = opened.partition.spec.num_classes
    for task in tasks:
        if len(task.classes) > most:
            raise InputError(
                f"task '{task.name}' has {len(task.classes)} classes, the partition's classifier {most}: "
                f"partition with --num-classes {max(len(t.classes) for t in tasks)}"
            )
    network = DeepVirtualNetwork(opened.partition, tasks, opened.file_tensors())
    network.make_private()
    return network


def _tasks(recipe: Recipe, data: Sequence[TaskData], units: int, base: Path) -> list[Task]:
    tasks = []
    for number, (keys, images) in enumerate(zip(recipe.tasks, data, strict=True), 1):
        order = paper_order(number, units) if keys.order is None else keys.order
        if sorted(order) != list(range(1, units + 1)):
            raise InputError(f"tasks.{number - 1}.order: name each of the units 1 to {units} once, not {order}")
        given = (levels for levels in (keys.levels, recipe.levels) if levels is not None)
        levels = next(given, list(range(1, units + 1)))
        if not levels or levels != sorted(set(levels)) or levels[-1] > units:
            raise InputError(
                f"the levels of task '{keys.name}' are cumulative numbers of units, ascending, up to {units}, not "
                f"{levels}"
            )
        tasks.append(
            Task(
                keys.name,
                tuple(images.classes),
                images.input_size,
                tuple(images.mean),
                tuple(images.std),
                tuple(order),
                tuple(levels),
                {"spec": keys.data.model_dump(mode="json"), "base": str(base.resolve())},
            )
        )
    return tasks
