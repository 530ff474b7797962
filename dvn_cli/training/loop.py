"""The one loop: all networks of a stage in every step, gradients accumulated, one optimizer step (eq. 4 and 6)."""

import bisect
import copy
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dvn_cli import processes
from dvn_cli.data import Split, TaskData, some, to_device
from dvn_cli.data.batches import batch_count
from dvn_cli.errors import DvnError, InputError
from dvn_cli.evaluation.measure import evaluate_all
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.store.metadata import StateMetadata, TaskLevel
from dvn_cli.training.freezing import Freezing, statistics
from dvn_cli.training.levels import networks_of_step
from dvn_cli.training.losses import balancing
from dvn_cli.training.methods import METHODS, Stage, plan
from dvn_cli.training.optimizer import load_state, make_optimizer, state_tensors
from dvn_cli.training.recipe import Recipe
from dvn_cli.training.schedule import factor
from dvn_cli.training.step import Step
from dvn_cli.training.stop import Stop
from dvn_cli.training.teachers import FileTeacher

CHECK_EVERY = 50  # steps between looks at the losses where each look waits for all that came before: not on a CPU


@dataclass
class Run:
    """A run of a recipe, from its start or from where it was interrupted.

    Attributes:
        data: the images of each task that is learnt, by its number from 1.
        before: networks that were trained in an earlier run.
        teachers: by number of task, the networks of files that teach.
        epochs_done: how many epochs it has behind it, of all stages.
        steps_done: how many steps of the epoch that it is in.
        history: for each epoch what it gave: learning rate (its last, without factors of single tensors), loss and
            validation accuracy by task and level, None for networks that were not trained or have no such images.
            `gone` are those whose weights nothing had kept when the run of before was given `patience`.
        best: of the epochs so far of this stage, the validation accuracy (mean of its networks, per cent) of the best.
        stages: the parts of the run.
        stage: the one that it is in.
        average: the networks as their exponential moving average has them, where the recipe wants it.
        stop: knows of signals that ask for an end, where it is entered.
        waited: seconds, until now, that this process took to get and augment images.
    """

    recipe: Recipe
    network: DeepVirtualNetwork
    data: Mapping[int, TaskData]
    device: torch.device
    before: Sequence[TaskLevel] = ()
    teachers: Mapping[int, FileTeacher] = field(default_factory=dict)
    epochs_done: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: float = -math.inf
    steps_done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.recipe.seed)  # of dropout and its like
        self.network.to(self.device)
        self.network.compiled, self.network.synchronised = self.recipe.compile, self.recipe.sync_bn
        processes.broadcast([t for t in self.network.file_tensors().values() if t.is_floating_point()])
        self.stop, self.waited = Stop(), 0.0
        self._finite_before = self._finite_tensors()
        self.generators = {number: torch.Generator() for number in self.data}
        for number, generator in self.generators.items():
            generator.manual_seed(self.recipe.seed * 1000 + number - 1)
        validated = {number: data.validation for number, data in self.data.items() if data.validation is not None}
        splits = [*(data.train for data in self.data.values()), *validated.values()]
        on_device = iter(to_device(splits, self.device))  # all at once: tasks of one data set share its images there
        self.train = dict(zip(self.data, on_device, strict=False))
        self.validation = dict(zip(validated, on_device, strict=True))
        sequential = self.recipe.sequential
        self.stages = plan(
            METHODS[self.recipe.method],
            self.network.tasks,
            before=self.before,
            sequential=self.recipe.learning == "sequential",
            old=sequential.old,
            grow=sequential.grow,
            epochs=self.recipe.epochs,
            warmup_epochs=sequential.warmup_epochs,
        )
        self._begin()

    @property
    def total_epochs(self) -> int:
        """Of all stages together."""
        return sum(stage.epochs for stage in self.stages)

    @property
    def steps(self) -> int:
        """Of an epoch of this stage."""
        return self.steps_of(self.stage)

    def steps_of(self, stage: Stage) -> int:
        """Of an epoch of a stage."""
        sizes = self.batch_sizes
        batches = max(batch_count(self.train[task], sizes[task], training=True) for task in stage.tasks)
        return -(-batches // self.recipe.accumulate)

    @property
    def batch_sizes(self) -> dict[int, int]:
        """By number of task that is learnt."""
        tasks = zip(self.data, self.recipe.tasks, strict=True)
        return {number: keys.batch_size or self.recipe.batch_size for number, keys in tasks}

    def scalars(self, entry: Mapping[str, Any] | None = None) -> dict[str, float]:
        """Returns the figures of an epoch by name, such as `loss/low/1` for a task and level, as loggers want them.

        Args:
            entry: of the history; by default the last one. What it has no value for is left out.
        """
        entry = self.history[-1] if entry is None else entry
        found = {name: entry[name] for name in ("epoch", "stage", "lr", "seconds")}
        for what in ("loss", "validation"):
            for task, levels in zip(self.network.tasks, entry[what] or [], strict=False):
                found |= {f"{what}/{task.name}/{n}": value for n, value in enumerate(levels, 1) if value is not None}
        return found

    # The state between two steps

    def state(self) -> dict[str, Tensor]:
        """The tensors that change during a run.

        Within an epoch the generators are as they were at its start: what the steps done have drawn is drawn again.
        """
        tensors = {f"network/{name}": tensor for name, tensor in self.network.file_tensors().items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best_tensors.items()}
        for what, network in (("teacher", self.teacher), ("average", self.average)):
            if network is not None:
                tensors |= {f"{what}/{name}": tensor for name, tensor in network.file_tensors().items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in state_tensors(self.optimizer).items()}
        if self.steps_done:
            tensors["totals"] = self.step.totals
        drawn = self._drawn if self.steps_done else self._states_of_generators()
        tensors |= {f"generator/{number}": state for number, state in drawn.items()}
        tensors |= {f"taught_by/{number}": teacher.sums for number, teacher in self.teachers.items()}
        tensors["random"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random_cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors

    def restore(self, tensors: Mapping[str, Tensor], metadata: StateMetadata) -> None:
        """Goes back to a state: what `state` returned, and what else its file says.

        Raises:
            InputError: a teacher's file is another one.
        """
        for number, teacher in self.teachers.items():
            before = tensors.get(f"taught_by/{number}", teacher.sums)
            if before.shape != teacher.sums.shape or not torch.allclose(before, teacher.sums, rtol=1e-9, atol=0):
                raise InputError(
                    f"'{self.recipe.taught_by}' is not the teacher that the run had so far: put that back, or start "
                    "again with --force"
                )
        self._put(self.network, tensors, "network/")
        self.epochs_done, self.history = metadata.epochs_done, [dict(entry) for entry in metadata.history]
        self.steps_done = metadata.steps_done
        self._begin()
        if self.steps_done:
            self.step.totals.copy_(tensors["totals"])
        if self.epochs_done > self._start or self.steps_done:
            if self.teacher is not None:
                self._put(self.teacher, tensors, "teacher/")
            if self.average is not None:
                self._put(self.average, tensors, "average/")
            self.best_tensors = _below("best/", tensors)
            self.best = -math.inf if metadata.best is None else metadata.best
            load_state(self.optimizer, _below("optimizer/", tensors))
            torch.set_rng_state(tensors["random"])  # not between two stages, of which the next has a seed of its own
            if self.device.type == "cuda" and "random_cuda" in tensors:
                torch.cuda.set_rng_state(tensors["random_cuda"], self.device)
        for i, generator in self.generators.items():
            generator.set_state(tensors[f"generator/{i}"])

    def extend(
        self, tensors: Mapping[str, Tensor], history: Sequence[Mapping[str, Any]], epochs_done: int, has_best: bool
    ) -> None:
        """Goes on from the networks that a shorter run of the recipe left, at its place in this one's schedule.

        The optimizer starts anew, and so do the random numbers, from the seed and the number of epochs.

        Args:
            tensors: of the checkpoint, by their names in it.
            history: of that run; empty where it is lost.
            epochs_done: of that run.
            has_best: whether the checkpoint is that of its best epoch, not of the last.

        Raises:
            InputError: the run has stages, of which the first ones would need more epochs.
        """
        if epochs_done < self.total_epochs and (len(self.stages) > 1 or self.stage.distilled):
            raise InputError(
                "tasks that are learnt one after the other get no more epochs afterwards: start again with --force"
            )
        self._put(self.network, tensors)
        self.epochs_done, self.history = epochs_done, [dict(entry) for entry in history]
        self._begin()
        if self.recipe.keeps_best and not has_best:
            for entry in self.history[:-1]:
                entry["gone"] = True
        for number, generator in self.generators.items():
            generator.manual_seed((self.recipe.seed * 1000 + number - 1) + (epochs_done << 44))
        if self.recipe.keeps_best and (scores := self._scores()):
            self.best, self.best_tensors = max(scores), self._copied()

    def _class_weights(self) -> dict[int, Tensor]:
        tasks = zip(self.data.items(), self.recipe.tasks, strict=True)
        balanced = [(number, data) for (number, data), keys in tasks if keys.class_weights == "balanced"]
        return {number: balancing(data.train.labels, len(data.classes)).to(self.device) for number, data in balanced}

    def _frozen_copy(self) -> DeepVirtualNetwork:
        return copy.deepcopy(self.network).eval().requires_grad_(False)

    @staticmethod
    @torch.no_grad()
    def _put(network: DeepVirtualNetwork, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        for name, tensor in network.file_tensors().items():
            tensor.copy_(tensors[prefix + name])

    def _begin(self) -> None:
        """Makes ready for the stage that the next epoch is of."""
        ends = list(itertools.accumulate(stage.epochs for stage in self.stages))
        place = min(bisect.bisect_right(ends, self.epochs_done), len(ends) - 1)  # after the last epoch: still the last
        self.stage = self.stages[place]
        self._start = ends[place] - self.stage.epochs
        self.network.zero_grad(set_to_none=True)
        if self.stage.before:  # what a later stage draws depends on no earlier one, since that may be of another run
            torch.manual_seed(self.recipe.seed + (2 * self.stage.tasks[0] + self.stage.warmup << 40))
        self.teacher = self._frozen_copy() if self.stage.distilled else None
        is_new = self.epochs_done == self._start and not self.steps_done
        if is_new and not (place and self.stages[place - 1].warmup):
            for network in self.stage.trained:
                if self.stage.before and network not in self.stage.before:
                    self.network.inherit(*network, self.stage.before)
        self.freezing = Freezing(self.network, self.stage)
        self.optimizer = make_optimizer(self.recipe.optimizer, self.network)
        self.step = Step(
            self.network,
            self.teacher,
            self.stage,
            self.freezing.train_mode,
            self.recipe,
            self.teachers,
            self._class_weights(),
        )
        self.average = None if self.recipe.ema is None else self._frozen_copy()
        self.best, self.best_tensors = -math.inf, {}

    # The loop

    def run(self, after_epoch: Callable[["Run"], None], after_step: Callable[["Run", int], None]) -> None:
        """Trains to the end of the last stage; each one leaves in the network what the recipe selects.

        Args:
            after_epoch: called with this run, such as to save its state.
            after_step: called with this run and the number of the step in the epoch, from 1.

        Raises:
            DvnError: a loss, or what it made of the weights, is not a number.
        """
        while self.epochs_done < self.total_epochs and not self.patience_is_over:
            start = time.perf_counter()
            losses = self._epoch(after_step)
            self.epochs_done += 1
            entry = {
                "epoch": self.epochs_done,
                "stage": self.stages.index(self.stage) + 1,
                "lr": self._rate,
                "loss": losses,
                "validation": self._validate(),
                "seconds": round(time.perf_counter() - start, 3),
            }
            self.history.append(entry)
            if self.recipe.keeps_best:
                self._keep_best()
            ended = self.epochs_done == self._start + self.stage.epochs or self.patience_is_over
            if ended and (self.best_tensors or self.average is not None):
                self._put(self.network, self.best_tensors or self._copied())
            after_epoch(self)
            if ended and self.epochs_done < self.total_epochs and not self.patience_is_over:
                self._begin()
        self.network.zero_grad(set_to_none=True)
        for name, tensor in self.network.file_tensors().items():
            tensor.requires_grad_(name.rpartition("/")[2] in self.network.partition.parameters)

    @property
    def patience_is_over(self) -> bool:
        """Whether the last epochs, as many as the recipe waits for, were none of them better than one before."""
        if self.recipe.patience is None or not self.history:
            return False
        scores = self._scores()
        return bool(scores) and len(scores) - 1 - scores.index(max(scores)) >= self.recipe.patience

    def _scores(self) -> list[float]:
        """Mean validation accuracy of those epochs of this stage of which the best is kept, from first to last.

        Not those whose weights are gone. Where levels are unlocked one by one, those since all of them are trained:
        what is kept of an earlier one would hold networks that have learnt nothing.
        """
        stage = self.stages.index(self.stage) + 1
        untrained = set() if self.recipe.unlock is None else set(self.stage.learn)
        scores = []
        for entry in self.history:
            if entry["stage"] == stage:
                untrained -= {network for network in untrained if _of(entry["loss"], network) is not None}
                if not untrained and not entry.get("gone"):
                    scores.append(_mean(numbers(entry["validation"] or [])))
        return scores

    def _epoch(self, after_step: Callable[["Run", int], None]) -> list[list[float | None]]:
        """One pass over the stage's task of most batches. Returns the mean loss of every network, by task and level."""
        recipe, stage, step = self.recipe, self.stage, self.step
        self.network.train()
        self._drawn = self._states_of_generators()
        resumed = self.steps_done  # of an interrupted run, whose images are not read again
        skip = resumed * recipe.accumulate
        batches = {number: self.endless(number, split, skip) for number, split in self._splits().items()}
        if not resumed:
            step.totals.zero_()
        counts = Counter[TaskLevel]()
        check_every = 1 if self.device.type == "cpu" else CHECK_EVERY
        steps = self.steps
        for number in range(1, steps + 1):
            before = (self.epochs_done - self._start) * steps + number - 1  # steps of this stage
            done = before / (stage.epochs * steps)
            rate = recipe.optimizer.lr * (1.0 if stage.warmup else factor(recipe.schedule, done))
            careful = recipe.sequential.lr_factor if stage.distilled and stage.trainable == "all" else 1.0
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"] * careful
            self._rate = rate * careful
            networks = networks_of_step(stage, recipe, done, before + 1)
            counts.update(networks * recipe.accumulate)
            if number <= resumed:
                continue
            if processes.count() > 1:  # dropout and its like: others in each process, the same when resumed
                torch.manual_seed(random.Random(f"{recipe.seed} {before} {processes.rank()}").getrandbits(63))
            for _ in range(recipe.accumulate):
                asked = time.perf_counter()
                given = {task: next(of_task) for task, of_task in batches.items()}
                self.waited += time.perf_counter() - asked
                step(given, networks)
            self.stop.hear(self._meet(networks))
            if number % check_every == 0 or number == steps:
                self.check_losses(number)
            self.freezing.mask_gradients()
            if recipe.optimizer.clip_grad is not None:
                torch.nn.utils.clip_grad_norm_(step.parameters, recipe.optimizer.clip_grad)
            self.optimizer.step()
            self.freezing.restore()
            if self.average is not None:
                self._follow(self.average, before)
            step.clear()
            self.steps_done = number
            after_step(self, number)
        self.steps_done = 0
        self._check_weights()
        totals = zip(step.networks, step.totals.tolist(), strict=True)
        return self._by_level({network: total / counts[network] for network, total in totals if counts[network]})

    def _meet(self, networks: Sequence[TaskLevel]) -> Tensor:
        """Gives all processes the mean of their gradients, running statistics and losses: one all-reduce a step.

        Returns:
            How many of them were asked to stop, as a share.
        """
        asked = torch.full((1,), float(self.stop.signal is not None), device=self.device)
        if processes.count() > 1:
            tensors = self.network.file_tensors()
            moving = self.freezing.train_mode.intersection(networks)
            names = {name for one in moving for name in statistics(self.network, *one)}
            kept = [tensors[name] for name in sorted(names) if tensors[name].is_floating_point()]
            gradients = [p.grad for p in self.step.parameters if p.grad is not None]
            processes.average([*gradients, *kept, self.step.totals, asked])
        return asked

    @torch.no_grad()
    def _follow(self, average: DeepVirtualNetwork, step: int) -> None:
        """Moves the average towards the networks; counters are copied."""
        assert self.recipe.ema is not None
        decay = min(self.recipe.ema, 1 - (1 + step) ** (-2 / 3))
        ours, theirs = average.file_tensors(), self.network.file_tensors()
        floats = [name for name in ours if name in self._finite_before]
        get_ema_multi_avg_fn(decay)([ours[name] for name in floats], [theirs[name] for name in floats], None)
        for name, tensor in ours.items():
            if not tensor.is_floating_point():
                tensor.copy_(theirs[name])

    def _states_of_generators(self) -> dict[int, Tensor]:
        return {number: generator.get_state() for number, generator in self.generators.items()}

    def _by_level(self, values: Mapping[TaskLevel, float]) -> list[list[float | None]]:
        """Values of networks by task and level, None where there is none."""
        tasks = enumerate(self.network.tasks, 1)
        return [[values.get(TaskLevel(task, level)) for level in range(1, len(of.levels) + 1)] for task, of in tasks]

    def check_losses(self, step: int) -> None:
        """Raises DvnError where a loss of the epoch so far is not a number."""
        finite = torch.isfinite(self.step.totals).tolist()
        if not all(finite):
            task, level = self.step.networks[finite.index(False)]
            name = self.network.tasks[task - 1].name
            raise self._diverged(f"the loss of task '{name}', level {level}, is not a number", step)

    def _check_weights(self) -> None:
        """The last step of an epoch has no loss after it that would show what it did."""
        finite = self._finite_tensors()
        name = next((name for name in self.network.file_tensors() if name in self._finite_before - finite), None)
        if name is not None:
            raise self._diverged(f"{name} is not finite", self.steps)

    @torch.no_grad()
    def _finite_tensors(self) -> set[str]:
        """Names of the tensors without infinities and NaN; a backbone may have some with them, such as open bounds."""
        tensors = {name: t for name, t in self.network.file_tensors().items() if t.is_floating_point()}
        finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
        return {name for name, is_finite in zip(tensors, finite, strict=True) if is_finite}

    def _diverged(self, what: str, step: int) -> DvnError:
        return DvnError(
            f"{what} after epoch {self.epochs_done + 1}, step {step}: a lower optimizer.lr may help; nothing was "
            "overwritten"
        )

    def _splits(self) -> dict[int, Split]:
        """The images that this stage trains on: those of its tasks, and those of old ones that are replayed."""
        splits, count = {number: self.train[number] for number in self.stage.tasks}, self.recipe.sequential.replay
        for student, _ in self.stage.distilled if count else ():
            if student.task in self.train:
                splits[student.task] = some(self.train[student.task], count, seed=self.recipe.seed)
        return splits

    def endless(self, number: int, split: Split, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of a task, pass after pass, but for the first ones: a smaller task is seen more often in an epoch."""
        resident = TaskData(**{**vars(self.data[number]), "train": split})
        size, generator = self.batch_sizes[number], self.generators[number]
        while True:
            part = processes.rank(), processes.count()
            yield from resident.train_batches(size, generator, self.device, skip, part)
            skip = max(0, skip - batch_count(split, size, training=True))

    def _validate(self) -> list[list[float | None]] | None:
        """Top-1 accuracy in per cent on images held out of train, of each network whose task has some in this stage."""
        splits = {number: self.validation[number] for number in self.stage.tasks if number in self.validation}
        if not splits:
            return None
        networks = [network for network in self.stage.learn if network.task in splits]
        rows = evaluate_all(self._kept, splits, networks=networks, device=self.device, shared=True)
        return self._by_level({TaskLevel(row.task, row.level): row.top1 for row in rows})

    def _keep_best(self) -> None:
        scores = self._scores()
        if scores and scores[-1] > self.best:
            self.best = scores[-1]
            self.best_tensors = self._copied()

    @property
    def _kept(self) -> DeepVirtualNetwork:
        """The networks as they would be kept now."""
        return self.network if self.average is None else self.average

    def _copied(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._kept.file_tensors().items()}


def json_number(value: float) -> float | None:
    """A number that JSON has, or None."""
    return value if math.isfinite(value) else None


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of some tensors whose names have a prefix, by what follows it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _of(by_level: Sequence[Sequence[float | None]], network: TaskLevel) -> float | None:
    return by_level[network.task - 1][network.level - 1]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def numbers(by_level: Sequence[Sequence[float | None]]) -> list[float]:
    """The values of an entry of the history that are there."""
    return [value for levels in by_level for value in levels if value is not None]
