"""The one loop: every task and level in every step, gradients accumulated, one optimizer step (eq. 4 of the paper)."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dvn_cli.data import TaskData
from dvn_cli.data.batches import batch_count
from dvn_cli.errors import DvnError
from dvn_cli.evaluation import evaluate_all
from dvn_cli.network import DeepVirtualNetwork
from dvn_cli.training.recipe import OptimizerKeys, Recipe
from dvn_cli.training.schedule import factor

CHECK_EVERY = 50  # steps between looks at the losses where each look waits for all that came before: not on a CPU


@dataclass
class Run:
    """A run of a recipe, from its start or from where it was interrupted.

    Attributes:
        epochs_done: how many epochs it has behind it.
        history: for each epoch what it gave: learning rate, loss and validation accuracy of every network.
        best: of the epochs so far, the validation accuracy (mean of all networks, per cent) of the best.
    """

    recipe: Recipe
    network: DeepVirtualNetwork
    data: Sequence[TaskData]
    device: torch.device
    epochs_done: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: float = -math.inf

    def __post_init__(self) -> None:
        torch.manual_seed(self.recipe.seed)  # of dropout and its like
        self.network.to(self.device)
        self.optimizer = make_optimizer(self.recipe.optimizer, self.network)
        self.generators = [torch.Generator() for _ in self.data]
        for number, generator in enumerate(self.generators):
            generator.manual_seed(self.recipe.seed * 1000 + number)
        self.train = [d.train.to(self.device) for d in self.data]
        self.validation = [d.validation.to(self.device) if d.validation is not None else None for d in self.data]
        self.steps = max(batch_count(split, self.recipe.batch_size, training=True) for split in self.train)
        self.best_tensors: dict[str, Tensor] = {}

    # The state between two epochs

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that changes during a run, as tensors and JSON."""
        tensors = {f"network/{name}": tensor for name, tensor in self.network.file_tensors().items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best_tensors.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{key}": torch.as_tensor(value) for key, value in state.items()}
        tensors |= {f"generator/{i}": generator.get_state() for i, generator in enumerate(self.generators)}
        tensors["random"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random_cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors, {"epochs_done": self.epochs_done, "history": self.history, "best": json_number(self.best)}

    def restore(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Goes back to a state."""
        with torch.no_grad():
            for name, tensor in self.network.file_tensors().items():
                tensor.copy_(tensors[f"network/{name}"])
        self.best_tensors = {n.removeprefix("best/"): t for n, t in tensors.items() if n.startswith("best/")}
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer/"):
                _, index, key = name.split("/")
                state.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        for i, generator in enumerate(self.generators):
            generator.set_state(tensors[f"generator/{i}"])
        torch.set_rng_state(tensors["random"])
        if self.device.type == "cuda" and "random_cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random_cuda"], self.device)
        self.epochs_done, self.history = metadata["epochs_done"], list(metadata["history"])
        self.best = -math.inf if metadata["best"] is None else metadata["best"]

    # The loop

    def run(self, after_epoch: Callable[["Run"], None], after_step: Callable[["Run", int], None]) -> None:
        """Trains to the end, then leaves in the network what the recipe selects.

        Args:
            after_epoch: called with this run, such as to save its state.
            after_step: called with this run and the number of the step in the epoch, from 1.

        Raises:
            DvnError: a loss, or what it made of the weights, is not a number.
        """
        while self.epochs_done < self.recipe.epochs:
            start = time.perf_counter()
            losses = self._epoch(after_step)
            self.epochs_done += 1
            entry = {
                "epoch": self.epochs_done,
                "lr": self.optimizer.param_groups[0]["lr"],
                "loss": losses,
                "validation": self._validate(),
                "seconds": round(time.perf_counter() - start, 3),
            }
            self.history.append(entry)
            if self.recipe.select == "best":
                self._keep_best(entry["validation"])
            after_epoch(self)
        if self.recipe.select == "best":
            with torch.no_grad():
                for name, tensor in self.network.file_tensors().items():
                    tensor.copy_(self.best_tensors[name])

    def _epoch(self, after_step: Callable[["Run", int], None]) -> list[list[float]]:
        """One pass over the largest task. Returns the mean loss of every network, by task and level."""
        network, recipe = self.network.train(), self.recipe
        networks = list(network)
        weight = 1.0 if recipe.reduction == "sum" else 1 / len(networks)
        batches = [self._endless(number) for number in range(len(self.data))]
        totals = torch.zeros(len(networks), device=self.device)
        check_every = 1 if self.device.type == "cpu" else CHECK_EVERY
        for step in range(1, self.steps + 1):
            done = (self.epochs_done * self.steps + step - 1) / (recipe.epochs * self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = recipe.optimizer.lr * factor(recipe.schedule, done)
            images = [next(batch) for batch in batches]
            for place, (task, level) in enumerate(networks):
                inputs, labels = images[task - 1]
                with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                    loss = F.cross_entropy(network(inputs, task, level).float(), labels)
                # Backward at once: no more than one network's activations are ever held.
                (weight * loss).backward()
                totals[place] += loss.detach()
            if step % check_every == 0 or step == self.steps:
                self._check(totals, networks, step)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            after_step(self, step)
        self._check_weights()
        means = iter((totals / self.steps).tolist())
        return [[next(means) for _ in task.levels] for task in network.tasks]

    def _check(self, totals: Tensor, networks: Sequence[tuple[int, int]], step: int) -> None:
        finite = torch.isfinite(totals).tolist()
        if not all(finite):
            task, level = networks[finite.index(False)]
            name = self.network.tasks[task - 1].name
            raise self._diverged(f"the loss of task '{name}', level {level}, is not a number", step)

    def _check_weights(self) -> None:
        """The last step of an epoch has no loss after it that would show what it did."""
        with torch.no_grad():
            tensors = {name: t for name, t in self.network.file_tensors().items() if t.is_floating_point()}
            finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
        if not all(finite):
            raise self._diverged(f"{list(tensors)[finite.index(False)]} is not finite", self.steps)

    def _diverged(self, what: str, step: int) -> DvnError:
        return DvnError(
            f"{what} after epoch {self.epochs_done + 1}, step {step}: a lower optimizer.lr may help; nothing was "
            "overwritten"
        )

    def _endless(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of a task, pass after pass: a smaller task is seen more often in an epoch."""
        data = self.data[number]
        resident = TaskData(**{**vars(data), "train": self.train[number]})
        while True:
            yield from resident.train_batches(self.recipe.batch_size, self.generators[number], self.device)

    def _validate(self) -> list[list[float]] | None:
        """Top-1 accuracy in per cent of every network on images held out of train; None if there are none."""
        splits = {number: split for number, split in enumerate(self.validation, 1) if split is not None}
        if not splits:
            return None
        rows = evaluate_all(self.network, splits, device=self.device)
        return [[row.result.top1 for row in rows if row.task == number] for number in range(1, len(self.data) + 1)]

    def _keep_best(self, validation: list[list[float]] | None) -> None:
        values = [value for levels in validation or [] for value in levels]
        score = sum(values) / len(values)
        if score > self.best:
            self.best = score
            self.best_tensors = {name: t.detach().clone() for name, t in self.network.file_tensors().items()}


def make_optimizer(keys: OptimizerKeys, network: DeepVirtualNetwork) -> torch.optim.Optimizer:
    """The optimizer of a recipe; vectors (norms and biases) may be spared weight decay."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    decayed = [p for p in parameters if keys.decay_norms or p.ndim > 1]
    spared = [p for p in parameters if not keys.decay_norms and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": keys.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if keys.name == "adamw":
        return torch.optim.AdamW(groups, lr=keys.lr, betas=(keys.momentum, 0.999))
    return torch.optim.SGD(groups, lr=keys.lr, momentum=keys.momentum, nesterov=keys.nesterov and keys.momentum > 0)


def json_number(value: float) -> float | None:
    """A number that JSON has, or None."""
    return value if math.isfinite(value) else None
