"""What each network learns from in a step: gradients against those of copies that know nothing of each other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch.nn.functional as F
from torch import Tensor

from dvn_cli.network import VirtualNetwork
from dvn_cli.store.metadata import TaskLevel
from dvn_cli.training.freezing import elements
from dvn_cli.training.loop import Run

GROW = ["learning=sequential", "sequential={old: distilled, grow: true}"]


class SecondStep:
    """What goes into the second step of a stage, where old networks differ already from what holds them.

    Attributes:
        old: copies of all networks as they were when the stage before ended.
        students: copies of all networks as they are when the step begins.
        images: what each network gets.
        gradients: what its step leaves.
    """

    def __init__(self, run: Run, stage: int) -> None:
        self.run, self.stage = run, stage
        self.old: dict[TaskLevel, VirtualNetwork] = {}
        self.students: dict[TaskLevel, VirtualNetwork] = {}
        self.images: dict[TaskLevel, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.now = False
        run.network.register_forward_pre_hook(self.forward)
        with pytest.raises(small.Stopped):
            run.run(self.epoch, self.step)

    def copies(self) -> dict[TaskLevel, VirtualNetwork]:
        return {network: self.run.network.virtual_network(*network) for network in self.run.network}

    def epoch(self, run: Run) -> None:
        if run.epochs_done == sum(stage.epochs for stage in run.stages[: self.stage - 1]):
            self.old = {network: copy.eval() for network, copy in self.copies().items()}

    def step(self, run: Run, step: int) -> None:
        self.now = run.stage == run.stages[self.stage - 1] and step == 1

    def forward(self, _: Any, given: Any) -> None:
        if self.now and not self.students:
            self.students = self.copies()
            self.run.optimizer.step = self.instead_of_it  # type: ignore[method-assign]
        if self.now:
            self.images[given[1:3]] = given[0]

    def instead_of_it(self) -> None:
        self.gradients = {n: t.grad for n, t in self.run.network.file_tensors().items() if t.grad is not None}
        raise small.Stopped


@pytest.mark.parametrize(
    ("words", "stage", "from_labels", "from_top", "held"),
    [
        (
            ["inplace_distillation=true"],
            1,
            {(1, 2), (2, 2)},
            {(1, 1): (1, 2), (2, 1): (2, 2)},
            {},
        ),
        (
            ["teacher=next", "units=3"],
            1,
            {(1, 3), (2, 3)},
            {(1, 2): (1, 3), (1, 1): (1, 2), (2, 2): (2, 3), (2, 1): (2, 2)},
            {},
        ),
        (
            ["learning=sequential"],
            2,
            {(2, 1), (2, 2)},
            {},
            {(1, 1): (1, 1), (1, 2): (1, 2)},
        ),
        (
            ["learning=sequential", "sequential.replay=8", "tasks.0.weight=5"],
            2,
            {(2, 1), (2, 2)},
            {},
            {(1, 1): (1, 1), (1, 2): (1, 2)},
        ),
        (
            [*GROW, "sequential.weight=0.3", "sequential.temperature=3", "inplace_distillation=true"],
            2,
            {(2, 2)},
            {(2, 1): (2, 2)},
            {(1, 1): (1, 1), (1, 2): (1, 1)},
        ),
        (
            [*GROW, "sequential.squared_temperature=true", "sequential.warmup_epochs=1", "reduction=mean"],
            2,
            {(2, 1), (2, 2)},
            {},
            {(1, 2): (1, 1)},
        ),
    ],
    ids=["from the top level", "from the next level", "held at each level", "replayed", "a grown level", "warm-up"],
)
def test_gradients(
    tmp_path: Path,
    words: list[str],
    stage: int,
    from_labels: set[TaskLevel],
    from_top: Mapping[TaskLevel, TaskLevel],
    held: Mapping[TaskLevel, TaskLevel],
) -> None:
    seen = SecondStep(small.session(tmp_path, "tasks.0.data.augment=none", "sequential.lr_factor=1", *words).run, stage)
    run, students, images = seen.run, seen.students, seen.images
    trained = {*from_labels, *from_top, *held}
    assert {network for network in images if network not in held.values() or network in trained} == trained
    keys, weight = run.recipe.sequential, 1 / len(trained) if run.recipe.reduction == "mean" else 1
    old_statistics = {network for network in held if network in run.stage.before}
    for network, student in students.items():
        student.train(network not in old_statistics)
    for network in trained:
        logits = students[network](images[network])
        if network in held:
            teacher = seen.old[held[network]](images[network]).detach()
            temperature = keys.temperature
            loss = F.cross_entropy(logits / temperature, (teacher / temperature).softmax(1)) * keys.weight
            loss = loss * (temperature**2 if keys.squared_temperature else 1)
        elif network in from_top:
            loss = F.cross_entropy(logits, students[from_top[network]](images[network]).detach().softmax(1))
        else:
            loss = F.cross_entropy(logits, small.labels_of(images[network], run.data[network[0]]))
        (weight * loss).backward()
    expected = small.gathered(run.network, {network: students[network] for network in trained})
    if run.stage.trainable == "new":  # what an old network has too is frozen
        for name, old in elements(run.network, run.stage.before).items():
            expected[name] = expected[name] * ~old if name in expected else expected.get(name)
    for name, gradient in seen.gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    moving = {name for name, tensor in run.network.file_tensors().items() if tensor.requires_grad}
    assert set(seen.gradients) == moving


def test_replayed_images(tmp_path: Path) -> None:
    """The same few of an old task's training images, in every step, behind the new ones."""
    run = small.session(tmp_path, "learning=sequential", "sequential.replay=3", "tasks.0.data.augment=none").run
    seen: list[Tensor] = []

    def forward(_: Any, given: Any) -> None:
        if run.stage == run.stages[1] and given[1:3] == (1, 2):
            seen.append(given[0])

    run.network.register_forward_pre_hook(forward)
    run.run(small.nothing, small.nothing)
    assert {len(images) for images in seen} == {16 + 3}
    kept = torch.cat([images[16:] for images in seen])
    small.labels_of(kept, run.data[1])  # fails where they are no training images of the old task
    assert len(kept.unique(dim=0)) == 3


def test_old_networks_see_the_new_images_as_their_own(tmp_path: Path) -> None:
    """Each normalised by its own task's mean and std, and at its size."""
    run = small.session(tmp_path, "learning=sequential", "tasks.0.data.size=16").run
    images = SecondStep(run, 2).images
    first, second = run.network.tasks
    assert (first.mean, first.std) != (second.mean, second.std)
    pixels = images[2, 1] * torch.tensor(second.std) + torch.tensor(second.mean)
    larger = F.interpolate(pixels, (16, 16), mode="bilinear", antialias=True)
    expected = (larger - torch.tensor(first.mean)) / torch.tensor(first.std)
    for level in (1, 2):
        torch.testing.assert_close(images[1, level], expected)
