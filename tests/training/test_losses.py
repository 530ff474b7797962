"""Distillation against formulas written independently, and images handed from one task to another."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dvn_cli.store.metadata import Task
from dvn_cli.training.losses import as_seen_by, distillation

temperatures = st.floats(0.5, 20)
seeds = st.integers(0, 10_000)


def logits(seed: int, count: int = 2) -> list[Tensor]:
    """Of networks, for the same few images, some of them sure of what they say."""
    generator = torch.Generator().manual_seed(seed)
    batch, classes = (int(torch.randint(1, high, (), generator=generator)) for high in (5, 8))
    scale = torch.rand((), generator=generator, dtype=torch.float64) * 10
    return [torch.randn(batch, classes + 1, generator=generator, dtype=torch.float64) * scale for _ in range(count)]


def lwf(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Eq. 2 and 3 of learning without forgetting, as they are written there; the mean over the images."""
    powers = [F.softmax(z, 1) ** (1 / temperature) for z in (student, teacher)]
    new, old = (power / power.sum(1, keepdim=True) for power in powers)
    return -(old * new.log()).sum(1).mean()


def avalanche(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """What avalanche-lib's LearningWithoutForgetting computes of the classes of one task."""
    new, old = F.softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    return (old * (old / new).log()).sum(1).mean()


def gradient(loss: Callable[..., Tensor], student: Tensor, *more: object) -> Tensor:
    leaf = student.clone().requires_grad_()
    loss(leaf, *more).backward()
    assert leaf.grad is not None
    return leaf.grad


@settings(deadline=None)
@given(seeds, temperatures)
def test_same_gradient_as_lwf(seed: int, temperature: float) -> None:
    student, teacher = logits(seed)
    expected = gradient(lwf, student, teacher, temperature)
    torch.testing.assert_close(gradient(distillation, student, teacher, temperature), expected, rtol=1e-6, atol=1e-10)


@settings(deadline=None)
@given(seeds, temperatures)
def test_less_than_lwf_by_the_teachers_entropy(seed: int, temperature: float) -> None:
    student, teacher = logits(seed)
    difference = lwf(student, teacher, temperature) - lwf(teacher, teacher, temperature)
    torch.testing.assert_close(distillation(student, teacher, temperature), difference, rtol=1e-6, atol=1e-9)


@settings(deadline=None)
@given(seeds, temperatures)
def test_zero_where_student_is_teacher(seed: int, temperature: float) -> None:
    """And nowhere less; what is added to all classes is no difference."""
    student, teacher = logits(seed)
    assert distillation(teacher, teacher, temperature) == 0
    assert gradient(distillation, teacher, teacher, temperature).abs().max() < 1e-12
    assert abs(distillation(teacher + 3, teacher, temperature)) < 1e-7
    assert distillation(student, teacher, temperature) > -1e-9


@settings(deadline=None)
@given(seeds, temperatures)
def test_as_in_avalanche(seed: int, temperature: float) -> None:
    student, teacher = logits(seed)
    expected = avalanche(student, teacher, temperature)
    torch.testing.assert_close(distillation(student, teacher, temperature), expected, rtol=1e-6, atol=1e-9)


def test_by_hand() -> None:
    """Logits whose probabilities at temperature 2 are 1/2, 1/2 and 3/4, 1/4."""
    teacher, student = torch.tensor([[0.0, 0.0]]), torch.tensor([[2 * math.log(3), 0.0]])
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert float(distillation(student, teacher, 2)) == pytest.approx(expected)
    assert float(distillation(student, teacher, 2, squared=True)) == pytest.approx(4 * expected)
    assert float(distillation(student.repeat(3, 1), teacher.repeat(3, 1), 2)) == pytest.approx(expected), "a mean"


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = (z.requires_grad_() for z in logits(0))
    distillation(student, teacher, 2).backward()
    assert teacher.grad is None
    assert student.grad is not None


# Images of one task for another

SMALL = Task("small", ("a", "b"), (8, 8), (0.2, 0.5, 0.7), (0.1, 0.3, 0.2), (1,), (1,))
OTHER = dataclasses.replace(SMALL, mean=(0.5, 0.1, 0.4), std=(0.2, 0.2, 0.5))
LARGE = dataclasses.replace(OTHER, input_size=(16, 24))


def normalised(pixels: Tensor, task: Task) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (task.mean, task.std))
    return (pixels - mean) / std


def test_normalised_as_the_other_task_wants_it() -> None:
    pixels = torch.rand(4, 3, 8, 8)
    seen = as_seen_by(normalised(pixels, SMALL), SMALL, OTHER)
    torch.testing.assert_close(seen, normalised(pixels, OTHER))
    torch.testing.assert_close(as_seen_by(seen, OTHER, SMALL), normalised(pixels, SMALL), rtol=1e-4, atol=1e-5)


def test_of_the_size_that_the_other_task_wants() -> None:
    """What is even stays even; what is smooth comes back."""
    even = torch.rand(4, 3, 1, 1).expand(4, 3, 8, 8)
    torch.testing.assert_close(
        as_seen_by(normalised(even, SMALL), SMALL, LARGE), normalised(even[..., :1, :1].expand(4, 3, 16, 24), LARGE)
    )
    ramp = torch.linspace(0, 1, 8).expand(2, 3, 8, 8)
    there = as_seen_by(normalised(ramp, SMALL), SMALL, LARGE)
    assert there.shape == (2, 3, 16, 24)
    back = as_seen_by(there, LARGE, SMALL)
    assert back.shape == (2, 3, 8, 8)
    torch.testing.assert_close(back[..., 1:-1], normalised(ramp, SMALL)[..., 1:-1], rtol=0, atol=0.02 / 0.1)


def test_untouched_where_tasks_agree() -> None:
    images = torch.randn(2, 3, 8, 8)
    assert as_seen_by(images, SMALL, dataclasses.replace(SMALL, name="same")) is images
