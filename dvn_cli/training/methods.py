"""The methods, as data: which networks exist, which parameters each has of its own, and which are trained when.

Those that the paper compares itself with (section 4): NestedNet (E. Kim, C. Ahn, S. Oh, CVPR 2018), PackNet (A. Mallya,
S. Lazebnik, CVPR 2018) by groups of feature maps as in section 4.3, feature extraction (J. Donahue et al., ICML 2014),
DA-CNN (Y.-X. Wang, D. Ramanan, M. Hebert, CVPR 2017), learning without forgetting (Z. Li, D. Hoiem, ECCV 2016).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dvn_cli.errors import InputError
from dvn_cli.store.metadata import Task, TaskLevel, task_levels


@dataclass(frozen=True)
class Method:
    """What sets a method apart.

    Attributes:
        order: of the units: the paper's, another for each task, or the same for all tasks.
        levels: of a task: all; its `own`, level j for task j (all where there is one task); or the `top` alone.
        private: what each network has of its own: `norms` (the stem, normalisations with running statistics and the
            classifier), the `head` alone (the classifier and hidden layers before it), or `all`.
        arrival: of the tasks: as the recipe says (`any`), `together`, or `one by one`.
        old: what becomes of earlier tasks' networks when another task comes: `distilled`, they are trained on and learn
            to give the outputs that they gave; `frozen`, only what is in none of them is trained; or either, as the
            recipe says (`any`).
        hidden: fully connected layers before the classifier, which the backbone has not.
    """

    order: Literal["paper", "same"]
    levels: Literal["all", "own", "top"]
    private: Literal["norms", "head", "all"]
    arrival: Literal["any", "together", "one by one"]
    old: Literal["any", "distilled", "frozen"]
    hidden: int = 0


METHODS: Mapping[str, Method] = {
    "dvn": Method("paper", "all", "norms", "any", "any"),
    "baseline": Method("paper", "all", "all", "together", "any"),
    "nestednet": Method("same", "own", "norms", "any", "distilled"),
    "packnet": Method("same", "own", "norms", "one by one", "frozen"),
    "feature_extraction": Method("same", "top", "head", "one by one", "frozen"),
    "da_cnn": Method("same", "top", "head", "one by one", "frozen", hidden=2),
    "lwf": Method("same", "top", "norms", "one by one", "distilled"),
}


@dataclass(frozen=True)
class Stage:
    """A part of a run: some tasks' images, and what is learnt from them.

    Attributes:
        tasks: whose images there are.
        learn: networks that learn from labels.
        distilled: old tasks' networks, each with the network of before the stage whose outputs it learns to give.
        before: networks that were trained in an earlier stage.
        trainable: `all` that the trained networks have; or only what is `new`, in no network of before.
        epochs: passes over the task that has the most batches.
        warmup: whether it only prepares the next stage, at an even learning rate.
    """

    tasks: tuple[int, ...]
    learn: tuple[TaskLevel, ...]
    distilled: tuple[tuple[TaskLevel, TaskLevel], ...]
    before: tuple[TaskLevel, ...]
    trainable: Literal["all", "new"]
    epochs: int
    warmup: bool = False

    @property
    def trained(self) -> tuple[TaskLevel, ...]:
        """All networks that this stage trains."""
        return (*self.learn, *(student for student, _ in self.distilled))


def levels_of(method: Method, number: int, tasks: int, levels: Sequence[int], name: str) -> tuple[int, ...]:
    """The levels of task `number` of so many `tasks`, of those that the recipe has, each a number of units.

    Raises:
        InputError: there is no level for this task.
    """
    if method.levels == "top":
        return (levels[-1],)
    if method.levels == "all" or tasks == 1:
        return tuple(levels)
    if number > len(levels):
        raise InputError(f"task '{name}' takes the recipe's level {number}; the recipe has {len(levels)}")
    return (levels[number - 1],)


def together(method: Method, sequential: bool) -> bool:
    """Whether all tasks are learnt at once."""
    return method.arrival == "together" or (method.arrival == "any" and not sequential)


def old_networks(
    method: Method, wish: Literal["frozen", "distilled"] | None, used: Collection[int], units: int
) -> Literal["frozen", "distilled"]:
    """What becomes of earlier tasks' networks, which use some of the units, when another task comes.

    Args:
        wish: what the recipe says; None leaves them frozen while a unit is free, in none of them.
    """
    if method.old != "any":
        return method.old
    return wish or ("frozen" if len(used) < units else "distilled")


def used_units(tasks: Sequence[Task], networks: Iterable[TaskLevel]) -> set[int]:
    """The units of some networks, by number from 1."""
    return {unit for task, level in networks for unit in tasks[task - 1].units(level)}


def plan(
    method: Method,
    tasks: Sequence[Task],
    *,
    before: Sequence[TaskLevel] = (),
    sequential: bool,
    old: Literal["frozen", "distilled"] | None,
    grow: bool,
    epochs: int,
    warmup_epochs: int,
) -> list[Stage]:
    """The stages of a run.

    Args:
        method: the method.
        tasks: as they are at the end, task 1 first.
        before: networks that were trained in an earlier run, which the first tasks are all of.
        sequential: learn one task after the other, where the method leaves that open.
        old: see `old_networks`.
        grow: each task brings a unit, the last one the last unit: before it comes nobody uses that.
        epochs: for all tasks together, or for each.
        warmup_epochs: of new parts alone, before each later task.

    Raises:
        InputError: a task has no network among the units that there are when it comes.
    """
    every = task_levels(tasks)
    if together(method, sequential):
        return [Stage(tuple(range(1, len(tasks) + 1)), tuple(every), (), (), "all", epochs)]
    units = len(tasks[0].order)
    known = max((task for task, _ in before), default=0)
    used = max(used_units(tasks, before), default=units - len(tasks))
    before = tuple(before)
    stages: list[Stage] = []
    for newest in range(known + 1, len(tasks) + 1):
        active = min(used + newest - known, units) if grow and method.levels == "all" else units
        there = tuple(
            network
            for network in every
            if network.task <= newest and all(unit <= active for unit in tasks[network.task - 1].units(network.level))
        )
        learn = tuple(network for network in there if network.task == newest)
        if not learn:
            raise no_level(tasks[newest - 1].name, active, units)
        frozen = bool(before) and old_networks(method, old, used_units(tasks, before), units) == "frozen"
        held = () if frozen else tuple(network for network in there if network.task < newest)
        distilled = tuple((each, each if each in before else highest(before, each.task)) for each in held)
        if held and warmup_epochs:
            fresh = tuple((student, teacher) for student, teacher in distilled if student not in before)
            stages.append(Stage((newest,), learn, fresh, before, "new", warmup_epochs, warmup=True))
        stages.append(Stage((newest,), learn, distilled, before, "new" if frozen else "all", epochs))
        before = there
    return stages


def no_level(task: str, there: int, units: int) -> InputError:
    """What to say of a task that has no network among the units that there are when it comes."""
    return InputError(
        f"task '{task}' has no level within {max(there, 0)} of the {units} units, which is all that there are when it "
        "comes: give it a lower level, more units, or sequential.grow=false"
    )


def highest(networks: Sequence[TaskLevel], task: int) -> TaskLevel:
    """Of some networks a task's of the highest level."""
    return max(network for network in networks if network.task == task)
