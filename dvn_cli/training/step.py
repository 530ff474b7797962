"""Forward and backward of all networks of a stage, one after the other."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dvn_cli import processes
from dvn_cli.device import memory_format
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.store.metadata import TaskLevel
from dvn_cli.training.losses import as_seen_by, distillation
from dvn_cli.training.methods import Stage
from dvn_cli.training.recipe import Recipe
from dvn_cli.training.teachers import FileTeacher, teachers

WARM = 3  # steps before one is captured: libraries choose their algorithms and allocate in the first ones

Batches = Mapping[int, tuple[Tensor, Tensor]]  # by number of task: images (B, C, H, W), normalised, and labels (B,)


class Step:
    """One training step but for the optimizer's: gradients of the weighted sum of all losses (eq. 4 and 6).

    On CUDA the step is captured as a graph and replayed (https://docs.pytorch.org/docs/stable/notes/cuda.html,
    "CUDA Graphs"): networks of this size are otherwise limited by how fast a CPU can launch their kernels.

    Attributes:
        networks: those that the stage trains.
        totals: sum of the losses of each one so far, unweighted; whoever reads them sets them to zero.
        capture_error: why the step could not be captured, and so is launched each time; None where it could, or was
            not tried.
    """

    def __init__(
        self,
        network: DeepVirtualNetwork,
        teacher: DeepVirtualNetwork | None,
        stage: Stage,
        train_mode: set[TaskLevel],
        recipe: Recipe,
        files: Mapping[int, FileTeacher],
        class_weights: Mapping[int, Tensor],
    ) -> None:
        """Makes a step.

        Args:
            network: all networks.
            teacher: they as they were before the stage.
            stage: says which ones are trained.
            train_mode: see `Freezing`.
            recipe: says how.
            files: networks of files that teach, by number of task.
            class_weights: by number of task, where its classes have any.
        """
        self.network, self.teacher, self.stage = network, teacher, stage
        self.recipe, self.train_mode = recipe, train_mode
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.device = next(network.parameters()).device
        self.files, self.class_weights = files, class_weights
        first = len(network.tasks) - len(recipe.tasks) + 1  # earlier ones are not of this recipe
        self.task_weights = {number: keys.weight for number, keys in enumerate(recipe.tasks, first)}
        self.networks = stage.trained
        self.totals = torch.zeros(len(self.networks), device=self.device)
        self._eager_left = WARM if self.device.type == "cuda" else -1  # below zero: always
        self._launched = set[tuple[TaskLevel, ...]]()
        self._captured: dict[tuple[TaskLevel, ...], Captured] = {}
        self.capture_error: str | None = None

    def __call__(self, batches: Batches, networks: tuple[TaskLevel, ...] | None = None) -> None:
        """Adds the gradients of a batch to those that are there, and its losses to the totals.

        Args:
            batches: of each task.
            networks: that the step trains; by default all.
        """
        networks = self.networks if networks is None else networks
        given = self._prepared(batches)
        if networks in self._captured:
            self._captured[networks].replay(self.parameters, given.tensors)
        elif self._eager_left == 0 and networks in self._launched:
            self._capture(given.copy(), networks)
        else:  # first as it is, in which what it needs is compiled and brought to the device
            self._eager_left -= self._eager_left > 0
            self._launched.add(networks)
            with self._beside():
                self._run(given, networks)

    def clear(self) -> None:
        """Lets go of the gradients; those of captured steps stay in memory, and are overwritten by the next replay."""
        for parameter in self.parameters:
            parameter.grad = None

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """On CUDA another stream, as a step that will be captured wants it."""
        if self.device.type != "cuda":
            yield
            return
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(stream)

    def _capture(self, given: "Given", networks: tuple[TaskLevel, ...]) -> None:
        """Captures the step and replays it; where that fails, launches this step and all later ones."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        totals, before = self.totals.clone(), [parameter.grad for parameter in self.parameters]
        self.clear()
        own = torch.cuda.Stream(self.device)  # torch's own is of the device that a process captured on first
        try:  # other threads, such as one that pins images, may allocate meanwhile
            with (
                torch.cuda.device(self.device),
                torch.cuda.graph(graph, stream=own, capture_error_mode="thread_local"),
            ):
                self._run(given, networks)
        except RuntimeError as error:  # such as a backbone that asks the device for something in between
            torch.cuda.set_stream(stream)  # a capture that fails to end leaves its own stream as the current one
            self._eager_left = -1
            self.capture_error = str(error).partition("\n")[0]
            self.totals.copy_(totals)
            for parameter, gradient in zip(self.parameters, before, strict=True):
                parameter.grad = gradient
            self._run(given, networks)
            return
        gradients = [parameter.grad for parameter in self.parameters]
        for parameter, gradient in zip(self.parameters, before, strict=True):
            parameter.grad = gradient
        self._captured[networks] = Captured(graph, given.tensors, gradients)
        self._captured[networks].replay(self.parameters, given.tensors)

    def _prepared(self, batches: Batches) -> "Given":
        images = {number: given for number, (given, _) in batches.items()}
        source, tasks = self.stage.tasks[0], self.network.tasks
        for number in {student.task for student, _ in self.stage.distilled}:  # old tasks, whose images are gone or few
            seen = as_seen_by(batches[source][0], tasks[source - 1], tasks[number - 1])
            images[number] = torch.cat([seen, images[number]]) if number in images else seen
        layout = memory_format(self.recipe.memory_format, self.device)
        images = {number: given.contiguous(memory_format=layout) for number, given in images.items()}
        labels = {number: labels for number, (_, labels) in batches.items()}
        shares = {}
        for number, weights in self.class_weights.items() if processes.count() > 1 else ():
            if number in labels and labels[number].ndim == 1:  # else each image counts alike
                own = weights[labels[number]].sum()
                processes.average([mean := own.clone()])
                shares[number] = own / mean
        return Given(images, labels, shares)

    def _run(self, given: "Given", networks: tuple[TaskLevel, ...]) -> None:
        recipe, distilled = self.recipe, dict(self.stage.distilled)
        weight = 1 / recipe.accumulate / (1 if recipe.reduction == "sum" else len(networks))
        soft_targets: dict[TaskLevel | FileTeacher, Tensor] = {}  # outputs, in this step, of whoever teaches
        for student, teacher in teachers(self.stage, networks, recipe.taught_by, self.files).items():
            images = given.images[student.task]
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=recipe.precision == "bf16", cache_enabled=False
            ):
                logits = self.network(images, *student, student in self.train_mode).float()
                if teacher is not None and teacher not in soft_targets:
                    with torch.no_grad():
                        soft_targets[teacher] = self._outputs(teacher, images).float()
            own = self.task_weights.get(student.task, 1.0)
            if teacher is None:
                loss = F.cross_entropy(
                    logits,
                    given.labels[student.task],
                    self.class_weights.get(student.task),
                    label_smoothing=recipe.label_smoothing,
                )
                weighted = own * (loss := loss * given.shares.get(student.task, 1.0))
            elif student in distilled:
                keys = recipe.sequential
                loss = distillation(logits, soft_targets[teacher], keys.temperature, keys.squared_temperature)
                weighted = keys.weight * loss
            else:
                weighted = own * (loss := distillation(logits, soft_targets[teacher], 1.0))
            # Backward at once: no more than one network's activations are ever held.
            (weight * weighted).backward()
            self.totals[self.networks.index(student)] += loss.detach()
            if student not in distilled:
                soft_targets[student] = logits.detach()

    def _outputs(self, teacher: TaskLevel | FileTeacher, images: Tensor) -> Tensor:
        """The logits of a teacher that is not among the networks of the step."""
        if isinstance(teacher, FileTeacher):
            return teacher(images)
        assert self.teacher is not None
        return self.teacher(images, *teacher)


@dataclass(frozen=True)
class Given:
    """What a step gets, by number of task.

    Attributes:
        images: that its networks get.
        labels: where there are any.
        shares: of the weights of all processes' labels those of this one's, times the number of processes: where
            classes have weights, by whose sum a loss is divided, and there are several processes.
    """

    images: dict[int, Tensor]
    labels: dict[int, Tensor]
    shares: dict[int, Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.images.values(), *self.labels.values(), *self.shares.values()]

    def copy(self) -> "Given":
        return Given(*({number: t.clone() for number, t in part.items()} for part in vars(self).values()))


@dataclass(frozen=True)
class Captured:
    """A step of some networks as a CUDA graph.

    Attributes:
        graph: of it.
        inputs: tensors that it reads images and labels from.
        gradients: of each parameter, that it writes; None where the networks have no part of it.
    """

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    gradients: list[Tensor | None]

    def replay(self, parameters: Sequence[Tensor], given: Sequence[Tensor]) -> None:
        """Does the step anew with what is given, and adds its gradients to those that the parameters have."""
        for static, now in zip(self.inputs, given, strict=True):
            static.copy_(now)
        before = [None if p.grad is None else p.grad.clone() for p in parameters]  # perhaps where the graph writes
        self.graph.replay()
        for parameter, gradient, so_far in zip(parameters, self.gradients, before, strict=True):
            if gradient is not None:
                parameter.grad = gradient if so_far is None else gradient.add_(so_far)
