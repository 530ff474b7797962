"""What a network learns from in place of labels: another network's output."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dvn_cli.store.metadata import Task


def distillation(logits: Tensor, teacher: Tensor, temperature: float, squared: bool = False) -> Tensor:
    """How far a network is from its teacher: 0 where they agree, averaged over the batch, in nats.

    Cross-entropy between both softmaxes at a temperature, as in learning without forgetting (Z. Li, D. Hoiem, ECCV
    2016, eq. 2 and 3: probabilities to the power of 1/T, normalised), less the entropy of the teacher's: a constant, so
    that the gradients are the same.

    Args:
        logits: the student's, (batch, classes).
        teacher: the teacher's, (batch, classes); no gradient reaches it.
        temperature: of both softmaxes.
        squared: multiply by the square of the temperature, so that the gradient's size hardly depends on it (G. Hinton,
            O. Vinyals, J. Dean, 2015, section 2).
    """
    target = F.log_softmax(teacher.detach() / temperature, 1)
    loss = F.kl_div(F.log_softmax(logits / temperature, 1), target, reduction="batchmean", log_target=True)
    return loss * temperature**2 if squared else loss


def as_seen_by(images: Tensor, source: Task, target: Task) -> Tensor:
    """A task's images as another task would get them: at its size, normalised by its mean and std.

    Args:
        images: (batch, channels, height, width), normalised for `source`.
    """
    if (source.mean, source.std, source.input_size) == (target.mean, target.std, target.input_size):
        return images

    def channels(values: tuple[float, ...]) -> Tensor:
        of_each = [images.new_full((), value) for value in values]  # no copy from the host, in a CUDA graph too
        return torch.stack(of_each).view(1, -1, 1, 1)

    pixels = images * channels(source.std) + channels(source.mean)
    if source.input_size != target.input_size:
        pixels = F.interpolate(pixels, target.input_size, mode="bilinear", antialias=True)
    return (pixels - channels(target.mean)) / channels(target.std)


def balancing(labels: Tensor, classes: int) -> Tensor:
    """Returns a weight for each class, (classes,), by which all classes count alike; their mean over images is 1.

    Args:
        labels: of all training images, integer (images,).
        classes: how many there are; one without images has the weight that it would have with one.
    """
    counts = torch.bincount(labels, minlength=classes)
    return len(labels) / (classes * counts.clamp(min=1))
