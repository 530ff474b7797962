"""What the files say besides their tensors. A wrong value is an InputError, whether it is read or about to be written.

Names of fields are keys of the files' JSON, and so are stable. Keys that are not known here are passed over.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args

from dvn_cli.errors import InputError, did_you_mean
from dvn_cli.store.ownership import Assignment, Run
from dvn_cli.store.schema import omitted

Index = Annotated[int, range(1 << 31)]
Number = Annotated[int, range(1, 1 << 31)]
Size = Annotated[int, range(1, (1 << 16) + 1)]
ClassCount = Annotated[int, range(1, (1 << 20) + 1)]

Source = Literal["timm", "torchvision", "python"]
Owner = Literal["shared", "task", "network"]
Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
CropMode = Literal["center", "squash", "border"]

ASSIGN = ("even", "importance", "sorted")
DIVIDE = ("all", "inner")
WIDTHS = ("even", "macs", "params")


@dataclass(frozen=True)
class Backbone:
    """All that it takes to build a backbone.

    Attributes:
        source: `timm` (the paper's own backbones among them), `torchvision`, or `python`: a factory of one's own.
        name: The name there; of a factory `package.module:factory`.
        num_classes: Outputs of the classifier.
        in_chans: Channels of the images.
        input_size: Height and width of the images in pixels.
        hidden_layers: Fully connected layers put before the classifier, each as wide as the features.
        width: What its numbers of channels are multiplied by: numerator and denominator.
    """

    source: Source
    name: str
    num_classes: ClassCount
    in_chans: Size = 3
    input_size: tuple[Size, Size] = (224, 224)
    hidden_layers: Annotated[int, range(1025)] = 0
    width: tuple[Size, Size] = omitted((1, 1))


@dataclass(frozen=True)
class Rule:
    """How channels are assigned to the units.

    Attributes:
        assign: `even`: consecutive channels; `importance`: by a score (see `units.score`), so that units are equally
            strong; `sorted`: the best by that score in unit 1, the next best in unit 2, and so on.
        round_to: what widths of units are multiples of, wherever every unit then still has channels.
        divide: `all` coupled groups, or the `inner` ones alone: those whose channels no sum couples with what another
            layer makes. The residual stream then stays whole and belongs to all units.
        widths: `even`: units have as many channels of each group; `macs`, `params`: more where channels are worth more
            for the multiply-accumulates, or parameters, that go with them (see `units.widths`).

    Raises:
        InputError: no such `assign`, `divide` or `widths`, widths that need another `assign`, or `round_to` is below 1.
    """

    assign: str = "even"
    round_to: int = 1
    divide: str = omitted("all")
    widths: str = omitted("even")

    def __post_init__(self) -> None:
        if self.assign not in ASSIGN:
            near = did_you_mean(self.assign, ASSIGN)
            raise InputError(f"channels are assigned even, importance or sorted, not '{self.assign}'{near}")
        if self.divide not in DIVIDE:
            near = did_you_mean(self.divide, DIVIDE)
            raise InputError(f"units divide {' or '.join(DIVIDE)} coupled groups, not '{self.divide}'{near}")
        if self.widths not in WIDTHS:
            near = did_you_mean(self.widths, WIDTHS)
            raise InputError(f"widths are even, or follow macs or params, not '{self.widths}'{near}")
        if self.widths != "even" and self.assign != "sorted":
            raise InputError(f"widths {self.widths} gives unit 1 what is worth most: assign must be sorted with it")
        if self.round_to < 1:
            raise InputError(f"widths are rounded to multiples of 1 or more (8, say), not {self.round_to}")

    @property
    def scores_channels(self) -> bool:
        """Whether the backbone's weights, or images, decide which channels a unit gets."""
        return self.assign != "even"


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for the weights of a backbone; names and values are timm's.

    Attributes:
        origin: Whose word that is.
        mean: Per channel, of pixels in 0..1, subtracted; None where there is none for these channels.
        std: Per channel, of pixels in 0..1, divided by; None with `mean`.
        interpolation, crop_pct, crop_mode: See `data.resize.Resize`.
    """

    origin: str
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    interpolation: str
    crop_pct: float
    crop_mode: str

    def __post_init__(self) -> None:
        _check_resize(self.interpolation, self.crop_pct, self.crop_mode)
        _check_mean_and_std(self.mean or (), self.std or ())

    @property
    def resize(self) -> dict[str, Any]:
        """The fields that say how an image is brought to its size."""
        return {"interpolation": self.interpolation, "crop_pct": self.crop_pct, "crop_mode": self.crop_mode}

    def describe(self, resized: bool = True) -> str:
        """Says it in a line, with or without how images are resized."""
        words = [f"{self.interpolation}, crop_pct {self.crop_pct:.4g} ({self.crop_mode})"] if resized else []
        for key, numbers in (("mean", self.mean), ("std", self.std)):
            if numbers is not None:
                words.append(f"{key} {' '.join(f'{number:.4g}' for number in numbers)}")
        return f"{', '.join(words)}: {self.origin}"


def _check_resize(interpolation: str, crop_pct: float | None, crop_mode: str) -> None:
    for what, value, kind in (("interpolation", interpolation, Interpolation), ("crop mode", crop_mode, CropMode)):
        if value not in (known := get_args(kind)):
            raise InputError(f"no {what} '{value}'{did_you_mean(value, known)}; there are {', '.join(known)}")
    if crop_pct is not None and not 0.1 <= crop_pct <= 2:
        raise InputError(f"crop_pct is a share of the resized image, such as 0.875, not {crop_pct:g}")


def _check_mean_and_std(mean: Sequence[float], std: Sequence[float]) -> None:
    if not all(math.isfinite(number) for number in mean):
        raise InputError(f"mean is of pixels in 0..1, not {mean}")
    if not all(math.isfinite(number) and number > 0 for number in std):
        raise InputError(f"std is of pixels in 0..1 and above 0, not {std}")


@dataclass(frozen=True)
class DataSource:
    """Where a task's images come from.

    Attributes:
        spec: a `data.DataSpec`, as JSON.
        base: the folder that a relative path in it starts from; None where there is no such path.
    """

    spec: Mapping[str, Any]
    base: str | None


@dataclass(frozen=True)
class Task:
    """One task: what it tells apart, what its images are, and in which order it takes the units.

    Attributes:
        name: by which commands may call it.
        classes: names, in the order of the labels.
        input_size: height and width of its images in pixels.
        mean: per channel, of pixels in 0..1; subtracted from the images.
        std: per channel, of pixels in 0..1; divides them.
        order: all units, by number from 1, in the order in which the task takes them.
        levels: for each level how many units it has, ascending.
        data: where its images come from; None where nobody said.
        interpolation, crop_pct, crop_mode: how they are brought to their size, see `data.resize.Resize`.
        affinity: the cosine of its gradients with those of each task, where the orders were learned from that.
    """

    name: str
    classes: tuple[str, ...]
    input_size: tuple[Size, Size]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    order: tuple[Number, ...]
    levels: tuple[Number, ...]
    data: DataSource | None = None
    interpolation: str = "bilinear"
    crop_pct: float | None = None
    crop_mode: str = "center"
    affinity: tuple[float, ...] = omitted(())

    def __post_init__(self) -> None:
        if any("\ud800" <= letter <= "\udfff" for letter in self.name):
            raise InputError("its name is no text in UTF-8")
        if not 1 <= len(self.classes) <= 1 << 20:
            raise InputError(f"a task has 1 to {1 << 20:,} classes, not {len(self.classes):,}")
        if sorted(self.order) != list(range(1, len(self.order) + 1)):
            raise InputError("its order does not name each unit once")
        if not self.levels or not all(a < b for a, b in itertools.pairwise((0, *self.levels, len(self.order) + 1))):
            raise InputError(f"its levels are not ascending numbers of units up to {len(self.order)}")
        _check_mean_and_std(self.mean, self.std)
        _check_resize(self.interpolation, self.crop_pct, self.crop_mode)

    def units(self, level: int) -> tuple[int, ...]:
        """Returns the units of a level, from 1, by number from 1, ascending."""
        return tuple(sorted(self.order[: self.levels[level - 1]]))


class TaskLevel(NamedTuple):
    """Which network: the numbers of its task and of its level, both from 1."""

    task: int
    level: int


def task_levels(tasks: Sequence[Task]) -> list[TaskLevel]:
    """Returns all networks of some tasks, the first of which is task 1."""
    return [
        TaskLevel(number, level) for number, task in enumerate(tasks, 1) for level in range(1, len(task.levels) + 1)
    ]


@dataclass(frozen=True)
class TensorEntry:
    """One of the backbone's tensors.

    Attributes:
        axes: for each dimension which of the axes divides it; None: it is not divided.
        trainable: whether it is a parameter; the rest are buffers.
        owner: who has one of its own when training begins.
    """

    axes: tuple[Index | None, ...]
    trainable: bool
    owner: Owner = "shared"


@dataclass(frozen=True, kw_only=True)
class DividedBackbone:
    """A backbone, and which unit owns which indices of its tensors.

    Attributes:
        units: how many units there are.
        axes, class_axis: see `Assignment`.
        tensors: by their names in the backbone.
        rule: how channels were assigned.
        aliases: other names in the backbone's `state_dict` of tensors that it holds under several, and the first.
        graph: the backbone's graph in eval mode, see `graph.text`; None where a file does not say.
    """

    backbone: Backbone
    units: Size
    axes: tuple[tuple[tuple[tuple[Index, Index], ...], ...], ...]
    tensors: Mapping[str, TensorEntry]
    class_axis: tuple[tuple[str, Index], ...] = ()
    rule: Rule = Rule()
    aliases: Mapping[str, str] = field(default_factory=dict)
    graph: str | None = omitted(None)

    def __post_init__(self) -> None:
        for number, axis in enumerate(self.axes):
            if len(axis) != self.units:
                raise InputError(f"'axes.{number}' is of {len(axis)} units, not of {self.units}")
            if not all(_ascends(runs) for runs in axis) or not _ascends(sorted(itertools.chain(*axis))):
                raise InputError(f"'axes.{number}' has runs of indices that are not ascending and apart")
        for name, entry in self.tensors.items():
            if not (name.isprintable() and "/" not in name and all(name.split("."))):
                raise InputError(f"'tensors' has {name!r:.80}, which is no tensor's name")
            if any(axis is not None and axis >= len(self.axes) for axis in entry.axes):
                raise InputError(f"'tensors.{name}.axes' has an axis that is not listed")
        for name, dim in self.class_axis:
            if name not in self.tensors or dim >= len(self.tensors[name].axes):
                raise InputError(f"'class_axis' has dimension {dim} of {name!r:.80}, which is not there")
        for name, first in self.aliases.items():
            if first not in self.tensors or name in self.tensors or not (name.isprintable() and all(name.split("."))):
                raise InputError(f"'aliases.{name!r:.80}' is not another name of a tensor that is listed")

    @property
    def divided(self) -> dict[str, Any]:
        """Its fields, less those that a checkpoint and its slices do not have in common."""
        return {each.name: getattr(self, each.name) for each in fields(DividedBackbone)}

    @cached_property
    def assignment(self) -> Assignment:
        """Which unit owns which indices."""
        tensors = {name: entry.axes for name, entry in self.tensors.items()}
        return Assignment(self.units, self.axes, tensors, self.class_axis)

    def check_task(self, task: Task) -> None:
        """Raises InputError unless a task is one of this backbone's."""
        if len(task.order) != self.units:
            raise InputError(f"the order of task '{task.name}' is of {len(task.order)} units, not of {self.units}")
        if len(task.classes) > self.backbone.num_classes:
            most = self.backbone.num_classes
            raise InputError(f"task '{task.name}' has {len(task.classes)} classes, the backbone's classifier {most}")
        if not len(task.mean) == len(task.std) == self.backbone.in_chans:
            channels = self.backbone.in_chans
            raise InputError(f"task '{task.name}' has not one mean and one std for each of {channels} channels")


def _ascends(runs: Sequence[Run]) -> bool:
    ends = [end for run in runs for end in run]
    return all(start < stop for start, stop in runs) and all(a <= b for a, b in itertools.pairwise(ends))


@dataclass(frozen=True)
class TrainingRecord:
    """How a checkpoint was trained.

    Attributes:
        recipe: resolved, as JSON.
        versions: of the libraries.
        device, threads: that it was trained on.
        epochs: of all stages; None in a file that does not say.
        restarts: after which numbers of epochs the run was trained on from its finished networks alone.
        capture_error: why its steps were not replayed as a CUDA graph, where they were to be.
        commit: of the working directory, where that is a checkout of git.
    """

    recipe: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str | None = None
    threads: int | None = None
    epochs: Index | None = None
    restarts: tuple[Index, ...] = omitted(())
    capture_error: str | None = omitted(None)
    commit: str | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointMetadata(DividedBackbone):
    """What a checkpoint says: all networks of all tasks.

    Attributes:
        tasks: number 1 first.
        training: how they were trained; None in a fresh partition.
        preprocessing: how images were prepared for the weights that it started from; None where those were random.
        earlier: the divisions that it had before units were added, the first one first.
        random: of a fresh partition that started from weights, names of the backbone's tensors that these lack.
    """

    kind: ClassVar[str] = "checkpoint"
    tasks: tuple[Task, ...]
    training: TrainingRecord | None = None
    preprocessing: Preprocessing | None = None
    earlier: tuple[DividedBackbone, ...] = omitted(())
    random: tuple[str, ...] | None = omitted(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= len(self.tasks) <= 1 << 16:
            raise InputError(f"'tasks' has {len(self.tasks)} tasks, not 1 to {1 << 16:,}")
        for task in self.tasks:
            self.check_task(task)

    @property
    def numbered_tasks(self) -> dict[int, Task]:
        """The tasks by number, from 1."""
        return dict(enumerate(self.tasks, 1))

    @property
    def networks(self) -> list[TaskLevel]:
        """All of its networks."""
        return task_levels(self.tasks)

    def divided_for(self, task: Task) -> dict[str, Any]:
        """What a slice says of its task and backbone: nothing of other tasks' classes or of units added for them."""
        units = max(task.units(len(task.levels)))
        division = next((each for each in self.earlier if units <= each.units), self)
        order = tuple(unit for unit in task.order if unit <= division.units)
        backbone = replace(division.backbone, num_classes=len(task.classes))
        return {**division.divided, "backbone": backbone, "task": replace(task, order=order)}


@dataclass(frozen=True)
class Calibration:
    """How the layers of a slice were fitted to its task's top level.

    Attributes:
        images: how many were there to fit to.
        ridge: of the regression, times the mean variance of the channels that a layer is given.
    """

    images: Index
    ridge: float


@dataclass(frozen=True, kw_only=True)
class SliceMetadata(DividedBackbone):
    """What a slice says: one network.

    Attributes:
        task: that it solves.
        task_number: that the task had in the checkpoint, from 1.
        level: of the task, from 1.
        kept: the units of the level.
        calibration: how its layers were fitted; None where they are as they were trained.
    """

    kind: ClassVar[str] = "slice"
    task: Task
    task_number: Number
    level: Number
    kept: tuple[int, ...]
    calibration: Calibration | None = field(default=None, metadata={"omitted": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_task(self.task)
        check_level(self.task, self.level)
        if self.kept != self.task.units(self.level):
            raise InputError(f"'kept' has other units than level {self.level} of its task")

    @property
    def numbered_tasks(self) -> dict[int, Task]:
        """Its only task, by number from 1."""
        return {self.task_number: self.task}

    @property
    def networks(self) -> list[TaskLevel]:
        """Its only network."""
        return [TaskLevel(self.task_number, self.level)]


@dataclass(frozen=True)
class StateMetadata:
    """What the state of an interrupted run says.

    Attributes:
        recipe: resolved, as JSON.
        epochs_done: of all stages.
        history: what each of them gave, see `training.loop.Run`.
        best: the accuracy of the best epoch so far of the stage, per cent.
        total_epochs: of all stages; None in the first files.
        restarts: see `TrainingRecord`.
        tasks: without where their images come from; None in the first files.
        images: of each task that is learnt, how many were there to train and to validate on.
        division: which unit owns what, which images may tell otherwise another time; None in the first files.
        steps_done: of the epoch after those.
    """

    kind: ClassVar[str] = "training state"
    recipe: Mapping[str, Any]
    epochs_done: Index
    history: tuple[Mapping[str, Any], ...]
    best: float | None
    total_epochs: Index | None = None
    restarts: tuple[Index, ...] = ()
    tasks: tuple[Task, ...] | None = None
    images: tuple[tuple[Index, ...], ...] = ()
    division: DividedBackbone | None = None
    steps_done: Index = 0

    @property
    def place(self) -> str:
        """How far the run has come, in words."""
        within = f"step {self.steps_done} of " if self.steps_done else ""
        return f"{within}epoch {self.epochs_done + (self.steps_done > 0)}"

    def __post_init__(self) -> None:
        if len(self.history) > self.epochs_done:
            raise InputError(f"'history' is of {len(self.history)} epochs, of which {self.epochs_done} are done")


Metadata = CheckpointMetadata | SliceMetadata | StateMetadata

KINDS: dict[str, type[Metadata]] = {kind.kind: kind for kind in get_args(Metadata)}


def check_level(task: Task, level: int) -> int:
    """Returns `level` if a task has it, else raises InputError."""
    count = len(task.levels)
    if not 1 <= level <= count:
        allowed = f"levels 1 to {count}" if count > 1 else "level 1 only"
        raise InputError(f"there is no level {level}; task '{task.name}' has {allowed}")
    return level
