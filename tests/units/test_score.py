"""How much channels matter: what the layers that read them, or the logits, would lose without them."""

import numpy as np
import torch
from torch import nn

from dvn_cli.graph.labels import Labeller
from dvn_cli.graph.trace import trace
from dvn_cli.units.score import Images, by_images, by_logits


class Small(nn.Module):
    """Two layers with three channels between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.classifier = nn.Conv2d(1, 3, 1), nn.Conv2d(3, 2, 1), nn.Linear(2, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.second(self.first(images)).mean((2, 3)))


def test_variance_times_the_weights_that_read_it() -> None:
    module = Small().eval()
    with torch.no_grad():
        module.first.weight.copy_(torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1))
        module.second.weight.copy_(torch.tensor([[3.0, 1.0, 0.5], [4.0, 1.0, 0.0]]).view(2, 3, 1, 1))
    traced = trace(module, (1, 4, 4), train=False)
    labeller = Labeller(2)
    labels = labeller.run(traced)
    images = [torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    score = by_images(labeller, Images(labels, traced, module.state_dict(), images))
    roots = labeller.coupled.roots()[labeller.sources["first.weight"][0].numpy()]
    expected = torch.cat(images).var(correction=0).item() * np.array([1 * 25, 4 * 2, 9 * 0.25])
    np.testing.assert_allclose(score[roots], expected, rtol=1e-4)


class Read(nn.Module):
    """Four channels: the first two are read as they are, the third by two layers that cancel, the last by none."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 1)
        self.plus, self.minus = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 1)
        self.classifier = nn.Linear(6, 5)
        with torch.no_grad():
            self.plus.weight[:, 3] = self.minus.weight[:, 3] = 0
            self.minus.weight[:, :2] = 0
            self.minus.weight[:, 2] = -self.plus.weight[:, 2]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        channels = self.first(images)
        added = self.plus(channels) + self.minus(channels)
        channels.relu_()  # what was read stays what it was
        return self.classifier(added.mean((2, 3))) + 0 * channels.sum()


def test_by_how_much_the_logits_would_change() -> None:
    """Where logits are linear in the channels, first order is all there is: variance times the squared weights."""
    torch.manual_seed(0)
    module = Read().eval()
    traced = trace(module, (1, 2, 2), train=False)
    labeller = Labeller(2)
    labels = labeller.run(traced)
    images = list(torch.randn(600, 1, 2, 2, generator=torch.Generator().manual_seed(2)).split(300))
    score = by_logits(labeller, Images(labels, traced, module.state_dict(), images))
    with torch.no_grad():
        channels = module.first(torch.cat(images)).mean((2, 3))
        read = module.classifier.weight @ module.plus.weight[:, :, 0, 0]
        expected = (channels - channels.mean(0)).square().mean(0) * read.square().sum(0) * torch.tensor([1, 1, 0, 0])
    found = score[labeller.coupled.roots()[labeller.sources["first.weight"][0].numpy()]]
    np.testing.assert_allclose(found, expected, rtol=0.15, atol=1e-9 * found.max())
