"""Forward and backward of all networks of a stage, one after the other."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dvn_cli.device import memory_format
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.store.metadata import TaskLevel
from dvn_cli.training.losses import as_seen_by, distillation
from dvn_cli.training.methods import Stage, highest
from dvn_cli.training.recipe import Recipe

WARM = 3  # steps before one is captured: libraries choose their algorithms and allocate in the first ones

Batches = Mapping[int, tuple[Tensor, Tensor]]  # by number of task: images (B, C, H, W), normalised, and labels (B,)


class Step:
    """One training step but for the optimizer's: gradients of the weighted sum of all losses (eq. 4 and 6).

    On CUDA the step is captured as a graph and replayed (https://docs.pytorch.org/docs/stable/notes/cuda.html,
    "CUDA Graphs"): networks of this size are otherwise limited by how fast a CPU can launch their kernels.

    Attributes:
        networks: those that the stage trains, in the order of a step.
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
    ) -> None:
        """`teacher`: the networks as they were before the stage; `train_mode`: see `Freezing`."""
        self.network, self.teacher, self.stage = network, teacher, stage
        self.recipe, self.train_mode = recipe, train_mode
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.device = next(network.parameters()).device
        self.teachers = _teachers(stage, recipe.inplace_distillation)
        self.networks = list(self.teachers)
        self.weight = 1.0 if recipe.reduction == "sum" else 1 / len(self.networks)
        self.totals = torch.zeros(len(self.networks), device=self.device)
        self._eager_left = WARM if self.device.type == "cuda" else -1  # below zero: always
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self.capture_error: str | None = None

    def __call__(self, batches: Batches) -> None:
        """Leaves the gradients of a step where the optimizer looks for them, and adds to the totals."""
        images, labels = self._prepared(batches)
        if self._graph is not None:
            for static, given in zip(self._inputs, (*images.values(), *labels.values()), strict=True):
                static.copy_(given)
            self._graph.replay()
        elif self._eager_left == 0:
            self._capture(images, labels)
        else:
            self._eager_left -= 1
            with self._beside():
                self._run(images, labels)

    def clear(self) -> None:
        """Frees the gradients; those of a captured step stay where they are, and the next one overwrites them."""
        if self._graph is None:
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

    def _capture(self, images: dict[int, Tensor], labels: dict[int, Tensor]) -> None:
        """Captures the step and replays it; where that fails, launches this step and all later ones."""
        images = {number: tensor.clone() for number, tensor in images.items()}
        labels = {number: tensor.clone() for number, tensor in labels.items()}
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        totals = self.totals.clone()
        self.clear()
        try:
            with torch.cuda.graph(graph):
                self._run(images, labels)
        except RuntimeError as error:  # such as a backbone that asks the device for something in between
            torch.cuda.set_stream(stream)  # a capture that fails to end leaves its own stream as the current one
            self._eager_left = -1
            self.capture_error = str(error).partition("\n")[0]
            self.totals.copy_(totals)
            self.clear()
            self._run(images, labels)
            return
        self._graph, self._inputs = graph, [*images.values(), *labels.values()]
        graph.replay()

    def _prepared(self, batches: Batches) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """The images that each task's networks get, by its number, and the labels there are."""
        images = {number: given for number, (given, _) in batches.items()}
        for number, _ in self.networks:
            if number not in images:  # an old task, whose images are gone
                source, tasks = self.stage.tasks[0], self.network.tasks
                images[number] = as_seen_by(batches[source][0], tasks[source - 1], tasks[number - 1])
        layout = memory_format(self.recipe.memory_format, self.device)
        images = {number: given.contiguous(memory_format=layout) for number, given in images.items()}
        return images, {number: labels for number, (_, labels) in batches.items()}

    def _run(self, images: Mapping[int, Tensor], labels: Mapping[int, Tensor]) -> None:
        soft_targets: dict[TaskLevel, Tensor] = {}  # outputs, in this step, of the teacher and of higher levels
        distilled = dict(self.stage.distilled)
        for place, (student, teacher) in enumerate(self.teachers.items()):
            given = images[student[0]]
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16", cache_enabled=False
            ):
                logits = self.network(given, *student, student in self.train_mode).float()
                if student in distilled and teacher not in soft_targets:
                    assert self.teacher is not None
                    assert teacher is not None
                    with torch.no_grad():
                        soft_targets[teacher] = self.teacher(given, *teacher).float()
            if teacher is None:
                loss = weighted = F.cross_entropy(logits, labels[student[0]])
            elif student in distilled:
                keys = self.recipe.sequential
                loss = distillation(logits, soft_targets[teacher], keys.temperature, keys.squared_temperature)
                weighted = keys.weight * loss
            else:
                loss = weighted = distillation(logits, soft_targets[teacher], 1.0)
            # Backward at once: no more than one network's activations are ever held.
            (self.weight * weighted).backward()
            self.totals[place] += loss.detach()
            if student not in distilled:
                soft_targets[student] = logits.detach()


def _teachers(stage: Stage, inplace: bool) -> dict[TaskLevel, TaskLevel | None]:
    """The networks of a stage in the order of a step, each with the network that it learns from; None: from labels.

    An old task's network learns from one of before the stage, another one from its own task's top level.
    """
    learn: dict[TaskLevel, TaskLevel | None] = dict.fromkeys(stage.learn)
    if inplace:
        top = {task: highest(stage.learn, task) for task, _ in stage.learn}
        highest_first = sorted(stage.learn, key=lambda network: -network[1])
        learn = {network: None if network == top[network[0]] else top[network[0]] for network in highest_first}
    return {**learn, **dict(stage.distilled)}
