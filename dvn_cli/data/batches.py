"""Whole batches, augmented and normalised where they are used, whether their images are in memory or read anew."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dvn_cli.data.augment import Mixing, ResizedCrop
from dvn_cli.data.pool import Pool
from dvn_cli.data.spec import Augmentation
from dvn_cli.data.stream import stream

Draws = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, eq=False)
class Split:
    """Images and the index of each one's class.

    Attributes:
        pool: uint8 (M, C, H, W), images that several splits may share; or what they are read from.
        labels: int64 (N,).
        indices: int64 (N,), which images of the pool they are, None for all of them in order.
        transform: What is done in training to each image that is read.
        bad: What is said of each image that cannot be read and is left out, so far: see `Pool`.
    """

    pool: Tensor | Pool
    labels: Tensor
    indices: Tensor | None = None
    transform: ResizedCrop | None = None
    bad: Collection[str] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> Tensor:
        """The images alone, uint8 (N, C, H, W): a copy where they are not all of the pool."""
        if isinstance(self.pool, Pool):
            return torch.cat([images for images, _ in self.read(torch.arange(len(self)).split(256))])
        return self.pool if self.indices is None else self.pool[self.indices]

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width of an image."""
        return tuple(self.pool.shape[1:])

    def subset(self, positions: Tensor) -> "Split":
        """Returns some of the images, int64 (n,), in that order."""
        return replace(
            self,
            labels=self.labels[positions],
            indices=positions if self.indices is None else self.indices[positions],
        )

    def read(
        self, chosen: Sequence[Tensor], device: torch.device | str = "cpu", seed: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields batches of images, uint8 (B, C, H, W) on the device, and which of the split they are, int64 (B,).

        They are those chosen, but for images that cannot be read where such are to be skipped: in training others are
        there instead, else they are left out.

        Args:
            chosen: Of each batch, which images; int64 on the device of the labels.
            device: Of the batches.
            seed: Of `transform`, in training; None: the images as they are evaluated.

        Raises:
            InputError: An image cannot be read, or they are of different sizes.
        """
        if isinstance(self.pool, Pool):
            assert self.indices is not None
            yield from stream(self.pool, self.indices, chosen, device, self.transform, seed)
            return
        for positions in chosen:
            rows = positions if self.indices is None else self.indices[positions]
            yield self.pool[rows].to(device), positions

    def to(self, device: torch.device | str) -> "Split":
        """Returns the same split on a device, where `batches` then needs no copies."""
        return to_device([self], device)[0]


def to_device(splits: Iterable[Split], device: torch.device | str) -> list[Split]:
    """Returns the same splits on a device, where a pool that several share is there once."""
    moved: dict[int, Tensor | Pool] = {}
    result = []
    for split in splits:
        if id(split.pool) not in moved:
            moved[id(split.pool)] = split.pool if isinstance(split.pool, Pool) else split.pool.to(device)
        indices = None if split.indices is None else split.indices.to(device)
        result.append(replace(split, pool=moved[id(split.pool)], labels=split.labels.to(device), indices=indices))
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
    mixing: Mixing | None = None,
    skip: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields one pass over a split: images, float32 (B, C, H, W) normalised, and labels, int64 (B,), on the device.

    Mixed labels are the shares of the classes, float32 (B, classes).

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
        mixing: What is done to whole batches; only with a generator.
        skip: How many batches to leave out at the beginning: what they draw is drawn, but their images are not read.
        part: Which one, from 0, of how many equal parts of every batch to yield, each what it is in the whole one. Only
            with a generator.
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
    seed = int(torch.randint(2**62, (), generator=generator)) if generator is not None and split.transform else 0
    chosen, (place, parts) = order.split(batch_size), part
    count = len(chosen[0])  # in training of every batch
    # The first image of a part is mixed with the last one of the part before, which is read for that alone.
    beside = int(parts > 1 and mixing is not None and mixing.mixes)
    places = torch.arange(count).chunk(parts)[place]
    places = torch.cat([places[:beside] - 1, places]) % count

    def drawn() -> tuple[Draws | None, int]:
        """What a batch draws at random, whether its images are read or skipped."""
        if generator is None:
            return None, 0
        shifts = _draws(count, pad, augment == "crop-flip", generator) if augment in ("crop", "crop-flip") else None
        return shifts, int(torch.randint(2**62, (), generator=generator)) if mixing is not None else 0

    for _ in chosen[:skip]:
        drawn()
    of_part = places.to(order.device)
    own = chosen if generator is None else [positions[of_part] for positions in chosen[skip:]]
    for pixels, positions in split.read(own, device, None if generator is None else seed):
        shifts, seed_of_batch = drawn()
        if shifts is not None:
            down_right, flips = shifts
            pixels = _augmented(pixels, pad, (down_right[:, places], None if flips is None else flips[places]))
        images, labels = pixels.float().sub_(scale[0]).div_(scale[1]), split.labels[positions].to(device)
        if generator is not None and mixing is not None:
            images, labels = mixing(images, labels, seed_of_batch, places.tolist(), count)
        yield images[beside:], labels[beside:]


def batch_count(split: Split, batch_size: int, training: bool) -> int:
    """The number of batches that `batches` yields, `training` with a generator."""
    return max(len(split) // batch_size, 1) if training else -(-len(split) // batch_size)


def _draws(count: int, pad: int, flip: bool, generator: torch.Generator) -> Draws:
    """How far down and to the right each image of a batch is cut out, int64 (2, N, 1), and whether it is mirrored."""
    shifts = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=generator)
    return shifts, torch.randint(0, 2, (count, 1), generator=generator).bool() if flip else None


def _augmented(images: Tensor, pad: int, draws: Draws) -> Tensor:
    """Each image with `pad` black pixels around, cut out again at a random place, and mirrored or not."""
    channels, height, width = images.shape[1:]
    down, right = draws[0].to(images.device, non_blocking=True)  # without waiting for the steps before
    rows = down + torch.arange(height, device=images.device)
    columns = right + torch.arange(width, device=images.device)
    if draws[1] is not None:
        columns = torch.where(draws[1].to(images.device, non_blocking=True), columns.flip(1), columns)
    pixels = (rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]).flatten(1)  # (N, H * W), of the padded image
    padded = F.pad(images, (pad, pad, pad, pad)).flatten(2)
    return padded.gather(2, pixels[:, None].expand(-1, channels, -1)).view(images.shape)
