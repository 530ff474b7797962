"""Whole batches, augmented and normalised where they are used: no worker processes, no image handled alone."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dvn_cli.data.spec import Augmentation


@dataclass(frozen=True, eq=False)
class Split:
    """Images and the index of each one's class.

    Attributes:
        pool: uint8 (M, C, H, W), images that several splits may share.
        labels: int64 (N,).
        indices: int64 (N,), which images of the pool they are, None for all of them in order.
    """

    pool: Tensor
    labels: Tensor
    indices: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> Tensor:
        """The images alone, uint8 (N, C, H, W): a copy where they are not all of the pool."""
        return self.pool if self.indices is None else self.pool[self.indices]

    def to(self, device: torch.device | str) -> "Split":
        """Returns the same split on a device, where `batches` then needs no copies."""
        return to_device([self], device)[0]


def to_device(splits: Iterable[Split], device: torch.device | str) -> list[Split]:
    """Returns the same splits on a device, where a pool that several share is there once."""
    moved: dict[int, Tensor] = {}
    result = []
    for split in splits:
        if id(split.pool) not in moved:
            moved[id(split.pool)] = split.pool.to(device)
        indices = None if split.indices is None else split.indices.to(device)
        result.append(Split(moved[id(split.pool)], split.labels.to(device), indices))
    return result


def batches(
    split: Split,
    batch_size: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    augment: Augmentation = "none",
    pad: int = 4,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields one pass over a split: images, float32 (B, C, H, W) normalised, and labels, int64 (B,), on the device.

    Without a generator: every image once, in order, the last batch as small as it comes (evaluation). With one:
    shuffled and augmented, and a last partial batch is left out, since the statistics of a small batch would harm the
    norms; those images are others in the next pass. A split smaller than a batch is one batch all the same.

    Args:
        split: The images; put them on the device beforehand (`Split.to`) to save a copy per batch.
        batch_size: Images in a batch.
        mean: Per channel, of pixels in 0..1.
        std: Per channel, of pixels in 0..1.
        device: Of the batches.
        generator: On the CPU, so that every device draws alike; its state is all there is to save and restore.
        augment: As in `DataSpec`; only with a generator.
        pad: As in `DataSpec`.
    """
    scale = (
        torch.tensor(mean, device=device).view(1, -1, 1, 1) * 255,
        torch.tensor(std, device=device).view(1, -1, 1, 1) * 255,
    )
    if generator is None:
        order = torch.arange(len(split), device=split.labels.device)
    else:
        order = torch.randperm(len(split), generator=generator).to(split.labels.device)
        order = order[: len(split) - len(split) % batch_size] if len(split) >= batch_size else order
    for chosen in order.split(batch_size):
        images = split.pool[chosen if split.indices is None else split.indices[chosen]].to(device)
        if generator is not None and augment != "none":
            images = _augmented(images, pad, augment == "crop-flip", generator)
        yield images.float().sub_(scale[0]).div_(scale[1]), split.labels[chosen].to(device)


def batch_count(split: Split, batch_size: int, training: bool) -> int:
    """The number of batches that `batches` yields, `training` with a generator."""
    return max(len(split) // batch_size, 1) if training else -(-len(split) // batch_size)


def _augmented(images: Tensor, pad: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Each image with `pad` black pixels around, cut out again at a random place, and mirrored or not."""
    count, channels, height, width = images.shape
    down, right = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=generator).to(images.device)
    rows = down + torch.arange(height, device=images.device)
    columns = right + torch.arange(width, device=images.device)
    if flip:
        mirrored = torch.randint(0, 2, (count, 1), generator=generator).to(images.device).bool()
        columns = torch.where(mirrored, columns.flip(1), columns)
    pixels = (rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]).flatten(1)  # (N, H * W), of the padded image
    padded = F.pad(images, (pad, pad, pad, pad)).flatten(2)
    return padded.gather(2, pixels[:, None].expand(-1, channels, -1)).view(images.shape)
